"""Sparse prefill after SampleAttention: a selection of key blocks for each head, then attention over those alone.

Source: SampleAttention, arXiv 2406.15486, in its MLSys 2025 version (columns and slashes); docs/prefill.md. The
selection is `santa.sample_select`. What executes it is one of

    flex        FlexAttention, compiled once for each bucket of lengths (CUDA)
    reference   plain PyTorch, block by block (any device)
    dense       the kernels of torch's scaled_dot_product_attention, which ignore the selection
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from santa._dispatch import InferenceOnly, autocast
from santa.arguments import int64, real, value_of
from santa.select import BLOCK, Gqa, Selection, sample_select
from santa.shapes import PREFILL_HEAD_DIMS, pad, padded_head_dim

# backend="auto" is dense for fewer keys, where the selection costs more than it saves.
DENSE_BELOW = 16384
# False: FlexAttention is compiled for each bucket of lengths. True: once for the first length, once for all others.
DYNAMIC_SHAPES = False

BACKENDS = ("auto", "flex", "reference", "dense")


def break_even_density(kv_len: int, *, cuda: bool) -> float:
    """The share of the causal blocks above which backend="auto" is dense: dense kernels do more operations per second,
    the more so against FlexAttention at short lengths (docs/prefill.md, "Dense selections"), and much more against the
    plain PyTorch of the CPU."""
    if not cuda:
        return 0.05
    return 0.4 if kv_len < 32768 else 0.55


HEAD_DIMS = PREFILL_HEAD_DIMS
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float16, torch.float32)}
_MAX_INT32 = (1 << 31) - 1
# As in csrc/api: what a selection refuses, every backend refuses.
MAX_CHUNKS, MAX_GROUP_SIZE, MAX_SCALE = 65535, 1024, 1e30


@dataclass(frozen=True)
class PrefillStats:
    """What `santa.prefill` did.

    Attributes:
        backend: "flex", "reference" or "dense": what computed the output.
        heads: float32 [batch, num_qo_heads, 6], of the selection: density (kept over causal blocks); mean, minimum and
            5th percentile of the softmax mass that the sampled rows keep; columns; slashes. None if nothing was
            selected. A "dense" backend with heads is one that "auto" chose for their density.
    """

    backend: str
    heads: Tensor | None

    @property
    def density(self) -> float:
        """Causal blocks computed over causal blocks there are, all heads together; reads `heads` from the device."""
        return 1.0 if self.backend == "dense" or self.heads is None else float(self.heads.detach()[..., 0].mean())


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | tuple[float, float] = 0.95,
    num_chunks: int = 0,
    sink_blocks: int = 1,
    window_blocks: int = 2,
    sm_scale: float | None = None,
    gqa: Gqa | int | str = Gqa.PER_HEAD,
    selection: Selection | int | str = Selection.PAPER,
    min_mass: float = 0.0,
    backend: str = "auto",
    return_stats: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, PrefillStats]:
    """Causal attention of a prompt, or a chunk of one, over the key blocks that matter (SampleAttention, 2406.15486).

    A few blocks of 128 queries, at equal distances, are scored against all keys. From their softmax each head keeps the
    columns (key blocks) and the slashes (distances from the diagonal, in blocks) that hold a share alpha of the mass,
    and every query attends to these. Nothing is drawn: equal arguments give equal results. The mean mass that the
    sampled rows keep is at least max(alpha) in each head; that of a single row, or of rows not sampled, has no bound.

    Args:
        q: [batch, num_qo_heads, q_len, head_dim]: the last q_len tokens of the kv_len there are. bfloat16 or float16
            (float32 too on the CPU); head_dim up to 128, others than 64 and 128 padded with zeros in a copy;
            num_qo_heads a multiple of num_kv_heads.
        k, v: [batch, num_kv_heads, kv_len, head_dim], q's dtype and device; v may have a head_dim of its own.
            kv_len - q_len is 0 or a multiple of 128 (prefill in chunks over a cache). All strides with a contiguous
            last dimension.
        alpha: mass to keep, 0 to 1, by columns and by slashes; or (of columns, of slashes). 1 keeps everything.
        num_chunks: query blocks to score; 0: a fiftieth of them, at least 2, at most 8.
        sink_blocks: first key blocks that are always kept, from 0 on.
        window_blocks: distances from the diagonal that are always kept, from 1 on: the diagonal itself is.
        sm_scale: softmax scale; None is 1 / sqrt(head_dim).
        gqa, selection, min_mass: as in `santa.sample_select`: "per_head" or "union"; "paper" or "joint"; the share of
            its mass that every sampled row is to keep.
        backend: "flex", "reference", "dense", or "auto": dense below 16,384 keys without a selection; dense if the
            selection keeps more of the causal blocks than `break_even_density`, 0.4 below 32,768 keys and 0.55 from
            there on, 0.05 on the CPU; else flex on CUDA, reference elsewhere. For the second rule "auto" copies one
            number from the device to the host, which waits for the selection and is impossible inside a CUDA graph;
            the other backends copy nothing ("reference" copies the counts).
        return_stats: also return what was selected and which backend ran.

    Returns:
        out: [batch, num_qo_heads, q_len, head_dim of v], q's dtype.
        lse: [batch, num_qo_heads, q_len], float32: log-sum-exp of the scaled scores of the keys attended to, natural
            logarithm.
        stats (with return_stats): `PrefillStats`.

    Raises:
        ValueError: an argument has an unusable value, dtype, shape, stride or device; the message names it.
        TypeError: an argument is of the wrong Python type.
        RuntimeError: a derivative of an output is computed, `stats.heads` among them: in backward() for inputs that
            require gradients, in the call itself under vmap and for forward derivatives; FlexAttention is to run while
            torch.compile is switched off.

    Under torch.autocast q, k and v are cast as torch's scaled_dot_product_attention casts them.
    """
    alphas = check_alpha(alpha)
    options = {
        "alpha_c": alphas[0],
        "alpha_s": alphas[1],
        "num_chunks": _count("num_chunks", num_chunks, 0, MAX_CHUNKS),
        "sink_blocks": _count("sink_blocks", sink_blocks, 0),
        "window_blocks": _count("window_blocks", window_blocks, 1),
        "sm_scale": _scale(sm_scale),
        "gqa": value_of("gqa", gqa, Gqa),
        "selection": value_of("selection", selection, Selection),
        "min_mass": _share("min_mass", min_mass),
    }
    if backend not in BACKENDS:
        raise ValueError(f"santa: backend is {backend!r}; it needs to be one of {', '.join(map(repr, BACKENDS))}")
    q, k, v = autocast(q, k, v)
    _check_tensors(q, k, v)
    if backend == "flex" and not q.is_cuda:
        raise ValueError(
            f"santa: backend is 'flex' with q on {q.device}; it needs CUDA tensors: use 'reference', 'dense' or 'auto'"
        )
    # That of the head_dim before padding.
    options["sm_scale"] = q.shape[-1] ** -0.5 if options["sm_scale"] is None else float(options["sm_scale"])
    ran = backend

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        nonlocal ran
        with torch.autocast(q.device.type, enabled=False):  # what it does has happened
            ran, *outputs = _prefill(backend, options, q, k, v)
        return tuple(outputs)

    out, lse, *heads = InferenceOnly.apply("prefill", run, q, k, v)
    return (out, lse, PrefillStats(ran, *(heads or [None]))) if return_stats else (out, lse)


def _prefill(backend: str, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """(backend that ran, out, lse, and, if there was a selection, the statistics of its heads)"""
    sm_scale = options["sm_scale"]
    selected: list[Tensor] = []
    if backend == "auto" and k.shape[2] < DENSE_BELOW:
        backend = "dense"
    if backend != "dense":
        kv_cnt, kv_idx, heads = sample_select(q, k, **options)
        selected.append(heads)
    if backend == "auto" and float(heads[..., 0].mean()) > break_even_density(k.shape[2], cuda=q.is_cuda):
        backend = "dense"
    if backend == "auto":
        backend = "flex" if q.is_cuda else "reference"
    head_dim, v_head_dim = q.shape[-1], v.shape[-1]
    # Dense kernels take multiples of 8, with k and v alike: more padding than that would be work for nothing.
    width = -(-max(head_dim, v_head_dim) // 8) * 8
    if backend != "dense":
        width = padded_head_dim(head_dim, v_head_dim, prefill=True)
    q, k, v = (pad(x, width) for x in (q, k, v))
    if backend == "dense":
        out, lse = _dense(q, k, v, sm_scale)
    elif backend == "flex":
        out, lse = _flex(q, k, v, kv_cnt, kv_idx, sm_scale)
    else:
        out, lse = _reference(q, k, v, kv_cnt, kv_idx, sm_scale)
    if v_head_dim < width:
        out = out[..., :v_head_dim].contiguous()
    return backend, out, lse, *selected


# Arguments ----------------------------------------------------------------------------------------------


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"santa: {name} is a bool; it needs to be a float")
    value = real(name, value)
    if not 0 <= value <= 1:  # NaN too
        raise ValueError(f"santa: {name} is {value}; it needs to be from 0 to 1")
    return float(value)


def check_alpha(alpha: Any) -> tuple[float, float]:
    """(of columns, of slashes) of one number or of two."""
    if not isinstance(alpha, (tuple, list)):
        share = _share("alpha", alpha)
        return share, share
    if len(alpha) != 2:
        raise ValueError(f"santa: alpha has {len(alpha)} entries; it needs to be one number or (columns, slashes)")
    return _share("alpha of columns", alpha[0]), _share("alpha of slashes", alpha[1])


def _count(name: str, value: Any, least: int, most: int = _MAX_INT32) -> int:
    value = int64(name, value)
    if not least <= value <= most:
        raise ValueError(f"santa: {name} is {value}; it needs to be from {least} to {most}")
    return value


def _scale(sm_scale: Any) -> float | None:
    if isinstance(sm_scale, bool):
        raise TypeError("santa: sm_scale is a bool; it needs to be a float or None")
    sm_scale = real("sm_scale", sm_scale, optional=True)
    if sm_scale is not None and not abs(sm_scale) <= MAX_SCALE:
        raise ValueError(f"santa: sm_scale is {sm_scale}; it needs to be finite and at most {MAX_SCALE} in magnitude")
    return sm_scale


def _check_tensors(q: Any, k: Any, v: Any) -> None:
    for name, x, heads, length in (
        ("q", q, "num_qo_heads", "q_len"),
        ("k", k, "num_kv_heads", "kv_len"),
        ("v", v, "num_kv_heads", "kv_len"),
    ):
        if not isinstance(x, Tensor):
            raise TypeError(f"santa: {name} is a {type(x).__name__}; it needs to be a torch.Tensor")
        if x.dim() != 4:
            raise ValueError(
                f"santa: {name} has shape {list(x.shape)}; it needs 4 dimensions, [batch, {heads}, {length}, head_dim]"
            )
        if 0 in x.shape:
            raise ValueError(f"santa: {name} has shape {list(x.shape)}; it needs to be without empty dimensions")
        if x.stride(-1) != 1:
            raise ValueError(f"santa: {name} has strides {list(x.stride())}; it needs a contiguous last dimension")
    dtypes = DTYPES.get(q.device.type)
    if dtypes is None:
        raise ValueError(f"santa: q is on {q.device}; it needs to be on a CUDA device or the CPU")
    if q.dtype not in dtypes:
        names = " or ".join(_name(dtype) for dtype in dtypes)
        raise ValueError(f"santa: q is {_name(q.dtype)}; it needs to be {names} on {q.device.type}")
    padded_head_dim(q.shape[-1], v.shape[-1], prefill=True)
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(f"santa: {name} is on {x.device}; it needs to be on q's device, {q.device}")
        if x.dtype != q.dtype:
            raise ValueError(f"santa: {name} is {_name(x.dtype)}; it needs to be q's dtype, {_name(q.dtype)}")
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"santa: k has shape {list(k.shape)}; it needs q's batch and head_dim, "
            f"[{q.shape[0]}, num_kv_heads, kv_len, {q.shape[-1]}]"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"santa: v has shape {list(v.shape)}; it needs k's, {list(k.shape)}, up to head_dim")
    # Tensors in another order reach this far: batch and head_dim stand where they do in [batch, len, heads, head_dim].
    layout = (
        f"q is {list(q.shape)} and k {list(k.shape)}, read as [batch, heads, len, head_dim]; for [batch, len, heads, "
        "head_dim] pass x.transpose(1, 2)"
    )
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"santa: q has {q.shape[1]} heads; it needs a multiple of k's, {k.shape[1]}: {layout}")
    if q.shape[1] // k.shape[1] > MAX_GROUP_SIZE:
        raise ValueError(
            f"santa: q has {q.shape[1]} heads, k has {k.shape[1]}; it needs to be at most {MAX_GROUP_SIZE} times as "
            "many"
        )
    past = k.shape[2] - q.shape[2]
    if past < 0:
        raise ValueError(f"santa: k has {k.shape[2]} tokens for {q.shape[2]} of q; it needs at least as many: {layout}")
    if past % BLOCK:
        raise ValueError(
            f"santa: k has {k.shape[2]} tokens for {q.shape[2]} of q, {past} more; it needs to have 0 or a multiple of "
            f"{BLOCK} more: cut a prompt into chunks at multiples of {BLOCK}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Dense --------------------------------------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    past = k.shape[2] - q.shape[2]
    if sm_scale <= 0:  # kernels mask first and scale then: -inf would become NaN or inf
        q, sm_scale = (-q, -sm_scale) if sm_scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (_aligned(x) for x in (q, k, v))
    if past == 0:
        return _dense_part(q, k, v, sm_scale, is_causal=True)
    # Kernels do not agree on where the causal diagonal lies if there are more keys than queries, and the fastest take
    # squares alone: the cache and the chunk's own square are two calls, merged by their masses.
    out_past, lse_past = _dense_part(q, k[:, :, :past], v[:, :, :past], sm_scale, is_causal=False)
    out_own, lse_own = _dense_part(q, k[:, :, past:], v[:, :, past:], sm_scale, is_causal=True)
    lse = torch.logaddexp(lse_past, lse_own)
    weight_past, weight_own = (torch.exp(part - lse).unsqueeze(-1) for part in (lse_past, lse_own))
    return (out_past * weight_past + out_own * weight_own).to(q.dtype), lse


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy if its rows do not start on 16-byte boundaries, which kernels on CUDA assume."""
    strides = (stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    if x.is_cuda and (x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in strides)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _dense_part(q: Tensor, k: Tensor, v: Tensor, sm_scale: float, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attention to all of k, or to a square's lower triangle, with the kernel that torch's SDPA would take and the lse
    that SDPA does not return."""
    aten = torch.ops.aten
    if not q.is_cuda:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=sm_scale)
    choice = aten._fused_sdp_choice(q, k, v, None, 0.0, is_causal, scale=sm_scale, enable_gqa=q.shape[1] != k.shape[1])
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        result = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False, scale=sm_scale)
    else:
        result = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=sm_scale)
    # cuDNN's lse is [batch, num_qo_heads, q_len, 1].
    return result[0], result[1].reshape(q.shape[:3])


# Plain PyTorch ------------------------------------------------------------------------------------------


def _reference(
    q: Tensor, k: Tensor, v: Tensor, kv_cnt: Tensor, kv_idx: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """The lists of `santa.sample_select`, executed as they are written, in float32. Memory: the kept keys and values of
    one query block, and its scores."""
    q_len, past = q.shape[2], k.shape[2] - q.shape[2]
    group_size = q.shape[1] // k.shape[1]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    # [batch, num_kv_heads, nk, BLOCK, head_dim]; the causal mask hides what fills up the last block.
    keys, values = (F.pad(x, (0, 0, 0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)) for x in (k, v))
    within = torch.arange(BLOCK, device=q.device)
    counts = kv_cnt.tolist()
    for b, h, a in itertools.product(*map(range, kv_cnt.shape)):
        count = counts[b][h][a]
        rows = slice(a * BLOCK, min((a + 1) * BLOCK, q_len))
        blocks = kv_idx[b, h, a, :count].long()
        kept_keys, kept_values = (x[b, h // group_size, blocks].flatten(0, 1).float() for x in (keys, values))
        scores = (q[b, h, rows].float() @ kept_keys.T) * sm_scale
        positions = (blocks.unsqueeze(-1) * BLOCK + within).flatten()
        query_positions = past + torch.arange(rows.start, rows.stop, device=q.device)
        scores.masked_fill_(positions > query_positions.unsqueeze(-1), -torch.inf)
        lse[b, h, rows] = torch.logsumexp(scores, dim=-1)
        out[b, h, rows] = (torch.softmax(scores, dim=-1) @ kept_values).to(q.dtype)
    return out, lse


# FlexAttention ------------------------------------------------------------------------------------------


def bucket(length: int) -> int:
    """Length that FlexAttention is compiled for: the next multiple of 128, or, for more than 2,048 tokens, of a
    sixteenth of the next power of two: eight lengths per doubling.

    What is added costs memory and a copy, but no attention: padding keys are in no block list and padding query blocks
    have empty ones.
    """
    step = max(BLOCK, (1 << (length - 1).bit_length()) // 16)
    return -(-length // step) * step


def _within_diagonal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The causal mask of a diagonal block, the only kind of block that is masked. Both of its sides start at multiples
    of BLOCK, so the offset between queries and keys, which would be compiled in, is not needed."""
    return kv_idx % BLOCK <= q_idx % BLOCK


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, sm_scale: float) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        # Run eagerly, FlexAttention would take no notice of the block lists.
        raise RuntimeError(
            "santa: backend 'flex' needs torch.compile, which is switched off (TORCHDYNAMO_DISABLE, "
            "TORCH_COMPILE_DISABLE or a compiler stance); switch it on, or use another backend"
        )
    enable_gqa = q.shape[1] != k.shape[1]
    out, aux = flex_attention(
        q, k, v, block_mask=mask, scale=sm_scale, enable_gqa=enable_gqa, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


@functools.cache
def _compiled(dynamic: bool, *key: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """One compiled function per key, each with a code object of its own: torch keeps compilations by code object, and
    after eight of one gives up."""
    function = types.FunctionType(_attend_blocks.__code__.replace(), globals(), _attend_blocks.__name__)
    # None: what is seen to change becomes symbolic, in one recompilation. True would make the scale symbolic too, which
    # the kernel has to know.
    return torch.compile(function, fullgraph=True, dynamic=None if dynamic else False)


def _flex(q: Tensor, k: Tensor, v: Tensor, kv_cnt: Tensor, kv_idx: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    q_len, past = q.shape[2], k.shape[2] - q.shape[2]
    q_padded, kv_padded = (
        -(-length // BLOCK) * BLOCK if DYNAMIC_SHAPES else bucket(length) for length in (q_len, k.shape[2])
    )
    q = _pad(_aligned(q), (0, 0, 0, q_padded - q_len))
    k, v = (_pad(_aligned(x), (0, 0, 0, kv_padded - x.shape[2])) for x in (k, v))
    mask = block_mask(kv_cnt, kv_idx, past // BLOCK, q_padded, kv_padded)
    key = (q.device, q.dtype, sm_scale, q.shape[:2], k.shape[1], q.shape[3])
    if not DYNAMIC_SHAPES:
        key = (*key, q.stride(), k.stride(), v.stride(), q_padded, kv_padded)
    out, lse = _compiled(DYNAMIC_SHAPES, *key)(q, k, v, mask, sm_scale)
    return out[:, :, :q_len], lse[:, :, :q_len]


def block_mask(kv_cnt: Tensor, kv_idx: Tensor, past_blocks: int, q_len: int, kv_len: int) -> BlockMask:
    """The block lists as FlexAttention takes them, for q_len and kv_len that are multiples of BLOCK and not shorter
    than the lists. Query blocks that have no list attend to nothing."""
    nq, nk = q_len // BLOCK, kv_len // BLOCK
    kv_cnt = _pad(kv_cnt, (0, nq - kv_cnt.shape[2]))
    full_idx = _pad(kv_idx, (0, nk - kv_idx.shape[3], 0, nq - kv_idx.shape[2]))
    # The lists ascend and the diagonal is their last block: without it, the rest is full.
    full_num = (kv_cnt - 1).clamp(min=0)
    # As wide as full_idx although one entry is used: in torch 2.10 the kernel takes one stride for both.
    partial_idx = torch.zeros_like(full_idx)
    partial_idx[..., 0] = (torch.arange(nq, device=kv_idx.device) + past_blocks).clamp(max=nk - 1)
    return BlockMask.from_kv_blocks(
        kv_cnt - full_num,
        partial_idx,
        full_num,
        full_idx,
        BLOCK_SIZE=BLOCK,
        mask_mod=_within_diagonal,
        seq_lengths=(q_len, kv_len),
        compute_q_blocks=False,
    )


def _pad(x: Tensor, widths: tuple[int, ...]) -> Tensor:
    return F.pad(x, widths) if any(widths) else x
