"""The Transformers integration, on tiny randomly initialised models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.4.0")

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    CompileConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import santa  # noqa: E402
from santa.integrations import transformers as integration  # noqa: E402

VOCAB = 97
PAD = 0
NUM_LAYERS = 2
PROMPT_LEN, NEW_TOKENS, WINDOW = 19, 10, 12
PADDING = 6

# Large initial weights: with the usual 0.02 attention hardly moves the logits, and a wrong mask is not seen.
_SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    initializer_range=0.2,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=WINDOW)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SHAPE, sliding_window=WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=64)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_SHAPE,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    ),
}
# Transformers' SDPA knows neither the soft cap nor sinks: there, its eager attention is the truth.
_TRUTH = {"gemma2": "eager", "gpt_oss": "eager"}

pytestmark = pytest.mark.filterwarnings("ignore:.*caps its attention logits")


def make_model(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = _FAMILIES[family]().eval()
    model.set_attn_implementation(_TRUTH.get(family, "sdpa"))
    return model


def make_prompt(padded: bool) -> dict[str, torch.Tensor]:
    """Two prompts; if padded, the second is shorter and filled up on the left."""
    input_ids = torch.randint(2, VOCAB, (2, PROMPT_LEN), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    if padded:
        input_ids[1, :PADDING] = PAD
        attention_mask[1, :PADDING] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def fullgraph_on_cpu() -> CompileConfig:
    # Dynamo's capture is what the integration can break; Inductor would only add compile time.
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


def generate(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [batch, NEW_TOKENS] and their logits [batch, NEW_TOKENS, VOCAB]."""
    torch.compiler.reset()
    result = model.generate(
        **prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return result.sequences[:, prompt["input_ids"].shape[1] :], torch.stack(result.logits, dim=1)


def generate_static_compiled(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return generate(model, prompt, cache_implementation="static", compile_config=fullgraph_on_cpu())


@pytest.fixture
def decode_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every `santa.decode` call, tensors copied. For eager models."""
    calls: list[dict[str, Any]] = []
    decode = santa.decode

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()})
        return decode(*args, **kwargs)

    monkeypatch.setattr(santa, "decode", spy)
    return calls


class FakeAttention(torch.nn.Module):
    """What `attention` reads from a module: calls it without a model."""

    def __init__(self, layer_idx: int | None = 0, is_causal: bool = True, num_key_value_groups: int = 4) -> None:
        super().__init__()
        if layer_idx is not None:
            self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.num_key_value_groups = num_key_value_groups
        self.eval()


def make_qkv(q_len: int = 1, kv_len: int = 24, batch: int = 2, head_dim: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, 8, q_len, head_dim), (batch, 2, kv_len, head_dim), (batch, 2, kv_len, head_dim)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return out.transpose(1, 2)


# Settings -------------------------------------------------------------------------------------------


def test_importing_santa_does_not_import_transformers() -> None:
    code = "import sys, santa; santa.SantaConfig(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_normalises() -> None:
    config = santa.SantaConfig(sampler="Systematic", budget=1, layers=[3, 1, 3])
    assert config.sampler is santa.Sampler.SYSTEMATIC
    assert config.budget is santa.Budget.UNIFORM
    assert config.layers == (1, 3)
    assert [config.samples_in_layer(i) for i in range(4)] == [0, 256, 0, 256]
    assert santa.SantaConfig(sampler="grouped", budget="proportional") == santa.SantaConfig()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_samples": -1}, ValueError, "num_samples is -1; it needs to be from 0 to 1048576"),
        (
            {"num_samples": (1 << 20) + 1},
            ValueError,
            "num_samples is 1048577; it needs to be from 0 to 1048576",
        ),
        ({"num_samples": 2.5}, TypeError, "num_samples is 2.5; it needs to be an int"),
        ({"num_samples": True}, TypeError, "num_samples is True; it needs to be an int"),
        (
            {"sampler": "best"},
            ValueError,
            "sampler is 'best'; it needs to be one of .*'grouped'.* or a santa.Sampler",
        ),
        ({"sampler": 7}, ValueError, "sampler is 7; it needs to be one of"),
        (
            {"budget": None},
            ValueError,
            "budget is None; it needs to be one of .*'uniform'.* or a santa.Budget",
        ),
        ({"seed": -1}, ValueError, "seed is -1; it needs to be from 0"),
        ({"seed": 1 << 62}, ValueError, "seed is 4611686018427387904; it needs to be from 0"),
        ({"min_context": -5}, ValueError, "min_context is -5; it needs to be from 0"),
        ({"min_context": "8"}, TypeError, "min_context is '8'; it needs to be an int"),
        ({"layers": 3}, TypeError, "layers is 3; it needs to be None or a collection of layer indices"),
        ({"layers": [0, -1]}, ValueError, "layers is -1; it needs to be from 0"),
        ({"layers": ["0"]}, TypeError, "layers is '0'; it needs to be an int"),
    ],
)
def test_config_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        santa.SantaConfig(**fields)


def test_register_twice_then_select_by_name() -> None:
    integration.register()
    integration.register()
    model = LlamaForCausalLM._from_config(LlamaConfig(**_SHAPE), attn_implementation="santa")
    assert model.config._attn_implementation == "santa"


def test_model_with_attached_config_can_be_saved(tmp_path: Any) -> None:
    model = integration.attach(make_model(), santa.SantaConfig(num_samples=8))
    model.save_pretrained(tmp_path)
    assert "santa_config" not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation != "santa"


# Exact decoding: equal to Transformers' -------------------------------------------------------------


# Compiling takes seconds, so padding, the harder case, stands for both on most models.
_GENERATION_CASES = [
    *((family, "dynamic", padded) for family in _FAMILIES for padded in (False, True)),
    *((family, "static_compiled", True) for family in _FAMILIES),
    ("llama", "static_compiled", False),
]


@pytest.mark.parametrize(("family", "cache", "padded"), _GENERATION_CASES)
def test_greedy_tokens_equal_transformers(family: str, cache: str, padded: bool) -> None:
    model, prompt = make_model(family), make_prompt(padded)
    run = generate if cache == "dynamic" else generate_static_compiled
    tokens, logits = generate(model, prompt)
    integration.attach(model, santa.SantaConfig(num_samples=0))
    santa_tokens, santa_logits = run(model, prompt)
    assert torch.equal(santa_tokens, tokens)
    torch.testing.assert_close(santa_logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", list(_FAMILIES))
def test_decode_steps_go_through_the_operator(family: str, decode_calls: list[dict[str, Any]]) -> None:
    model = integration.attach(make_model(family), santa.SantaConfig(num_samples=0))
    generate(model, make_prompt(padded=False))
    # The first token comes from the prefill. A soft cap is outside the operator.
    assert len(decode_calls) == (0 if family == "gemma2" else NUM_LAYERS * (NEW_TOKENS - 1))


def test_the_attention_of_the_tiny_models_matters() -> None:
    """Guards the tests above: hiding one key must move the logits far beyond their tolerance."""
    prompt = make_prompt(padded=False)
    _, logits = generate(make_model(), prompt)
    prompt["attention_mask"][:, 3] = 0
    _, other = generate(make_model(), prompt)
    assert (logits - other)[:, 1].abs().max() > 0.1


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "speculative_lookup"]
)
def test_other_generation_modes_equal_sdpa(kwargs: dict[str, Any]) -> None:
    model, prompt = make_model(), make_prompt(padded=False)
    prompt = {name: x[:1] for name, x in prompt.items()}
    expected = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
    integration.attach(model, santa.SantaConfig(num_samples=0))
    assert torch.equal(model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs), expected)


@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_chunked_prefill_and_verification_equal_transformers(family: str, cache_type: type) -> None:
    """Chunks of 7 to 1 tokens into a cache that already holds some: the logits of every position."""
    prompt = make_prompt(padded=True)
    chunks = [7, 2, 3, 1, 5, 1]
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
                attention_mask=prompt["attention_mask"][:, :seen],
                position_ids=positions[:, step],
                past_key_values=cache,
            )
            logits.append(output.logits)
        return torch.cat(logits, dim=1)

    expected = run()
    integration.attach(model, santa.SantaConfig(num_samples=0))
    valid = prompt["attention_mask"].bool()
    torch.testing.assert_close(run()[valid], expected[valid], rtol=1e-3, atol=1e-3)


def test_padding_on_the_right_takes_the_exact_path(decode_calls: list[dict[str, Any]]) -> None:
    """Tokens generated after right padding leave a hole in the mask."""
    model, prompt = make_model(), make_prompt(padded=False)
    prompt["attention_mask"][1, -PADDING:] = 0
    expected, _ = generate(model, prompt)
    integration.attach(model, santa.SantaConfig(num_samples=1, min_context=0))
    tokens, _ = generate(model, prompt)
    assert torch.equal(tokens, expected)
    assert not decode_calls


def test_manually_compiled_step_with_static_cache() -> None:
    """The mask function traced inside the graph: sampled without a padding mask, exact with one."""
    model = integration.attach(make_model(), santa.SantaConfig(num_samples=1, min_context=0))
    prompt = make_prompt(padded=False)
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


# Sampled decoding -----------------------------------------------------------------------------------


def sampled_logits(model: PreTrainedModel, run: Callable[..., Any] = generate, **fields: Any) -> torch.Tensor:
    settings = {"num_samples": 2, "min_context": 0, **fields}
    integration.attach(model, santa.SantaConfig(**settings))
    return run(model, make_prompt(padded=True))[1]


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
    prompt = make_prompt(padded=False)

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
    model, prompt = make_model(family), make_prompt(padded=True)
    integration.attach(model, santa.SantaConfig(num_samples=2, min_context=0))
    _, together = generate(model, prompt)
    _, alone = generate(model, {name: x[1:, PADDING:] for name, x in prompt.items()})
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


def test_valid_ranges_of_each_step(decode_calls: list[dict[str, Any]]) -> None:
    model = integration.attach(make_model(), santa.SantaConfig(num_samples=0))
    generate(model, make_prompt(padded=True), cache_implementation="static", disable_compile=True)
    assert len(decode_calls) == NUM_LAYERS * (NEW_TOKENS - 1)
    for index, call in enumerate(decode_calls):
        seen = PROMPT_LEN + 1 + index // NUM_LAYERS
        assert call["kv_starts"].tolist() == [0, PADDING]
        assert call["kv_lens"].tolist() == [seen, seen - PADDING]
        assert call["row_seeds"].tolist() == [seen, seen - PADDING]
        assert call["kv_starts"].dtype == call["kv_lens"].dtype == torch.int32


def test_full_sliding_window_draws_fresh_numbers_each_step(decode_calls: list[dict[str, Any]]) -> None:
    """There kv_len stays the window size, so the row's position must tell the steps apart."""
    model = integration.attach(make_model("mistral"), santa.SantaConfig(num_samples=2, min_context=0))
    generate(model, make_prompt(padded=True))
    in_layer_0 = decode_calls[::NUM_LAYERS]
    assert {tuple(call["kv_lens"].tolist()) for call in in_layer_0} == {(WINDOW, WINDOW)}
    assert len({tuple(call["row_seeds"].tolist()) for call in in_layer_0}) == NEW_TOKENS - 1


def test_layers_draw_from_different_streams(decode_calls: list[dict[str, Any]]) -> None:
    query, key, value = make_qkv()
    config = santa.SantaConfig(num_samples=2, min_context=0, seed=40)
    outputs = []
    for layer_idx in (0, 1):
        module = FakeAttention(layer_idx)
        module._santa_config = config
        outputs.append(integration.attention(module, query, key, value, None)[0])
    assert [call["seed"] for call in decode_calls] == [40, 41]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def test_only_the_named_layers_sample() -> None:
    model = make_model()
    integration.attach(model, santa.SantaConfig(num_samples=1, min_context=0, layers=[1]))
    with integration.record_rows_read(model) as record:
        generate(model, make_prompt(padded=True))
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
    generate(model, make_prompt(padded=False))
    assert not record.rows_read
    assert record.share() != record.share()  # NaN
    with integration.record_rows_read(model), pytest.raises(Exception, match="record_rows_read"):
        generate_static_compiled(model, make_prompt(padded=False))


def test_short_rows_are_exact_below_min_context() -> None:
    model, prompt = make_model(), make_prompt(padded=False)
    expected, _ = generate(model, prompt)
    integration.attach(model, santa.SantaConfig(num_samples=1, min_context=PROMPT_LEN + NEW_TOKENS + 1))
    assert torch.equal(generate(model, prompt)[0], expected)


# Masks handed in from outside -----------------------------------------------------------------------


def range_mask(kv_len: int, *ranges: tuple[int, int]) -> torch.Tensor:
    positions = torch.arange(kv_len)
    return torch.stack([(positions >= low) & (positions < high) for low, high in ranges])[:, None, None]


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    module = FakeAttention()
    module._santa_config = santa.SantaConfig(num_samples=0)
    return integration.attention(module, query, key, value, mask)[0]


@pytest.mark.parametrize("ranges", [[(0, 24), (5, 24)], [(3, 9), (0, 1)], [(2, 20)]])
def test_bool_mask_of_one_range_reaches_the_operator(
    ranges: list[tuple[int, int]], decode_calls: list[dict[str, Any]]
) -> None:
    query, key, value = make_qkv()
    mask = range_mask(24, *ranges)
    torch.testing.assert_close(exact_attention(query, key, value, mask), sdpa(query, key, value, mask))
    (call,) = decode_calls
    both = ranges * (2 // len(ranges))
    assert call["kv_starts"].tolist() == [low for low, _ in both]
    assert call["kv_lens"].tolist() == [high - low for low, high in both]


def test_masks_that_are_no_range_take_the_exact_path(decode_calls: list[dict[str, Any]]) -> None:
    query, key, value = make_qkv()
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
    query, key, value = make_qkv(q_len, kv_len=q_len + 20)
    module = FakeAttention()
    module._santa_config = santa.SantaConfig(num_samples=0)
    mask = None if q_len == 1 else torch.ones(1, 1, q_len, q_len + 20, dtype=torch.bool).tril(20)
    for options in ({}, {"s_aux": torch.full((8,), -1e4)}, {"softcap": 1e4}):
        out = integration.attention(module, query, key, value, mask, scaling=0.3, **options)[0]
        torch.testing.assert_close(out, sdpa(query * 0.3 * 8, key, value, mask), rtol=1e-3, atol=1e-3)


def test_causal_prefill_without_a_mask() -> None:
    """Without a mask, more than one query is causal, aligned to the first key, with and without a soft cap."""
    query, key, value = make_qkv(q_len=6, kv_len=9)
    expected = sdpa(query, key, value, torch.ones(6, 9, dtype=torch.bool).tril())
    for options in ({}, {"softcap": 1e4}, {"s_aux": torch.full((8,), -1e4)}):
        out = integration.attention(FakeAttention(), query, key, value, None, **options)[0]
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("allow_skip", [False, True])
def test_mask_of_a_prefill_is_that_of_sdpa(allow_skip: bool) -> None:
    options = dict(batch_size=2, q_length=5, kv_length=5, allow_is_causal_skip=allow_skip, use_vmap=False)
    mask = integration.decode_ranges(**options)
    assert (mask is None) == allow_skip
    if mask is not None:
        assert torch.equal(mask, torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5))


def test_row_without_valid_keys_gives_zeros() -> None:
    query, key, value = make_qkv()
    out = exact_attention(query, key, value, range_mask(24, (0, 24), (0, 0)))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().max() > 0.01


@pytest.mark.parametrize("q_len", [1, 5])
def test_soft_cap_and_sinks_with_masks_per_head(q_len: int) -> None:
    """The exact path in plain PyTorch against the definition, without shortcuts for groups or blocks."""
    query, key, value = make_qkv(q_len)
    mask = torch.rand(2, 8, q_len, 24, generator=torch.Generator().manual_seed(4)) < 0.7
    sinks = torch.linspace(-1, 2, 8)
    out = integration.attention(FakeAttention(), query, key, value, mask, softcap=2.0, s_aux=sinks)[0]
    scores = 2 * torch.tanh(query @ key.repeat_interleave(4, 1).transpose(-1, -2) / 8 / 2)
    weights = scores.exp() * mask
    weights = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[None, :, None, None])
    torch.testing.assert_close(out, (weights @ value.repeat_interleave(4, 1)).transpose(1, 2))


# Errors ---------------------------------------------------------------------------------------------


def test_soft_cap_warns_that_nothing_is_sampled() -> None:
    query, key, value = make_qkv()
    with pytest.warns(UserWarning, match="FakeAttention caps its attention logits .*are not sampled"):
        integration.attention(FakeAttention(), query, key, value, None, softcap=50.0)


def test_dropout_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.1; it needs to be 0"):
        integration.attention(FakeAttention(), *make_qkv(), None, dropout=0.1)


def test_training_is_refused() -> None:
    model = integration.attach(make_model(), santa.SantaConfig()).train()
    with pytest.raises(
        NotImplementedError,
        match="the model is in training mode with gradients on; it needs to be in inference",
    ):
        model(**make_prompt(padded=False))
    with torch.no_grad():
        model(**make_prompt(padded=False))


@pytest.mark.parametrize("q_len", [1, 5])
def test_unsupported_head_dim_is_refused_at_the_first_call(q_len: int) -> None:
    with pytest.raises(ValueError, match=r"FakeAttention has head_dim 80; it needs one of .*64"):
        integration.attention(FakeAttention(), *make_qkv(q_len, head_dim=80), None)
    query, key, value = make_qkv(q_len)
    with pytest.raises(ValueError, match="head_dim 64 with values of 32"):
        integration.attention(FakeAttention(), query, key, value[..., :32], None)


def test_unsupported_dtypes_are_refused_at_the_first_call() -> None:
    query, key, value = (x.double() for x in make_qkv())
    with pytest.raises(TypeError, match="runs in float64 on cpu; it needs to be bfloat16 or float16 or float32"):
        integration.attention(FakeAttention(), query, key, value, None)
    with torch._subclasses.FakeTensorMode():
        query, key, value = (torch.empty(2, 8, 1, 64, device="cuda") for _ in range(3))
        with pytest.raises(TypeError, match="runs in float32 on cuda; it needs to be bfloat16 or float16"):
            integration.attention(FakeAttention(num_key_value_groups=1), query, key, value, None)


def test_module_without_layer_idx_is_refused() -> None:
    with pytest.raises(ValueError, match="FakeAttention has no layer_idx"):
        integration.attention(FakeAttention(layer_idx=None), *make_qkv(), None)


def test_attach_errors() -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"config is a dict; it needs to be a santa\.SantaConfig"):
        integration.attach(model, {"num_samples": 4})
    with pytest.raises(
        ValueError,
        match=r"layers has \[7\]; it needs to name attention layers of LlamaForCausalLM, which are \[0, 1\]",
    ):
        integration.attach(model, santa.SantaConfig(layers=[0, 7]))
    narrow = LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "head_dim": 80}))
    with pytest.raises(ValueError, match="LlamaAttention has head_dim 80"):
        integration.attach(narrow)
    encoder = BertModel(BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="model is a BertModel; it needs to have causal attention layers"):
        integration.attach(encoder)
    for refused in (model, narrow, encoder):
        assert refused.config._attn_implementation != "santa"


# GPU ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bf16_on_cuda_close_to_sdpa_and_static_generation_with_cuda_graphs() -> None:
    prompt = {name: x.cuda() for name, x in make_prompt(padded=True).items()}
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


@pytest.mark.gpu
def test_float32_on_cuda_is_refused() -> None:
    model = integration.attach(make_model().cuda(), santa.SantaConfig())
    with pytest.raises(TypeError, match="LlamaAttention runs in float32 on cuda; it needs to be bfloat16 or float16"):
        model(make_prompt(padded=False)["input_ids"].cuda())
