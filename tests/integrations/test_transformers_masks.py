"""Masks, scales, soft caps and sinks handed to the attention function of the Transformers integration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.models import FakeAttention, layer_qkv, sdpa

import santa
from santa.integrations import transformers as integration
from santa.integrations.transformers.layers import LayerSettings, set_settings


def range_mask(kv_len: int, *ranges: tuple[int, int]) -> torch.Tensor:
    positions = torch.arange(kv_len)
    return torch.stack([(positions >= low) & (positions < high) for low, high in ranges])[:, None, None]


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    module = FakeAttention()
    set_settings(module, LayerSettings(santa.SantaConfig(num_samples=0)))
    return integration.attention(module, query, key, value, mask)[0]


@pytest.mark.parametrize("ranges", [[(0, 24), (5, 24)], [(3, 9), (0, 1)], [(2, 20)]])
def test_bool_mask_of_one_range_reaches_the_operator(
    ranges: list[tuple[int, int]], decode_calls: list[dict[str, Any]]
) -> None:
    query, key, value = layer_qkv()
    mask = range_mask(24, *ranges)
    torch.testing.assert_close(exact_attention(query, key, value, mask), sdpa(query, key, value, mask))
    (call,) = decode_calls
    both = ranges * (2 // len(ranges))
    assert call["kv_starts"].tolist() == [low for low, _ in both]
    assert call["kv_lens"].tolist() == [high - low for low, high in both]


def test_masks_that_are_no_range_take_the_exact_path(decode_calls: list[dict[str, Any]]) -> None:
    query, key, value = layer_qkv()
    holes = range_mask(24, (0, 24), (5, 24))
    holes[0, ..., 7] = False
    additive = torch.randn(2, 1, 1, 24, generator=torch.Generator().manual_seed(3))
    per_head = range_mask(24, (0, 9), (5, 24)).repeat(1, 8, 1, 1)
    per_head[:, 3, :, :8] = False
    for mask in (holes, additive, per_head):
        torch.testing.assert_close(exact_attention(query, key, value, mask), sdpa(query, key, value, mask))
    assert not decode_calls


@pytest.mark.parametrize("q_len", [1, 4])
def test_scaling_of_the_model_is_used(q_len: int) -> None:
    query, key, value = layer_qkv(q_len, kv_len=q_len + 20)
    module = FakeAttention()
    set_settings(module, LayerSettings(santa.SantaConfig(num_samples=0)))
    mask = None if q_len == 1 else torch.ones(1, 1, q_len, q_len + 20, dtype=torch.bool).tril(20)
    for options in ({}, {"s_aux": torch.full((8,), -1e4)}, {"softcap": 1e4}):
        out = integration.attention(module, query, key, value, mask, scaling=0.3, **options)[0]
        torch.testing.assert_close(out, sdpa(query * 0.3 * 8, key, value, mask), rtol=1e-3, atol=1e-3)


def test_causal_prefill_without_a_mask() -> None:
    """Without a mask, more than one query is causal, aligned to the first key, with and without a soft cap."""
    query, key, value = layer_qkv(q_len=6, kv_len=9)
    expected = sdpa(query, key, value, torch.ones(6, 9, dtype=torch.bool).tril())
    for options in ({}, {"softcap": 1e4}, {"s_aux": torch.full((8,), -1e4)}):
        out = integration.attention(FakeAttention(), query, key, value, None, **options)[0]
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("allow_skip", [False, True])
def test_mask_of_a_prefill_is_that_of_sdpa(allow_skip: bool) -> None:
    options = dict(batch_size=2, q_length=5, kv_length=5, allow_is_causal_skip=allow_skip, use_vmap=False)
    mask = integration.step_mask(**options)
    assert torch.equal(mask, torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5))


def test_row_without_valid_keys_gives_zeros() -> None:
    query, key, value = layer_qkv()
    out = exact_attention(query, key, value, range_mask(24, (0, 24), (0, 0)))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().max() > 0.01


@pytest.mark.parametrize("q_len", [1, 5])
def test_soft_cap_and_sinks_with_masks_per_head(q_len: int) -> None:
    """The exact path in plain PyTorch against the definition, without shortcuts for groups or blocks."""
    query, key, value = layer_qkv(q_len)
    mask = torch.rand(2, 8, q_len, 24, generator=torch.Generator().manual_seed(4)) < 0.7
    sinks = torch.linspace(-1, 2, 8)
    out = integration.attention(FakeAttention(), query, key, value, mask, softcap=2.0, s_aux=sinks)[0]
    scores = 2 * torch.tanh(query @ key.repeat_interleave(4, 1).transpose(-1, -2) / 8 / 2)
    weights = scores.exp() * mask
    weights = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[None, :, None, None])
    torch.testing.assert_close(out, (weights @ value.repeat_interleave(4, 1)).transpose(1, 2))
