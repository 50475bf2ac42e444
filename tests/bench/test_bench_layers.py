"""The benchmark of attention between matrix products: a small run on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_layers as bench
import pytest


@pytest.mark.parametrize("shape", ["4", "1x", "0x64", "1x100", "1x64x2"])
def test_bad_shapes_are_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--device", "cpu", "--shapes", shape])
    assert shape in capsys.readouterr().err


def test_the_benchmark_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layers.json"
    monkeypatch.setattr(sys, "argv", f"bench_layers.py --device cpu --quick --json {path}".split())
    bench.main()
    assert "x SDPA" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "torch SDPA",
        "santa exact",
        "santa paged, exact",
        "santa paged, may be sampled",
    ]
    assert rows[0]["ratio"] == 1.0 and all(row["alone_us"] > 0 for row in rows)


def test_an_attention_that_is_wrong_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.santa, "decode", lambda q, *_, **__: (q,))
    with pytest.raises(SystemExit, match="not what SDPA gives"):
        bench.run(bench.parse(["--device", "cpu", "--quick"]))
