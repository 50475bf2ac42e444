"""Sampled decoding in the Transformers integration, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.models import (
    NEW_TOKENS,
    NUM_LAYERS,
    PADDING,
    PROMPT_LEN,
    WINDOW,
    FakeAttention,
    generate,
    generate_static_compiled,
    layer_qkv,
    make_model,
    make_prompt,
)
from transformers import PreTrainedModel, StaticCache

import santa
from santa.integrations import transformers as integration
from santa.integrations.transformers.layers import LayerSettings, set_settings


def sampled_logits(model: PreTrainedModel, run: Callable[..., Any] = generate, **fields: Any) -> torch.Tensor:
    settings = {"num_samples": 2, "min_context": 0, **fields}
    integration.attach(model, santa.SantaConfig(**settings))
    return run(model, make_prompt(padding=PADDING))[1]


@pytest.mark.parametrize("sampler", ["multinomial", "stratified", "systematic", "grouped"])
def test_sampled_generation_is_reproducible_and_seeded(sampler: str) -> None:
    model = make_model()
    first = sampled_logits(model, sampler=sampler)
    assert torch.isfinite(first).all()
    assert torch.equal(first, sampled_logits(model, sampler=sampler))
    # The prefill is dense and equal; from the first decode step on, another seed is another estimate.
    other = sampled_logits(model, sampler=sampler, seed=1000)
    assert torch.equal(first[:, 0], other[:, 0])
    assert (first[:, 1] - other[:, 1]).abs().max() > 0.1


def test_static_compiled_samples_the_same_rows_as_dynamic() -> None:
    model = make_model()
    dynamic = sampled_logits(model)
    torch.testing.assert_close(sampled_logits(model, generate_static_compiled), dynamic, rtol=1e-3, atol=1e-3)


def test_compiled_model_follows_new_settings() -> None:
    """Settings are constants of the graph, so a change must recompile it."""
    model = make_model()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    prompt = make_prompt()

    @torch.no_grad()
    def logits(**fields: Any) -> torch.Tensor:
        integration.attach(model, santa.SantaConfig(min_context=0, **fields))
        cache = StaticCache(model.config, max_cache_len=32)
        model(input_ids=prompt["input_ids"][:, :-1], past_key_values=cache)
        return step(input_ids=prompt["input_ids"][:, -1:], past_key_values=cache).logits

    torch.compiler.reset()
    first = logits(num_samples=2)
    assert (first - logits(num_samples=2, seed=1000)).abs().max() > 0.1
    assert (first - logits(num_samples=2, sampler="systematic")).abs().max() > 0.01
    assert (first - logits(num_samples=0)).abs().max() > 0.1
    torch.testing.assert_close(logits(num_samples=2), first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_padding_and_batch_do_not_change_a_row(family: str) -> None:
    model, prompt = make_model(family), make_prompt(padding=PADDING)
    integration.attach(model, santa.SantaConfig(num_samples=2, min_context=0))
    _, together = generate(model, prompt)
    _, alone = generate(model, {name: x[1:, PADDING:] for name, x in prompt.items()})
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


def test_valid_ranges_of_each_step(decode_calls: list[dict[str, Any]]) -> None:
    model = integration.attach(make_model(), santa.SantaConfig(num_samples=0))
    generate(model, make_prompt(padding=PADDING), cache_implementation="static", disable_compile=True)
    assert len(decode_calls) == NUM_LAYERS * (NEW_TOKENS - 1)
    for index, call in enumerate(decode_calls):
        seen = PROMPT_LEN + 1 + index // NUM_LAYERS
        assert call["kv_starts"].tolist() == [0, PADDING]
        assert call["kv_lens"].tolist() == [seen, seen - PADDING]
        assert call["positions"].tolist() == [seen, seen - PADDING]
        assert call["kv_starts"].dtype == call["kv_lens"].dtype == torch.int32


def test_full_sliding_window_draws_fresh_numbers_each_step(decode_calls: list[dict[str, Any]]) -> None:
    """There kv_len stays the window size, so the row's position must tell the steps apart."""
    model = integration.attach(make_model("mistral"), santa.SantaConfig(num_samples=2, min_context=0))
    generate(model, make_prompt(padding=PADDING))
    in_layer_0 = decode_calls[::NUM_LAYERS]
    assert {tuple(call["kv_lens"].tolist()) for call in in_layer_0} == {(WINDOW, WINDOW)}
    assert len({tuple(call["positions"].tolist()) for call in in_layer_0}) == NEW_TOKENS - 1


def test_layers_draw_from_different_streams(decode_calls: list[dict[str, Any]]) -> None:
    query, key, value = layer_qkv()
    config = santa.SantaConfig(num_samples=2, min_context=0, seed=40)
    outputs = []
    for layer_idx in (0, 1):
        module = FakeAttention(layer_idx)
        set_settings(module, LayerSettings(config))
        outputs.append(integration.attention(module, query, key, value, None)[0])
    assert [call["seed"] for call in decode_calls] == [40, 41]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def test_only_the_named_layers_sample() -> None:
    model = make_model()
    integration.attach(model, santa.SantaConfig(num_samples=1, min_context=0, layers=[1]))
    with integration.record_rows_read(model) as record:
        generate(model, make_prompt(padding=PADDING))
    steps = NEW_TOKENS - 1
    assert {layer: len(rows) for layer, rows in record.rows_read.items()} == {0: steps, 1: steps}
    assert record.share(0) == 1.0
    assert all(
        torch.equal(rows, lens[:, None].expand(2, 2))
        for rows, lens in zip(record.rows_read[0], record.kv_lens[0], strict=True)
    )
    # One draw per query head: at most gqa_group_size rows of each KV head.
    assert all(int(rows.max()) <= 4 for rows in record.rows_read[1])
    assert 0 < record.share(1) < record.share() < 1


def test_recording_ends_with_the_block_and_refuses_graphs() -> None:
    model = integration.attach(make_model(), santa.SantaConfig(num_samples=1))
    with integration.record_rows_read(model) as record:
        pass
    generate(model, make_prompt())
    assert not record.rows_read
    assert record.share() != record.share()  # NaN
    with integration.record_rows_read(model), pytest.raises(Exception, match="record_rows_read"):
        generate_static_compiled(model, make_prompt())


def test_short_rows_are_exact_below_min_context() -> None:
    model, prompt = make_model(), make_prompt()
    expected, _ = generate(model, prompt)
    integration.attach(model, santa.SantaConfig(num_samples=1, min_context=PROMPT_LEN + NEW_TOKENS + 1))
    assert torch.equal(generate(model, prompt)[0], expected)
