"""The benchmark of pages and tokens: a small run on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_paged as bench
import pytest


def test_bad_arguments_end_the_program() -> None:
    for argv in (["--shapes", "4"], ["--shapes", "1x100"], ["--page-sizes", "3"]):
        with pytest.raises(SystemExit):
            bench.parse(["--device", "cpu", *argv])


def test_the_benchmark_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "paged.json"
    options = "--device cpu --quick --dtype float32 --num-qo-heads 4 --num-kv-heads 2 --head-dim 64 --tokens 2"
    monkeypatch.setattr(sys, "argv", ["bench_paged.py", *options.split(), "--json", str(path)])
    bench.main()
    assert "x contiguous" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * (2 + len(bench.PAGE_SIZES) + 1) and all(row["us"] > 0 for row in rows)
    assert [row["ratio"] for row in rows if row["what"] == "contiguous"] == [1.0, 1.0]
