"""Rows of bench_decode.py as the tests of reports and targets make them."""

from __future__ import annotations

import report


def case(suite: str, shape: str, times: dict[str, tuple[str, float]], **more: object) -> list[dict]:
    """Rows of one case: name to (kind, microseconds), with the ratios that derive() adds."""
    batch, kv_len = report.parse_shape(shape)
    common = {"suite": suite, "shape": shape, "case": "", "k_bytes": batch * kv_len * 2048} | more
    setting = {"num_samples": 128, "sampler": "grouped", "budget": "streaming", "v_rows": 400.0, "error": 0.5}
    rows = [
        common | (setting if kind == "santa" else {}) | {"what": name, "kind": kind, "us": us}
        for name, (kind, us) in times.items()
    ]
    report.derive(rows)
    return rows


MEASURED = {
    "torch SDPA": ("dense", 40.0),
    "FlashInfer": ("dense", 36.0),
    "FlashInfer fp8": ("dense fp8", 30.0),
    "FlashInfer XQA": ("dense", 38.0),
    "FlashInfer XQA fp8": ("dense fp8", 28.0),
    "K stream": ("stream", 16.0),
    "santa grouped S=128": ("santa", 20.0),
}
