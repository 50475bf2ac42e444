"""The benchmark of context parallelism: its arithmetic, and a small run on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_context_parallel as bench
import pytest


def test_ranks_together_are_as_slow_as_the_slowest() -> None:
    place = {"shape": "1x4096", "what": "exact"}
    one = [place | {"ranks": 1, "us": 90.0, "v_rows": 4096.0, "error": 1e-3, "bound": 0.02}]
    first = place | {"ranks": 2, "us": 50.0, "slice_us": 40.0, "v_rows": 2048.0, "error": 1e-3, "bound": 0.02}
    second = place | {"ranks": 2, "us": 60.0, "slice_us": 30.0, "v_rows": 2048.0}
    rows = bench.together([one]) + bench.together([[first], [second]])
    bench.derive(rows)
    assert rows[1] == first | {"us": 60.0, "v_rows": 4096.0, "speedup": 1.5}
    text = bench.lines(rows)
    assert len(text) == 4 and len({len(line) for line in text[1:]}) == 1 and "1.50" in text[3]


def test_bad_arguments_end_the_program() -> None:
    for argv in (["--shapes", "4"], ["--ranks", "0"], ["--device", "cuda", "--ranks", "1000"]):
        with pytest.raises(SystemExit):
            bench.parse(argv)


def test_the_benchmark_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "context_parallel.json"
    options = "--device cpu --quick --dtype float32 --num-qo-heads 4 --num-kv-heads 2 --head-dim 64 --samples 64"
    monkeypatch.setattr(sys, "argv", ["bench_context_parallel.py", *options.split(), "--json", str(path)])
    bench.main()
    assert "1 x 2,048" in capsys.readouterr().out
    content = json.loads(path.read_text())
    rows = {(row["what"], row["ranks"]): row for row in content["rows"]}
    assert len(rows) == 4 and content["environment"]["date"]
    assert all(row["us"] > 0 and row["error"] < row["bound"] for row in rows.values())
    assert all(rows[what, 2]["slice_us"] > 0 for what in ("exact", "grouped S=64"))
    assert rows["exact", 1]["v_rows"] == rows["exact", 2]["v_rows"] == 2048
    assert rows["grouped S=64", 1]["v_rows"] == pytest.approx(rows["grouped S=64", 2]["v_rows"], rel=0.01)
