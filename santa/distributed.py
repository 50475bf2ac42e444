"""Context parallelism: decode over rows whose keys and values lie on several ranks of a torch.distributed group."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from santa._dispatch import no_derivative, wants_derivative
from santa.arguments import Budget, KvLayout, Sampler, check_tensor, int64, real, value_of
from santa.merge import merge_states
from santa.ops import decode, decode_paged

# Tiles of draws are at most this long, and slices must not cut one: kDrawTileKv of csrc/core/tiling.h.
SLICE_MULTIPLE = 128

# The pilot of csrc/core/draw.h.
_PILOT_FIRST, _PILOT_SPACED, _PILOT_LAST = 16, 192, 48
_PILOT_KEYS = _PILOT_FIRST + _PILOT_SPACED + _PILOT_LAST


def shard_rows(whole_lens: int | Tensor, world_size: int) -> list[tuple[Any, Any]]:
    """Positions [start, end) of each rank's slice of a row, for whoever splits a cache.

    Slices start at multiples of 128 and differ by 128 keys at most, but for the last, which ends with the row. A row of
    fewer than 128 world_size keys leaves some ranks with none.

    Args:
        whole_lens: keys of a row, or of each row: int32 [batch].
        world_size: ranks of the group.

    Returns:
        world_size pairs (start, end), of ints for an int, of int32 [batch] for a tensor.

    Raises:
        ValueError: whole_lens is negative or not int32, or world_size is below 1.
        TypeError: whole_lens is neither an int nor a tensor, or world_size is no int.
    """
    world_size = int64("world_size", world_size)
    if world_size < 1:
        raise ValueError(f"santa: world_size is {world_size}; it needs to be at least 1")
    if isinstance(whole_lens, Tensor):
        if whole_lens.dtype != torch.int32:
            raise ValueError(f"santa: whole_lens is {_name_of(whole_lens.dtype)}; it needs to be int32")
        tiles = (whole_lens.long() + SLICE_MULTIPLE - 1) // SLICE_MULTIPLE
        cuts = [(tiles * rank // world_size * SLICE_MULTIPLE).int() for rank in range(world_size)]
    else:
        whole_lens = int64("whole_lens", whole_lens)
        if whole_lens < 0:
            raise ValueError(f"santa: whole_lens is {whole_lens}; it needs to be at least 0")
        tiles = -(-whole_lens // SLICE_MULTIPLE)
        cuts = [tiles * rank // world_size * SLICE_MULTIPLE for rank in range(world_size)]
    return list(zip(cuts, [*cuts[1:], whole_lens], strict=True))


def decode_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor,
    whole_lens: Tensor,
    shard_starts: Tensor,
    group: dist.ProcessGroup | None = None,
    page_table: Tensor | None = None,
    max_kv_len: int | None = None,
    kv_starts: Tensor | None = None,
    num_samples: int = 256,
    sampler: Sampler | int | str = Sampler.GROUPED,
    budget: Budget | int | str | None = None,
    kv_layout: KvLayout | int | str = KvLayout.NHD,
    sm_scale: float | None = None,
    seed: int = 0,
    row_seeds: Tensor | None = None,
    positions: Tensor | None = None,
    min_sampled_len: int | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sinks: Tensor | None = None,
    first_kv_head: int = 0,
    return_rows_read: bool = False,
) -> tuple[Tensor, ...]:
    """`santa.decode` of rows that are cut along the sequence: every rank of a group has a slice of each row's keys and
    values, and all get attention over the whole rows.

    The draws of a slice are those that one rank with the whole row would make of these keys, however many ranks there
    are and wherever the slices end: the estimate is the same up to the rounding of a merge, and unbiased. All ranks get
    the same bits.

    Every rank calls it, with the same arguments but for the cache, kv_lens, shard_starts and what says where its keys
    are (page_table, max_kv_len, kv_starts). Nothing waits for the device: the call can be captured in a CUDA graph
    where the group's collectives can (NCCL). As with every collective, an error on one rank alone leaves the others
    waiting for it.

    What each rank puts into the collectives, for each row and each of its q_len num_qo_heads query vectors:

        all-gather      head_dim elements of q's dtype and 4 bytes; 4 bytes per row
        all-reduce      1,024 bytes, before it: the logits of the pilot's 256 keys; streaming budget alone

    For 32 heads of 128 in 16 bits that is 8.1 and 32 KiB. The pilot's products take num_qo_heads head_dim KiB of memory
    per row and new token meanwhile.

    Args:
        q: [batch, num_qo_heads, head_dim] or [batch, q_len, num_qo_heads, head_dim], as `santa.decode` takes it: of
            several new tokens, the last q_len keys of the whole row are theirs. The same on all ranks.
        k, v: this rank's cache: [batch, max_kv_len, num_kv_heads, head_dim] for NHD, [batch, num_kv_heads, max_kv_len,
            head_dim] for HND. With page_table, pages of it, as `santa.decode_paged` takes them.
        kv_lens: int32 [batch]: keys of each row that are on this rank; 0 allowed.
        whole_lens: int32 [batch]: keys of each row on all ranks together. On the CPU a row for which the kv_lens of the
            ranks add up to something else raises; on CUDA, where looking would stop the stream, it comes out as NaN.
        shard_starts: int32 [batch]: position in the whole row of the first key on this rank, a multiple of 128
            (`shard_rows` splits so). Slices of any length, in any order of the ranks; without keys, any number.
        group: the ranks that share the rows. None: the default group.
        page_table: int32 [batch, max_pages]: k and v are pages, and these are each row's on this rank.
        max_kv_len: with page_table: bound of the keys of a row on this rank, as in `santa.decode_paged`.
        kv_starts: int32 [batch]: place in this rank's cache of each row's first key. None: 0.
        sampler: "grouped" or "systematic", if anything is sampled.
        budget: "streaming", which None means, or "uniform".
        positions: int32 [batch]: what sets the steps of a request apart. None: whole_lens.
        min_sampled_len: rows whose whole_lens is below it take the exact path on all ranks.
        window_left: -1. Windows are not cut along the sequence.
        first_kv_head: number of the first KV head here among those of the whole model: context parallelism within
            tensor parallelism.
        return_rows_read: also return the V rows read on this rank; those of the ranks add up.

    The other arguments are those of `santa.decode`. There are no Bernoulli scores.

    Returns:
        out: q's shape and dtype (as wide as v), of the whole rows.
        lse: [batch, num_qo_heads] or [batch, q_len, num_qo_heads], float32, of the whole rows.
        rows_read (with return_rows_read): [batch, num_kv_heads], int32, of this rank.

    Raises:
        ValueError: as `santa.decode`; also this process is not in group, or a budget, sampler or window that rows in
            slices do not have.
        TypeError: an argument is of the wrong Python type.
        RuntimeError: an input requires a derivative.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
    world_size = _size_of(group)
    _check_cache(q, k, k_scale, kv_layout, paged=page_table is not None)
    rows = {"kv_lens": kv_lens, "whole_lens": whole_lens, "shard_starts": shard_starts}
    for name, tensor in (rows if kv_starts is None else {**rows, "kv_starts": kv_starts}).items():
        _check_int32(name, tensor, q, (len(q),), f"[batch], [{len(q)}]")
    if page_table is not None:
        _check_int32("page_table", page_table, q, (len(q), None), f"[batch, max_pages], [{len(q)}, any]")
    elif max_kv_len is not None:
        raise ValueError(f"santa: max_kv_len is {max_kv_len} without page_table; it goes with pages alone")
    if int64("window_left", window_left) != -1:
        raise ValueError(f"santa: window_left is {window_left}; rows in slices need -1")
    if sinks is not None and (
        sinks.dtype != torch.float32 or sinks.shape != q.shape[-2:-1] or sinks.device != q.device
    ):
        raise ValueError(
            f"santa: sinks is {sinks.dtype} {list(sinks.shape)} on {sinks.device}; it needs to be torch.float32 "
            f"[num_qo_heads], [{q.shape[-2]}], on {q.device}"
        )
    streaming = _check_sampling(int64("num_samples", num_samples), sampler, budget)
    if wants_derivative((q, k, v, k_scale, v_scale, sinks)):
        raise no_derivative("decode_context_parallel")

    # A slice without keys may begin anywhere; the operator wants it within the row.
    shard_starts = shard_starts * (kv_lens > 0)
    levels = None
    if streaming:
        pilot = _pilot_positions(whole_lens)
        places = pilot - shard_starts.unsqueeze(1)
        bits = _pilot_bits(
            q,
            _keys_at(k, places, kv_starts, page_table, kv_layout),
            (places >= 0) & (places < kv_lens.unsqueeze(1)),
            sm_scale=sm_scale,
            k_scale=k_scale,
            logits_soft_cap=logits_soft_cap,
        )
        if world_size > 1 and len(q) > 0:
            # Each key is on one rank, so sums round nothing, and NaN stays what it is.
            dist.all_reduce(bits, group=group)
        levels = _levels(bits, pilot, whole_lens).view(q.shape[:-1])

    pages = {} if page_table is None else {"page_table": page_table, "max_kv_len": max_kv_len}
    out, lse, *rows_read = (decode if page_table is None else decode_paged)(
        q,
        k,
        v,
        kv_lens=kv_lens,
        **pages,
        kv_starts=kv_starts,
        num_samples=num_samples,
        sampler=sampler,
        budget=budget,
        kv_layout=kv_layout,
        sm_scale=sm_scale,
        seed=seed,
        row_seeds=row_seeds,
        positions=positions,
        min_sampled_len=min_sampled_len,
        k_scale=k_scale,
        v_scale=v_scale,
        logits_soft_cap=logits_soft_cap,
        first_kv_head=first_kv_head,
        whole_lens=whole_lens,
        shard_starts=shard_starts,
        levels=levels,
        return_rows_read=return_rows_read,
    )
    if len(q) == 0:
        return out, lse, *rows_read
    gathered = _gather(_pack(out, lse, kv_lens), group, world_size)
    return *_merge_gathered(gathered, out, lse, whole_lens, sinks), *rows_read


