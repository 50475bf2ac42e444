"""One layer: rows with one new token go to santa, the others to FlashAttention."""

from __future__ import annotations

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

from .cache import layer_cache
from .decode import DecodeLayer
from .metadata import SantaMetadata, max_rows
from .settings import check_engine, first_kv_head, layer_index


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
        self._lse: Tensor | None = None
        self._sinks: Tensor | None = None

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
            key, value: of the new tokens; not read.
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
            )
        if attn_metadata.prefill is not None:
            self._prefill(layer, query[rows:], key, value, kv_cache, attn_metadata.prefill, output[rows:])
        return output

    def _set_up(self, layer: torch.nn.Module, query: Tensor) -> None:
        """What is known at the first call: the layer's name, the device and the dtype."""
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
        )

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
