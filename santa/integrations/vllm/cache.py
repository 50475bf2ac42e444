"""K and V of a layer as vLLM keeps them, and its proposal keys, which each page has behind its K and V.

A page is a block of vLLM's cache, of one layer. vLLM lets pages be padded, counts the padding as memory of the cache,
and steps over it. So codes have the block tables and the life of the keys that they are of: prefix caching, chunks,
preemption and blocks that are used again need nothing more than that whoever writes a key writes its codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import santa
from santa.proposal import key_statistics

# Of blocks that are coded again in one call.
_BLOCKS_AT_ONCE = 4096


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


def bytes_of_codes(block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """What the codes and scales of one page take: 66 bytes a key and KV head at head_dim 128."""
    return block_size * num_kv_heads * (head_dim // 2 + 2)


class Pages(NamedTuple):
    """Where a layer has something in its pages: `used` bytes of each of `count`, which are `stride` bytes apart."""

    start: int
    stride: int
    used: int
    count: int

    def overlap(self, other: Pages) -> bool:
        """Whether a byte is used by both. Pages that are apart by different strides count as overlapping where the
        memory from the first to the last does."""
        first, second = sorted((self, other))
        if second.start >= first.start + (first.count - 1) * first.stride + first.used:
            return False
        if first.stride != second.stride:
            return True
        behind = (second.start - first.start) % first.stride
        return behind < first.used or behind + second.used > first.stride


def pages_of(kv_cache: Tensor) -> Pages:
    """Those of a layer's K and V. kv_cache: blocks first, as in `layer_cache`."""
    size = kv_cache.element_size()
    used = kv_cache.numel() // kv_cache.shape[0] * size
    return Pages(kv_cache.data_ptr(), kv_cache.stride(0) * size, used, kv_cache.shape[0])


class LayerCodes:
    """Proposal keys of one layer.

    Blocks are shared by requests, so center and channel_scale are those of all of them: 0 and 1 until `freeze`. They
    are written in place: captured CUDA graphs keep their addresses.

    Attributes:
        is_frozen: `freeze` has been called.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, device: torch.device, k_scale: Tensor | None = None) -> None:
        """k_scale: of a float8 cache, float32 [] or [1], by which it has keys divided."""
        self.is_frozen = False
        self._k_scale = k_scale
        center = torch.zeros(1, num_kv_heads, head_dim, dtype=torch.float32, device=device)
        # Of keys as they come, and of keys as the cache has them. Codes are the same for both.
        self._of_new = center, torch.ones_like(center)
        self._of_stored = self._of_new if k_scale is None else (center.clone(), torch.ones_like(center))
        self._divide()

    def proposal(self, kv_cache: Tensor) -> santa.ProposalKeys:
        """Views of vLLM's memory, for `santa.decode_paged` on `layer_cache` of the same tensor.

        Args:
            kv_cache: as in `layer_cache`.

        Raises:
            ValueError: its pages have no room for codes.
        """
        return self._proposal(kv_cache, self._of_stored)

    def write(self, kv_cache: Tensor, key: Tensor, slot_mapping: Tensor) -> None:
        """The codes of new keys. For graphs: no size depends on the device, and nothing waits for it.

        Args:
            kv_cache: as in `layer_cache`.
            key: [n, num_kv_heads, head_dim], bfloat16 or float16, of a float8 cache too.
            slot_mapping: int64 [n], block * block_size + offset of each; negative: nowhere.
        """
        santa.append_proposal_keys(self._proposal(kv_cache, self._of_new), key[None], slots=slot_mapping[None])

    def freeze(self, kv_cache: Tensor, cache: LayerCache, key: Tensor) -> None:
        """Take center and channel_scale from the keys of a prompt, for good, and code all of the cache with them.

        Args:
            kv_cache, cache: of the same memory.
            key: [n, num_kv_heads, head_dim], as in `write`.
        """
        everywhere = torch.ones(1, len(key), dtype=torch.bool, device=key.device)
        center, channel_scale = key_statistics(key[None], everywhere, shared=True)
        # One bad prompt is not to spoil the codes of all others.
        self._of_new[0].copy_(torch.where(center.isfinite(), center, 0.0))
        self._of_new[1].copy_(channel_scale)
        self._divide()
        proposal, (blocks, block_size) = self.proposal(kv_cache), cache.k.shape[:2]
        for first in range(0, blocks, _BLOCKS_AT_ONCE):
            keys = cache.k[first : first + _BLOCKS_AT_ONCE]
            slots = torch.arange(len(keys) * block_size, device=key.device) + first * block_size
            santa.append_proposal_keys(proposal, keys, slots=slots.view(-1, block_size))
        self.is_frozen = True

    def _divide(self) -> None:
        if self._k_scale is not None:
            for stored, new in zip(self._of_stored, self._of_new, strict=True):
                torch.div(new, self._k_scale, out=stored)

    def pages(self, kv_cache: Tensor) -> Pages:
        """Where the codes are: behind K and V.

        Raises:
            ValueError: as `proposal`.
        """
        _, num_kv_heads, head_dim = self._of_new[0].shape
        found = pages_of(kv_cache)
        block_size = kv_cache.numel() // (2 * found.count * num_kv_heads * head_dim)
        needed = bytes_of_codes(block_size, num_kv_heads, head_dim)
        if found.stride < found.used + needed:
            raise ValueError(
                f"santa: kv_cache has pages of {found.stride} bytes; keys='proposal' needs {found.used + needed}, "
                f"{needed} of them for codes: this kind of attention layer has pages that are not padded"
            )
        return found._replace(start=found.start + found.used, used=needed)

    def _proposal(self, kv_cache: Tensor, statistics: tuple[Tensor, Tensor]) -> santa.ProposalKeys:
        _, num_kv_heads, head_dim = statistics[0].shape
        stride, used, count = self.pages(kv_cache)[1:]
        half = head_dim // 2
        block_size = used // (num_kv_heads * (half + 2))
        page = kv_cache.view(torch.uint8)
        # A head's codes lie side by side, and so do its scales: kernels read a head at a time.
        start = page.storage_offset() + page.numel() // count
        codes = page.as_strided((count, block_size, num_kv_heads, half), (stride, half, block_size * half, 1), start)
        start += block_size * num_kv_heads * half
        scales = page.as_strided((count, num_kv_heads, 2 * block_size), (stride, 2 * block_size, 1), start)
        return santa.ProposalKeys(codes, scales.view(torch.float16).transpose(1, 2), *statistics)
