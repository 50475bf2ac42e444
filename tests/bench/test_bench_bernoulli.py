"""The benchmark of Bernoulli scores: its arithmetic, and a small run on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_bernoulli
import harness
import pytest
import torch


def test_ratios_and_verdicts() -> None:
    place = {"shape": "1x32768"}
    rows = [
        place | {"what": "K stream", "kind": "stream", "us": 16.0},
        place | {"what": "exact scores", "kind": "exact", "us": 24.0},
        place | {"what": "exact scores, K fp8", "kind": "fp8", "us": 18.0},
        place | {"what": "shared B=1", "kind": "draws", "us": 20.0, "score_us": 10.0, "features": 0.5},
        place | {"what": "shared B=2", "kind": "draws", "us": 17.9, "score_us": 9.0, "features": 0.5},
        place | {"what": "shared B=4", "kind": "draws", "us": 12.0, "score_us": 9.0, "features": 0.5},
        place | {"what": "shared B=8", "kind": "draws", "note": "failed: wrong result"},
    ]
    bench_bernoulli.derive(rows)
    assert rows[3]["over_exact"] == 24 / 20 and rows[3]["over_fp8"] == 18 / 20 and rows[3]["over_stream"] == 20 / 8
    assert [row.get("verdict") for row in rows[3:]] == ["fp8 keys", "bernoulli = fp8 keys", "bernoulli", None]
    text = "\n".join(bench_bernoulli.lines(rows))
    assert "failed: wrong result" in text and "bernoulli = fp8 keys" in text


def test_a_query_reads_the_share_it_was_made_for() -> None:
    q = bench_bernoulli.query_of_share(torch.randn(2, 8, 64), 0.375)
    kept = q != 0
    assert (kept.sum(dim=-1) == 24).all() and (q.abs().amax(dim=-1) == 1).all()
    assert (kept.unflatten(-1, (8, 8)).sum(dim=-1) == 3).all()  # spread evenly


def test_the_benchmark_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, png = tmp_path / "deep" / "bernoulli.json", tmp_path / "bernoulli.png"
    monkeypatch.setattr(harness, "CPU_CACHE_BYTES", 0)
    monkeypatch.setattr(bench_bernoulli, "time_cpu_us", lambda calls: float(len([call() for call in calls])))
    options = "--device cpu --shapes 2x600 --draws 1 4 --shares 0.25 1 --num-qo-heads 4 --num-kv-heads 2 --head-dim 64"
    options += " --samples 64 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["bench_bernoulli.py", *options.split(), "--json", str(path), "--plot", str(png)])
    pytest.importorskip("matplotlib")
    bench_bernoulli.main()
    assert "failed" not in capsys.readouterr().out and png.stat().st_size > 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["exact", "fp8"] + ["draws"] * 6 + ["share"] * 2
    assert all(row["us"] > 0 and row["error"] >= 0 for row in rows)
    assert [row["features"] for row in rows[-2:]] == [0.25, 1.0]
