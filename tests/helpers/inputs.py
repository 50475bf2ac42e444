"""The samplers, budgets and sizes that are tested, and random inputs of the operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SAMPLERS = ["multinomial", "stratified", "systematic", "grouped"]
BUDGETS = ["proportional", "uniform", "streaming"]
# The samplers and budgets that go together.
SAMPLED = [
    (sampler, budget)
    for sampler in SAMPLERS
    for budget in (BUDGETS if sampler in ("systematic", "grouped") else BUDGETS[:1])
]
HEAD_DIMS = [64, 96, 128, 192, 256]


def dtypes_of(device: str) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16] + ([torch.float32] if device == "cpu" else [])


def working_dtype(device: str) -> torch.dtype:
    """The most accurate dtype of the device: what the sampling laws are tested in."""
    return torch.float32 if device == "cpu" else torch.float16


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """The CPU backend has so many in the block."""
    had = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(had)


def make_qkv(
    batch: int,
    num_qo_heads: int,
    num_kv_heads: int,
    kv_len: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "NHD",
    logit_std: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian inputs whose logits have standard deviation `logit_std` under the default scale; V has mean 1, so that a
    relative bias of the output shows."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, num_qo_heads, head_dim, generator=generator) * logit_std
    k = torch.randn(batch, kv_len, num_kv_heads, head_dim, generator=generator)
    v = torch.randn(batch, kv_len, num_kv_heads, head_dim, generator=generator) + 1.0
    if layout == "HND":
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def repeat_rows(tensor: Tensor, count: int) -> Tensor:
    """The one row of `tensor`, `count` times, without a copy: one call of the operator then makes `count` draws."""
    return tensor.expand(count, *tensor.shape[1:])
