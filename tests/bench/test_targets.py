"""Which rows of a benchmark are judged by which target."""

from __future__ import annotations

import report
import targets
from helpers.bench_rows import MEASURED, case

import santa


def test_a_limit_that_is_exceeded_meets_no_target() -> None:
    """A K stream slower than the kernel that reads K and more is a failed measurement, not a success."""
    rows = [
        {"suite": "table", "shape": "4x32768", "kind": "santa", "what": "santa grouped S=128", "budget": "streaming"}
    ]
    rows[0] |= {"num_samples": 128, "sampler": "grouped", "share": 1.05, "speedup": 1.9, "ratios": {}}
    shares = [r for r in targets.evaluate(rows) if r.target == "share of limit" and r.what == "santa grouped S=128"]
    assert len(shares) == 1 and not shares[0].met and shares[0].figure is None and "1.05" in shares[0].reason


def test_targets_at_their_boundary() -> None:
    def speedup(santa_us: float, device: str = "NVIDIA H200") -> targets.Result:
        times = {"torch SDPA": ("dense", 185.0), "santa grouped S=128": ("santa", santa_us)}
        (result,) = [r for r in targets.evaluate(case("table", "4x32768", times), device) if r.figure is not None]
        return result

    assert speedup(100.0).met  # 1.85
    assert not speedup(100.01).met
    assert "1.849  miss" in report.target_lines([speedup(100.01)])[1]
    assert not speedup(100.0, "NVIDIA H100 80GB HBM3").met  # 1.90
    assert speedup(97.36, "NVIDIA H100 80GB HBM3").met


def test_each_card_has_its_targets_and_others_those_of_the_h200() -> None:
    assert targets.card_of("NVIDIA H100 80GB HBM3") == "H100"
    assert targets.card_of("NVIDIA H200") == targets.card_of("CPU (x86_64, 2 threads)") == "H200"
    rows = case("table", "1x32768", MEASURED) + case("fp8", "16x32768", MEASURED)
    for device, table, fp8 in (("NVIDIA H100 NVL", 1.72, 3.6), ("NVIDIA H200 NVL", 1.60, 3.4), ("RTX", 1.60, 3.4)):
        required = {(r.target, r.shape): r.required for r in targets.evaluate(rows, device)}
        assert required["x best dense", "1x32768"] == table
        assert required["8-bit K, x best 16-bit dense", "16x32768"] == fp8
        assert required["share of limit", "1x32768"] == 0.80


def test_targets_name_the_settings_that_count() -> None:
    rows = case("table", "1x32768", MEASURED)
    others = (
        {"num_samples": 2048, "budget": "uniform"},
        {"num_samples": 0},
        {"sampler": "systematic"},
        {"num_samples": 64},
    )
    for other in others:
        rows.append(rows[-1] | {"what": "other"} | other)
    measured = {(r.target, r.what): r for r in targets.evaluate(rows) if r.figure is not None}
    assert set(measured) == {("x best dense", "santa grouped S=128"), ("share of limit", "santa grouped S=128")}
    assert measured["x best dense", "santa grouped S=128"].met  # 1.80 of 1.60
    assert measured["share of limit", "santa grouped S=128"].met  # 0.80 of 0.80


def test_the_exact_path_is_judged_over_the_best_dense_kernel_on_short_rows() -> None:
    rows = case("table", "16x2048", MEASURED)
    rows.append(rows[-1] | {"what": "santa exact", "num_samples": 0, "speedup": 0.949})
    measured = {r.what: r for r in targets.evaluate(rows) if r.figure is not None}
    assert {r.target for r in measured.values()} == {"exact path, x best dense"}
    assert not measured["santa exact"].met
    assert measured["santa grouped S=128"].figure == 1.8  # over FlashInfer, not SDPA


