"""Proposal keys in the Transformers integration: codes that follow the cache, and what is drawn by them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from packaging import version

pytest.importorskip("transformers", minversion="5.4.0")

import evaluate
import transformers
from helpers.models import (
    NEW_TOKENS,
    NUM_LAYERS,
    PADDING,
    PROMPT_LEN,
    VOCAB,
    generate,
    generate_static_compiled,
    make_model,
    make_prompt,
)
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

import santa
from santa.integrations import transformers as integration
from santa.integrations.transformers import proposals

MAX_LEN = 64
CACHES = ["dynamic", "static"]


def settings(**options: Any) -> santa.SantaConfig:
    return santa.SantaConfig(**{"keys": "proposal", "num_samples": 4, "min_sampled_len": 0, **options})


def attached(family: str = "llama", **options: Any) -> PreTrainedModel:
    return integration.attach(make_model(family), settings(**options))


def make_cache(kind: str, model: PreTrainedModel) -> Any:
    return StaticCache(model.config, max_cache_len=MAX_LEN) if kind == "static" else DynamicCache(config=model.config)


def some_tokens(count: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))


class Session:
    """Steps of a model with a cache, token by token, row 1 padded on the left."""

    def __init__(self, model: PreTrainedModel, cache: Any, padding: int = 0) -> None:
        self.model, self.cache, self.padding, self.length = model, cache, padding, 0

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, VOCAB] of the last."""
        self.length += tokens.shape[1]
        mask = torch.ones(tokens.shape[0], self.length, dtype=torch.long)
        mask[1:, : self.padding] = 0
        return self.model(tokens, attention_mask=mask, past_key_values=self.cache).logits[:, -1]

    def steps(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.step(token) for token in tokens.split(1, dim=1)], dim=1)

    def crop(self, count: int) -> None:
        for layer in self.cache.layers:
            layer.crop(-count)
        self.length -= count


def by_hand(keys: torch.Tensor, prompt_len: int, starts: torch.Tensor) -> santa.ProposalKeys:
    """Proposal keys of [batch, num_kv_heads, kv_len, head_dim], with statistics of the first prompt_len."""
    lens = prompt_len - starts
    made = santa.make_proposal_keys(keys[:, :, :prompt_len], lens, kv_starts=starts, kv_layout="HND")
    scale = torch.where((lens < 16)[:, None, None], 1.0, made.channel_scale)
    return santa.make_proposal_keys(keys, kv_layout="HND", center=made.center, channel_scale=scale)


def padded(batch: int, padding: int = 0) -> torch.Tensor:
    starts = torch.full((batch,), padding, dtype=torch.int32)
    starts[0] = 0
    return starts


def check_codes(cache: Any, length: int, prompt_len: int, padding: int = 0) -> None:
    """Codes beside the cache are those of its keys, bit for bit."""
    for layer in cache.layers:
        keys = layer.keys[:, :, :length]
        codes = proposals.codes_of(layer.keys)
        assert codes.pending == 0
        expected = by_hand(keys, prompt_len, padded(len(keys), padding))
        found = codes.keys(length)
        for name, tensor in expected.tensors().items():
            assert torch.equal(found.tensors()[name], tensor), name


