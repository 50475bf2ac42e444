"""Tables in Markdown, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .decode import HeadFacts, LayerFacts
from .measures import MAX_TOTAL_VARIATION, Advice, Point, wilson_interval


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def point_table(points: Sequence[Point]) -> str:
    rows = []
    for point in points:
        low, change, high = point.perplexity_change
        rows.append(
            [
                point.method,
                str(point.num_samples),
                f"{change:+.2%} ({low:+.1%} to {high:+.1%})",
                f"{point.variation:.4f} ± {point.variation_half_width:.4f}",
                f"{point.variation_99:.3f}",
                f"{point.agreement:.1%}",
                f"{point.rows_share:.2%}",
                f"{point.bytes_share:.1%}",
            ]
        )
    header = ["method", "S", "perplexity, change", "TV", "TV, 99%", "top-1", "V rows", "bytes of dense"]
    return markdown(header, rows)


def advice_table(advice: Sequence[Advice]) -> str:
    def cell(num_samples: int | None) -> str:
        return "-" if num_samples is None else str(num_samples)

    rows = [
        [
            line.model,
            f"{line.context:,}",
            line.method,
            *map(cell, (line.for_variation, line.for_perplexity, line.for_both)),
        ]
        for line in advice
    ]
    return markdown(["model", "context", "method", "S for TV", "S for perplexity", "S for both"], rows)


def layer_table(facts: Sequence[LayerFacts], num_samples: int) -> str:
    rows = [
        [
            f"{fact.layer}{', window' if fact.has_window else ''}",
            f"{fact.effective_keys:,.0f}",
            f"{fact.sink:.1%}",
            f"{fact.error:.1%}",
        ]
        for fact in facts
    ]
    return markdown(["layer", "exp of entropy, keys", "mass of the first key", f"error, S = {num_samples}"], rows)


def head_table(heads: Sequence[HeadFacts], num_samples: int) -> str:
    rows = [
        [
            f"{head.layer}{', window' if head.has_window else ''}",
            str(head.head),
            "-" if head.copied is None else f"{head.copied:.1%}",
            f"{head.effective_keys:,.0f}",
            f"{head.sink:.1%}",
            f"{head.error:.1%}",
        ]
        for head in heads
    ]
    header = ["layer", "head", "mass of the token copied", "exp of entropy, keys", "mass of the first key"]
    return markdown([*header, f"error, S = {num_samples}"], rows)


def error_summary(heads: Sequence[HeadFacts]) -> str:
    errors = torch.tensor([head.error for head in heads])
    median, most = errors.quantile(torch.tensor([0.5, 0.9])).tolist()
    return f"error of {len(heads)} heads: median {median:.1%}, 90th percentile {most:.1%}, mean {errors.mean():.1%}"


def retrieval_table(records: Sequence[dict]) -> str:
    """A line for each method and S, a column for each task, and one for all of them with its interval."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    lines: dict[tuple[str, int], list[dict]] = {}
    for record in records:
        lines.setdefault((record["method"], record["num_samples"]), []).append(record)
    first = lines[records[0]["method"], records[0]["num_samples"]]
    rows = [["exact", "-", *(f"{record['exact_right']} of {record['prompts']}" for record in first), "-", "-"]]
    for (method, num_samples), of_line in lines.items():
        right, total = (sum(record[name] for record in of_line) for name in ("right", "exact_right"))
        low, high = wilson_interval(right, total)
        cells = [f"{record['right']}/{record['exact_right']}" for record in of_line]
        rows.append([method, str(num_samples), *cells, f"{right}/{total}", f"{low:.0%} to {high:.0%}"])
    return markdown(["method", "S", *tasks, "all", "95% interval"], rows)


def plot(points: Sequence[Point], path: Path) -> str:
    """TV distance against bytes read, a line for each method, a panel for each model and context. Says what it wrote,
    or why it could not."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: no plot"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    panels = list(dict.fromkeys((point.model, point.context) for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    columns = min(2, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(6.2 * columns, 4.6 * -(-len(panels) // columns)), squeeze=False
    )
    markers = "osD^vP*Xh<>d"
    for panel, axis in zip(panels, axes.flat, strict=False):
        for number, method in enumerate(methods):
            line = [p for p in points if (p.model, p.context) == panel and p.method == method]
            axis.errorbar(
                [p.bytes_share for p in line],
                [p.variation for p in line],
                [p.variation_half_width if p.variation_half_width < p.variation else 0 for p in line],
                marker=markers[number % len(markers)],
                markersize=4,
                capsize=2,
                linewidth=1.2,
                label=method,
            )
        axis.axhline(MAX_TOTAL_VARIATION, color="grey", linestyle="--", linewidth=0.8)
        axis.set_title(f"{panel[0]}, {panel[1]:,} tokens")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("bytes of K and V read, of dense attention's (lower is better)")
        axis.set_ylabel("TV distance of next-token distributions\nfrom exact attention (lower is better)")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, ncols=4 if columns > 1 else 2, loc="upper center", bbox_to_anchor=(0.5, 0)
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f"plot: {path}"
