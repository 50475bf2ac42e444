"""From measured rows to ratios, tables and a plot. A row is a dictionary, as in the JSON of bench_decode.py."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import targets

Row = dict[str, Any]
WIDTH = 150
SHORT_NAMES = {
    "torch SDPA": "x SDPA",
    "FlashInfer": "x FI",
    "FlashInfer fp8": "x FI fp8",
    "FlashInfer XQA": "x XQA",
    "FlashInfer XQA fp8": "x XQA8",
    "FlashAttention-3": "x FA3",
}


def parse_shape(shape: str) -> tuple[int, int]:
    """batch and kv_len of "4x32768"."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
        raise ValueError(f"shape is {shape!r}; it needs to be batch x kv_len, such as 4x32768")
    batch, kv_len = shape.split("x")
    return int(batch), int(kv_len)


def best_dense(rows: Iterable[Row]) -> Row | None:
    """The fastest dense kernel of a case that keeps K and V in 16 bits and gave the right result."""
    return min((row for row in rows if row["kind"] == "dense" and "us" in row), key=lambda row: row["us"], default=None)


def derive(rows: list[Row]) -> None:
    """Adds k_gbps, share, speedup and ratios to the rows of one case that have a time."""
    streams = {row["k_bytes"]: row["us"] for row in rows if row["kind"] == "stream" and "us" in row}
    best = best_dense(rows)
    dense = {row["what"]: row["us"] for row in rows if row["kind"].startswith("dense") and "us" in row}
    for row in rows:
        if "us" not in row:
            continue
        row["k_gbps"] = row["k_bytes"] / row["us"] / 1e3
        if row["k_bytes"] in streams:
            row["stream_us"] = streams[row["k_bytes"]]
            row["share"] = row["stream_us"] / row["us"]
        if best is not None:
            row["speedup"] = best["us"] / row["us"]
        row["ratios"] = {name: us / row["us"] for name, us in dense.items()}


def _cell(value: float | None, width: int, spec: str) -> str:
    return f"{value:{width}{spec}}" if value is not None else "-".rjust(width)


def case_lines(rows: list[Row]) -> list[str]:
    """The table of one case."""
    if not rows:
        return ["nothing was measured"]
    batch, kv_len = parse_shape(rows[0]["shape"])
    best = best_dense(rows)
    stream = next((row for row in rows if row["kind"] == "stream" and "us" in row), None)
    title = f"{batch} x {kv_len:,}" + (f", {rows[0]['case']}" if rows[0]["case"] else "")
    title += f"; best dense: {best['what']}" if best else "; no dense kernel ran"
    if best and stream:
        title += f", {best['us'] / stream['us']:.2f} times as long as {stream['what']}"
    dense = [row["what"] for row in rows if row["kind"].startswith("dense")]
    heads = "".join(f"{SHORT_NAMES.get(name, name):>9}" for name in dense)
    lines = [title, f"    {'':37}{'us':>9}{'K GB/s':>8}{'limit':>7}{'x best':>8}{heads}{'V rows':>10}{'error':>10}"]
    for row in rows:
        if "us" not in row:
            text = f"    {row['what']:37} {row.get('note', 'not run')}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 42, replace_whitespace=False)
            continue
        ratios = "".join(_cell(row["ratios"].get(name), 9, ".2f") for name in dense)
        gbps = _cell(row["k_gbps"], 8, ".0f" if row["k_gbps"] >= 100 else ".3g")
        lines.append(
            f"    {row['what']:37}{row['us']:9.1f}{gbps}{_cell(row.get('share'), 7, '.2f')}"
            f"{_cell(row.get('speedup'), 8, '.2f')}{ratios}{_cell(row.get('v_rows'), 10, '.0f')}"
            f"{_cell(row.get('error'), 10, '.1e')}"
        )
    return lines


PREFILL_HEAD = (
    f"{'length':>9}  {'data':14}{'density':>8}{'select':>9}{'attend':>10}{'total':>10}{'SDPA':>10}{'FA3':>10}"
    f"{'x best':>8}{'x FA3':>8}{'sel/FA3':>9}{'error':>9}{'kernel':>9}{'kept min':>10}{'mean':>8}"
)


def derive_prefill(row: Row) -> None:
    """Adds speedup (over the fastest dense kernel) and ratios to a row of bench_prefill.py."""
    row["ratios"] = {name: ms / row["total_ms"] for name, ms in row["dense"].items()}
    if row["ratios"]:
        row["speedup"] = min(row["ratios"].values())


def prefill_lines(rows: Iterable[Row]) -> list[str]:
    """A line for each data set, under PREFILL_HEAD."""
    lines = []
    for row in rows:
        place = f"{row['length']:9,}  {row['data']:14}"
        if "total_ms" not in row:
            lines += textwrap.wrap(f"{place} {row.get('note', 'not run')}", WIDTH, subsequent_indent=" " * 26)
            continue
        dense, fa3 = row["dense"], row["dense"].get("FlashAttention-3")
        cells = [
            (row["density"], 8, ".3f"),
            (row["selection_ms"], 9, ".3f"),
            (row["attention_ms"], 10, ".2f"),
            (row["total_ms"], 10, ".2f"),
            (dense.get("torch SDPA"), 10, ".2f"),
            (fa3, 10, ".2f"),
            (row.get("speedup"), 8, ".2f"),
            (row["ratios"].get("FlashAttention-3"), 8, ".2f"),
            (None if fa3 is None else row["selection_ms"] / fa3, 9, ".1%"),
            (row["error"], 9, ".1e"),
            (row["kernel_error"], 9, ".1e"),
            (row["kept_min"], 10, ".3f"),
            (row["kept_mean"], 8, ".3f"),
        ]
        lines.append(place + "".join(_cell(*cell) for cell in cells))
    return lines


