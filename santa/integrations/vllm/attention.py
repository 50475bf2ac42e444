"""One layer: rows with one new token go to santa, the others to FlashAttention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from .cache import LayerCodes, bytes_of_codes, layer_cache, pages_of
from .compat import let_layers_pad_pages
from .decode import DecodeLayer
from .metadata import SantaMetadata, max_rows
from .settings import PAGE_SIZES, check_engine, first_kv_head, is_draft, layer_index


class SantaImpl(FlashAttentionImpl):
    """FlashAttention's layer, with decode steps by `santa.decode_paged` on the same cache and output.

    Raises:
        ValueError, TypeError: settings, or an engine, that the backend refuses (settings.py).
        NotImplementedError: position biases (ALiBi), attention other than a decoder's.
    """

    # Both are about context parallelism, which the backend refuses.
    can_return_lse_for_decode = False
    supports_dcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: AttentionType = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError("santa: alibi_slopes is given; the backend has no position biases")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"santa: attn_type is {attn_type!r}; it needs to be {AttentionType.DECODER!r}")
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
        )
        config = get_current_vllm_config()
        self._settings = check_engine(config)
        self._first_kv_head = first_kv_head(
            num_kv_heads,
            config.model_config.get_total_num_kv_heads(),
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
        )
        self._max_rows, self._max_kv_len = max_rows(config), config.model_config.max_model_len
        self._is_float8 = kv_cache_dtype.startswith("fp8")
        # vLLM would quantize queries before it calls the layer. Santa takes them as they are; for FlashAttention they
        # are quantized in `_prefill`, where the parent has to be told again.
        self._quantizes_prefill = self._is_float8 and self.supports_quant_query_input
        self.supports_quant_query_input = False
        self._layer: DecodeLayer | None = None
        # Windows read few keys, and their pages can be those of other layers; layers that share keys have none; drafts
        # are built from steps that tell nothing of prompts.
        self._can_have_codes = sliding_window is None and kv_sharing_target_layer_name is None and not is_draft(config)
        self._codes: LayerCodes | None = None
        self._checked_pages: int | None = None
        self._layers = config.compilation_config.static_forward_context
        if self._settings.keys == "proposal":
            let_layers_pad_pages()
        self._lse: Tensor | None = None
        self._sinks: Tensor | None = None

    def keeps_codes(self, layer_name: str) -> bool:
        """Whether the layer of that name has proposal keys."""
        return self._can_have_codes and self._settings.proposes(layer_index(layer_name))

    def adapt_spec(self, layer_name: str, spec: Any, vllm_config: Any) -> Any:
        """vLLM's specification of the layer's cache, with room in each page for codes if it has some.

        Raises:
            ValueError: blocks of a size that vLLM would cut into smaller pages, which it cannot where they are padded.
        """
        if self._settings.keys != "proposal":
            return spec
        block_size = vllm_config.cache_config.block_size
        if block_size not in PAGE_SIZES:
            raise ValueError(
                f"santa: block_size is {block_size} while keys is 'proposal', which needs one of {list(PAGE_SIZES)}"
            )
        if self.keeps_codes(layer_name):
            codes = bytes_of_codes(spec.block_size, spec.num_kv_heads, spec.head_size)
            return dataclasses.replace(spec, page_size_padded=spec.page_size_bytes + codes)
        if spec.block_size < block_size and spec.page_size_padded is None:
            # Pages of windows have to be as large as the others. vLLM makes larger blocks of them where sizes are
            # multiples, which they no longer are, and pads them otherwise.
            return dataclasses.replace(spec, block_size=block_size)
        return spec

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values into the cache, and the codes of the keys."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self._layer is None:
            self._set_up(layer, key)
        if self._codes is not None:
            if self._checked_pages != kv_cache.data_ptr():
                self._check_pages(layer.layer_name, kv_cache)
            # vLLM pads tokens, but not their slots.
            self._codes.write(kv_cache, key[: len(slot_mapping)], slot_mapping)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.sinks is not None:
            self._sinks = self.sinks.detach().float().contiguous()

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SantaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's tokens, whose keys and values vLLM has written into the cache by now.

        Args:
            layer: vLLM's layer, for its name and its scales.
            query: [num_tokens, num_heads, head_size], bfloat16 or float16.
            key, value: of the new tokens; read where they tell the statistics of proposal keys.
            kv_cache: as in `layer_cache`.
            attn_metadata: None while vLLM measures memory: the output is 0 then.
            output: [num_tokens, num_heads, head_size], written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("santa: output_scale is given; the backend does not quantize its output")
        if self._layer is None:
            self._set_up(layer, query)
        if attn_metadata is None:
            # With as many tokens as there can be it is the measurement; ranks without work run a few as well.
            if query.shape[0] >= self._max_rows:
                self._layer.claim_memory(query, self.num_kv_heads, self._cache_dtype, self._max_rows, self._max_kv_len)
            return output.fill_(0)
        rows = attn_metadata.num_decodes
        codes = self._codes
        if attn_metadata.prompt is not None and codes is not None and not codes.is_frozen:
            first, last = attn_metadata.prompt
            # Waits for the device, once. Keys that were written nowhere are those of a warm-up.
            if attn_metadata.slot_mapping[first] >= 0:
                codes.freeze(kv_cache, layer_cache(kv_cache, self.head_size, self._cache_dtype), key[first:last])
        if attn_metadata.decode is not None:
            cache = layer_cache(kv_cache, self.head_size, self._cache_dtype)
            self._layer.run(
                output[:rows],
                self._lse[:rows],
                query[:rows],
                cache,
                attn_metadata.decode,
                k_scale=layer._k_scale if self._is_float8 else None,
                v_scale=layer._v_scale if self._is_float8 else None,
                sinks=self._sinks,
                proposal=None if codes is None else codes.proposal(kv_cache),
            )
        if attn_metadata.prefill is not None:
            self._prefill(layer, query[rows:], key, value, kv_cache, attn_metadata.prefill, output[rows:])
        return output

    def _set_up(self, layer: torch.nn.Module, query: Tensor) -> None:
        """What is known at the first call, which is never in a graph: the layer's name, the device and the dtype."""
        self._cache_dtype = torch.float8_e4m3fn if self._is_float8 else query.dtype
        # Santa writes the log-sum-exp, which nobody reads; captured graphs keep its address.
        self._lse = torch.empty(self._max_rows, self.num_heads, dtype=torch.float32, device=query.device)
        if self.sinks is not None and self._sinks is None:
            self._sinks = self.sinks.detach().float().contiguous()
        self._layer = DecodeLayer.of(
            self._settings,
            layer_index(layer.layer_name),
            sm_scale=self.scale,
            window_left=self.sliding_window[0],
            logits_soft_cap=float(self.logits_soft_cap),
            first_kv_head=self._first_kv_head,
            has_codes=self._can_have_codes,
        )
        if self._layer.proposes:
            k_scale = layer._k_scale if self._is_float8 else None
            self._codes = LayerCodes(self.num_kv_heads, self.head_size, query.device, k_scale)

    def _check_pages(self, layer_name: str, kv_cache: Tensor) -> None:
        """Refuse codes in memory that another layer uses.

        Where some layers have windows, vLLM has layers of several groups share memory, each with blocks of its own, and
        `freeze` codes all blocks.
        """
        codes = self._codes.pages(kv_cache)
        for name, other in self._layers.items():
            cache = getattr(other, "kv_cache", None)
            if name == layer_name or not isinstance(cache, Tensor) or cache.numel() == 0:
                continue
            impl = getattr(other, "impl", None)
            has_codes = isinstance(impl, SantaImpl) and impl._codes is not None
            if codes.overlap(pages_of(cache)) or (has_codes and codes.overlap(impl._codes.pages(cache))):
                raise ValueError(
                    f"santa: {layer_name} and {name} share the memory of their caches while keys is 'proposal', which "
                    "needs some for each layer with codes: leave one of them out of layers, or set "
                    "disable_hybrid_kv_cache_manager"
                )
        self._checked_pages = kv_cache.data_ptr()

    def _prefill(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
    ) -> None:
        if self._quantizes_prefill:
            flat, _ = ops.scaled_fp8_quant(query.reshape(query.shape[0], -1), layer._q_scale)
            query = flat.view(query.shape)
            # vLLM's layer has looked by now, and the parent asks whether queries are in 8 bits.
            self.supports_quant_query_input = True
        super().forward(layer, query, key, value, kv_cache, metadata, output)
