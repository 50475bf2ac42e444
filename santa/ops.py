"""The decode operators: typed Python functions, and fake kernels for tracing."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor

from santa._dispatch import autocast, call, no_derivative, register, wants_derivative
from santa.arguments import (
    Budget,
    KvLayout,
    Sampler,
    ScoreSampler,
    check_same_device,
    check_tensor,
    int64,
    real,
    value_of,
)
from santa.proposal import ProposalKeys
from santa.shapes import DECODE_HEAD_DIMS, PaddingWarning, pad, padded_head_dim


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
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
    whole_lens: Tensor | None = None,
    shard_starts: Tensor | None = None,
    levels: Tensor | None = None,
    proposal: ProposalKeys | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_rows_read: bool = False,
    score: str = "exact",
    num_draws: int | None = None,
    score_sampler: ScoreSampler | int | str | None = None,
    return_features_read: bool = False,
) -> tuple[Tensor, ...]:
    """One decode step of attention, with the value stage sampled (SANTA, arXiv 2605.01910, section 3).

    Every key is read; of the values, only rows drawn from the softmax distribution are. The estimate is unbiased for
    every sampler: its mean over seeds is exact attention. ``lse`` is exact. (Not so with ``proposal``, below.)

    With ``score="bernoulli"`` the key side is sampled as well: of every key only some features are read, and added or
    subtracted. It is the logits that are unbiased then, not the output, and ``lse`` is that of the noisy logits; so is
    what rows below min_sampled_len and num_samples = 0 give, whose values are all read.

    Args:
        q: [batch, num_qo_heads, head_dim], bfloat16 or float16 (float32 too on the CPU), or [batch, q_len,
            num_qo_heads, head_dim] for q_len new tokens, 1 to 8, as speculative decoding verifies them: the last of the
            row's keys are theirs, and each sees those up to its own. They share one read of K and, under "grouped",
            their samples. num_qo_heads is a multiple of num_kv_heads. There are kernels for head_dim 64, 96, 128, 192
            and 256; others up to 256 are padded, see below.
        k, v: [batch, max_kv_len, num_kv_heads, head_dim] for NHD, [batch, num_kv_heads, max_kv_len, head_dim] for HND;
            q's dtype and device; any strides with a contiguous last dimension. k, or both, can be float8_e4m3fn;
            `quantize_kv` makes them so. With Bernoulli scores k is feature-major, [batch, num_kv_heads, head_dim,
            max_kv_len], contiguous along the sequence and not float8 (`append_k_features` fills it); v is as kv_layout
            says, not float8 either. On CUDA a max_kv_len and kv_starts that are multiples of 8 let keys be read 16
            bytes at a time, others one by one. v may have a head_dim of its own.
        kv_lens: int32 [batch]: number of valid keys of each row, 0 allowed. None: all from kv_starts on. Memory outside
            the valid range is never read. On the CPU a range outside the cache raises; on CUDA, where looking would
            stop the stream, such a row reads nothing and comes out as NaN.
        kv_starts: int32 [batch]: position of each row's first valid key (left padding). None: 0.
        num_samples: S, draws per query head, 0 to 2^20. 0 is exact attention.
        sampler: "multinomial", "stratified", "systematic" or "grouped" (or `Sampler`).
        budget: "streaming", "proportional" or "uniform" (or `Budget`). None: streaming for the samplers that can draw
            tile by tile, "grouped" and "systematic"; proportional, which the other two need, for them. Proportional
            makes S draws exactly; uniform expects S; streaming expects S where its pilot, 256 of the row's keys, has
            the row's log-sum-exp right, more where it is too low. ``rows_read`` says what was read.
        kv_layout: "NHD" or "HND" (or `KvLayout`).
        sm_scale: softmax scale; None is 1 / sqrt(head_dim), that of q, before padding.
        seed: 64-bit seed. The random numbers are a function of (seed, row seed, position, head) alone: the same in any
            batch and on any device.
        row_seeds: int64 [batch]: a random stream for each request. None: 0 for every row.
        positions: int32 [batch]: what sets the steps of a request apart. None: kv_len, so that a growing row draws
            fresh numbers at each step. A window of constant length needs its last token's position here.
        min_sampled_len: rows with fewer keys take the exact path. None: `default_min_sampled_len`; 0: always sample.
        k_scale, v_scale: what a float8 k or v is to be multiplied with: float32, on q's device, [] or [1] for the whole
            tensor or [num_kv_heads], contiguous; or a float, which becomes such a tensor in every call. None: 1. Only
            for a k or v that is float8_e4m3fn.
        window_left: sliding window: a token sees this many keys before its own; -1: all. Draws still depend on the
            row's whole length, so that a window of constant length draws fresh numbers.
        logits_soft_cap: logits x become cap tanh(x / cap), x with sm_scale, as in Gemma 2. None or 0: as they are.
        sinks: float32 [num_qo_heads]: a logit for each head that takes part in the softmax without a value, as in
            gpt-oss. ``lse`` includes it. None: none.
        first_kv_head: number of the first KV head here among those of the whole model. Heads that are spread over GPUs
            (tensor parallelism) then draw what they would draw on one.
        whole_lens, shard_starts, levels: rows that are parts of longer ones; `santa.distributed` fills them in.
            int32 [batch]: keys of the whole row, and the position of the first key here, a multiple of 128; float32
            [batch, num_qo_heads]: the pilot's log-sum-exp of the whole row, for the streaming budget.
        proposal: `ProposalKeys` of k: all keys are then read in 4 bits, and k and v only where rows are drawn. For the
            sampler "grouped", the streaming budget and rows that are whole alone. ``out`` is then the quotient of two
            unbiased estimates, with a bias of the order of 1 / S, and ``lse`` the logarithm of one, off by about 0.016
            (root mean square, S = 128). Rows that take the exact path do not read it. On the CPU alone so far
            (docs/proposals.md).
        out, lse: tensors to write the results of these names into, contiguous; both or neither.
        return_rows_read: also return the number of V rows read.
        score: "exact" or "bernoulli".
        num_draws: B, ternary vectors whose mean takes the place of q, 1 to 4096; Bernoulli scores alone. None: 4.
        score_sampler: "independent", "systematic" or "shared" (or `ScoreSampler`); Bernoulli scores alone. None:
            independent. The draws depend on what `seed` says they do, and are not those of the values.
        return_features_read: also return the number of key features read; Bernoulli scores alone.

    Returns:
        out: [batch, num_qo_heads, head_dim of v], or [batch, q_len, ...], q's dtype. Rows with kv_len 0 are zero.
        lse: [batch, num_qo_heads], or [batch, q_len, num_qo_heads], float32: log-sum-exp of the scaled scores, natural
            logarithm; -inf for kv_len 0 (without sinks).
        rows_read (with return_rows_read): [batch, num_kv_heads], int32: V rows read for the KV head, each counted once
            (streaming and uniform: once for each block of up to 8 query heads, which share what they read); on CUDA -1
            where the row's range lies outside the cache.
        features_read (with return_features_read): [batch, num_kv_heads], int32: key features, of head_dim, that any
            head of the group reads; 0 for kv_len 0, -1 as in rows_read.

    Raises:
        ValueError: an argument has an unusable value, dtype, shape, stride or device; the message names it. (From
            torch 2.15 on, torch.ops.santa.decode under inference_mode raises the same text as a RuntimeError.)
        TypeError: an argument is of the wrong Python type.
        RuntimeError: a derivative of out or lse is computed. Inputs that require gradients are no error, backward() is;
            forward derivatives (torch.autograd.forward_ad) and the transforms of torch.func, vmap among them, raise in
            the call itself. torch.compile traces the backward beside the forward, so there the call raises as well: use
            torch.no_grad().

    Other head_dims, and k and v of different ones, run padded with zeros to `padded_head_dim`; the result is the same.
    Where k or v has to be padded, all of it is copied in every call, which costs more than attention; a
    `PaddingWarning` says so. A cache that is kept that wide, with zeros behind head_dim, is not copied: q comes as it
    is, and out as wide as v (docs/shapes.md). torch.ops.santa.decode pads nothing.

    Under torch.autocast q, k and v are cast as torch's scaled_dot_product_attention casts them, float8 excepted.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
    check_tensor("kv_lens", kv_lens, optional=True)
    options = {"kv_lens": kv_lens} | _decode_options(
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
    )
    features = _decode_features(
        q,
        k_scale=k_scale,
        v_scale=v_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        first_kv_head=first_kv_head,
        whole_lens=whole_lens,
        shard_starts=shard_starts,
        levels=levels,
    )
    _check_outputs(out, lse)
    if proposal is not None and score != "exact":
        raise ValueError(f"santa: proposal is given with score={score!r}; it needs score='exact'")
    proposal_options = _proposal_options(proposal, options["kv_layout"])
    q, k, v, options["sm_scale"], out_dim = _fit_head_dim(
        q, k, v, options["sm_scale"], by_features=score == "bernoulli"
    )
    if score == "bernoulli":
        made, *others = _decode_bernoulli(
            (q, k, v),
            options,
            {**features, "out": out, "lse": lse},
            num_draws,
            score_sampler,
            return_rows_read,
            return_features_read,
        )
        return _cut(made, out_dim), *others
    if score != "exact":
        raise ValueError(f"santa: score is {score!r}; it needs to be 'exact' or 'bernoulli'")
    for name, given in (
        ("num_draws", num_draws is not None),
        ("score_sampler", score_sampler is not None),
        ("return_features_read", return_features_read),
    ):
        if given:
            raise ValueError(f"santa: {name} is given with score='exact'; it needs score='bernoulli'")
    rows_read = _empty_rows_read(q, k, 1 if options["kv_layout"] == KvLayout.HND else 2) if return_rows_read else None
    outputs = _run(
        torch.ops.santa.decode if proposal is None else torch.ops.santa.decode_proposal,
        torch.ops.santa.decode_out if proposal is None else torch.ops.santa.decode_proposal_out,
        (q, k, v),
        {**proposal_options, **options, **features, "rows_read": rows_read},
        (out, lse),
        out_dim,
    )
    return outputs if rows_read is None else (*outputs, rows_read)