def variant_lines(rows: list[Row]) -> list[str]:
    """Speed-ups of the variants, over the best dense kernel, beside those of the base: group 4, head_dim 128."""
    variants = [row for row in rows if row["suite"] == "variants" and row["kind"] == "santa" and "speedup" in row]
    base = {row["what"]: row["speedup"] for row in variants if row["case"] == targets.VARIANT_BASE}
    if not variants:
        return []
    lines = [f"Speed-up over the best dense kernel at {targets.VARIANT_SHAPE}, and that over the first case's"]
    for case in dict.fromkeys(row["case"] for row in variants):
        figures = [
            f"{row['what']} {row['speedup']:.2f} ({row['speedup'] / base[row['what']]:.2f})"
            if row["what"] in base
            else f"{row['what']} {row['speedup']:.2f}"
            for row in variants
            if row["case"] == case
        ]
        lines.append(f"    {case:52} {'   '.join(figures)}")
    return [*lines, ""]


def target_lines(results: list[targets.Result]) -> list[str]:
    """A line for each target and setting that was run: required, measured, met or miss; then what was not run."""
    lines = [f"{'target':34}{'shape':>11}  {'setting':37}{'at least':>9}{'measured':>10}"]
    for r in results:
        if r.figure is None and r.reason == targets.NOT_RUN:
            continue
        # Rounded down, so that no figure that misses looks as if it met.
        figure = f"{math.floor(r.figure * 1000) / 1000:10.3f}" if r.figure is not None else f"{'-':>10}"
        verdict = "met" if r.met else "miss" if r.figure is not None else f"not measured: {r.reason}"
        verdict += f" ({r.remark})" if r.remark else ""
        lines.append(f"{r.target:34}{r.shape:>11}  {r.what:37}{r.required:9.2f}{figure}  {verdict}"[:WIDTH])
    not_run: dict[str, dict[str, list[str]]] = {}
    for r in results:
        if r.figure is None and r.reason == targets.NOT_RUN:
            not_run.setdefault(r.target, {}).setdefault(r.shape, []).extend([r.remark] if r.remark else [])
    for target, shapes in not_run.items():
        places = [shape + (f" ({', '.join(settings)})" if settings else "") for shape, settings in shapes.items()]
        text = f"{target:34}not run: {', '.join(places)}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 43, break_long_words=False)
    met, missed = sum(r.met for r in results), sum(r.figure is not None and not r.met for r in results)
    return [*lines, f"{met} met, {missed} missed, {len(results) - met - missed} not measured", ""]


def describe(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "heads": f"{arguments.num_qo_heads} / {arguments.num_kv_heads}",
        "head_dim": arguments.head_dim,
        "dtype": arguments.dtype,
        "layout": arguments.layout,
    }


def plot_prefill(rows: list[Row], path: Path, device: str) -> None:
    """Time by length of each data set and dense kernel; the selection's part dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "total_ms" in row]
    figure, axes = plt.subplots(figsize=(7.5, 5), constrained_layout=True)

    def line(name: str, points: list[tuple[int, float]], **style: Any) -> None:
        if points:
            axes.plot(*zip(*sorted(points), strict=True), label=name, **style)

    for number, data in enumerate(dict.fromkeys(row["data"] for row in rows)):
        own = [row for row in rows if row["data"] == data]
        densities = sorted(row["density"] for row in own)
        name = f"santa.prefill, {data} (density {densities[0]:.2f} to {densities[-1]:.2f})"
        line(name, [(row["length"], row["total_ms"]) for row in own], color=f"C{number}", marker="o")
        line("", [(row["length"], row["selection_ms"]) for row in own], color=f"C{number}", linestyle=":")
    planted = [row for row in rows if row["data"].startswith("planted")] or rows
    for number, name in enumerate(dict.fromkeys(name for row in planted for name in row["dense"])):
        points = {(row["length"], row["dense"][name]) for row in planted if name in row["dense"]}
        line(name, list(points), color="black", linestyle=("-", "--", "-.")[number % 3], marker="x")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of prompt")
    axes.set_ylabel("ms (dotted: selection)")
    axes.set_title(f"Causal attention of one prompt, one layer, {device}")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot(rows: list[Row], path: Path, device: str) -> None:
    """Speed-up over the best dense kernel by shape, with the K-stream limit marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["suite"] == "table" and "speedup" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["what"] for row in rows if row["kind"] == "santa"))
    figure, axes = plt.subplots(figsize=(max(6.0, 1.2 * len(shapes)), 4.5), constrained_layout=True)
    width = 0.8 / max(len(names), 1)
    for n, name in enumerate(names):
        points = [(shapes.index(r["shape"]) - 0.4 + (n + 0.5) * width, r["speedup"]) for r in rows if r["what"] == name]
        axes.bar(*zip(*points, strict=True), width=width, label=name)
    limits = [(shapes.index(r["shape"]), r["speedup"]) for r in rows if r["kind"] == "stream"]
    for i, (position, limit) in enumerate(limits):
        label = "limit: reading K alone" if i == 0 else None
        axes.hlines(limit, position - 0.45, position + 0.45, color="black", linestyle="--", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [f"{b} x {n:,}" for b, n in map(parse_shape, shapes)], rotation=20)
    axes.set_ylabel("speed-up over the best dense kernel")
    axes.set_title(f"One decode step of attention, {device}")
    axes.legend(fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
