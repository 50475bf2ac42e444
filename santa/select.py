"""Which key blocks a long prefill needs to attend to: the selection of SampleAttention."""

from __future__ import annotations

import enum
import math
from typing import Any

import torch
from torch import Tensor

from santa._dispatch import call, register
from santa.arguments import check_same_device, check_tensor, int64, real, register_choices, value_of
from santa.shapes import PREFILL_HEAD_DIMS, pad, padded_head_dim

BLOCK = 128  # tokens, of queries and of keys


@register_choices
class Gqa(enum.IntEnum):
    """PER_HEAD: each query head has its own blocks. UNION: the query heads of a KV head share the union of theirs."""

    PER_HEAD = 0
    UNION = 1


@register_choices
class Selection(enum.IntEnum):
    """PAPER: columns and slashes by two separate covers. JOINT: together, by mass gained per added block."""

    PAPER = 0
    JOINT = 1


def sample_select(
    q: Tensor,
    k: Tensor,
    *,
    alpha_c: float = 0.95,
    alpha_s: float = 0.95,
    num_chunks: int = 0,
    sink_blocks: int = 1,
    window_blocks: int = 2,
    sm_scale: float | None = None,
    gqa: Gqa | int | str = Gqa.PER_HEAD,
    selection: Selection | int | str = Selection.PAPER,
    min_mass: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the key blocks that each block of 128 queries attends to, from the attention of a few query blocks.

    Nothing is random. The queries of num_chunks blocks at equal distances, the last one among them, get their exact
    causal softmax over all keys. From it each head takes columns (key blocks that all later queries keep) and slashes
    (block distances from the diagonal), so that the sampled queries keep, on average, at least the larger of alpha_c
    and alpha_s of their attention mass. No such promise is made for a single query, sampled or not; the statistics say
    what the sampled ones keep. santa/reference_prefill.py writes the rules out.

    The choice depends on which queries one call covers: a prompt in pieces is sampled in each piece. On CUDA the call
    uses up to 512 MiB of scratch memory, more only if one KV head's query heads need it: 512 bytes per sampled block,
    key block and query head.

    Args:
        q: [batch, num_qo_heads, q_len, head_dim]; bfloat16 or float16 (float32 too on CPU); head_dim up to 128, others
            than 64 and 128 padded with zeros in a copy; num_qo_heads is a multiple of num_kv_heads. The queries are the
            last q_len positions of the keys.
        k: [batch, num_kv_heads, kv_len, head_dim], q's dtype and device; kv_len is q_len plus a multiple of 128. q and
            k have any strides with a contiguous last dimension.
        alpha_c, alpha_s: part of the sampled mass that the columns, and that the slashes, hold by themselves. At or
            below 0: the forced ones alone; at or above 1: all of them, which is dense attention.
        num_chunks: sampled query blocks, at most as many as there are. 0: 2% of them, from 2 to 8.
        sink_blocks: columns that are always kept, from the first on. window_blocks: slashes that are always kept, from
            the diagonal on; at least 1.
        sm_scale: softmax scale; None is 1 / sqrt(head_dim).
        gqa: "per_head" or "union" (or `santa.Gqa`).
        selection: "paper" or "joint" (or `santa.Selection`). "joint" is an extension: columns and slashes are chosen
            together, by mass gained per block added, until the larger of alpha_c and alpha_s is kept.
        min_mass: an extension: then columns and slashes are added until each sampled query keeps this part of its
            mass. 0: none; 1: everything is kept.

    Returns:
        kv_cnt: int32 [batch, num_qo_heads, nq], nq = ceil(q_len / 128): key blocks that the query block keeps.
        kv_idx: int32 [batch, num_qo_heads, nq, nk], nk = ceil(kv_len / 128): these key blocks, ascending, then zeros.
            The last of them is the diagonal block; it is to be masked causally, the others are full.
        stats: float32 [batch, num_qo_heads, 6]: density (kept blocks / causal blocks); mean, minimum and 5th percentile
            of the mass that the sampled queries keep (of n ascending values, the one at floor((n - 1) / 20) from 0);
            number of columns; number of slashes. Under gqa "union" they are those of the union.

    A head that has a sampled query without a softmax (a NaN or +inf among its scores, or nothing but -inf) keeps every
    block, and its three masses are NaN. Sampled queries see all keys but no other queries.

    Raises:
        ValueError: an argument has an unusable value, dtype, shape, stride or device; the message names it. (From
            torch 2.15 on, torch.ops.santa.sample_select under inference_mode raises the same text as a RuntimeError.)
        TypeError: an argument is of the wrong Python type.
        RuntimeError: a derivative of stats is computed, in backward() or by a transform of torch.func.

    Source: SampleAttention (arXiv 2406.15486; with slashes as in its MLSys 2025 version).
    """
    check_tensor("q", q)
    check_tensor("k", k)
    sm_scale = real("sm_scale", sm_scale, optional=True)
    if q.dim() == k.dim() == 4 and q.shape[-1] == k.shape[-1] and q.shape[-1] not in PREFILL_HEAD_DIMS:
        sm_scale = 1 / math.sqrt(q.shape[-1]) if sm_scale is None and q.shape[-1] else sm_scale
        width = padded_head_dim(q.shape[-1], prefill=True)
        q, k = pad(q, width), pad(k, width)
    return call(
        torch.ops.santa.sample_select,
        q,
        k,
        alpha_c=real("alpha_c", alpha_c),
        alpha_s=real("alpha_s", alpha_s),
        num_chunks=int64("num_chunks", num_chunks),
        sink_blocks=int64("sink_blocks", sink_blocks),
        window_blocks=int64("window_blocks", window_blocks),
        sm_scale=sm_scale,
        gqa=value_of("gqa", gqa, Gqa),
        selection=value_of("selection", selection, Selection),
        min_mass=real("min_mass", min_mass),
    )


@torch.library.register_fake("santa::sample_select")
def _sample_select_fake(q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(q, k=k)
    batch, num_qo_heads = q.shape[:2]
    nq, nk = ((x.shape[2] + BLOCK - 1) // BLOCK for x in (q, k))
    return (
        q.new_empty((batch, num_qo_heads, nq), dtype=torch.int32),
        q.new_empty((batch, num_qo_heads, nq, nk), dtype=torch.int32),
        q.new_empty((batch, num_qo_heads, 6), dtype=torch.float32),
    )


register("sample_select")