def test_targets_of_the_proportional_budget_are_for_every_sampler() -> None:
    assert set(targets.PROPORTIONAL_SAMPLERS) == {sampler.name.lower() for sampler in santa.Sampler}
    rows = case("table", "4x32768", MEASURED)
    setting = {"budget": "proportional", "sampler": "multinomial", "what": "santa multinomial S=128 proportional"}
    rows.append(rows[-1] | setting)
    found = [r for r in targets.evaluate(rows) if r.target == "proportional, x best dense"]
    assert len(found) == 3 * 4
    (measured,) = [r for r in found if r.figure is not None]
    assert measured.shape == "4x32768" and measured.met  # 1.8 of 1.4
    text = "\n".join(report.target_lines(found))
    assert "4x32768 (stratified, systematic, grouped)" in text and "1x32768 (multinomial, stratified" in text
    assert all(len(line) <= report.WIDTH for line in text.splitlines())


def test_targets_of_variants_are_shares_of_their_own_limit() -> None:
    times = {"K stream": ("stream", 81.0), "santa grouped S=128": ("santa", 100.0)}
    rows = case("variants", targets.VARIANT_SHAPE, times, case=targets.VARIANT_BASE)
    rows += case("variants", targets.VARIANT_SHAPE, times, case="NHD")
    slow = times | {"K stream": ("stream", 80.9)}
    rows += case("variants", targets.VARIANT_SHAPE, slow, case="head_dim 64")
    results = targets.evaluate(rows)
    assert {r.target for r in results} == {"variant, share of limit"}
    assert len(results) == len(targets.VARIANTS)
    measured = {r.what: r.met for r in results if r.figure is not None}
    assert measured == {"NHD": True, "head_dim 64": False}
    assert "4x32768 (group 1: 8 / 8 heads, group 7: 28 / 4 heads" in "\n".join(report.target_lines(results))


def test_targets_of_mixed_lengths_and_of_8_bit_caches() -> None:
    rows = case("mixed", targets.MIXED_SHAPE, {"FlashInfer": ("dense", 176.0), "santa grouped S=128": ("santa", 100.0)})
    rows += case("fp8", "16x32768", MEASURED)
    measured = {r.target: r for r in targets.evaluate(rows) if r.figure is not None}
    assert measured["mixed lengths, x FlashInfer"].met
    assert measured["8-bit K, x best 16-bit dense"].figure == 1.8
    over_8_bit = measured["8-bit K, x best 8-bit dense"]
    assert over_8_bit.figure == 1.4 and not over_8_bit.met and over_8_bit.required == 2.2


def test_the_best_8_bit_kernel_is_named_with_its_error_and_has_xqa_among_it() -> None:
    def judged(rows: list[dict]) -> targets.Result:
        target = ("8-bit K, x best 8-bit dense", "16x32768")
        (result,) = [r for r in targets.evaluate(rows) if (r.target, r.shape) == target]
        return result

    rows = case("fp8", "16x32768", MEASURED)
    xqa = next(row for row in rows if row["what"] == "FlashInfer XQA fp8")
    xqa["error"] = 0.054
    result = judged(rows)
    assert result.remark == "over FlashInfer XQA fp8, error 5.4e-02"
    assert report.target_lines([result])[1].endswith("miss (over FlashInfer XQA fp8, error 5.4e-02)")
    slow = case("fp8", "16x32768", MEASURED | {"FlashInfer XQA fp8": ("dense fp8", 31.0)})
    assert judged(slow).figure == 1.5 and judged(slow).remark == "over FlashInfer fp8"
    del xqa["us"]
    xqa["note"] = "failed: out of memory"
    report.derive(rows)
    assert judged(rows).figure is None and "XQA fp8: failed: out of memory" in judged(rows).reason
    assert judged([row for row in rows if row is not xqa]).figure is None


def test_what_was_not_run_is_said() -> None:
    rows = case("table", "1x32768", {"torch SDPA": ("dense", 40.0)})
    rows.append(rows[0] | {"what": "santa", "kind": "santa", "num_samples": 128})
    rows[-1] |= {"sampler": "grouped", "budget": "streaming"}
    del rows[-1]["us"], rows[-1]["speedup"]
    rows[-1]["note"] = "failed: out of memory"
    text = "\n".join(report.target_lines(targets.evaluate(rows)))
    assert "not measured: failed: out of memory" in text
    assert "not run: 1x8192" in text
    assert "0 met, 0 missed" in text
