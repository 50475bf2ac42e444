"""Continuous batching: requests that decode beside chunks of prompts, over Transformers' paged cache."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17.0")

from helpers.architectures import make_tiny
from helpers.models import (
    NEW_TOKENS,
    NUM_LAYERS,
    VOCAB,
    FakeAttention,
    generate,
    generate_batch,
    make_model,
    make_prompt,
)
from torch import Tensor
from transformers import PreTrainedModel

import santa
from santa.integrations import transformers as integration
from santa.integrations.transformers import attach, paged, record_rows_read, report
from santa.integrations.transformers.layers import LayerSettings, set_settings

EXACT = santa.SantaConfig(num_samples=0)
SAMPLED = santa.SantaConfig(num_samples=2, min_sampled_len=0)
FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss")  # full attention, windows, soft cap and sinks beside windows
PROMPT_LENS = (19, 5, 40, 1, 27)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENS]


def one_by_one(model: PreTrainedModel) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of `generate`, one prompt at a time, and their log-probabilities."""
    found = ([], [])
    for prompt in make_prompts():
        ids = torch.tensor([prompt], device=model.device)
        tokens, logits = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        found[0].append(tokens[0].tolist())
        found[1].append(logits[0].float().log_softmax(-1).gather(1, tokens[0][:, None])[:, 0].tolist())
    return found


def assert_same(found: Any, expected: Any) -> None:
    """Tokens are equal, log-probabilities to rounding."""
    assert found[0] == expected[0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=1e-4, atol=1e-4)


def differs(found: Any, other: Any) -> bool:
    """By more than rounding, in every request."""
    return bool(((torch.tensor(found[1]) - torch.tensor(other[1])).abs().amax(1) > 1e-3).all())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each `santa.decode_paged`, tensors copied, q among them; and of each chunk, its length."""
    found: list[dict[str, Any]] = []
    decode_paged, chunk_attention = santa.decode_paged, paged._chunk_attention

    def spy(q: Tensor, *args: Any, **options: Any) -> Any:
        found.append({name: x.clone() if isinstance(x, Tensor) else x for name, x in (options | {"q": q}).items()})
        return decode_paged(q, *args, **options)

    def spy_on_chunks(module: torch.nn.Module, query: Tensor, *args: Any) -> Tensor:
        found.append({"chunk": query.shape[2]})
        return chunk_attention(module, query, *args)

    monkeypatch.setattr(santa, "decode_paged", spy)
    monkeypatch.setattr(paged, "_chunk_attention", spy_on_chunks)
    return found


@pytest.fixture
def as_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are computed as those that a CUDA graph captures."""
    monkeypatch.setattr(paged, "_is_capturing", lambda tensor: True)


