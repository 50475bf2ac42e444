"""The vLLM backend's layer, builder and cache over stand-ins for vLLM's classes, and steps for them."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import vllm_stub
from helpers.vllm_stub import Common, layer_rows, make_config, reference

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 8, 2, 64, 16, 100
EXACT = {"num_samples": 0}
# Of a page, in bytes.
CODES = BLOCK * KV_HEADS * (DIM // 2 + 2)


def load(monkeypatch: pytest.MonkeyPatch, santa: dict[str, Any], rank: int = 0, size: int = 1, **model: Any) -> Any:
    """The package over the stub, with `config`."""
    config = make_config(santa, **model)
    vllm_stub.install(monkeypatch, config, rank, size)
    backend = importlib.import_module("santa.integrations.vllm.backend")
    attention, metadata = (sys.modules[f"santa.integrations.vllm.{name}"] for name in ("attention", "metadata"))
    return SimpleNamespace(config=config, backend=backend, attention=attention, metadata=metadata)


def make_builder(package: Any) -> Any:
    return package.metadata.SantaMetadataBuilder(
        None, ["model.layers.1.self_attn.attn"], package.config, torch.device("cpu")
    )


def make_impl(package: Any, **options: Any) -> Any:
    arguments = dict(
        num_heads=HEADS,
        head_size=DIM,
        scale=0.2,
        num_kv_heads=KV_HEADS,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
    )
    impl = package.attention.SantaImpl(**arguments | options)
    impl.process_weights_after_loading(torch.bfloat16)
    return impl


def make_layer(index: int = 1, scale: float = 1.0) -> Any:
    scales = {name: torch.tensor(scale) for name in ("_q_scale", "_k_scale", "_v_scale")}
    return SimpleNamespace(layer_name=f"model.layers.{index}.self_attn.attn", **scales)


def make_step(lens: list[int], new_tokens: list[int]) -> Common:
    """Rows in vLLM's order: those with one new token first."""
    starts = torch.tensor([0, *new_tokens]).cumsum(0).int()
    pages = 12
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3))[: len(lens) * pages]
    return Common(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        num_reqs=len(lens),
        num_actual_tokens=sum(new_tokens),
        max_query_len=max(new_tokens),
        max_seq_len=max(lens),
        block_table_tensor=table.view(len(lens), pages).int(),
        slot_mapping=torch.arange(sum(new_tokens)),
        seq_lens_cpu_upper_bound=torch.tensor(lens, dtype=torch.int32),
    )


def make_cache(layout: str = "0.25", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    if layout == "0.25":
        return torch.randn(BLOCKS, 2, BLOCK, KV_HEADS, DIM, generator=generator).to(dtype)
    return torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * DIM, generator=generator).to(dtype)


def padded_cache(layout: str = "0.25", dtype: torch.dtype = torch.bfloat16, padding: int = CODES) -> Tensor:
    """Pages with `padding` bytes behind each, as vLLM makes them of its zeroed memory."""
    page = 2 * BLOCK * KV_HEADS * DIM * dtype.itemsize + padding
    raw = torch.zeros(BLOCKS * page, dtype=torch.uint8).view(dtype)
    stride = page // dtype.itemsize
    if layout.startswith("0.33"):
        heads, tokens = (BLOCK * 2 * DIM, 2 * DIM) if layout.endswith("HND") else (2 * DIM, KV_HEADS * 2 * DIM)
        return raw.as_strided((BLOCKS, KV_HEADS, BLOCK, 2 * DIM), (stride, heads, tokens, 1))
    shape = (BLOCKS, 2, BLOCK, KV_HEADS, DIM)
    heads, tokens = (BLOCK * DIM, DIM) if layout.endswith("HND") else (DIM, KV_HEADS * DIM)
    return raw.as_strided(shape, (stride, BLOCK * KV_HEADS * DIM, tokens, heads, 1))


def run(impl: Any, layer: Any, cache: Tensor, metadata: Any, tokens: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """A step's query and output; vLLM pads both."""
    query = torch.randn(tokens + padding, HEADS, DIM, generator=torch.Generator().manual_seed(5)).bfloat16()
    output = torch.full_like(query, torch.nan)
    assert impl.forward(layer, query, None, None, cache, metadata, output) is output
    return query, output


def check(impl: Any, step: Common, query: Tensor, output: Tensor, cache: Tensor, scale: float = 1.0) -> None:
    """Against exact attention in float64."""
    dtype = torch.float8_e4m3fn if cache.dtype == torch.uint8 else cache.dtype
    starts = step.query_start_loc_cpu.tolist()
    for row, length in enumerate(step.seq_lens.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        k, v = layer_rows(cache, step.block_table_tensor[row], length, DIM, dtype, (scale, scale))
        expected = reference(impl, query[tokens], k, v)
        torch.testing.assert_close(output[tokens].double(), expected, atol=2e-2, rtol=2e-2)
