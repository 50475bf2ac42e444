"""The evaluation of Bernoulli scores on the bundled model: its draws and its arithmetic, and a small run on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.4.0")
pytest.importorskip("tqdm")

import evaluate
import evaluate_bernoulli as eb
import tasks

import santa
from santa import reference
from santa.reference_bernoulli import ternary_counts

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, KV_LEN = 4, 2, 64, 40
CONTEXT = 300


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(q: Tensor, k: Tensor, v: Tensor, seed: int = 0, **options: object) -> Tensor:
    """bernoulli_attention of k, v [num_kv_heads, kv_len, head_dim] for queries [rows, num_qo_heads, head_dim]."""
    options = {"num_draws": 4, "score_sampler": "independent", "correction": "none"} | options
    k, v = (x.expand(len(q), *x.shape) for x in (k, v))
    generator = torch.Generator().manual_seed(seed)
    return eb.bernoulli_attention(q, k, v, sm_scale=0.2, generator=generator, **options)


@pytest.mark.parametrize("score_sampler", eb.SCORE_SAMPLERS)
def test_draws_have_the_law_of_the_oracle(score_sampler: str) -> None:
    """First and second moments over 2,000 rows, of the same queries. 256 two-sample z statistics of the means; of the
    dots with a key, their variances. False alarms: below 1e-3 in all (5 and 6 standard deviations)."""
    count, num_draws = 2000, 3
    # Heads of a group that are much alike: sharing random numbers then shows in the variance of their sum.
    alike = randn(1, NUM_KV_HEADS, 1, HEAD_DIM) + 0.3 * randn(1, NUM_KV_HEADS, 2, HEAD_DIM, seed=3)
    q = alike.flatten(1, 2).expand(count, -1, -1)
    generator = torch.Generator().manual_seed(1)
    ours, p = eb.draw_counts(q, NUM_KV_HEADS, num_draws, score_sampler, generator)
    oracle = ternary_counts(
        q,
        num_kv_heads=NUM_KV_HEADS,
        num_draws=num_draws,
        score_sampler=score_sampler,
        row_seeds=torch.arange(count),
        kv_lens=torch.full((count,), KV_LEN),
    )
    assert torch.equal(oracle.sign() * q.sign(), oracle.abs().sign())
    oracle = oracle.abs().double()
    spread = (num_draws * p * (1 - p)).double()[0].sqrt().clamp(min=0.02)
    z = (ours.double().mean(0) - oracle.mean(0)) / spread / (2 / count) ** 0.5
    assert float(z.abs().max()) < 5
    expected = num_draws * p[0].double()
    assert float(((oracle.mean(0) - expected) / spread / count**-0.5).abs().max()) < 5
    # How the features, and the heads of a group, hang together shows in the variance of these sums.
    key = randn(HEAD_DIM, seed=2).double()
    for sums in (lambda c: c.double() @ key, lambda c: (c.double() @ key).unflatten(1, (NUM_KV_HEADS, -1)).sum(2)):
        ratio = sums(ours).var(0) / sums(oracle).var(0)
        assert float((ratio - 1).abs().max()) < 6 * (4 / count) ** 0.5


def test_the_estimated_variance_of_a_count_is_unbiased() -> None:
    p = torch.tensor([0.0, 0.01, 0.3, 0.9, 1.0])
    for num_draws in (1, 4):
        drawn = 1 - (1 - p) ** num_draws
        weights = eb.variance_weights(torch.ones(5), p, num_draws)
        assert torch.allclose(weights * drawn, num_draws * p * (1 - p))
        assert torch.equal(eb.variance_weights(torch.zeros(5), p, num_draws), torch.zeros(5))


def test_exact_attention_and_its_limit_of_many_draws() -> None:
    q, k, v = randn(3, NUM_QO_HEADS, HEAD_DIM), *randn(2, NUM_KV_HEADS, KV_LEN, HEAD_DIM, seed=1)
    expected, _ = reference.exact(
        q, *(x.expand(3, -1, -1, -1) for x in (k, v)), kv_layout="HND", sm_scale=0.2
    )  # float64
    assert torch.allclose(attend(q, k, v, num_draws=0).double(), expected, atol=1e-5)
    many = {"num_draws": 1 << 16, "score_sampler": "systematic"}
    assert torch.allclose(attend(q, k, v, **many).double(), expected, atol=1e-2)


def test_what_all_keys_share_does_not_reach_the_centred_correction() -> None:
    """A softmax does not see it, but the variance of a single logit does."""
    q, k, v = randn(3, NUM_QO_HEADS, HEAD_DIM), *randn(2, NUM_KV_HEADS, KV_LEN, HEAD_DIM, seed=1)
    shifted = k + 3 * randn(NUM_KV_HEADS, 1, HEAD_DIM, seed=2)
    for correction in ("none", "centred"):
        outs = [attend(q, keys, v, correction=correction) for keys in (shifted, k)]
        assert torch.allclose(*outs, atol=1e-4)
    off = attend(q, shifted, v, correction="logit") - attend(q, k, v, correction="logit")
    assert float(off.abs().max()) > 0.1


def test_the_centred_correction_removes_most_of_a_small_bias() -> None:
    """5,000 draws: their mean is off by less than a third of the bias that is to be removed."""
    q = randn(1, NUM_QO_HEADS, HEAD_DIM).expand(5_000, -1, -1)
    k, v = randn(NUM_KV_HEADS, 8, HEAD_DIM, seed=1), randn(NUM_KV_HEADS, 8, HEAD_DIM, seed=2)
    expected = attend(q[:1], k, v, num_draws=0)[0]
    bias = {}
    for correction in eb.CORRECTIONS:
        mean = attend(q, k, v, num_draws=16, correction=correction).mean(0)
        bias[correction] = float((mean - expected).norm())
    assert bias["centred"] < 0.5 * bias["none"]


def test_moments_tell_noise_from_bias() -> None:
    """10,000 vectors of 16 components: noise 0.4 in all, off by 0.3 in all; and without bias, nothing is left of it."""
    exact = torch.ones(16) / 4
    drawn = exact + 0.1 * randn(10_000, 5, 16)
    for offset in (0.0, 0.3):
        moments = eb.Moments(exact.expand(5, -1))
        for row in drawn + offset / 4:
            moments.add(row)
        summary = moments.summary()
        assert summary["noise"] == pytest.approx(0.4, rel=0.02)
        assert summary["bias"] == pytest.approx(offset, rel=0.02, abs=0.003)
    assert summary["tv"] > summary["tv_mean"] == pytest.approx(16 * 0.3 / 4 / 2, rel=0.02)


def test_rows_are_prompts_with_answers_and_windows_of_the_text() -> None:
    text = tasks.load_corpus().heldout
    prompts, windows = eb.make_rows(text, CONTEXT, 2, 3, 4, 0)
    assert prompts.shape == (2, CONTEXT) and windows.shape == (3, CONTEXT)
    assert prompts[:, -1].tolist() == [ord("\n")] * 2
    assert bytes(windows[2].tolist()) == text[-CONTEXT:].tobytes()
    with pytest.raises(ValueError, match="fewer than a context"):
        eb.make_rows(text[:50], CONTEXT, 2, 3, 4, 0)


@pytest.fixture(scope="module")
def model():
    return evaluate.load_model(device="cpu")


def test_settings_against_exact_attention(model) -> None:
    prompts, windows = eb.make_rows(tasks.load_corpus().heldout, CONTEXT, 2, 2, 2, 0)
    settings = [eb.Setting(), eb.Setting(4096, "systematic"), eb.Setting(1, "shared"), eb.Setting(1, "independent")]
    found = eb.measure(model, prompts, windows, settings, batch_size=3)
    exact, many, shared, independent = (
        eb.result(setting, of_setting, found[0]) for setting, of_setting in zip(settings, found, strict=True)
    )
    assert exact["right"] == 2 and exact["tv_text"] == exact["difference"] == 0 and exact["features_read"] == 1
    assert many["right"] == 2 and many["tv_text"] < 0.01 and abs(many["difference"]) < 0.01
    assert shared["tv_text"] > 0.1 and independent["tv_text"] > 0.1
    assert 0.2 < shared["features_read"] < independent["features_read"] < 0.95
    assert shared["rows_read"] == 1
    # By hand: 4 rows of the text's last bytes in one batch give the same bits as 3 and 1.
    again = eb.measure(model, prompts, windows, settings[:1], batch_size=4)
    assert torch.allclose(torch.cat(again[0].bits), torch.cat(found[0].bits), atol=1e-4)
    with pytest.raises(ValueError, match="first setting needs to be exact"):
        eb.measure(model, prompts, windows, settings[1:])


def test_equal_rows_draw_different_numbers() -> None:
    q, k, v = randn(1, 2, 64).expand(2, -1, -1), randn(1, 1, 64, 9).expand(2, -1, -1, -1), randn(1, 9, 1, 64)
    options = {"score": "bernoulli", "num_draws": 1, "row_seeds": torch.zeros(2, dtype=torch.int64)}
    together = santa.decode(q, k, v.expand(2, -1, -1, -1), **options)[0]
    with eb.streams_of_rows(5):
        apart = santa.decode(q, k, v.expand(2, -1, -1, -1), **options)[0]
    assert torch.equal(together[0], together[1]) and not torch.equal(apart[0], apart[1])


def test_bias_is_that_of_the_softmax_and_shrinks_with_draws(model) -> None:
    prompts, windows = eb.make_rows(tasks.load_corpus().heldout, CONTEXT, 2, 2, 2, 0)
    cases = [(1, "independent", "none"), (16, "independent", "none"), (16, "systematic", "none")]
    few, many, systematic = eb.measure_bias(model, torch.cat((prompts, windows)), cases, 8)
    assert len(few["layers"]) == model.config.num_hidden_layers
    assert few["attention"]["noise"] > many["attention"]["noise"] > systematic["attention"]["noise"] > 0
    assert few["attention"]["bias"] > many["attention"]["bias"]
    assert 1 >= few["next_byte"]["tv"] >= few["next_byte"]["tv_mean"] > many["next_byte"]["tv_mean"]


def test_program(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    argv = ["--context", str(CONTEXT), "--prompts", "1", "--windows", "1", "--pairs", "2", "--draws", "2", "4"]
    argv += ["--samples", "0", "16", "--score-samplers", "independent", "systematic", "--device", "cpu"]
    argv += ["--bias-rows", "2", "--bias-seeds", "2"]
    eb.main([*argv, "--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    content = json.loads((tmp_path / "x.json").read_text())
    # exact and S = 16 alone, then 2 samplers, 2 B, 2 S; bias: 2 samplers and 2 corrections of one of them, 2 B.
    assert (len(content["results"]), len(content["bias"])) == (2 + 8, 8)
    assert len(tables) == 2 + 10 + 2 + 8
    assert len({line.count("|") for line in tables[:12]}) == len({line.count("|") for line in tables[12:]}) == 1
    assert {row["correction"] for row in content["bias"] if row["score_sampler"] == "systematic"} == {"none"}
    assert (tmp_path / "x.png").stat().st_size > 10_000
