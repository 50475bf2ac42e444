"""What the backend can do: vLLM asks before it builds a layer, and says what was refused and why."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from santa.shapes import DECODE_HEAD_DIMS

from .attention import SantaImpl
from .compat import check_version
from .metadata import SantaMetadataBuilder
from .settings import PAGE_SIZES

check_version()


class SantaBackend(FlashAttentionBackend):
    """FlashAttention's backend, whose decode steps are santa's. What either cannot do is refused.

    Blocks of other sizes than 16, 32, ... 256 tokens are cut into pages of such a size by vLLM.
    """

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SantaImpl]:
        return SantaImpl

    @staticmethod
    def get_builder_cls() -> type[SantaMetadataBuilder]:
        return SantaMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, *args: Any, **kwargs: Any) -> list[int]:
        # vLLM 0.33 passes the layer's specification, 0.25 nothing.
        theirs = super().get_supported_kernel_block_sizes(*args, **kwargs)
        return [
            size
            for size in PAGE_SIZES
            if any(size % known.base == 0 if isinstance(known, MultipleOf) else size == known for known in theirs)
        ]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in DECODE_HEAD_DIMS and super().supports_head_size(head_size)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_combination(cls, head_size: int, *args: Any, **kwargs: Any) -> str | None:
        # What supports_head_size refuses vLLM reports without the size.
        if head_size not in DECODE_HEAD_DIMS:
            return f"santa: head_size is {head_size}; it needs to be one of {list(DECODE_HEAD_DIMS)}"
        return super().supports_combination(head_size, *args, **kwargs)