# The pilot ----------------------------------------------------------------------------------------------
#
# Its keys are some of the whole row. Their logits are made where the keys are, each by itself, and everybody takes the
# same sums of them: levels are the same to the bit on all ranks, and however many there are.


def _pilot_positions(whole_lens: Tensor) -> Tensor:
    """int64 [batch, 256]: pilot_position of csrc/core/draw.h, with runs of one key; i where the row has no key i.

    What spaced keys would be is below i for the first keys and behind the last ones for those, so a maximum and a
    minimum choose. In rows of up to 256 keys all three are i.
    """
    i = torch.arange(_PILOT_KEYS, device=whole_lens.device)
    odd = torch.arange(1 - 2 * _PILOT_FIRST, 2 * (_PILOT_SPACED + _PILOT_LAST), 2, device=whole_lens.device)
    between, step = _keys_between(whole_lens).unsqueeze(1), 2 * _PILOT_SPACED
    spaced = (odd * between + (_PILOT_FIRST * step - _PILOT_SPACED)).div(step, rounding_mode="floor")
    return torch.minimum(torch.maximum(spaced, i), i + (between - _PILOT_SPACED))


def _keys_between(whole_lens: Tensor) -> Tensor:
    """int64 [batch]: keys that the spaced ones of the pilot stand for."""
    return (whole_lens.long() - (_PILOT_FIRST + _PILOT_LAST)).clamp(min=_PILOT_SPACED)