@contextmanager
def decode_calls(
    make: Callable[[torch.Tensor, dict[str, Any]], santa.ProposalKeys] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """The options of every `santa.decode`. make: proposals for it from the very keys that it gets, whatever the cache
    has beside them."""
    calls, decode = [], santa.decode

    def instead(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        calls.append(options | {"q": q, "k": k})
        if make is not None:
            end = int((options["kv_starts"] + options["kv_lens"]).max())
            k, v = k[:, :, :end], v[:, :, :end]
            options["proposal"] = make(k, options)
        return decode(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(santa, "decode", instead)
        yield calls


def reset(session: Session) -> None:
    with torch.inference_mode():
        session.cache.reset()
    session.length = 0
    if int(session.cache.get_seq_length()) > 0:
        pytest.skip("growing caches of this release of Transformers are not empty after a reset")


def of_prompt(prompt_len: int) -> Any:
    return decode_calls(lambda k, options: by_hand(k, prompt_len, options["kv_starts"]))


# What is drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padding", [0, PADDING])
def test_logits_are_those_of_proposals_made_by_hand(cache: str, padding: int) -> None:
    model, prompt = attached(seed=7), make_prompt(padding=padding)
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    with decode_calls() as calls:
        tokens, logits = generate(model, prompt, **options)
    assert len(calls) == NUM_LAYERS * (NEW_TOKENS - 1) and all("proposal" in call for call in calls)
    assert [call["seed"] for call in calls[:NUM_LAYERS]] == [7, 8]
    with of_prompt(PROMPT_LEN):
        expected_tokens, expected = generate(model, prompt, **options)
    assert torch.equal(logits, expected) and torch.equal(tokens, expected_tokens)
    # They are no exact scores.
    integration.attach(model, settings(keys="exact", seed=7))
    assert (generate(model, prompt, **options)[1] - logits).abs().max() > 0.1


def test_caches_compiled_or_not_give_the_same() -> None:
    model, prompt = attached(), make_prompt(padding=PADDING)
    _, dynamic = generate(model, prompt)
    _, static = generate(model, prompt, cache_implementation="static", disable_compile=True)
    _, compiled = generate_static_compiled(model, prompt)
    torch.testing.assert_close(static, dynamic, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled, dynamic, rtol=1e-3, atol=1e-3)


def test_a_row_of_a_padded_batch_is_as_alone() -> None:
    model, prompt = attached(), make_prompt(padding=PADDING)
    _, together = generate(model, prompt)
    _, alone = generate(model, {name: x[1:, PADDING:] for name, x in prompt.items()})
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"min_sampled_len": MAX_LEN}], ids=["exact", "short"])
@pytest.mark.parametrize("padding", [0, PADDING])
def test_exact_tokens_equal_sdpa(options: dict[str, int], padding: int) -> None:
    model, prompt = make_model(), make_prompt(padding=padding)
    modes = [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}]
    one = {name: x[:1] for name, x in prompt.items()}
    expected = [generate(model, prompt)[0]] + [generate(model, one, **mode)[0] for mode in modes]
    integration.attach(model, settings(**options))
    found = [generate(model, prompt)[0]] + [generate(model, one, **mode)[0] for mode in modes]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert torch.equal(generate_static_compiled(model, prompt)[0], expected[0])


@pytest.mark.parametrize("cache", CACHES)
def test_beams(cache: str) -> None:
    """Beams of one prompt share its statistics; what each has generated is its own."""
    model, prompt = attached(), {name: x[:1] for name, x in make_prompt().items()}
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        change = proposals.CacheCodes.change_rows
        patch.setattr(proposals.CacheCodes, "change_rows", lambda *args: (moved.append(1), change(*args)))
        tokens = generate(model, prompt, num_beams=3, **options)[0]
    assert len(moved) >= NUM_LAYERS * (NEW_TOKENS - 2)
    with of_prompt(PROMPT_LEN):
        assert torch.equal(tokens, generate(model, prompt, num_beams=3, **options)[0])
    assert torch.equal(tokens, generate(model, prompt, num_beams=3)[0])