def decode_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_indptr: Tensor | None = None,
    kv_indices: Tensor | None = None,
    kv_last_page_len: Tensor | None = None,
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
    whole_lens: Tensor | None = None,
    shard_starts: Tensor | None = None,
    levels: Tensor | None = None,
    proposal: ProposalKeys | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_rows_read: bool = False,
) -> tuple[Tensor, ...]:
    """`decode` from a paged cache: the same results, bit for bit, as from a contiguous one with the same keys.

    Args:
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] for NHD, [num_pages, num_kv_heads, page_size,
            head_dim] for HND, any strides with a contiguous last dimension: the halves of a [num_pages, 2, ...] or
            [2, num_pages, ...] tensor, for one. page_size is a power of two from 1 to 256.
        page_table: int32 [batch, max_pages], contiguous along a row: the pages of each row, in the order of its keys;
            with kv_lens. Entries behind a row's last key are never looked at.
        kv_lens: int32 [batch]: number of valid keys of each row, 0 allowed.
        kv_indptr, kv_indices, kv_last_page_len: instead of those two, the pages of all rows in one list, as FlashInfer
            has them: int32 [batch + 1], int32 [any], int32 [batch]. Row b has the pages kv_indices[kv_indptr[b]] to
            kv_indices[kv_indptr[b + 1] - 1], of which the last has kv_last_page_len[b] keys. With pages of one key this
            is a list of keys: whatever a method of KV selection or eviction has left of a row.
        max_kv_len: bound of the keys of a row, which memory and launches are sized for. None: what page_table has room
            for, or all of kv_indices. A longer row raises on the CPU and is NaN on CUDA.
        proposal: `ProposalKeys` laid out as k_cache, whose center and channel_scale are those of all rows, [1, ...].

    The other arguments, returns and errors are those of `decode`, Bernoulli scores excepted. On the CPU a page that is
    not there raises; on CUDA, where looking would stop the stream, it is the caller's to see to. head_dim is one that
    there are kernels for; q may be narrower than a cache that is kept padded (docs/shapes.md).
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, tensor)
    pages = {
        "page_table": page_table,
        "kv_lens": kv_lens,
        "kv_indptr": kv_indptr,
        "kv_indices": kv_indices,
        "kv_last_page_len": kv_last_page_len,
    }
    for name, tensor in pages.items():
        check_tensor(name, tensor, optional=True)
    options = _decode_options(
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
    )
    features = _decode_features(
        q,
        k_scale=k_scale,
        v_scale=v_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        first_kv_head=first_kv_head,
        whole_lens=whole_lens,
        shard_starts=shard_starts,
        levels=levels,
    )
    _check_outputs(out, lse)
    width = k_cache.shape[-1] if k_cache.dim() > 0 else 0
    if q.dim() in (3, 4) and q.shape[-1] < width and padded_head_dim(q.shape[-1]) == width:
        if options["sm_scale"] is None:
            options["sm_scale"] = 1 / math.sqrt(q.shape[-1])
        q = pad(q, width)
    rows_read = (
        _empty_rows_read(q, k_cache, 1 if options["kv_layout"] == KvLayout.HND else 2) if return_rows_read else None
    )
    outputs = _run(
        torch.ops.santa.decode_paged if proposal is None else torch.ops.santa.decode_proposal_paged,
        torch.ops.santa.decode_paged_out if proposal is None else torch.ops.santa.decode_proposal_paged_out,
        (q, k_cache, v_cache),
        {
            **pages,
            "max_kv_len": None if max_kv_len is None else int64("max_kv_len", max_kv_len),
            **_proposal_options(proposal, options["kv_layout"]),
            **options,
            **features,
            "rows_read": rows_read,
        },
        (out, lse),
        None,
    )
    return outputs if rows_read is None else (*outputs, rows_read)


def _decode_options(
    *,
    kv_starts: Tensor | None,
    num_samples: int,
    sampler: Sampler | int | str,
    budget: Budget | int | str | None,
    kv_layout: KvLayout | int | str,
    sm_scale: float | None,
    seed: int,
    row_seeds: Tensor | None,
    positions: Tensor | None,
    min_sampled_len: int | None,
) -> dict[str, Any]:
    """What all decode operators have in common, as they take it."""
    for name, tensor in (("kv_starts", kv_starts), ("row_seeds", row_seeds), ("positions", positions)):
        check_tensor(name, tensor, optional=True)
    return {
        "kv_starts": kv_starts,
        "num_samples": int64("num_samples", num_samples),
        "sampler": value_of("sampler", sampler, Sampler),
        "budget": None if budget is None else value_of("budget", budget, Budget),
        "kv_layout": value_of("kv_layout", kv_layout, KvLayout),
        "sm_scale": real("sm_scale", sm_scale, optional=True),
        "seed": int64("seed", seed),
        "row_seeds": row_seeds,
        "positions": positions,
        "min_sampled_len": None if min_sampled_len is None else int64("min_sampled_len", min_sampled_len),
    }


def _decode_features(
    q: Tensor,
    *,
    k_scale: Tensor | float | None,
    v_scale: Tensor | float | None,
    window_left: int,
    logits_soft_cap: float | None,
    sinks: Tensor | None,
    first_kv_head: int,
    whole_lens: Tensor | None,
    shard_starts: Tensor | None,
    levels: Tensor | None,
) -> dict[str, Any]:
    """What decode operators other than that of Bernoulli scores have, as they take it."""
    tensors = {"sinks": sinks, "whole_lens": whole_lens, "shard_starts": shard_starts, "levels": levels}
    for name, tensor in tensors.items():
        check_tensor(name, tensor, optional=True)
    cap = real("logits_soft_cap", logits_soft_cap, optional=True)
    return {
        "k_scale": _scale("k_scale", k_scale, q),
        "v_scale": _scale("v_scale", v_scale, q),
        "window_left": int64("window_left", window_left),
        "logits_soft_cap": 0.0 if cap is None else cap,
        "first_kv_head": int64("first_kv_head", first_kv_head),
        **tensors,
    }


def _proposal_options(proposal: ProposalKeys | None, kv_layout: int) -> dict[str, Any]:
    """What the operators with proposal keys take beside the others; nothing without them."""
    if proposal is None:
        return {}
    if not isinstance(proposal, ProposalKeys):
        raise TypeError(f"santa: proposal is a {type(proposal).__name__}; it needs to be a santa.ProposalKeys or None")
    layout = proposal.layout()
    if layout != kv_layout:
        names = ("NHD", "HND")
        raise ValueError(
            f"santa: proposal has kv_layout {names[layout]!r}; it needs to be {names[kv_layout]!r}, that of k"
        )
    return proposal.tensors()


def _scale(name: str, value: Any, q: Tensor) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"santa: {name} is a {type(value).__name__}; it needs to be a torch.Tensor, a float or None")
    return torch.full((1,), float(value), dtype=torch.float32, device=q.device)


def _check_outputs(out: Tensor | None, lse: Tensor | None) -> None:
    check_tensor("out", out, optional=True)
    check_tensor("lse", lse, optional=True)
    if (out is None) != (lse is None):
        given, missing = ("lse", "out") if out is None else ("out", "lse")
        raise ValueError(f"santa: {given} is given without {missing}; they need each other")


def _run(
    op: Any,
    op_out: Any,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    outputs: tuple[Tensor | None, Tensor | None],
    out_dim: int | None,
) -> tuple[Tensor, Tensor]:
    """Calls the operator that makes its outputs, or the one that writes into those given."""
    out, lse = outputs
    if out is None:
        made, made_lse = call(op, *tensors, **options)
        return _cut(made, out_dim), made_lse
    tensors = autocast(*tensors)  # the operator that writes the caller's tensors does not
    if out_dim is None:
        call(op_out, out, lse, *tensors, **options)
        return out, lse
    if wants_derivative((out, lse, *tensors, *options.values())):
        raise no_derivative("decode_out")
    made, made_lse = call(op, *tensors, **options)
    for name, given, needed in (("out", out, made[..., :out_dim]), ("lse", lse, made_lse)):
        if given.device != needed.device:
            raise ValueError(f"santa: {name} is on {given.device}; it needs to be on q's device, {needed.device}")
        if given.shape != needed.shape or given.dtype != needed.dtype:
            raise ValueError(
                f"santa: {name} is {given.dtype} of shape {list(given.shape)}; it needs to be {needed.dtype} of shape "
                f"{list(needed.shape)}"
            )
        if not given.is_contiguous():
            raise ValueError(f"santa: {name} has strides {list(given.stride())}; it needs to be contiguous")
        given.copy_(needed)
    return out, lse


def _fit_head_dim(
    q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None, *, by_features: bool
) -> tuple[Tensor, Tensor, Tensor, float | None, int | None]:
    """q, k and v in a head_dim that there are kernels for, the scale of the one they came in, and that of the output,
    None if nothing is to be cut off it. Of tensors of another rank the operator says what is wrong.

    k can be as wide as q is going to be: a cache that is kept padded.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) not in (3, 4) or len(k_shape) != 4 or len(v_shape) != 4:
        return q, k, v, sm_scale, None
    axis = -2 if by_features else -1  # of head_dim in k
    head_dim, v_head_dim = q_shape[-1], v_shape[-1]
    if head_dim == k_shape[axis] == v_head_dim and head_dim in DECODE_HEAD_DIMS:
        return q, k, v, sm_scale, None
    own_width, width = padded_head_dim(head_dim), padded_head_dim(head_dim, v_head_dim)
    if k.shape[axis] not in (head_dim, own_width):
        name = "k_features" if by_features else "k"
        padded = "" if own_width == head_dim else f", or {own_width}, padded"
        raise ValueError(
            f"santa: {name} has shape {list(k.shape)}; dimension {4 + axis} (head_dim) is {k.shape[axis]} and needs to "
            f"be {head_dim}{padded}"
        )
    copied = [name for name, x, axis_of in (("k", k, axis), ("v", v, -1)) if x.shape[axis_of] != width]
    if copied and not torch.compiler.is_compiling():
        warnings.warn(
            f"santa.decode copies {' and '.join(copied)} in every call to pad head_dim to {width}, which costs more "
            f"than attention: keep the cache {width} wide, with zeros behind (docs/shapes.md)",
            PaddingWarning,
            stacklevel=3,
        )
    scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
    return pad(q, width), pad(k, width, axis), pad(v, width), scale, v_head_dim if v_head_dim < width else None


