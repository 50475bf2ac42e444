"""As much of vLLM as its FlashAttention backend shows to santa's, on the CPU: for tests of the layer and the builder.

The parent's attention is exact attention in plain PyTorch. tests/integrations/test_vllm_interface.py holds the names
and signatures against vLLM's own.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from santa.integrations.vllm.cache import layer_cache


class MultipleOf:
    def __init__(self, base: int) -> None:
        self.base = base


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER = "encoder"


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_SINGLE_TOKEN_DECODE = 1


@dataclass
class Common:
    """CommonAttentionMetadata."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None

    def replace(self, **changes: Any) -> Common:
        return dataclasses.replace(self, **changes)


class FlashAttentionBackend:
    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    def supports_combination(cls, head_size: int, *args: Any) -> str | None:
        return None


@dataclass(frozen=True)
class FullAttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    page_size_padded: int | None = None

    @property
    def page_size_bytes(self) -> int:
        real = 2 * self.block_size * self.num_kv_heads * self.head_size * self.dtype.itemsize
        return self.page_size_padded or real


class Attention:
    """A layer."""

    def __init__(self, name: str, impl: Any, spec: Any) -> None:
        self.layer_name, self.impl, self._spec = name, impl, spec
        self.kv_cache = torch.empty(0)

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self._spec


@dataclass
class FlashAttentionMetadata:
    common: Common

    @property
    def num_actual_tokens(self) -> int:
        return self.common.num_actual_tokens


class FlashAttentionMetadataBuilder:
    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.device = device

    def _init_reorder_batch_threshold(self, reorder_batch_threshold: int) -> None:
        self.reorder_batch_threshold = reorder_batch_threshold

    def build(self, common_prefix_len: int, common_attn_metadata: Common, fast_build: bool = False) -> Any:
        return FlashAttentionMetadata(common_attn_metadata)