@pytest.mark.parametrize("max_sampled_q_len", [1, 8])
def test_assisted_decoding(max_sampled_q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification steps of several tokens, and crops of what they reject. Statistics are of what the first steps
    verified too."""
    model = attached(max_sampled_q_len=max_sampled_q_len)
    prompt = {name: x[:1].repeat(1, 2) for name, x in make_prompt().items()}
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB}  # early releases need an end, here never made
    crops, crop = [], proposals._FollowedLayer.crop
    monkeypatch.setattr(proposals._FollowedLayer, "crop", lambda *args: (crops.append(args[1]), crop(*args)))
    with decode_calls() as calls:
        tokens, logits = generate(model, prompt, **options)
    assert any(crops) and any(call["q"].dim() == 4 for call in calls) == (max_sampled_q_len > 1)

    def make(k: torch.Tensor, options: dict[str, Any]) -> santa.ProposalKeys:
        given = options["proposal"]
        return santa.make_proposal_keys(k, kv_layout="HND", center=given.center, channel_scale=given.channel_scale)

    with decode_calls(make):
        expected_tokens, expected = generate(model, prompt, **options)
    assert torch.equal(tokens, expected_tokens) and torch.equal(logits, expected)


def test_layers_that_are_left_out_and_windows_have_no_codes() -> None:
    for family, codes in (("llama", [False, True]), ("mistral", [False, False]), ("gpt_oss", [False, True])):
        model = attached(family, layers=[1] if family == "llama" else None)
        with decode_calls() as calls:
            session = Session(model, make_cache("dynamic", model))
            session.step(some_tokens(PROMPT_LEN))
            session.step(some_tokens(1))
        assert ["proposal" in call for call in calls] == codes, family
        held = [getattr(layer, proposals._CODES, None) for layer in session.cache.layers]
        assert [x is not None and x.proposal is not None for x in held] == codes, family
    remark = "reads all keys of its window, without proposal keys"
    assert [layer.reason for layer in integration.report(model).layers] == [remark, ""]


# Codes beside the cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padding", [0, PADDING])
def test_prefill_and_steps(kind: str, padding: int) -> None:
    model = attached()
    session = Session(model, make_cache(kind, model), padding)
    session.step(some_tokens(PROMPT_LEN))
    check_codes(session.cache, PROMPT_LEN, PROMPT_LEN, padding)
    session.steps(some_tokens(5))
    check_codes(session.cache, PROMPT_LEN + 5, PROMPT_LEN, padding)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_is_reset(kind: str) -> None:
    """Another prompt, longer or shorter, has codes and statistics of its own."""
    model = attached()
    session = Session(model, make_cache(kind, model))
    session.step(some_tokens(PROMPT_LEN))
    session.steps(some_tokens(3))
    for length in (11, 1, 30):
        reset(session)
        fresh = Session(model, make_cache(kind, model))
        for each in (session, fresh):
            each.step(some_tokens(length, seed=length))
        check_codes(session.cache, length, length)
        new = some_tokens(3, seed=5)
        assert torch.equal(session.steps(new), fresh.steps(new))
        check_codes(session.cache, length + 3, length)


def test_a_growing_cache_that_is_reset_may_have_another_batch() -> None:
    model = attached()
    session = Session(model, make_cache("dynamic", model))
    session.step(some_tokens(PROMPT_LEN))
    reset(session)
    session.step(some_tokens(9, batch=3))
    session.step(some_tokens(1, batch=3))
    check_codes(session.cache, 10, 9)


def test_a_static_cache_that_generate_uses_again() -> None:
    model, prompts = attached(), [make_prompt(length, padding=PADDING) for length in (PROMPT_LEN, 12, PROMPT_LEN)]
    options = {"cache_implementation": "static", "disable_compile": True}
    first, other, again = (generate(model, prompt, **options)[1] for prompt in prompts)
    assert torch.equal(first, again)
    torch.testing.assert_close(other, generate(model, prompts[1])[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", CACHES)
def test_crop_then_other_tokens(kind: str) -> None:
    model = attached()
    session = Session(model, make_cache(kind, model))
    if kind == "static" and not hasattr(StaticLayer, "crop"):
        pytest.skip("static caches of this release of Transformers cannot be cropped")
    session.step(some_tokens(PROMPT_LEN))
    session.steps(some_tokens(6))
    session.crop(4)
    logits = session.steps(some_tokens(3, seed=9))
    check_codes(session.cache, PROMPT_LEN + 5, PROMPT_LEN)
    straight = Session(model, make_cache(kind, model))
    straight.step(some_tokens(PROMPT_LEN))
    straight.steps(some_tokens(6)[:, :2])
    assert torch.equal(straight.steps(some_tokens(3, seed=9)), logits)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("reorder_cache", torch.tensor([1, 0])),
        ("reorder_cache", torch.tensor([1, 1])),
        ("batch_select_indices", torch.tensor([1])),
        ("batch_repeat_interleave", 2),
    ],
    ids=["swap", "one twice", "select", "repeat"],
)
def test_rows_that_move(kind: str, method: str, argument: Any) -> None:
    if not hasattr(DynamicLayer if kind == "dynamic" else StaticLayer, method):
        pytest.skip(f"{kind} caches have no {method}")
    model = attached()
    session = Session(model, make_cache(kind, model))
    session.step(some_tokens(PROMPT_LEN))
    session.steps(some_tokens(2))
    layers = session.cache.layers
    made = [proposals.codes_of(layer.keys).proposal for layer in layers]
    for layer, before in zip(layers, made, strict=True):
        getattr(layer, method)(argument)
        after = proposals.codes_of(layer.keys).proposal
        assert not torch.equal(after.codes, before.codes)  # moved, not made anew by the next step
    check_codes(session.cache, PROMPT_LEN + 2, PROMPT_LEN)
    session.steps(some_tokens(2, batch=len(layers[0].keys)))
    check_codes(session.cache, PROMPT_LEN + 4, PROMPT_LEN)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_a_cache_go_on_by_themselves(kind: str, duplicate: Callable[[Any], Any]) -> None:
    model = attached()
    session = Session(model, make_cache(kind, model))
    session.step(some_tokens(PROMPT_LEN))
    session.steps(some_tokens(2))
    other = Session(model, duplicate(session.cache))
    other.length = session.length
    after = session.steps(some_tokens(3, seed=3))
    assert not torch.equal(other.steps(some_tokens(3, seed=4)), after)
    for each in (session, other):
        check_codes(each.cache, PROMPT_LEN + 5, PROMPT_LEN)


@pytest.mark.parametrize("kind", CACHES)
def test_keys_from_elsewhere_get_their_codes_anew(kind: str) -> None:
    """A cache filled before `attach`, and one whose keys were replaced."""
    model = make_model()
    session = Session(model, make_cache(kind, model), PADDING)
    session.step(some_tokens(PROMPT_LEN))
    integration.attach(model, settings())
    session.steps(some_tokens(1))
    check_codes(session.cache, PROMPT_LEN + 1, PROMPT_LEN + 1, PADDING)
    for layer in session.cache.layers:
        layer.keys = layer.keys.flip(0).contiguous()
    session.padding = 0
    session.steps(some_tokens(1))
    check_codes(session.cache, PROMPT_LEN + 2, PROMPT_LEN + 2)


@pytest.mark.parametrize("kind", CACHES)
def test_steps_of_another_implementation_are_caught_up_with(kind: str) -> None:
    model = attached()
    session = Session(model, make_cache(kind, model))
    session.step(some_tokens(PROMPT_LEN))
    model.set_attn_implementation("sdpa")
    session.steps(some_tokens(3))
    model.set_attn_implementation("santa")
    # Four tokens at once, as far as codes know: statistics are made anew.
    session.steps(some_tokens(2))
    check_codes(session.cache, PROMPT_LEN + 5, PROMPT_LEN + 4)


def test_growing_past_the_room() -> None:
    model = attached()
    session = Session(model, make_cache("dynamic", model))
    session.step(some_tokens(proposals._ROOM - 1))
    session.steps(some_tokens(3))
    check_codes(session.cache, proposals._ROOM + 2, proposals._ROOM - 1)


# Statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHES)
def test_steps_of_several_tokens_settle_the_statistics(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of all keys after each such step until there are SETTLED_LEN; a token at a time does not change them."""
    monkeypatch.setattr(proposals, "SETTLED_LEN", 20)
    model = attached()
    session = Session(model, make_cache(kind, model))
    for count, statistics_of in [(1, 1), (1, 1), (8, 10), (1, 10), (11, 22), (8, 22), (1, 22), (9, 22)]:
        session.step(some_tokens(count))
        check_codes(session.cache, session.length, statistics_of)


def test_a_mask_of_ones_own_sets_no_limits_to_codes() -> None:
    """Padding may be anywhere: codes are of all keys, statistics of those that the last query sees."""
    model = attached()
    cache = make_cache("dynamic", model)
    mask = torch.ones(1, 1, PROMPT_LEN, PROMPT_LEN, dtype=torch.bool).tril()
    mask[..., 2] = False
    with torch.inference_mode():
        model(some_tokens(PROMPT_LEN, batch=1), attention_mask=mask, past_key_values=cache)
    for layer in cache.layers:
        seen = [i for i in range(PROMPT_LEN) if i != 2]
        made = santa.make_proposal_keys(layer.keys[:, :, seen], kv_layout="HND")
        found = proposals.codes_of(layer.keys).keys(PROMPT_LEN)
        statistics = {"center": found.center, "channel_scale": found.channel_scale}
        torch.testing.assert_close(statistics, {name: made.tensors()[name] for name in statistics})
        of_all = santa.make_proposal_keys(layer.keys, kv_layout="HND", **statistics)
        assert torch.equal(found.codes, of_all.codes) and torch.equal(found.scales, of_all.scales)


def test_memory_is_12_9_percent_more_at_head_dim_128() -> None:
    model = integration.attach(make_model(head_dim=128).bfloat16(), settings())
    cache = make_cache("static", model)
    Session(model, cache).step(some_tokens(PROMPT_LEN))
    for layer in cache.layers:
        made = proposals.codes_of(layer.keys).proposal
        assert 0.128 < (made.codes.nbytes + made.scales.nbytes) / (layer.keys.nbytes + layer.values.nbytes) < 0.13


# Errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": "4 bits"}, r"keys is '4 bits'; it needs to be one of \['exact', 'proposal'\]"),
        ({"sampler": "systematic"}, "sampler is 'systematic' while keys is 'proposal', which needs sampler='grouped'"),
        ({"budget": "uniform"}, "budget is 'uniform' while keys is 'proposal', which needs budget='streaming'"),
        ({"score": "bernoulli"}, "score is 'bernoulli' while keys is 'proposal', which needs score='exact'"),
    ],
)
def test_config_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**fields)


