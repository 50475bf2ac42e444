"""Soft caps, sinks and windows that layers hand over are sampled; so is the verification of speculated tokens, where
it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.models import (
    NEW_TOKENS,
    NUM_LAYERS,
    PADDING,
    WINDOW,
    FakeAttention,
    generate,
    layer_qkv,
    make_model,
    make_prompt,
    sdpa,
)
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import santa
from santa.integrations import transformers as integration
from santa.integrations.transformers import attach, report
from santa.integrations.transformers.layers import LayerSettings, set_settings

EXACT = santa.SantaConfig(num_samples=0)
SAMPLED = santa.SantaConfig(num_samples=2, min_sampled_len=0)
SOFT_CAP = 5.0  # of the tiny Gemma 2


def verifying(num_samples: int, most: int = 8, **fields: Any) -> santa.SantaConfig:
    return santa.SantaConfig(num_samples=num_samples, min_sampled_len=0, max_sampled_q_len=most, **fields)


def layer(config: santa.SantaConfig) -> FakeAttention:
    module = FakeAttention()
    set_settings(module, LayerSettings(config))
    return module


# Features of models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_decode_steps_sample_with_the_features_of_the_model(family: str, decode_calls: list[dict[str, Any]]) -> None:
    """That `num_samples=0` gives the tokens of Transformers is in test_transformers.py."""
    model = attach(make_model(family), EXACT)
    _, exact = generate(model, make_prompt(padding=PADDING))
    decode_calls.clear()
    attach(model, SAMPLED)
    assert [layer.status for layer in report(model).layers] == ["sampled"] * NUM_LAYERS
    _, logits = generate(model, make_prompt(padding=PADDING))
    assert torch.equal(logits[:, 0], exact[:, 0]) and (logits - exact)[:, 1:].abs().max() > 0.01
    assert len(decode_calls) == NUM_LAYERS * (NEW_TOKENS - 1)
    sinks = [getattr(layer.self_attn, "sinks", None) for layer in model.model.layers]
    for index, call in enumerate(decode_calls):
        assert call["num_samples"] == 2
        assert call["logits_soft_cap"] == (SOFT_CAP if family == "gemma2" else None)
        if family == "gpt_oss":
            assert torch.equal(call["sinks"], sinks[index % NUM_LAYERS].detach())
        else:
            assert call["sinks"] is None
    # The first layer of each has a window, which is the range that the mask leaves.
    assert all((call["kv_lens"] == WINDOW).all() for call in decode_calls[::NUM_LAYERS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_with_cap_and_sinks_is_attention(dtype: torch.dtype, device: str) -> None:
    """Against the definition, in float64. Sinks come in the model's dtype."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("no kernels")
    query, key, value = (x.to(device, dtype) for x in layer_qkv(kv_len=300))
    sinks = torch.linspace(-1, 6, 8).to(device, dtype)
    mask = (torch.arange(300, device=device) >= torch.tensor([[0], [70]], device=device))[:, None, None]
    options = dict(scaling=0.3, softcap=2.0, s_aux=sinks)
    out = integration.attention(layer(EXACT), query, key, value, mask, **options)[0]
    expected = attention_by_definition(query, key, value, mask, **options)
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    without = attention_by_definition(query, key, value, mask, **options | {"s_aux": None})
    assert (expected - without).abs().max() > 0.05


def attention_by_definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float, s_aux: Tensor | None
) -> Tensor:
    query, key, value = query.double(), *(x.double().repeat_interleave(4, 1) for x in (key, value))
    weights = (softcap * torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap)).exp() * mask
    mass = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        mass = mass + s_aux.double().exp()[None, :, None, None]
    return (weights / mass @ value).transpose(1, 2)


@pytest.mark.parametrize("sampler", ["grouped", "systematic"])
def test_estimates_with_cap_and_sinks_are_unbiased(sampler: str) -> None:
    query, key, value = layer_qkv(kv_len=150, batch=1)
    options = dict(softcap=2.0, s_aux=torch.linspace(-1, 4, 8), scaling=0.3)
    expected = integration.attention(layer(EXACT), query, key, value, None, **options)[0]
    draws = []
    for seed in range(3000):
        config = santa.SantaConfig(num_samples=4, min_sampled_len=0, sampler=sampler, seed=seed)
        draws.append(integration.attention(layer(config), query, key, value, None, **options)[0][0])
    projected, largest = mean_z(torch.stack(draws), expected[0])
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST


def test_bernoulli_scores_of_capped_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="Gemma2Attention caps its attention logits; score needs to be 'exact'"):
        attach(make_model("gemma2"), santa.SantaConfig(score="bernoulli"))


def test_bernoulli_scores_beside_sinks(decode_calls: list[dict[str, Any]]) -> None:
    """The operator of Bernoulli scores has no sinks: with many draws the output is that of exact scores."""
    query, key, value = layer_qkv(batch=1)
    sinks = torch.linspace(-1, 4, 8)
    expected = integration.attention(layer(EXACT), query, key, value, None, s_aux=sinks)[0]
    config = santa.SantaConfig(num_samples=0, score="bernoulli", num_draws=4096, score_sampler="systematic")
    out = integration.attention(layer(config), query, key, value, None, s_aux=sinks)[0]
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    assert "sinks" not in decode_calls[-1] and decode_calls[-1]["score"] == "bernoulli"


# Several tokens at once -------------------------------------------------------------------------------------


@torch.no_grad()
def steps(model: PreTrainedModel, chunks: list[int], padding: int = 0, static: bool = False) -> Tensor:
    """The logits of a prompt that is handed over in chunks."""
    prompt = make_prompt(sum(chunks), padding=padding)
    cache = StaticCache(model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    positions = (prompt["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    logits, seen = [], 0
    for chunk in chunks:
        step = slice(seen, seen + chunk)
        seen += chunk
        output = model(
            input_ids=prompt["input_ids"][:, step],
            attention_mask=prompt["attention_mask"][:, :seen],
            position_ids=positions[:, step],
            past_key_values=cache,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padding", [0, PADDING])
def test_verification_goes_through_the_operator_and_is_exact_without_samples(
    family: str, static: bool, padding: int, decode_calls: list[dict[str, Any]]
) -> None:
    chunks = [11, 2, 8, 5]
    model = make_model(family)
    expected = steps(model, chunks, padding, static)
    attach(model, verifying(0))
    found = steps(model, chunks, padding, static)
    valid = make_prompt(sum(chunks), padding=padding)["attention_mask"].bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-3, atol=1e-3)
    # Layers with a window see a band of keys.
    num_layers = NUM_LAYERS if family == "llama" else 1
    assert [call["q_shape"][1] for call in decode_calls] == [chunk for chunk in chunks[1:] for _ in range(num_layers)]
    for index, call in enumerate(decode_calls[::num_layers]):
        seen = sum(chunks[: index + 2])
        assert call["kv_starts"].tolist() == [0, padding]
        assert call["kv_lens"].tolist() == call["positions"].tolist() == [seen, seen - padding]
        assert call["kv_lens"].dtype == torch.int32


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_short_steps_are_exact_unless_asked_for(static: bool, decode_calls: list[dict[str, Any]]) -> None:
    """By default all of them; with the option those that are longer, and prompts, which nothing comes before."""
    model, chunks = make_model(), [4, 3, 6]
    expected = steps(model, chunks, static=static)
    for config in (SAMPLED, verifying(2, 1), verifying(2, 2)):
        attach(model, config)
        torch.testing.assert_close(steps(model, chunks, static=static), expected, rtol=1e-3, atol=1e-3)
    assert not decode_calls
    attach(model, verifying(2, 5))
    found = steps(model, chunks, static=static)
    torch.testing.assert_close(found[:, :4], expected[:, :4], rtol=1e-3, atol=1e-3)
    assert (found - expected)[:, 4:7].abs().max() > 0.01
    assert {call["q_shape"][1] for call in decode_calls} == {3} and len(decode_calls) == NUM_LAYERS


@pytest.mark.parametrize("where", ["between", "at the end"])
def test_padding_that_leaves_holes_is_exact(where: str, decode_calls: list[dict[str, Any]]) -> None:
    model = make_model()

    @torch.no_grad()
    def run() -> Tensor:
        prompt, cache = make_prompt(16), DynamicCache(config=model.config)
        prompt["attention_mask"][1, 9 if where == "between" else -1] = 0
        first = {name: x[:, :12] for name, x in prompt.items()}
        model(**first, past_key_values=cache)
        return model(prompt["input_ids"][:, 12:], prompt["attention_mask"], past_key_values=cache).logits

    expected = run()
    attach(model, verifying(2))
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    assert not decode_calls


@pytest.mark.parametrize("touch", ["user's", "written to"])
def test_a_mask_without_its_notes_is_exact(touch: str, decode_calls: list[dict[str, Any]]) -> None:
    query, key, value = layer_qkv(q_len=3)
    mask = integration.step_mask(batch_size=2, q_length=3, kv_length=24, q_offset=21)
    if touch == "user's":
        mask = mask.clone()
    else:
        mask[..., 4] = False
    out = integration.attention(layer(verifying(2)), query, key, value, mask)[0]
    torch.testing.assert_close(out, sdpa(query, key, value, mask))
    assert not decode_calls


def test_notes_follow_a_mask_to_another_device(decode_calls: list[dict[str, Any]]) -> None:
    """The meta device stands for another GPU."""
    mask = integration.step_mask(batch_size=2, q_length=3, kv_length=24, q_offset=21)
    moved = mask.to("meta")
    ranges = integration.masks.ranges_of_several(moved)
    assert ranges.device.type == "meta" and ranges.shape == (3, 2)
    assert integration.masks.ranges_of_several(mask).tolist() == [[0, 0], [24, 24], [24, 24]]
    mask[..., 4] = False
    assert integration.masks.ranges_of_several(mask.to("meta")) is None


@pytest.mark.parametrize(
    ("offset", "kept", "ranges"),
    [(5, 9, [[0], [9], [9]]), (5, 12, [[0], [9], [9]]), (0, 9, None), (6, 9, None)],
    ids=["all", "room left", "a prompt", "not all are kept"],
)
def test_static_caches_count_on_the_device(offset: int, kept: int, ranges: list[list[int]] | None) -> None:
    """Their tokens so far are a tensor, which they add to in place, after the mask is made."""
    so_far = torch.tensor(offset)
    mask = integration.step_mask(batch_size=1, q_length=4, kv_length=kept, q_offset=so_far)
    so_far += 4
    found = integration.masks.ranges_of_several(mask)
    assert (None if found is None else found.tolist()) == ranges


def test_estimates_of_several_tokens_are_unbiased() -> None:
    query, key, value = layer_qkv(q_len=4, kv_len=100, batch=1)
    mask = integration.step_mask(batch_size=1, q_length=4, kv_length=100, q_offset=96)
    expected = integration.attention(layer(verifying(0)), query, key, value, mask)[0]
    torch.testing.assert_close(expected, sdpa(query, key, value, mask))
    draws = [
        integration.attention(layer(verifying(4, seed=seed)), query, key, value, mask)[0][0] for seed in range(2000)
    ]
    projected, largest = mean_z(torch.stack(draws), expected[0])
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_speculative_generation(how: str, decode_calls: list[dict[str, Any]]) -> None:
    """Without samples the tokens of SDPA; with samples, verification samples."""
    model = make_model()
    prompt = {name: x[:1].repeat(1, 3) for name, x in make_prompt(6).items()}  # repeats itself: something to look up
    options = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": make_model()}

    def run() -> list[int]:
        decode_calls.clear()
        # Transformers 5.4 looks nothing up without a last token.
        result = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1, **options)
        return result[0, prompt["input_ids"].shape[1] :].tolist()

    expected = run()
    attach(model, verifying(0))
    assert run() == expected
    several = [call for call in decode_calls if len(call["q_shape"]) == 4]
    assert several and {call["q_shape"][1] for call in several} <= set(range(2, 9))
    attach(model, verifying(2))
    sampled = run()
    assert sampled == run() != expected
    assert any(len(call["q_shape"]) == 4 for call in decode_calls)
    assert all(call["num_samples"] == 2 for call in decode_calls)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_sampled_q_len": 0}, ValueError, "max_sampled_q_len is 0; it needs to be from 1 to 8"),
        ({"max_sampled_q_len": 9}, ValueError, "max_sampled_q_len is 9; it needs to be from 1 to 8"),
        ({"max_sampled_q_len": 2.0}, TypeError, r"max_sampled_q_len is 2\.0; it needs to be an int"),
        (
            {"max_sampled_q_len": 2, "score": "bernoulli"},
            ValueError,
            "max_sampled_q_len is 2 while score is 'bernoulli', .*; it needs to be 1",
        ),
    ],
)
def test_config_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        santa.SantaConfig(**fields)