def _cut(out: Tensor, head_dim: int | None) -> Tensor:
    return out if head_dim is None else out[..., :head_dim].contiguous()


def _empty_rows_read(q: Tensor, k: Tensor, head_axis: int) -> Tensor:
    """For the operator to fill. It also says what is wrong with q and k, so any shape will do for those it refuses."""
    batch = q.shape[0] if q.dim() in (3, 4) else 0
    num_kv_heads = k.shape[head_axis] if k.dim() == 4 else 0
    return q.new_empty((batch, num_kv_heads), dtype=torch.int32)


_NO_FEATURES = {"window_left": -1, "logits_soft_cap": 0.0, "first_kv_head": 0}


def _decode_bernoulli(
    tensors: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    features: dict[str, Any],
    num_draws: int | None,
    score_sampler: ScoreSampler | int | str | None,
    return_rows_read: bool,
    return_features_read: bool,
) -> tuple[Tensor, ...]:
    for name, value in features.items():
        if isinstance(value, Tensor) or (value is not None and value != _NO_FEATURES.get(name)):
            why = "takes no float8 cache" if name.endswith("_scale") else "does not have it"
            raise ValueError(f"santa: {name} is given with score='bernoulli', which {why}")
    num_draws = 4 if num_draws is None else int64("num_draws", num_draws)
    score_sampler = ScoreSampler.INDEPENDENT if score_sampler is None else score_sampler
    chosen = value_of("score_sampler", score_sampler, ScoreSampler)
    rows_read = _empty_rows_read(tensors[0], tensors[1], 1) if return_rows_read else None
    out, lse, features_read = call(
        torch.ops.santa.decode_bernoulli,
        *tensors,
        num_draws=num_draws,
        score_sampler=chosen,
        rows_read=rows_read,
        **options,
    )
    return (
        out,
        lse,
        *([] if rows_read is None else [rows_read]),
        *([features_read] if return_features_read else []),
    )


