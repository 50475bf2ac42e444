"""Exact decoding in the Transformers integration: equal to Transformers' own, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.models import (
    FAMILIES,
    NEW_TOKENS,
    NUM_LAYERS,
    PADDING,
    PROMPT_LEN,
    VOCAB,
    WINDOW,
    generate,
    generate_static_compiled,
    make_model,
    make_prompt,
)
from transformers import BertConfig, BertModel, CompileConfig, DynamicCache, StaticCache

import santa
from santa.integrations import transformers as integration

# Compiling takes seconds, so padding, the harder case, stands for both on most models.
_GENERATION_CASES = [
    *((family, "dynamic", padded) for family in FAMILIES for padded in (False, True)),
    *((family, "static_compiled", True) for family in FAMILIES),
    ("llama", "static_compiled", False),
]


@pytest.mark.parametrize(("family", "cache", "padded"), _GENERATION_CASES)
def test_greedy_tokens_equal_transformers(family: str, cache: str, padded: bool) -> None:
    model, prompt = make_model(family), make_prompt(padding=PADDING if padded else 0)
    run = generate if cache == "dynamic" else generate_static_compiled
    tokens, logits = generate(model, prompt)
    integration.attach(model, santa.SantaConfig(num_samples=0))
    santa_tokens, santa_logits = run(model, prompt)
    assert torch.equal(santa_tokens, tokens)
    torch.testing.assert_close(santa_logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_decode_steps_go_through_the_operator(family: str, decode_calls: list[dict[str, Any]]) -> None:
    model = make_model(family)
    integration.attach(model, santa.SantaConfig(num_samples=0))
    generate(model, make_prompt())
    # The first token comes from the prefill.
    assert len(decode_calls) == NUM_LAYERS * (NEW_TOKENS - 1)


def test_the_attention_of_the_tiny_models_matters() -> None:
    """Guards the tests above: hiding one key must move the logits far beyond their tolerance."""
    prompt = make_prompt()
    _, logits = generate(make_model(), prompt)
    prompt["attention_mask"][:, 3] = 0
    _, other = generate(make_model(), prompt)
    assert (logits - other)[:, 1].abs().max() > 0.1


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "speculative_lookup"]
)
def test_other_generation_modes_equal_sdpa(kwargs: dict[str, Any]) -> None:
    model, prompt = make_model(), make_prompt()
    prompt = {name: x[:1] for name, x in prompt.items()}
    expected = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
    integration.attach(model, santa.SantaConfig(num_samples=0))
    assert torch.equal(model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs), expected)


# Few tokens, which santa decodes, and more, which are prefill; with chunks of a window, where a static cache counts its
# tokens in another way.
@pytest.mark.parametrize("chunks", [[7, 2, 3, 1, 5, 1], [9, 10], [WINDOW, 4, 3], [4, 9, 6]], ids=str)
@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_chunked_prefill_and_verification_equal_transformers(
    family: str, cache_type: type, padding: int, chunks: list[int]
) -> None:
    """Chunks of tokens into a cache that already holds some: the logits of every position."""
    prompt = make_prompt(padding=padding)
    assert sum(chunks) == PROMPT_LEN
    model = make_model(family)

    @torch.no_grad()
    def run() -> torch.Tensor:
        config = model.config
        cache = DynamicCache(config=config) if cache_type is DynamicCache else StaticCache(config, max_cache_len=32)
        logits, seen = [], 0
        positions = (prompt["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        for chunk in chunks:
            step = slice(seen, seen + chunk)
            seen += chunk
            output = model(
                input_ids=prompt["input_ids"][:, step],
                attention_mask=prompt["attention_mask"][:, :seen] if padding else None,
                position_ids=positions[:, step],
                past_key_values=cache,
            )
            logits.append(output.logits)
        return torch.cat(logits, dim=1)

    expected = run()
    integration.attach(model, santa.SantaConfig(num_samples=0))
    valid = prompt["attention_mask"].bool()
    torch.testing.assert_close(run()[valid], expected[valid], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunks", [[128, 128, 130], [256, 40, 90]], ids=str)
@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_chunks_that_sparse_prefill_would_take(family: str, cache_type: type, chunks: list[int]) -> None:
    """Masks of such steps are built when a layer asks for them: by then a static cache has counted their tokens."""
    tokens = torch.randint(2, VOCAB, (2, sum(chunks)), generator=torch.Generator().manual_seed(1))
    model = make_model(family, max_position_embeddings=512)

    @torch.no_grad()
    def run() -> torch.Tensor:
        config = model.config
        cache = DynamicCache(config=config) if cache_type is DynamicCache else StaticCache(config, max_cache_len=400)
        return torch.cat([model(chunk, past_key_values=cache).logits for chunk in tokens.split(chunks, 1)], dim=1)

    expected = run()
    integration.attach(model, santa.SantaConfig(num_samples=0))
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)


def test_padding_on_the_right_takes_the_exact_path(decode_calls: list[dict[str, Any]]) -> None:
    """Tokens generated after right padding leave a hole in the mask."""
    model, prompt = make_model(), make_prompt()
    prompt["attention_mask"][1, -PADDING:] = 0
    expected, _ = generate(model, prompt)
    integration.attach(model, santa.SantaConfig(num_samples=1, min_context=0))
    tokens, _ = generate(model, prompt)
    assert torch.equal(tokens, expected)
    assert not decode_calls


def test_manually_compiled_step_with_static_cache() -> None:
    """The mask function traced inside the graph: sampled without a padding mask, exact with one."""
    model = integration.attach(make_model(), santa.SantaConfig(num_samples=1, min_context=0))
    prompt = make_prompt()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")

    @torch.no_grad()
    def last_logits(forward: Callable[..., Any], **mask: torch.Tensor) -> torch.Tensor:
        torch.compiler.reset()
        cache = StaticCache(model.config, max_cache_len=32)
        model(input_ids=prompt["input_ids"][:, :-1], past_key_values=cache)
        return forward(input_ids=prompt["input_ids"][:, -1:], past_key_values=cache, **mask).logits

    sampled = last_logits(model)
    torch.testing.assert_close(last_logits(step), sampled, rtol=1e-3, atol=1e-3)
    exact = last_logits(step, attention_mask=prompt["attention_mask"])
    integration.attach(model, santa.SantaConfig(num_samples=0))
    torch.testing.assert_close(exact, last_logits(model), rtol=1e-3, atol=1e-3)
    assert (exact - sampled).abs().max() > 0.1


def test_encoders_keep_sdpa(decode_calls: list[dict[str, Any]]) -> None:
    """Attention that is not causal has no decode step, not even with one token."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    model = BertModel(BertConfig(**shape)).eval()
    input_ids = torch.tensor([[5], [6]])
    with torch.no_grad():
        expected = model(input_ids).last_hidden_state
        integration.register()
        model.set_attn_implementation("santa")
        torch.testing.assert_close(model(input_ids).last_hidden_state, expected)
    assert not decode_calls