def test_config() -> None:
    assert [settings(layers=[1]).proposes(layer) for layer in range(3)] == [False, True, False]
    assert not settings(num_samples=0).proposes(0) and not santa.SantaConfig().proposes(0)
    assert settings(budget="streaming").proposes(0)


def test_continuous_batching_is_refused() -> None:
    if version.parse(transformers.__version__) < version.parse("5.17"):
        pytest.skip("this release of Transformers has no continuous batching that santa knows")
    with pytest.raises(ValueError, match="keys is 'proposal' with paged=True; it needs to be 'exact'"):
        integration.attach(make_model(), settings(), paged=True)


def test_other_caches_are_refused() -> None:
    model = attached()
    cache = make_cache("dynamic", model)
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=8)
    with pytest.raises(ValueError, match=r"LlamaAttention, layer 1, is a DynamicSlidingWindowLayer; it needs to be a"):
        Session(model, cache).step(some_tokens(4))


def test_keys_that_the_model_changes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached()
    session = Session(model, make_cache("dynamic", model))
    update = DynamicCache.update
    monkeypatch.setattr(DynamicCache, "update", lambda *args, **kwargs: [x * 1 for x in update(*args, **kwargs)])
    session.step(some_tokens(4))
    with pytest.raises(ValueError, match="LlamaAttention, layer 0, changes the keys that its cache returns"):
        session.step(some_tokens(1))


def test_no_cache_is_no_error() -> None:
    model, prompt = attached(), make_prompt(3)["input_ids"]
    with torch.no_grad():
        assert all(torch.isfinite(model(x, use_cache=False).logits).all() for x in (prompt, prompt[:, :1]))


# A trained model ------------------------------------------------------------------------------------


def test_retrieval_of_the_bundled_model() -> None:
    """Question and answer decoded, 2 prompts of 2048 bytes come out as with exact attention. The runs crop the cache
    to use it again."""
    model = evaluate.load_model(device="cpu")
    [exact, sampled] = evaluate.sampled_accuracy(model, 2048, 2, [settings(num_samples=256)], batch_size=2)
    assert exact.accuracy == 1.0
    assert torch.equal(sampled.right, exact.right) and 0 < sampled.rows_read < 0.3
