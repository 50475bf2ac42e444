"""K and V of a layer as vLLM keeps them. What is kept beside them for a layer belongs here, too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """Views of a layer's cache as `santa.decode_paged` takes them with kv_layout "NHD".

    Attributes:
        k, v: [num_blocks, block_size, num_kv_heads, head_dim], any strides with a contiguous last dimension.
    """

    k: Tensor
    v: Tensor


def layer_cache(kv_cache: Tensor, head_dim: int, dtype: torch.dtype) -> LayerCache:
    """The two views, of the memory that vLLM's FlashAttention writes; nothing is copied.

    Args:
        kv_cache: as vLLM binds it to a layer, in any physical order: [num_blocks, 2, block_size, num_kv_heads,
            head_dim] up to vLLM 0.25, [num_blocks, num_kv_heads, block_size, 2 head_dim], K before V in every row,
            in 0.33.
        head_dim: of K and of V.
        dtype: what the cache holds. vLLM's tensors of 8 bits say uint8.

    Raises:
        ValueError: kv_cache has neither shape.
    """
    if kv_cache.dim() == 5 and kv_cache.shape[1] == 2 and kv_cache.shape[4] == head_dim:
        k, v = kv_cache.unbind(1)
    elif kv_cache.dim() == 4 and kv_cache.shape[3] == 2 * head_dim:
        k, v = kv_cache.transpose(1, 2).split(head_dim, dim=-1)
    else:
        raise ValueError(
            f"santa: kv_cache has shape {list(kv_cache.shape)}; it needs to be [num_blocks, 2, block_size, "
            f"num_kv_heads, {head_dim}] or [num_blocks, num_kv_heads, block_size, {2 * head_dim}]"
        )
    return LayerCache(k.view(dtype), v.view(dtype)) if k.dtype != dtype else LayerCache(k, v)