def _keys_at(
    k: Tensor, places: Tensor, kv_starts: Tensor | None, page_table: Tensor | None, kv_layout: KvLayout | int | str
) -> Tensor:
    """[batch, 256, num_kv_heads, head_dim]: the keys at these places of this rank's rows, and any others where there
    is none. Only what is inside the tensors is looked at: a page that holds no key of the row can be any number."""
    cache = k.transpose(1, 2) if value_of("kv_layout", kv_layout, KvLayout) == KvLayout.HND else k
    if cache.dtype == torch.float8_e4m3fn:  # which torch has little for
        cache = cache.view(torch.uint8)
    size = cache.shape[1]
    room = size if page_table is None else size * page_table.shape[1]
    if room == 0 or len(cache) == 0:
        return k.new_zeros((*places.shape, *cache.shape[2:]))
    if kv_starts is not None:
        places = places + kv_starts.unsqueeze(1)
    places = places.clamp(0, room - 1)
    rows = torch.arange(len(places), device=k.device).unsqueeze(1)
    if page_table is not None:
        rows, places = page_table[rows, places // size].clamp(0, len(cache) - 1).long(), places % size
    return cache[rows, places].view(k.dtype)


def _pilot_bits(
    q: Tensor,
    keys: Tensor,
    here: Tensor,
    *,
    sm_scale: float | None,
    k_scale: Tensor | float | None,
    logits_soft_cap: float | None,
) -> Tensor:
    """int32 [batch, q_len, num_qo_heads, 256]: the logits of the pilot keys that are here, as bits of float32; 0 for
    the others.

    Products, and their sums over head_dim, for each query and key apart: the order in which a matrix product adds up
    depends on its shape.
    """
    batch, num_keys, num_kv_heads = keys.shape[:3]
    head_dim, q_len = q.shape[-1], q.shape[1] if q.dim() == 4 else 1
    # A cache that is kept padded is wider than q.
    keys = keys[..., :head_dim].transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    queries = q.reshape(batch, q_len, num_kv_heads, q.shape[-2] // num_kv_heads, 1, head_dim).float()
    logits = (queries * keys.view(batch, 1, num_kv_heads, 1, num_keys, head_dim)).sum(-1)
    logits *= 1 / math.sqrt(head_dim) if sm_scale is None else real("sm_scale", sm_scale)
    if k_scale is not None:
        logits *= k_scale.view(-1, 1, 1) if isinstance(k_scale, Tensor) else real("k_scale", k_scale)
    cap = real("logits_soft_cap", logits_soft_cap, optional=True)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    logits = torch.where(here.view(batch, 1, 1, 1, num_keys), logits, 0.0)
    return logits.flatten(2, 3).contiguous().view(torch.int32)


def _levels(bits: Tensor, positions: Tensor, whole_lens: Tensor) -> Tensor:
    """float32 [batch, q_len, num_qo_heads]: the log-sum-exp of whole rows by their pilots, natural logarithm."""
    logits = bits.view(torch.float32)
    stands_for = (_keys_between(whole_lens) / _PILOT_SPACED).log()
    logits[..., _PILOT_FIRST : _PILOT_FIRST + _PILOT_SPACED] += stands_for.view(-1, 1, 1, 1)
    # A new token sees the keys up to its own.
    ends = whole_lens.unsqueeze(1) - torch.arange(bits.shape[1] - 1, -1, -1, device=bits.device)
    unseen = positions.unsqueeze(1) >= ends.unsqueeze(2)
    logits = logits.masked_fill(unseen.unsqueeze(2), -math.inf)
    # Sums of integers, of up to 39 bits for the largest: those are the same in any order, so for any batch.
    reference = logits.amax(-1).clamp(min=torch.finfo(torch.float32).min) - 27.0
    return reference + (logits - reference.unsqueeze(-1)).exp().long().sum(-1).log()


# The merge ----------------------------------------------------------------------------------------------


def _pack(out: Tensor, lse: Tensor, kv_lens: Tensor) -> Tensor:
    """The bytes of all three, for one collective; a multiple of 4."""
    parts = [x.contiguous().view(-1).view(torch.uint8) for x in (lse, kv_lens, out)]
    return torch.cat([*parts, parts[1][: -parts[2].numel() % 4]])


def _gather(packed: Tensor, group: dist.ProcessGroup | None, world_size: int) -> Tensor:
    """uint8 [world_size, bytes]."""
    if world_size == 1:
        return packed.unsqueeze(0)
    gathered = packed.new_empty(world_size * packed.numel())
    # Newer torch has another name for it.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(gathered, packed, group=group)
    return gathered.view(world_size, -1)


def _merge_gathered(
    gathered: Tensor, out: Tensor, lse: Tensor, whole_lens: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From what `_pack` made on all ranks. out and lse, those of one rank, say what is in it. Sinks are one more state,
    without values: none of the ranks' calls, whose own sums may be too small to be numbers, has to add them."""
    shape = (len(whole_lens), lse.shape[1] if lse.dim() == 3 else 1, lse.shape[-1])  # batch, q_len, num_qo_heads
    sizes = [4 * lse.numel(), 4 * len(whole_lens), out.numel() * out.element_size()]
    parts = gathered[:, : sum(sizes)].split(sizes, dim=1)
    lses, lens, outs = (x.view(dtype) for x, dtype in zip(parts, (torch.float32, torch.int32, out.dtype), strict=True))
    whole = lens.sum(0) == whole_lens
    if out.device.type == "cpu":
        _check_whole(whole, lens, whole_lens)
    lses = lses.unflatten(1, shape).masked_fill(~whole.view(-1, 1, 1), math.nan).flatten(1, 2)
    outs = outs.unflatten(1, (*shape, out.shape[-1])).flatten(1, 2)
    if sinks is not None:
        outs = torch.cat([outs, torch.zeros_like(outs[:1])])
        lses = torch.cat([lses, sinks.expand(1, *lses.shape[1:])])
    merged, merged_lse = merge_states(outs.transpose(0, 1), lses.transpose(0, 1))
    return merged.reshape(out.shape), merged_lse.reshape(lse.shape)


def _check_whole(whole: Tensor, lens: Tensor, whole_lens: Tensor) -> None:
    for row in (~whole).nonzero().flatten().tolist()[:1]:
        counts = " + ".join(str(n) for n in lens[:, row].tolist())
        raise ValueError(
            f"santa: row {row} has kv_lens {counts} on the ranks of group and whole_lens {int(whole_lens[row])}; they "
            "need to add up to it"
        )


# Arguments ----------------------------------------------------------------------------------------------
#
# What is used here before the operator, which checks all, sees it.


def _size_of(group: dist.ProcessGroup | None) -> int:
    """The ranks of the group, which has this process."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"santa: group is {group}; it needs to be a group of torch.distributed, where "
            "torch.distributed.init_process_group was not called"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"santa: group is one without this process, rank {dist.get_rank()}; it needs to be in it")
    return dist.get_world_size(group)


def _check_cache(q: Tensor, k: Tensor, k_scale: Any, kv_layout: KvLayout | int | str, *, paged: bool) -> None:
    if q.dim() not in (3, 4):
        raise ValueError(
            f"santa: q has shape {list(q.shape)}; it needs to be [batch, num_qo_heads, head_dim] or [batch, q_len, "
            "num_qo_heads, head_dim]"
        )
    if k.dim() != 4:
        raise ValueError(f"santa: k has shape {list(k.shape)}; it needs 4 dimensions")
    if not paged and len(k) != len(q):
        raise ValueError(f"santa: k has shape {list(k.shape)}; dimension 0 (batch) needs to be {len(q)}")
    if k.shape[-1] < q.shape[-1]:
        raise ValueError(f"santa: k has shape {list(k.shape)}; dimension 3 (head_dim) needs to be {q.shape[-1]}")
    num_kv_heads = k.shape[1 if value_of("kv_layout", kv_layout, KvLayout) == KvLayout.HND else 2]
    if num_kv_heads < 1 or q.shape[-2] % num_kv_heads != 0:
        raise ValueError(
            f"santa: k has {num_kv_heads} KV heads (shape {list(k.shape)}); num_qo_heads ({q.shape[-2]}) needs to be a "
            "multiple of it"
        )
    _check_device("k", k, q)
    if isinstance(k_scale, Tensor) and k_scale.numel() not in (1, num_kv_heads):
        raise ValueError(
            f"santa: k_scale has shape {list(k_scale.shape)}; it needs one number, or one for each of {num_kv_heads} "
            "KV heads"
        )


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"santa: {name} is on {tensor.device}; it needs to be on q's device, {q.device}")


def _check_int32(name: str, tensor: Any, q: Tensor, shape: tuple[int | None, ...], needed: str) -> None:
    check_tensor(name, tensor)
    fits = tensor.dim() == len(shape) and all(n in (None, size) for n, size in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != torch.int32 or not fits:
        raise ValueError(
            f"santa: {name} is {_name_of(tensor.dtype)} of shape {list(tensor.shape)}; it needs to be int32 {needed}"
        )
    _check_device(name, tensor, q)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_sampling(num_samples: int, sampler: Sampler | int | str, budget: Budget | int | str | None) -> bool:
    """Whether there is a pilot."""
    sampler = value_of("sampler", sampler, Sampler)
    budget = None if budget is None else value_of("budget", budget, Budget)
    if num_samples == 0:
        return False
    if sampler not in (Sampler.SYSTEMATIC, Sampler.GROUPED):
        raise ValueError(
            f"santa: sampler is '{Sampler(sampler).name.lower()}', which draws from a whole row at once; rows in "
            "slices need 'grouped' or 'systematic'"
        )
    if budget == Budget.PROPORTIONAL:
        raise ValueError(
            "santa: budget is 'proportional', which draws from a whole row at once; rows in slices need 'streaming', "
            "in proportion to mass as a pilot of the whole row has it, or 'uniform'"
        )
    return budget != Budget.UNIFORM
