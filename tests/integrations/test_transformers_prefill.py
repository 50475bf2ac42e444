"""Sparse prefill in the Transformers integration: where it runs, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.models import NUM_LAYERS, make_model, make_prompt
from transformers import DynamicCache, PreTrainedModel, StaticCache

import santa
from santa.integrations import transformers as integration
from santa.integrations.transformers import attach

PROMPT_LEN, NEW_TOKENS = 600, 4
# Room for a prompt of PROMPT_LEN, which is long enough for sparse prefill.
LONG: dict[str, Any] = {"num_attention_heads": 4, "max_position_embeddings": 2048}


def sparse(alpha: float | tuple[float, float] = 0.3, **options: Any) -> santa.SantaConfig:
    """Decode is exact, so that prefill is the only thing that differs from dense attention."""
    return santa.SantaConfig(num_samples=0, prefill="sample", alpha=alpha, prefill_backend="reference", **options)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, prompt: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return model(**prompt, **options).logits


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    options = {"disable_compile": True} | options
    return model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **options)[:, -NEW_TOKENS:]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, dict[str, Any]]]:
    """(q_len, kv_len, options) of each `santa.prefill`."""
    found: list[tuple[int, int, dict[str, Any]]] = []
    prefill = santa.prefill

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        found.append((q.shape[2], k.shape[2], options))
        return prefill(q, k, v, **options)

    monkeypatch.setattr(santa, "prefill", spy)
    return found


def lengths(calls: list[tuple[int, int, dict[str, Any]]]) -> list[tuple[int, int]]:
    return [call[:2] for call in calls]


def test_alpha_1_gives_the_tokens_of_dense_attention(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected, expected_logits = generate(model, prompt), logits_of(model, prompt)
    attach(model, sparse(1.0))
    assert torch.equal(generate(model, prompt), expected)
    assert torch.allclose(logits_of(model, prompt), expected_logits, atol=1e-3)
    assert lengths(calls) == [(PROMPT_LEN, PROMPT_LEN)] * NUM_LAYERS * 2


def test_a_low_alpha_changes_the_logits_and_repeats_itself(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    dense = logits_of(model, prompt)
    attach(model, sparse((0.1, 0.2)))
    first = logits_of(model, prompt)
    assert not torch.allclose(first, dense, atol=1e-2)
    assert torch.equal(first, logits_of(model, prompt))
    assert calls[0][2]["alpha"] == (0.1, 0.2) and calls[0][2]["backend"] == "reference"


def test_dense_is_the_default(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected = logits_of(model, prompt)
    attach(model, santa.SantaConfig(num_samples=0))
    assert model.config._attn_implementation == integration.NAME
    assert torch.equal(logits_of(model, prompt), expected) and not calls


def test_auto_is_dense_for_short_prompts(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected = logits_of(model, prompt)
    attach(model, santa.SantaConfig(num_samples=0, prefill="sample", alpha=0.1))
    assert torch.allclose(logits_of(model, prompt), expected, atol=1e-3)
    assert len(calls) == NUM_LAYERS and calls[0][2]["backend"] == "auto"


def test_settings_can_be_changed_back(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected = logits_of(model, prompt)
    attach(model, sparse())
    attach(model, santa.SantaConfig(num_samples=0))
    assert torch.equal(logits_of(model, prompt), expected) and not calls


def test_decode_after_it_is_the_same_as_before(calls):
    """Decode steps read the cache that prefill has filled; with the same cache they give the same bits."""
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    token = torch.full((2, 1), 5)
    outputs = []
    for config in (sparse(1.0), santa.SantaConfig(num_samples=0)):
        attach(model, santa.SantaConfig(num_samples=0))
        cache = DynamicCache(config=model.config)
        logits_of(model, prompt, past_key_values=cache)
        attach(model, config)
        mask = torch.ones(2, PROMPT_LEN + 1, dtype=torch.int64)
        outputs.append(logits_of(model, {"input_ids": token, "attention_mask": mask}, past_key_values=cache))
    assert torch.equal(*outputs) and not calls


def test_sampled_decode_works_beside_it(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    attach(model, santa.SantaConfig(num_samples=16, min_context=0, prefill="sample", prefill_backend="reference"))
    with integration.record_rows_read(model) as record:
        generate(model, prompt)
    assert len(calls) == NUM_LAYERS and len(record.rows_read[0]) == NEW_TOKENS - 1


def test_static_cache(calls):
    """Its unused tail is cut off: prefill sees the keys of the prompt alone."""
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected = generate(model, prompt)
    attach(model, sparse(1.0))
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)
    assert lengths(calls) == [(PROMPT_LEN, PROMPT_LEN)] * NUM_LAYERS


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_chunks_at_multiples_of_128_are_sparse_and_others_dense(calls, cache_class):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected = logits_of(model, prompt)
    attach(model, sparse(1.0))
    cache = (
        DynamicCache(config=model.config)
        if cache_class is DynamicCache
        else StaticCache(config=model.config, max_cache_len=PROMPT_LEN + 50)
    )
    got = []
    for start, stop in ((0, 256), (256, 400), (400, 600)):
        chunk = {"input_ids": prompt["input_ids"][:, start:stop], "attention_mask": prompt["attention_mask"][:, :stop]}
        got.append(logits_of(model, chunk, past_key_values=cache))
    assert torch.allclose(torch.cat(got, dim=1), expected, atol=1e-3)
    # The third chunk starts at 400.
    assert lengths(calls) == [(256, 256)] * NUM_LAYERS + [(144, 400)] * NUM_LAYERS


def test_a_padded_batch_is_dense(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN, padding=9)
    expected = generate(model, prompt)
    attach(model, sparse(0.1))
    assert torch.equal(generate(model, prompt), expected) and not calls


def test_packed_sequences_are_dense(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN, batch=1)
    ids = prompt["input_ids"]
    # Transformers looks for restarting positions where there is neither a cache nor a mask.
    packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(300), torch.arange(300)])[None]}
    expected = logits_of(model, packed, use_cache=False)
    attach(model, sparse(0.1))
    assert torch.allclose(logits_of(model, packed, use_cache=False), expected, atol=1e-3) and not calls


@pytest.mark.parametrize("length", [2, 127])
def test_fewer_than_128_queries_are_dense(calls, length):
    """Verification of speculated tokens among them."""
    model, prompt = make_model(**LONG), make_prompt(length)
    expected = logits_of(model, prompt)
    attach(model, sparse(0.1))
    assert torch.equal(logits_of(model, prompt), expected) and not calls


def test_layers_that_are_left_out_are_dense(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    attach(model, sparse(0.1, layers=[1]))
    logits_of(model, prompt)
    assert len(calls) == 1


def test_without_a_cache_and_without_a_mask(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected = logits_of(model, prompt)
    attach(model, sparse(1.0))
    got = logits_of(model, {"input_ids": prompt["input_ids"]}, use_cache=False)
    assert torch.allclose(got, expected, atol=1e-3) and len(calls) == NUM_LAYERS


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "gpt_oss"], ids=["sliding window", "soft cap", "attention sinks"]
)
def test_what_prefill_has_no_kernel_for_is_exact(calls, family):
    model, prompt = make_model(family, **LONG, sliding_window=200), make_prompt(PROMPT_LEN)
    model.set_attn_implementation("eager")
    expected = logits_of(model, prompt)
    attach(model, sparse(0.1))
    assert torch.allclose(logits_of(model, prompt), expected, atol=1e-3)
    assert not calls


def test_a_compiled_model_is_dense(calls):
    model, prompt = make_model(**LONG), make_prompt(PROMPT_LEN)
    expected = logits_of(model, prompt)
    attach(model, sparse(0.1))
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits_of(compiled, prompt), expected, atol=1e-3) and not calls


@pytest.mark.gpu
def test_flex_in_a_model_on_cuda(calls):
    """In chunks, so that queries and keys differ in number; bfloat16 logits of two layers with large weights."""
    model = make_model(**LONG).to("cuda", torch.bfloat16)
    prompt = {name: x.cuda() for name, x in make_prompt(PROMPT_LEN).items()}
    expected = logits_of(model, prompt).float()
    attach(model, santa.SantaConfig(num_samples=0, prefill="sample", alpha=1.0, prefill_backend="flex"))
    cache, got = DynamicCache(config=model.config), []
    for start, stop in ((0, 256), (256, 600)):
        chunk = {"input_ids": prompt["input_ids"][:, start:stop], "attention_mask": prompt["attention_mask"][:, :stop]}
        got.append(logits_of(model, chunk, past_key_values=cache).float())
    difference = torch.cat(got, dim=1) - expected
    assert difference.norm() < 0.05 * expected.norm()
    assert lengths(calls) == [(256, 256)] * NUM_LAYERS + [(344, 600)] * NUM_LAYERS


# Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"prefill": "sparse"}, ValueError, r"santa: prefill is 'sparse'; it needs to be one of \['dense', 'sample'\]"),
        ({"prefill_backend": "fa3"}, ValueError, r"santa: prefill_backend is 'fa3'; it needs to be one of .*'flex'.*"),
        ({"alpha": 2.0}, ValueError, r"santa: alpha is 2.0; it needs to be from 0 to 1"),
        ({"alpha": (0.5,)}, ValueError, r"santa: alpha has 1 entries; .*"),
        ({"alpha": None}, TypeError, r"santa: alpha is a NoneType; it needs to be a float"),
    ],
)
def test_bad_settings(options, error, match):
    with pytest.raises(error, match=match):
        santa.SantaConfig(**options)


def test_a_head_dim_that_only_decode_has():
    model = make_model(**LONG, head_dim=96)
    with pytest.raises(ValueError, match=r"LlamaAttention has head_dim 96; prefill 'sample' needs one of \(64, 128\)"):
        attach(model, sparse())
    attach(model, santa.SantaConfig())
