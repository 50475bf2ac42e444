"""The demo on a short context, and the table that README has of it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[list[str], Path]:
    """Lines that it prints, and the folder that it writes to."""
    out = tmp_path_factory.mktemp("demo")
    options = ["--device", "cpu", "--context", "2048", "--steps", "16", "--markdown", "--out", str(out)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, ROOT / "demo" / "demo.py", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), out


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_readme_has_what_the_command_prints(demo):
    """Header, rows, and which figures have deviations; the figures vary with machine and text, as README says."""
    printed = cells(demo[0])
    readme = (ROOT / "README.md").read_text()
    shown = cells(readme[readme.index("The demo's table") :].split("\n\n")[1].splitlines())
    assert [line[:2] for line in shown] == [line[:2] for line in printed]
    assert shown[0] == printed[0] and len(shown) == 11
    assert [["±" in cell for cell in line] for line in shown] == [["±" in cell for cell in line] for line in printed]


def test_the_rows_are_about_what_they_say(demo):
    _, out = demo
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    sdpa, rounding, exact, *sampled = rows
    assert float(sdpa["total_variation"]) == 0 and float(exact["total_variation"]) < 1e-4
    assert rounding["attention"] == "exact, in bfloat16" and rounding["tokens_per_s"] == "nan"
    assert 0 < float(rounding["total_variation"]) < 0.02
    assert all(float(row["spread"]) > 0 and float(row["rows_read"]) < 1 for row in sampled)
    grouped = [float(row["total_variation"]) for row in sampled if row["attention"] == "grouped"]
    assert grouped[0] > grouped[-1]  # S = 16 and 256


def test_the_curves_have_errors_and_times(demo):
    lines, out = demo
    with (out / "error_curves.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 28 and all(float(point["relative_time"]) > 0 for point in points)
    if not any("matplotlib is not installed" in line for line in lines):
        assert (out / "error_curves.png").stat().st_size > 10_000
