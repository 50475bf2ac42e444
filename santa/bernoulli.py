"""Feature-major keys, which Bernoulli scores read: filling them, and the fake kernels of their operators.

``santa.decode(..., score="bernoulli")`` reads some features of every key, so a feature has to be contiguous along the
sequence: [batch, num_kv_heads, head_dim, max_kv_len].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from santa._dispatch import call, register
from santa.arguments import check_same_device, check_tensor
from santa.ops import _decode_outputs


def append_k_features(k_features: Tensor, k_new: Tensor, positions: Tensor) -> None:
    """Write keys, as a model makes them, into a feature-major cache: one at each decode step, or a prefill's.

    Args:
        k_features: [batch, num_kv_heads, head_dim, max_kv_len], bfloat16 or float16 (float32 too on the CPU),
            contiguous along max_kv_len; written in place.
        k_new: [batch, n, num_kv_heads, head_dim], dtype and device of k_features, any strides.
        positions: int32 or int64 [batch]: where the first of the n keys of each row goes. On the CPU a row without
            room for all n raises, and nothing is written; on CUDA, where looking would stop the stream, nothing of such
            a row is written.

    Raises:
        ValueError: an argument has an unusable value, dtype, shape, stride or device; the message names it.
        TypeError: an argument is no tensor.
        RuntimeError: k_features or k_new requires a gradient, or carries a forward derivative; vmap.
    """
    check_tensor("k_features", k_features)
    check_tensor("k_new", k_new)
    check_tensor("positions", positions)
    call(torch.ops.santa.append_k_features, k_features, k_new, positions)


def append_k_features_paged(k_pages: Tensor, k_new: Tensor, positions: Tensor, block_table: Tensor) -> None:
    """`append_k_features` into pages. Filling alone: no operator reads feature-major pages.

    Args:
        k_pages: [num_pages, num_kv_heads, head_dim, page_size], contiguous along page_size; written in place.
        k_new, positions: as in `append_k_features`.
        block_table: int32 [batch, max_pages]: the page of positions page_size i to page_size (i + 1) - 1 of a row in
            column i. Entries that the new keys do not need are not looked at. A page that is not there raises on the
            CPU; on CUDA keys of such a page are not written.
    """
    check_tensor("k_pages", k_pages)
    check_tensor("k_new", k_new)
    check_tensor("positions", positions)
    check_tensor("block_table", block_table)
    call(torch.ops.santa.append_k_features_paged, k_pages, k_new, positions, block_table)


@torch.library.register_fake("santa::decode_bernoulli")
def _decode_bernoulli_fake(q: Tensor, k_features: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    check_same_device(q, k_features=k_features, v=v, **tensors)
    return *_decode_outputs(q), q.new_empty((q.shape[0], k_features.shape[1]), dtype=torch.int32)


@torch.library.register_fake("santa::_ternary_counts")
def _ternary_counts_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape, dtype=torch.int32)


@torch.library.register_fake("santa::append_k_features")
def _append_k_features_fake(k_features: Tensor, k_new: Tensor, positions: Tensor) -> None:
    check_same_device(k_features, "k_features", k_new=k_new, positions=positions)


@torch.library.register_fake("santa::append_k_features_paged")
def _append_k_features_paged_fake(k_pages: Tensor, k_new: Tensor, positions: Tensor, block_table: Tensor) -> None:
    check_same_device(k_pages, "k_pages", k_new=k_new, positions=positions, block_table=block_table)


register("decode_bernoulli")
for _name in ("append_k_features", "append_k_features_paged"):
    register(_name, written=1)
