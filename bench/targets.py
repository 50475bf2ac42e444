"""What the kernels are to reach on an NVIDIA H200, and the judgement of a run's rows by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# batch x kv_len: speed-up over the best dense kernel, share of the K-stream limit.
SAMPLED: dict[str, tuple[float, float | None]] = {
    "1x8192": (1.20, 0.55),
    "1x32768": (1.60, 0.80),
    "1x131072": (1.85, 0.92),
    "4x32768": (1.85, 0.92),
    "16x32768": (1.90, 0.96),
    "8x131072": (1.95, 0.97),
}
# Rows below min_sampled_len: the exact path decides. A sample of 1 .. 64 x 512 .. 4,096.
SHORT = ("1x512", "1x4096", "16x2048", "64x512", "64x4096")
SHORT_SPEEDUP = 0.95
EXACT_OVER_SDPA = 0.95
SAMPLES = (128,)

NOT_RUN = "not run"

MIXED_SHAPE, MIXED_SHORTEST, MIXED_OVER_FLASHINFER = "16x131072", 1024, 1.75
FP8_SHAPES = ("16x32768", "8x131072")
FP8_SPEEDUP, FP8_OVER_FLASHINFER_FP8 = 3.4, 2.7
# Prefill, batch x length: the density that the selection may keep at most, and the least that FlashAttention-3's time
# is of santa.prefill's.
PREFILL: tuple[tuple[str, float, float], ...] = (("1x32768", 0.2, 2.2), ("1x131072", 0.2, 2.8), ("1x131072", 0.1, 5.0))
# The largest part of FlashAttention-3's time that the selection may take.
PREFILL_SELECTION = {"1x32768": 0.08, "1x131072": 0.03}
VARIANT_SHAPE, VARIANT_BASE = "4x32768", "group 4: 32 / 8 heads, head_dim 128, bfloat16, HND"


@dataclass(frozen=True)
class Result:
    """One figure against what it has to be; figure is None if it was not measured, with the reason."""

    target: str
    shape: str
    what: str
    required: float
    figure: float | None
    reason: str = NOT_RUN

    @property
    def met(self) -> bool:
        """Of the figure as measured: 1.849 does not meet 1.85."""
        return self.figure is not None and self.figure >= self.required


def _results(
    target: str, shape: str, required: float, rows: Iterable[dict[str, Any]], key: str, over: str | None = None
) -> list[Result]:
    found = []
    for row in rows:
        figure = row.get(key) if over is None else row.get(key, {}).get(over)
        reason = row.get("note") or (f"{over} has no figure" if over else f"no {key}")
        if key == "share" and figure is not None and figure > 1:  # a limit that is exceeded is none
            figure, reason = None, f"K stream took longer than santa (share {figure:.2f}): no limit to compare with"
        found.append(Result(target, shape, row["what"], required, figure, reason))
    return found or [Result(target, shape, "santa", required, None)]


def evaluate(rows: list[dict[str, Any]]) -> list[Result]:
    """All targets of the suites that were run, for every setting that they name."""

    def santa(suite: str, shape: str, **wanted: Any) -> list[dict[str, Any]]:
        return [
            row
            for row in rows
            if row["suite"] == suite
            and row["shape"] == shape
            and row["kind"] == "santa"
            and all(row[name] == value for name, value in wanted.items())
        ]

    def sampled(suite: str, shape: str) -> list[dict[str, Any]]:
        return [r for r in santa(suite, shape, budget="streaming") if r["num_samples"] in SAMPLES]

    suites = {row["suite"] for row in rows}
    results: list[Result] = []
    if "table" in suites:
        for shape, (speedup, share) in SAMPLED.items():
            results += _results("x best dense", shape, speedup, sampled("table", shape), "speedup")
            if share is not None:
                results += _results("share of limit", shape, share, sampled("table", shape), "share")
        for shape in SHORT:
            results += _results("x best dense, short rows", shape, SHORT_SPEEDUP, sampled("table", shape), "speedup")
        for shape in (*SAMPLED, *SHORT):
            exact = santa("table", shape, num_samples=0)
            results += _results("exact, x torch SDPA", shape, EXACT_OVER_SDPA, exact, "ratios", "torch SDPA")
    if "mixed" in suites:
        mixed = sampled("mixed", MIXED_SHAPE)
        results += _results(
            "mixed lengths, x FlashInfer", MIXED_SHAPE, MIXED_OVER_FLASHINFER, mixed, "ratios", "FlashInfer"
        )
    if "fp8" in suites:
        for shape in FP8_SHAPES:
            fp8 = sampled("fp8", shape)
            results += _results("8-bit cache, x best dense", shape, FP8_SPEEDUP, fp8, "speedup")
            results += _results(
                "8-bit cache, x FlashInfer fp8", shape, FP8_OVER_FLASHINFER_FP8, fp8, "ratios", "FlashInfer fp8"
            )
    return results


def evaluate_prefill(rows: list[dict[str, Any]]) -> list[Result]:
    """The targets of bench_prefill.py, for every planted data set of the length and no more than the density."""
    fa3 = "FlashAttention-3"

    def result(target: str, row: dict[str, Any], required: float, time: str) -> Result:
        dense_ms, own_ms = row.get("dense", {}).get(fa3), row.get(time)
        figure = dense_ms / own_ms if dense_ms and own_ms else None
        density = row.get("density")
        what = f"{row['data']}" + ("" if density is None else f", density {density:.3f}")
        return Result(target, row["shape"], what, required, figure, row.get("note") or f"{fa3} has no figure")

    def planted(shape: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["shape"] == shape and row["data"].startswith("planted")]

    results: list[Result] = []
    for shape, density, speedup in PREFILL:
        target = f"density <= {density}, x FA3"
        found = [result(target, row, speedup, "total_ms") for row in planted(shape) if row.get("density", 0) <= density]
        results += found or [Result(target, shape, "santa.prefill", speedup, None)]
    for shape, share in PREFILL_SELECTION.items():
        target = f"selection <= {share:.0%} of FA3, FA3 / it"
        found = [result(target, row, 1 / share, "selection_ms") for row in planted(shape)]
        results += found or [Result(target, shape, "selection", 1 / share, None)]
    return results