def default_min_sampled_len(num_samples: int, gqa_group_size: int) -> int:
    """Shortest row that is sampled when ``min_sampled_len`` is None: max(8192, 4 * num_samples * gqa_group_size).

    Exact attention reads kv_len value rows where sampling reads up to num_samples * gqa_group_size of them, so the
    budget must be a small part of the row.
    """
    return max(8192, 4 * num_samples * gqa_group_size)


def _decode_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("santa::decode")
def _decode_fake(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    check_same_device(q, k=k, v=v, **{name: x for name, x in options.items() if isinstance(x, Tensor)})
    return _decode_outputs(q)


@torch.library.register_fake("santa::decode_paged")
def _decode_paged_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    check_same_device(q, k_cache=k_cache, v_cache=v_cache, **tensors)
    return _decode_outputs(q)


@torch.library.register_fake("santa::decode_out")
def _decode_out_fake(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    _decode_fake(q, k, v, out=out, lse=lse, **options)


@torch.library.register_fake("santa::decode_paged_out")
def _decode_paged_out_fake(
    out: Tensor, lse: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any
) -> None:
    _decode_paged_fake(q, k_cache, v_cache, out=out, lse=lse, **options)


torch.library.register_fake("santa::decode_proposal", _decode_fake)
torch.library.register_fake("santa::decode_proposal_paged", _decode_paged_fake)
torch.library.register_fake("santa::decode_proposal_out", _decode_out_fake)
torch.library.register_fake("santa::decode_proposal_paged_out", _decode_paged_out_fake)


@torch.library.register_fake("santa::_select")
def _select_fake(tile_mass: Tensor, row_weights: Tensor, *_: Any) -> Tensor:
    return row_weights.new_empty(row_weights.shape)


@torch.library.register_fake("santa::_draw")
def _draw_fake(units: Tensor, *_: Any) -> Tensor:
    return units.new_empty(units.shape)


for _name in ("decode", "decode_paged", "decode_proposal", "decode_proposal_paged"):
    register(_name)
for _name in ("decode_out", "decode_paged_out", "decode_proposal_out", "decode_proposal_paged_out"):
    register(_name, written=2)