@pytest.mark.gpu
def test_bf16_on_cuda_close_to_sdpa_and_static_generation_with_cuda_graphs() -> None:
    prompt = {name: x.cuda() for name, x in make_prompt(padding=PADDING).items()}
    model = make_model().to("cuda", torch.bfloat16)
    tokens, logits = generate(model, prompt)
    integration.attach(model, santa.SantaConfig(num_samples=0))

    @torch.no_grad()
    def teacher_forced() -> torch.Tensor:
        """Logits of the steps above given the same tokens, so that a tie cannot send two runs apart."""
        cache = DynamicCache(config=model.config)
        mask = prompt["attention_mask"]
        output = model(
            input_ids=prompt["input_ids"],
            attention_mask=mask,
            past_key_values=cache,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        )
        steps = [output.logits[:, -1]]
        for step in range(NEW_TOKENS - 1):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            output = model(
                input_ids=tokens[:, step : step + 1],
                attention_mask=mask,
                past_key_values=cache,
                position_ids=mask.sum(-1, keepdim=True) - 1,
            )
            steps.append(output.logits[:, -1])
        return torch.stack(steps, dim=1)

    # bfloat16 keeps 8 bits: the logits are a few roundings apart. A wrong mask moves them ten times further.
    scale = logits.float().std()
    assert (teacher_forced().float() - logits.float()).abs().max() < 0.1 * scale

    compiled = CompileConfig(fullgraph=True, mode="reduce-overhead")
    for num_samples in (0, 2):
        integration.attach(model, santa.SantaConfig(num_samples=num_samples, min_context=0))
        static_tokens, static_logits = generate(model, prompt, cache_implementation="static", compile_config=compiled)
        assert static_tokens.shape == tokens.shape
        assert torch.isfinite(static_logits).all()