# Whole models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_tokens_equal_transformers(family: str, calls: list[dict[str, Any]]) -> None:
    model = make_model(family)
    expected = one_by_one(model)
    attach(model, EXACT, paged=True)
    assert {layer.status for layer in report(model).layers} == {"exact"}
    assert_same(generate_batch(model, make_prompts()), expected)
    # Rows and chunks, in the same steps: a chunk follows rows of its layer, or they follow it, more often than layers
    # and steps change.
    kinds = ["chunk" in call for call in calls]
    assert kinds.count(False) >= NUM_LAYERS * (NEW_TOKENS - 1)
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 2 * NUM_LAYERS
    assert any(call.get("chunk", 0) > 1 for call in calls)
    assert max(len(call["q"]) for call in calls if "q" in call) == len(PROMPT_LENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_tokens_are_those_of_generate(family: str, calls: list[dict[str, Any]]) -> None:
    """Draws are keyed by layer, position and head: batches, pages and chunks change nothing."""
    model = make_model(family)
    exact = one_by_one(model)
    attach(model, SAMPLED)
    expected = one_by_one(model)
    assert differs(expected, exact)
    attach(model, SAMPLED, paged=True)
    assert {layer.status for layer in report(model).layers} == {"sampled"}
    assert_same(generate_batch(model, make_prompts()), expected)
    rows = [call for call in calls if "q" in call]
    assert {call["num_samples"] for call in rows} == {2} and {call["seed"] for call in rows} == {0, 1}
    assert all(call["first_kv_head"] == 0 for call in rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [EXACT, SAMPLED], ids=["exact", "sampled"])
def test_captured_steps_give_the_same_tokens(
    family: str, config: santa.SantaConfig, as_captured: None, calls: list[dict[str, Any]]
) -> None:
    """What a graph replays has no look at the host: on the CPU, without the graph."""
    model = attach(make_model(family), config)
    expected = one_by_one(model)
    attach(model, config, paged=True)
    assert_same(generate_batch(model, make_prompts()), expected)
    assert calls and not any("chunk" in call for call in calls)


def test_seeds_and_samplers(calls: list[dict[str, Any]]) -> None:
    model = make_model()
    found = []
    for fields in ({}, {"seed": 1000}, {"sampler": "systematic"}, {"layers": [1]}):
        attach(model, santa.SantaConfig(num_samples=2, min_sampled_len=0, **fields), paged=True)
        found.append(generate_batch(model, make_prompts()))
    assert all(differs(a, b) for a, b in itertools.combinations(found, 2))
    assert {call["num_samples"] for call in calls[-8:] if "q" in call} == {0, 2}


def test_short_rows_are_exact() -> None:
    model = make_model()
    expected = one_by_one(model)
    attach(model, santa.SantaConfig(num_samples=1, min_sampled_len=60), paged=True)
    assert_same(generate_batch(model, make_prompts()), expected)


def test_recorded_rows() -> None:
    model = attach(make_model(), SAMPLED, paged=True)
    with record_rows_read(model) as record:
        generate_batch(model, make_prompts())
    assert list(record.rows_read) == [0, 1] and 0 < record.share() < 1
    assert sum(len(lens) for lens in record.kv_lens[0]) >= len(PROMPT_LENS) * (NEW_TOKENS - 1)


def test_a_model_goes_back_and_forth() -> None:
    """Between continuous batching with santa, `generate` with santa, and Transformers' own of both."""
    model = make_model()
    expected = one_by_one(model)
    for _ in range(2):
        attach(model, EXACT, paged=True)
        assert_same(generate_batch(model, make_prompts()), expected)
        attach(model, EXACT)
        assert_same(one_by_one(model), expected)
        model.set_attn_implementation("sdpa")
        assert not report(model).with_status("exact")
        assert_same(generate_batch(model, make_prompts()), expected)


def test_names() -> None:
    """Until 5.18 Transformers knows the name, and goes from "santa" to it by itself; later it takes no such names."""
    model = make_model()
    expected = one_by_one(model)
    if integration.PAGED_NAME == "paged|santa":
        model.set_attn_implementation("paged|santa")
        assert_same(generate_batch(model, make_prompts()), expected)
        attach(model, EXACT)
        assert_same(generate_batch(model, make_prompts()), expected)
        assert model.config._attn_implementation == "santa"
    else:
        attach(model, EXACT)
        with pytest.raises(ValueError, match="Implementation santa is not supported for continuous batching"):
            generate_batch(model, make_prompts())


def test_sparse_prefill_of_whole_prompts_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, prefill = [], santa.prefill

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        lengths.append((q.shape[2], k.shape[2]))
        return prefill(q, k, v, **options)

    monkeypatch.setattr(santa, "prefill", spy)
    model, prompts = make_model(), [make_prompt(300, batch=1)["input_ids"][0].tolist(), [5, 6, 7]]
    room = {"max_batch_tokens": 256, "num_blocks": 128}
    expected = generate_batch(model, prompts, **room)
    attach(
        model, santa.SantaConfig(num_samples=0, prefill="sample", alpha=1.0, prefill_backend="reference"), paged=True
    )
    assert_same(generate_batch(model, prompts, **room), expected)
    # What is left of the prompt is a chunk too short for it.
    assert lengths == [(256, 256)] * NUM_LAYERS


# On CUDA ----------------------------------------------------------------------------------------------------


def assert_equal_up_to_ties(found: Any, expected: Any, tolerance: float) -> None:
    """Of two runs that round differently: log-probabilities agree until two tokens are as likely as each other."""
    for tokens, logprobs, expected_tokens, expected_logprobs in zip(*found, *expected, strict=True):
        for step in range(NEW_TOKENS):
            assert abs(logprobs[step] - expected_logprobs[step]) < tolerance
            if tokens[step] != expected_tokens[step]:
                break


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda(family: str) -> None:
    model = make_model(family).to("cuda", torch.bfloat16)
    expected = one_by_one(model)
    attach(model, EXACT, paged=True)
    found = generate_batch(model, make_prompts(), use_cuda_graph=False, use_async_batching=False)
    assert_equal_up_to_ties(found, expected, 0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("use_async_batching", [False, True], ids=["sync", "async"])
# So many draws that one more or less, where rounding decides, moves little.
@pytest.mark.parametrize("num_samples", [0, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs(family: str, num_samples: int, use_async_batching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured in steps of one composition and replayed in others."""
    model = make_model(family).to("cuda", torch.bfloat16)
    attach(model, santa.SantaConfig(num_samples=num_samples, min_sampled_len=0), paged=True)
    expected = generate_batch(model, make_prompts(), use_cuda_graph=False, use_async_batching=False)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self))[1])
    found = generate_batch(model, make_prompts(), use_cuda_graph=True, use_async_batching=use_async_batching)
    assert_equal_up_to_ties(found, expected, 0.15 if num_samples == 0 else 0.3)
    assert len(replays) > NEW_TOKENS / 2


# One layer --------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, TRASH = 8, 2, 64, 3


class Step:
    """A step of requests of (tokens, earlier tokens), as continuous batching hands it to a layer, and what attention of
    it is. `padding` tokens belong to nobody, and so do as many requests of no tokens. The slots that a request does not
    have hold NaN."""

    def __init__(self, requests: list[tuple[int, int]], window: int | None, padding: int = 0, device: str = "cpu"):
        self.generator = torch.Generator().manual_seed(len(requests) + sum(map(sum, requests)))
        self.window, self.device = window, device
        dtype = torch.float32 if device == "cpu" else torch.float16
        q_lens = [tokens for tokens, _ in requests]
        past = [earlier if window is None else min(earlier, window - 1) for _, earlier in requests]
        num_tokens, num_slots = sum(q_lens) + padding, TRASH + 1 + sum(q_lens) + sum(past) + 50
        self.q = self.random(1, HEADS, num_tokens, HEAD_DIM).to(device, dtype)
        self.k, self.v = (self.random(1, KV_HEADS, num_tokens, HEAD_DIM).to(device, dtype) for _ in "kv")
        self.cache = [torch.full((num_slots, KV_HEADS, HEAD_DIM), torch.nan, dtype=dtype, device=device) for _ in "kv"]
        slots = (torch.randperm(num_slots - TRASH - 1, generator=self.generator) + TRASH + 1).tolist()
        read, write, self.expected = [], [], torch.zeros(num_tokens, HEADS, HEAD_DIM)
        first = 0
        for tokens, length in zip(q_lens, past, strict=True):
            own = [slots.pop() for _ in range(length)]
            for cache in self.cache:
                cache[own] = self.random(length, KV_HEADS, HEAD_DIM).to(cache)
            new = [slots.pop() for _ in range(tokens)]
            if window is None:
                read += own + new
            else:
                # A ring: the latest of the new tokens take the places of the oldest that are left.
                new = (own + new)[-min(tokens, window) :] if length + tokens > window else new
                ring = ([*own, slots.pop()] if length == window - 1 else own + new)[:window]
                new = [TRASH] * max(0, tokens - window) + [
                    ring[(length + i) % len(ring)] for i in range(max(0, tokens - window), tokens)
                ]
                read += own + [1] * tokens
            write += new
            self.attend(first, tokens, own)
            first += tokens
        write += [TRASH] * padding
        has_past = any(past)
        lengths = (q_lens, [a + b for a, b in zip(q_lens, past, strict=True)])
        cu_q, cu_k = (list(itertools.accumulate(lens, initial=0)) for lens in lengths)
        self.arguments = {
            "cu_seq_lens_q": torch.tensor(cu_q + cu_q[-1:] * padding, dtype=torch.int32, device=device),
            "cu_seq_lens_k": torch.tensor(cu_k + cu_k[-1:] * padding, dtype=torch.int32, device=device),
            "max_length_q": num_tokens if padding else max(q_lens),
            "max_length_k": max(lengths[1]) if not padding else 1024,
            "read_index": [torch.tensor(read if has_past else [], dtype=torch.int64, device=device)],
            "write_index": [torch.tensor(write, device=device)],
            "position_ids": torch.zeros(1, num_tokens, dtype=torch.int64, device=device),
        }
        first = 0
        for tokens, earlier in requests:
            self.arguments["position_ids"][0, first : first + tokens] = torch.arange(earlier, earlier + tokens)
            first += tokens
        self.num_real = first
        self.allocator = SimpleNamespace(index=0, _kv_token_views={0: tuple(self.cache)})
        if window is not None:
            self.allocator.sliding_window = window

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def attend(self, first: int, tokens: int, own: list[int]) -> None:
        """Attention of one request's tokens by definition, in float64."""
        k, v = (
            torch.cat([cache[own].transpose(0, 1), new[0][:, first : first + tokens]], dim=1).cpu().double()
            for cache, new in zip(self.cache, (self.k, self.v), strict=True)
        )
        q = self.q[0][:, first : first + tokens].cpu().double()
        scores = q @ k.repeat_interleave(HEADS // KV_HEADS, 0).transpose(1, 2) / HEAD_DIM**0.5
        behind = torch.arange(tokens)[:, None] + len(own) - torch.arange(k.shape[1])  # how far keys are
        visible = (behind >= 0) & (behind < (self.window or 1 << 30))
        out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(HEADS // KV_HEADS, 0)
        self.expected[first : first + tokens] = out.transpose(0, 1).float()

    def call(self, config: santa.SantaConfig = EXACT) -> Tensor:
        module = FakeAttention()
        set_settings(module, LayerSettings(config))
        cache = SimpleNamespace(layer_to_allocator={0: self.allocator})
        # New views in every step, as Transformers makes them.
        arguments = {
            name: [y[:] for y in x] if isinstance(x, list) else x[:] if isinstance(x, Tensor) else x
            for name, x in self.arguments.items()
        }
        out, weights = integration.paged_attention(module, self.q, self.k, self.v, cache=cache, **arguments)
        assert weights is None
        return out

    def run(self, config: santa.SantaConfig = EXACT) -> Tensor:
        return self.call(config)[0, : self.num_real].float().cpu()

    def become(self, other: Step) -> None:
        """The other's inputs, of the same sizes, in these tensors."""
        for ours, theirs in ((getattr(self, name), getattr(other, name)) for name in ("q", "k", "v")):
            ours.copy_(theirs)
        for ours, theirs in zip(self.cache, other.cache, strict=True):
            ours.copy_(theirs)
        for name, ours in self.arguments.items():
            theirs = other.arguments[name]
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
            for x, y in pairs:
                if isinstance(x, Tensor):
                    x.copy_(y)


COMPOSITIONS = {
    "rows": [(1, 30), (1, 3), (1, 200)],
    "mixed": [(1, 30), (9, 0), (1, 5), (17, 21), (2, 1), (1, 77), (8, 8)],
    "prompts": [(5, 0), (1, 0), (33, 0), (12, 0), (13, 0)],
    "one chunk": [(40, 100)],
}
_CASES = [
    *((name, window, 0) for name in COMPOSITIONS for window in (None, 12)),
    *((name, window, 11) for name in ("rows", "mixed") for window in (None, 12)),
]


@pytest.mark.parametrize("captured", [False, True], ids=["host", "captured"])
@pytest.mark.parametrize(("name", "window", "padding"), _CASES)
def test_a_step_is_attention(
    name: str, window: int | None, padding: int, captured: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any composition and padded, with and without a window: no key of a slot that is not the request's, which is
    NaN, and the new keys are in the cache."""
    monkeypatch.setattr(paged, "_is_capturing", lambda tensor: captured)
    step = Step(COMPOSITIONS[name], window, padding, device)
    tolerance = 2e-6 if device == "cpu" else 2e-3
    torch.testing.assert_close(step.run(), step.expected[: step.num_real], rtol=tolerance, atol=tolerance)
    write_index, num_real = step.arguments["write_index"][0], step.num_real
    kept = write_index[:num_real] != TRASH
    for cache, new in zip(step.cache, (step.k, step.v), strict=True):
        assert torch.equal(cache[write_index[:num_real][kept]], new[0, :, :num_real].transpose(0, 1)[kept])


@pytest.mark.parametrize("window", [None, 12])
def test_rows_of_a_mixed_step_draw_what_they_draw_alone(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host and captured, padded or not: bit for bit, the chunks exact."""
    config = santa.SantaConfig(num_samples=2, min_sampled_len=0)
    step = Step(COMPOSITIONS["mixed"], window)
    firsts = itertools.accumulate((tokens for tokens, _ in COMPOSITIONS["mixed"][:-1]), initial=0)
    singles = [first for first, (tokens, _) in zip(firsts, COMPOSITIONS["mixed"], strict=True) if tokens == 1]
    found = [step.run(config)]
    for captured, padding in ((False, 11), (True, 0), (True, 11)):
        monkeypatch.setattr(paged, "_is_capturing", lambda tensor, captured=captured: captured)
        again = Step(COMPOSITIONS["mixed"], window)
        if padding:
            again = pad(again, padding)
        found.append(again.run(config))
    for out in found[1:]:
        assert torch.equal(out[singles], found[0][singles])
        torch.testing.assert_close(out, found[0], rtol=2e-6, atol=2e-6)
    chunks = [token for token in range(step.num_real) if token not in singles]
    torch.testing.assert_close(found[0][chunks], step.expected[chunks], rtol=2e-6, atol=2e-6)
    assert all((found[0][token] - step.expected[token]).abs().max() > 0.01 for token in singles)


@pytest.mark.parametrize("num_samples", [0, 2])
@pytest.mark.parametrize("window", [None, 12])
def test_a_captured_step_is_replayed_for_others(
    window: int | None, num_samples: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of one composition, whose inputs become those of others: each gives what it gives by itself. On the CPU
    without the graph."""
    config = santa.SantaConfig(num_samples=num_samples, min_sampled_len=0)
    others = [[(1, 30), (9, 0), (1, 5)], [(1, 100), (1, 30), (1, 2), (1, 77)], [(25, 3)], [(2, 0), (1, 40), (1, 3)]]
    monkeypatch.setattr(paged, "_is_capturing", lambda tensor: True)
    alone = [fit(Step(requests, window, device=device)).run(config) for requests in others]
    static = fit(Step(others[0], window, device=device))
    if device == "cuda":
        static.run(config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = static.call(config)
    for requests, expected in zip(others, alone, strict=True):
        step = fit(Step(requests, window, device=device))
        static.become(step)
        if device == "cuda":
            graph.replay()
        else:
            out = static.call(config)
        found = out[0, : step.num_real].float().cpu()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        if num_samples == 0:
            tolerance = 2e-6 if device == "cpu" else 2e-3
            torch.testing.assert_close(found, step.expected[: step.num_real], rtol=tolerance, atol=tolerance)


def fit(step: Step, num_tokens: int = 40, num_requests: int = 8, num_read: int = 300, num_slots: int = 400) -> Step:
    """The same requests, in tensors of these sizes: a captured step's."""
    step = pad(step, num_tokens - step.q.shape[2])
    arguments = step.arguments
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        arguments[name] = arguments[name][: num_requests + 1].clone()
    read_index = arguments["read_index"][0]
    arguments["read_index"] = [torch.nn.functional.pad(read_index, (0, num_read - read_index.shape[0]))]
    step.cache = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, num_slots - x.shape[0])) for x in step.cache]
    step.allocator._kv_token_views[0] = tuple(step.cache)
    return step


def pad(step: Step, padding: int) -> Step:
    """The same requests, with tokens of nobody behind them."""
    for name in ("q", "k", "v"):
        setattr(step, name, torch.nn.functional.pad(getattr(step, name), (0, 0, 0, padding), value=torch.nan))
    arguments = step.arguments
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        arguments[name] = torch.cat([arguments[name], arguments[name][-1:].expand(padding)])
    arguments["write_index"] = [torch.nn.functional.pad(arguments["write_index"][0], (0, padding), value=TRASH)]
    arguments["position_ids"] = torch.nn.functional.pad(arguments["position_ids"], (0, padding))
    arguments |= {"max_length_q": step.q.shape[2], "max_length_k": 1024}
    return step


# What is refused --------------------------------------------------------------------------------------------


def test_outside_of_continuous_batching_it_is_refused() -> None:
    model = attach(make_model(), EXACT, paged=True)
    with pytest.raises(ValueError, match=r"LlamaAttention got no paged cache; .*for generate, attach without it"):
        generate(model, make_prompt())


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "block_table"])
def test_what_it_does_not_do_is_refused(name: str) -> None:
    step = Step([(1, 5)], None)
    step.arguments[name] = torch.zeros(1)
    with pytest.raises(NotImplementedError, match=f"FakeAttention hands over {name}, which continuous batching"):
        step.run()


def test_bernoulli_scores_are_refused() -> None:
    config = santa.SantaConfig(score="bernoulli")
    with pytest.raises(ValueError, match="score is 'bernoulli' with paged=True; it needs to be 'exact'"):
        attach(make_model(), config, paged=True)
    with pytest.raises(NotImplementedError, match="FakeAttention is to draw its scores"):
        Step([(1, 5)], None).run(config)


def test_a_window_without_positions_is_refused() -> None:
    step = Step([(1, 50)], 12)
    del step.arguments["position_ids"]
    torch.testing.assert_close(step.run(), step.expected, rtol=2e-6, atol=2e-6)
    with pytest.raises(NotImplementedError, match="FakeAttention hands over no position_ids; its sliding window needs"):
        step.run(santa.SantaConfig(num_samples=2, min_sampled_len=0))


def test_models_that_are_santas_in_part_are_refused() -> None:
    with pytest.raises(ValueError, match=r"paged is True while 1 of the causal layers of .* cannot be santa's .*512"):
        attach(make_tiny("gemma4_unified_text"), EXACT, paged=True)
    with pytest.raises(ValueError, match=r"paged is True for a .*, a model of several parts"):
        attach(make_tiny("gemma3"), EXACT, paged=True)


def test_old_releases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration.transformers, "__version__", "5.16.1")
    with pytest.raises(ImportError, match=r"transformers is 5\.16\.1; continuous batching needs at least 5\.17\.0"):
        attach(make_model(), EXACT, paged=True)