class FlashAttentionImpl:
    queries_in_8_bits = False  # what FlashAttention-3 takes with a float8 cache

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: Any = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.sliding_window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0
        self.sinks = sinks
        self.supports_quant_query_input = True

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        pass

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        is_float8 = self.kv_cache_dtype.startswith("fp8")
        cache = layer_cache(kv_cache, self.head_size, torch.float8_e4m3fn if is_float8 else kv_cache.dtype)
        written = slot_mapping >= 0
        slots = slot_mapping[written]
        scales = (layer._k_scale, layer._v_scale) if is_float8 else (1.0, 1.0)
        for pages, new, scale in zip(cache, (key, value), scales, strict=True):
            rows = (new[: len(slot_mapping)][written] / scale).to(pages.dtype)
            pages.view(torch.uint8)[slots // pages.shape[1], slots % pages.shape[1]] = rows.view(torch.uint8)

    def forward(
        self, layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor, attn_metadata: Any, output: Tensor
    ) -> Tensor:
        common = attn_metadata.common
        if self.kv_cache_dtype.startswith("fp8"):
            assert query.dtype == torch.float8_e4m3fn and self.supports_quant_query_input
            cache_dtype, scales = torch.float8_e4m3fn, (layer._k_scale, layer._v_scale)
            query = query.float() * layer._q_scale
        else:
            cache_dtype, scales = kv_cache.dtype, (1.0, 1.0)
        starts = common.query_start_loc.tolist()
        for row, length in enumerate(common.seq_lens.tolist()):
            first, last = starts[row], starts[row + 1]
            q = query[first:last]
            rows = layer_rows(kv_cache, common.block_table_tensor[row], length, self.head_size, cache_dtype, scales)
            output[first:last] = reference(self, q, *rows).to(output.dtype)
        return output


def layer_rows(
    kv_cache: Tensor, table: Tensor, length: int, head_dim: int, dtype: torch.dtype, scales: tuple[Any, Any]
) -> tuple[Tensor, Tensor]:
    """K and V of one request, [length, num_kv_heads, head_dim], in float64."""
    cache = layer_cache(kv_cache, head_dim, dtype)
    return tuple(
        pages[table.long()].flatten(0, 1)[:length].double() * scale for pages, scale in zip(cache, scales, strict=True)
    )


def reference(impl: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact causal attention in float64 of the last tokens of a request: [tokens, num_heads, head_dim]."""
    group = impl.num_heads // impl.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("thd,nhd->htn", q.double(), k) * impl.scale
    if impl.logits_soft_cap:
        logits = impl.logits_soft_cap * torch.tanh(logits / impl.logits_soft_cap)
    position = torch.arange(len(k) - len(q), len(k))[:, None]
    hidden = torch.arange(len(k)) > position
    if impl.sliding_window[0] >= 0:
        hidden |= torch.arange(len(k)) < position - impl.sliding_window[0]
    logits = logits.masked_fill(hidden, -torch.inf)
    if impl.sinks is not None:
        logits = torch.cat([logits, impl.sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
    p = logits.softmax(-1)[..., : len(k)]
    return torch.einsum("htn,nhd->thd", p, v)


def split_decodes_and_prefills(common: Common, decode_threshold: int = 1) -> tuple[int, int, int, int]:
    lens = common.query_start_loc_cpu.diff()
    decodes = int((lens <= decode_threshold).sum())
    tokens = int(lens[:decodes].sum())
    return decodes, common.num_reqs - decodes, tokens, common.num_actual_tokens - tokens


def scaled_fp8_quant(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (x / scale).to(torch.float8_e4m3fn), scale


def make_config(santa: dict[str, Any], **model: Any) -> SimpleNamespace:
    """As much of a VllmConfig as is looked at."""
    fields = {"rswa_window": None, "max_model_len": 512, "total_num_kv_heads": 2, "num_layers": 4} | model
    return SimpleNamespace(
        additional_config={"santa": santa},
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, use_ubatching=False),
        model_config=SimpleNamespace(
            rswa_window=fields["rswa_window"],
            max_model_len=fields["max_model_len"],
            get_total_num_hidden_layers=lambda: fields["num_layers"],
            get_total_num_kv_heads=lambda: fields["total_num_kv_heads"],
        ),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8, static_forward_context={}),
        scheduler_config=SimpleNamespace(max_num_seqs=6, max_num_batched_tokens=256),
        cache_config=SimpleNamespace(block_size=16),
    )


class Runner:
    """A model runner of the first kind, for as many rows as it is told."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=[])

    def _update_states(self, scheduler_output: Any) -> None:
        self.input_batch.req_ids = list(scheduler_output.num_scheduled_tokens)


def install(monkeypatch: pytest.MonkeyPatch, config: Any, rank: int = 0, size: int = 1) -> None:
    """Put these in vLLM's place, for modules that are imported from now on; santa's own are imported anew."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.25.0", "_custom_ops": SimpleNamespace(scaled_fp8_quant=scaled_fp8_quant)},
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {
            "get_tensor_model_parallel_rank": lambda: rank,
            "get_tensor_model_parallel_world_size": lambda: size,
        },
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {},
        "vllm.model_executor.layers.attention.attention": {
            "Attention": type("Attention", (Attention,), dict(vars(Attention)))
        },
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionCGSupport": AttentionCGSupport,
            "AttentionType": AttentionType,
            "MultipleOf": MultipleOf,
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.flash_attn": {
            "FlashAttentionBackend": FlashAttentionBackend,
            "FlashAttentionImpl": FlashAttentionImpl,
            "FlashAttentionMetadata": FlashAttentionMetadata,
            "FlashAttentionMetadataBuilder": FlashAttentionMetadataBuilder,
        },
        "vllm.v1.attention.backends.utils": {"split_decodes_and_prefills": split_decodes_and_prefills},
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": type("GPUModelRunner", (Runner,), dict(vars(Runner)))},
    }
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    for name, members in contents.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("attention", "backend", "compat", "metadata"):
        monkeypatch.delitem(sys.modules, f"santa.integrations.vllm.{name}", raising=False)
