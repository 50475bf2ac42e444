"""The evaluation of sparse prefill on the bundled model, at a small size on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")
pytest.importorskip("tqdm")

import evaluate
import evaluate_prefill
import tasks

NUM_LAYERS, NUM_HEADS = 6, 8
CONTEXT = 1000


@pytest.fixture(scope="module")
def results() -> list[evaluate_prefill.PrefillResult]:
    text = tasks.load_corpus().heldout
    options = dict(text=text, num_pairs=4, batch_size=2)
    model = evaluate.load_model(device="cpu")
    return evaluate_prefill.prefill_results(model, CONTEXT, 2, [0.2, 1.0], backend="reference", **options)


def test_dense_answers_right_and_alpha_1_is_dense(results):
    dense, _, everything = results
    assert dense.alpha is None and dense.kept is None and dense.right == 2
    assert everything.right == 2 and everything.tv_p99 < 1e-3 and everything.tv_answer < 1e-3
    assert everything.kept.densities == [1.0] * NUM_LAYERS
    assert min(everything.kept.min_masses) > 1 - 1e-4


def test_a_low_alpha_keeps_less_and_says_what(results):
    _, low, everything = results
    assert low.kept.backends == {"reference"}
    assert len(low.kept.densities) == NUM_LAYERS and max(low.kept.densities) < 0.9
    assert all(0 <= least <= mean <= 1 for least, mean in zip(low.kept.min_masses, low.kept.mean_masses, strict=True))
    # The provable part, head by head.
    assert all((low.kept.column(layer, 1) >= 0.2).all() for layer in range(NUM_LAYERS))
    assert everything.tv_mean < low.tv_mean < low.tv_p99 <= 1


def test_total_variation():
    far = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    assert torch.equal(evaluate_prefill.total_variation(far[:1], far[1:]), torch.ones(1))
    assert torch.equal(evaluate_prefill.total_variation(torch.zeros(1, 4), torch.ones(1, 4)), torch.zeros(1))


def test_block_masses_are_shares():
    q, k = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0))
    mass = evaluate_prefill.block_mass(q, k)
    assert mass.shape == (3, 3) and torch.allclose(mass.sum(-1), torch.ones(3)) and mass[0, 1] == 0


def test_a_dense_prefill_is_not_reported_as_sparse():
    """A prompt that went to dense attention would look as if sparsity cost nothing."""
    model = evaluate.load_model(device="cpu")
    with pytest.raises(RuntimeError, match="selected nothing"):
        evaluate_prefill.prefill_results(model, 600, 1, [0.5], backend="auto", num_pairs=2)


def test_program(tmp_path, capsys):
    argv = ["--context", "500", "--prompts", "1", "--pairs", "2", "--alpha", "0.5", "--device", "cpu"]
    argv += ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png"), "--heads", "0", str(NUM_HEADS * 5)]
    pytest.importorskip("matplotlib")
    evaluate_prefill.main(argv)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("| context"))
    rows = [line for line in lines if line.startswith("| 500")]
    assert len(rows) == 2 and all(row.count("|") == header.count("|") for row in rows)
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["backend"] == "reference" and content["results"][1]["backends"] == ["reference"]
    assert len(content["results"][1]["kept_min"]) == NUM_LAYERS
    assert (tmp_path / "x.png").stat().st_size > 10_000
