"""The prefill benchmark's own arithmetic and data, on the CPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import bench_prefill
import bench_selection
import competitors
import numpy as np
import prefill_data
import pytest
import report
import targets
import torch
from tqdm import tqdm

import santa

FA3 = "FlashAttention-3"


def row(length: int, density: float, total_ms: float, *, selection_ms: float = 0.5, fa3: float = 10.0) -> dict:
    result = {
        "suite": "prefill",
        "data": f"planted {density:g}",
        "shape": f"1x{length}",
        "length": length,
        "density": density,
        "selection_ms": selection_ms,
        "attention_ms": total_ms - selection_ms,
        "total_ms": total_ms,
        "dense": {"torch SDPA": 12.0, FA3: fa3},
        "error": 0.01,
        "kernel_error": 0.001,
        "kept_min": 0.9,
        "kept_mean": 0.97,
    }
    report.derive_prefill(result)
    return result


def planted(length: int, structures: float, **options: object) -> prefill_data.Planted:
    heads = {"num_qo_heads": 4, "num_kv_heads": 2, "dtype": torch.float32, "device": "cpu"}
    return prefill_data.planted(length, structures, **heads | options)


def test_ratios_are_to_the_fastest_dense_kernel_and_to_each() -> None:
    result = row(32768, 0.2, 4.0)
    assert result["speedup"] == 2.5 and result["ratios"] == {"torch SDPA": 3.0, FA3: 2.5}


def test_lines_align_and_say_what_was_not_run() -> None:
    failed = {"data": "planted 0.1", "length": 524288, "note": "not run: CUDA out of memory"}
    without_fa3 = row(131072, 0.1, 4000.0)
    del without_fa3["dense"][FA3]
    report.derive_prefill(without_fa3)
    lines = report.prefill_lines([row(32768, 0.2, 4.0), without_fa3, failed])
    assert {len(line) for line in lines[:2]} == {len(report.PREFILL_HEAD)} and len(lines[0]) <= report.WIDTH
    assert "5.0%" in lines[0] and "out of memory" in lines[2]


def test_targets_at_their_boundary() -> None:
    def results(total_ms: float, selection_ms: float, density: float = 0.2) -> dict[str, targets.Result]:
        rows = [row(32768, density, total_ms, selection_ms=selection_ms, fa3=22.0)]
        return {r.target: r for r in targets.evaluate_prefill(rows) if r.figure is not None}

    met = results(10.0, 1.76)
    assert met["density <= 0.2, x FA3"].met and met["selection <= 8% of FA3, FA3 / it"].met
    missed = results(10.01, 1.77)
    assert not missed["density <= 0.2, x FA3"].met and not missed["selection <= 8% of FA3, FA3 / it"].met
    # What is denser is not what the target is about.
    assert "density <= 0.2, x FA3" not in results(10.0, 1.0, density=0.21)


def test_targets_without_a_figure_are_not_met() -> None:
    failed = {"data": "planted 0.1", "shape": "1x131072", "density": 0.1, "note": "failed: wrong result"}
    results = targets.evaluate_prefill([failed])
    assert len(results) == 5 and not any(r.met for r in results)
    assert sum(r.reason == "failed: wrong result" for r in results) == 3
    text = "\n".join(report.target_lines(results))
    assert "0 met, 0 missed, 5 not measured" in text


def block_masses(data: prefill_data.Planted, h: int, a: int) -> torch.Tensor:
    """Mean softmax mass of query block a on each key block up to its own, in which it is not masked."""
    rows = slice(128 * a, 128 * (a + 1))
    scores = data.q[0, h, rows] @ data.k[0, h // 2, : rows.stop].T / 128**0.5
    return scores.softmax(-1).unflatten(1, (-1, 128)).sum(-1).mean(0)


@pytest.mark.parametrize("selection", ["paper", "joint"])
def test_the_selection_finds_what_was_planted(selection: str) -> None:
    data = planted(4096, 4)
    kv_cnt, kv_idx, stats = santa.sample_select(data.q, data.k, alpha_c=0.97, alpha_s=0.97, selection=selection)
    found = 0
    for h in range(4):
        kept = set(kv_idx[0, h, -1, : kv_cnt[0, h, -1]].tolist())
        strong = set((block_masses(data, h, 31) > 0.05).nonzero().flatten().tolist())
        # What holds mass was planted, and is found.
        assert strong <= {*data.columns[h], *(31 - d for d in data.slashes[h])} and strong <= kept
        found += len(strong)
    assert found >= 8
    assert (stats[..., 1] > 0.97).all() and stats[..., 0].mean() < 0.6


def test_planted_columns_and_slashes_hold_their_shares() -> None:
    data = planted(4096, 4, seed=3)
    rows = bench_prefill.Rows(data)
    shares = []
    for h in range(4):
        mass = block_masses(data, h, 31)
        columns, slashes = set(data.columns[h]), {31 - d for d in data.slashes[h]}
        assert mass[list(columns | slashes)].sum() > 0.9
        shares.append(float(mass[list(columns - slashes)].sum()))
    assert 0.2 < sum(shares) / 4 < 0.8
    assert torch.allclose(rows.dense_lse[0, -1], (data.q[0, 0, -1] @ data.k[0, 0].T / 128**0.5).logsumexp(-1))


def test_the_density_asked_for_is_not_exceeded() -> None:
    asked, options = [], {"num_qo_heads": 4, "num_kv_heads": 2, "dtype": torch.float32, "device": "cpu"}

    def density_of(data: prefill_data.Planted) -> float:
        asked.append(sum(map(len, data.columns)) / 100)
        return asked[-1]

    data = prefill_data.planted_at(2048, 0.2, density_of, **options)
    assert 0.15 <= sum(map(len, data.columns)) / 100 <= 0.2 < max(asked)
    # Not to be had: what there is then has the fewest structures.
    assert sum(map(len, prefill_data.planted_at(2048, 0.01, density_of, **options).columns)) == 5


def test_the_checked_rows_of_an_output() -> None:
    data = planted(1024, 4)
    rows = bench_prefill.Rows(data)
    assert len(rows.index) == bench_prefill.CHECKED_ROWS and int(rows.index[-1]) == 1023
    out, _, stats = santa.prefill(data.q, data.k, data.v, alpha=0.5, backend="reference", return_stats=True)
    lists = list(santa.sample_select(data.q, data.k, alpha_c=0.5, alpha_s=0.5)[:2])
    assert stats.density < 0.8
    assert bench_prefill.relative_error(rows.of(out), rows.attention(lists)[0]) < 1e-5
    # A block too few is found.
    lists[0] = (lists[0] - 1).clamp(min=1)
    assert bench_prefill.relative_error(rows.of(out), rows.attention(lists)[0]) > 0.05


def test_captured_heads_are_those_of_the_model_and_tiled_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", minversion="5.4.0")
    from transformers import LlamaConfig

    data = prefill_data.captured(512, layers=2, device="cpu", dtype=torch.float32)
    assert data.q.shape == (1, 16, 512, 64) and data.k.shape == data.v.shape == (1, 4, 512, 64)
    original = LlamaConfig.from_pretrained(prefill_data.MODEL)
    assert original.max_position_embeddings == 16384


def test_defaults() -> None:
    arguments = bench_prefill.parse([])
    assert arguments.lengths == [16384, 32768, 65536, 131072, 524288]
    assert arguments.densities == [0.2, 0.1] and arguments.dense == ["sdpa", "fa3"]
    measured = {(f"1x{n}", d) for n in arguments.lengths for d in arguments.densities}
    assert {(shape, density) for shape, density, _ in targets.PREFILL} <= measured
    assert bench_prefill.parse(["--lengths", "32768"]).captured_lengths == []
    assert bench_prefill.parse(["--device", "cpu"]).dense == ["sdpa"]


@pytest.mark.parametrize("argv", [["--lengths", "64"], ["--device", "cpu", "--dense", "fa3"], ["--selection", "best"]])
def test_bad_arguments_end_the_program(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench_prefill.parse(argv)


def test_a_dense_kernel_that_cannot_load_is_named_with_its_reason(tmp_path: Path) -> None:
    loaded, missing = bench_prefill.load_dense(["sdpa", "fa3"], tmp_path)
    assert [dense.name for dense in loaded] == ["torch SDPA"] and list(missing) == ["fa3"]
    assert competitors.FACTORIES["fa3"] is competitors.FlashAttention3


def test_the_benchmark_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--lengths", "1024", "--densities", "0.2", "--targets"]
    bench_prefill.main([*argv, "--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")])
    text = capsys.readouterr().out
    assert report.PREFILL_HEAD in text and "planted 0.2" in text and "5 not measured" in text
    content = json.loads((tmp_path / "x.json").read_text())
    (measured,) = content["rows"]
    assert measured["kernel_error"] < 1e-4 and 0 < measured["density"] <= 1 and measured["kept_min"] > 0.5
    assert measured["error"] < 0.1 and measured["dense"].keys() == {"torch SDPA"}
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prefill = santa.prefill

    def wrong(*tensors: torch.Tensor, **options: object) -> tuple:
        out, *rest = prefill(*tensors, **options)
        return out * 1.1, *rest

    monkeypatch.setattr(santa, "prefill", wrong)
    with pytest.raises(SystemExit, match="some rows failed"):
        bench_prefill.main(["--device", "cpu", "--lengths", "512", "--densities", "0.5"])
    assert "wrong result: relative error 0.1" in capsys.readouterr().out


def test_density_is_read_off_between_grid_points():
    curve = np.array([[0.1, 0.5], [0.2, 0.7], [0.4, 0.9]])  # (density, mean mass) of three alphas
    assert bench_selection.density_at(0.8, curve) == pytest.approx(0.3)
    assert np.isnan(bench_selection.density_at(0.95, curve)) and np.isnan(bench_selection.density_at(0.4, curve))


def test_selection_comparison_on_planted_heads():
    """The floor is kept, and costs blocks; every density is one."""
    data = prefill_data.planted(1024, 4, num_qo_heads=4, num_kv_heads=2, dtype=torch.float32, device="cpu")
    with tqdm(disable=True) as progress:
        result = bench_selection.compare(data, progress)
    for row in result["equal_mass"]:
        assert row["heads"] == 0 or (0 < row["joint"] <= 1 and 0 < row["paper"] <= 1)
    floors = result["floors"]
    assert all(row["least"] >= row["min_mass"] - 1e-6 for row in floors)
    assert all(a["density"] <= b["density"] for a, b in itertools.pairwise(floors))
