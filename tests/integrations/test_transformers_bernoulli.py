"""Bernoulli scores in the Transformers integration, on a tiny random model."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.models import NUM_LAYERS, VOCAB, make_model
from transformers import DynamicCache, PreTrainedModel, StaticCache

import santa
from santa.integrations.transformers import attach, record_rows_read

HEAD_DIM, PROMPT_LEN, STEPS = 64, 37, 4


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(num_attention_heads=4, head_dim=HEAD_DIM)


def bernoulli(num_draws: int, **options: Any) -> santa.SantaConfig:
    options = {"num_samples": 0, "min_context": 0, "score": "bernoulli"} | options
    return santa.SantaConfig(num_draws=num_draws, **options)


@torch.inference_mode()
def decode(
    model: PreTrainedModel, config: santa.SantaConfig, static: bool = False, padding: int = 0
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Logits [2, STEPS, VOCAB] of decode steps, and what `santa.decode` was given. Row 1 has `padding` on its left."""
    attach(model, config)
    tokens = torch.randint(1, VOCAB, (2, PROMPT_LEN + STEPS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    calls, original = [], santa.decode

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
        calls.append(given | {"k": k})
        return original(q, k, v, **given)

    with mock.patch.object(santa, "decode", recording):
        model(tokens[:, :PROMPT_LEN], attention_mask=mask[:, :PROMPT_LEN], past_key_values=cache)
        logits = [
            model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits[:, -1]
            for i in range(PROMPT_LEN, PROMPT_LEN + STEPS)
        ]
    return torch.stack(logits, dim=1), calls


def test_config() -> None:
    config = bernoulli(8, score_sampler="shared", layers=[1])
    assert config.score_sampler is santa.ScoreSampler.SHARED
    assert [config.draws_scores(layer) for layer in range(3)] == [False, True, False]
    assert not santa.SantaConfig().draws_scores(0)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"score": "ternary"}, ValueError, "score is 'ternary'; it needs to be one of .*'exact', 'bernoulli'"),
        ({"num_draws": 0}, ValueError, "num_draws is 0; it needs to be from 1 to 4096"),
        ({"num_draws": 4097}, ValueError, "num_draws is 4097; it needs to be from 1 to 4096"),
        ({"num_draws": None}, TypeError, "num_draws is None; it needs to be an int"),
        ({"score_sampler": "grouped"}, ValueError, "score_sampler is 'grouped'; it needs to be one of .*'shared'"),
    ],
)
def test_config_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        santa.SantaConfig(**fields)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
def test_many_draws_come_close_to_exact_scores(model: PreTrainedModel, static: bool, padding: int) -> None:
    exact, _ = decode(model, santa.SantaConfig(num_samples=0), static, padding)
    many, calls = decode(model, bernoulli(4096, score_sampler="systematic"), static, padding)
    one, _ = decode(model, bernoulli(1), static, padding)
    assert torch.allclose(many, exact, atol=0.05)
    assert float((one - exact).abs().max()) > 0.5
    assert len(calls) == NUM_LAYERS * STEPS
    assert all(call["k"].shape[2] == HEAD_DIM and call["k"].is_contiguous() for call in calls)


def test_caches_give_the_same_draws(model: PreTrainedModel) -> None:
    config = bernoulli(2, num_samples=8, seed=7)
    dynamic, calls = decode(model, config)
    static, _ = decode(model, config, static=True)
    assert torch.allclose(dynamic, static, atol=1e-4)
    assert [call["seed"] for call in calls[:NUM_LAYERS]] == [7, 8]


def test_layers_that_are_left_out_score_exactly(model: PreTrainedModel) -> None:
    with record_rows_read(model) as record:
        _, calls = decode(model, bernoulli(1, layers=[1]))
    assert [call.get("score", "exact") for call in calls] == ["exact", "bernoulli"] * STEPS
    assert list(record.features_read) == [1] and record.head_dims == {1: HEAD_DIM}
    assert len(record.features_read[1]) == STEPS and record.features_read[1][0].shape == (2, 2)
    # Two heads per KV head, each of whose features is drawn with the mean probability |q| / max|q|, 0.3 or so.
    assert 0.2 < record.feature_share() == record.feature_share(1) < 0.9
    assert record.share() == 1


def test_nothing_is_recorded_of_exact_scores(model: PreTrainedModel) -> None:
    with record_rows_read(model) as record:
        decode(model, santa.SantaConfig(num_samples=0))
    assert not record.features_read and record.feature_share() != record.feature_share()  # NaN
