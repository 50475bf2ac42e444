"""Bernoulli scores against exact ones and against keys in float8: time of a decode step and of its score stage.

    python bench/bench_bernoulli.py --json out/bernoulli.json --plot out/bernoulli.png
    python bench/bench_bernoulli.py --device cpu --shapes 1x4096 --draws 1 4

Every result is checked against float64 before it is timed: the first and the last row of the batch, with what the
oracle draws for the query. Times are medians; on CUDA of CUDA-graph replays over buffers that rotate past the L2.

The first rows of a shape are what Bernoulli scores have to beat: exact scores, exact scores of keys in float8. Then
the draws B by the samplers of scores, on Gaussian queries; then queries made so that a given share of the features is
read. Columns: microseconds of a call; of its score stage, where that is a stage of its own (CUDA, --samples 0: the
kernels that draw and score, from torch's profiler); share of the key features read; time of the call over that of a
kernel that only reads as many bytes (K stream times the share); speed-up over exact scores and over float8 keys; which
of the three is the fastest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import santa
from santa import reference_bernoulli

sys.path.insert(0, str(Path(__file__).resolve().parent))
import report
from harness import Oracle, Problem, environment, make_problem, save_run, time_cpu_us, time_us
from k_stream import KStream

SHAPES = ("1x32768", "16x32768")
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
SCORE_KERNELS = ("draw_kernel", "score_features_kernel")
K_SCALE = 2.0**-5
# Between calls of the same code on the same machine: what is closer than this counts as equal.
NOISE = 0.02
Row = dict[str, Any]


def query_of_share(q: Tensor, share: float) -> Tensor:
    """q with elements of one magnitude in `share` of its features, evenly spread, and zeros elsewhere: one draw reads
    just those, whatever the sampler."""
    head_dim = q.shape[-1]
    below = torch.arange(head_dim + 1, device=q.device) * round(share * head_dim) // head_dim
    return torch.where(below.diff() > 0, torch.where(q < 0, -1.0, 1.0), 0.0).to(q.dtype)


def drawn_query(q: Tensor, problem: Problem, num_draws: int, score_sampler: str) -> Tensor:
    """max|q| / B times the counts, float64, for the rows that are checked; the others are left out (0)."""
    drawn = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    rows = sorted({0, problem.batch - 1})
    counts = reference_bernoulli.ternary_counts(
        q[rows].cpu(),
        num_kv_heads=problem.num_kv_heads,
        num_draws=num_draws,
        score_sampler=score_sampler,
        kv_lens=torch.tensor([problem.kv_len] * len(rows)),
    )
    scale = reference_bernoulli.score_scale(q[rows].cpu(), num_draws)
    drawn[rows] = (counts * scale[..., None]).to(q.device)
    return drawn


def kernel_us(calls: list[Callable[[], object]], names: tuple[str, ...], rounds: int = 5) -> float | None:
    """Microseconds of the named kernels in one call, from torch's profiler: the sum over names of medians. None if it
    saw none of them."""
    calls[0]()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    found = [[e.time_range.elapsed_us() for e in profiler.events() if name in e.name] for name in names]
    return sum(statistics.median(times) for times in found) if all(found) else None


def verdict(row: Row, exact_us: float | None, fp8_us: float | None) -> str:
    """The fastest of the three; what is within NOISE of it is named too."""
    times = {"bernoulli": row.get("us"), "exact": exact_us, "fp8 keys": fp8_us}
    times = {name: us for name, us in times.items() if us is not None}
    fastest = min(times.values())
    return " = ".join(name for name, us in times.items() if us <= fastest * (1 + NOISE))


def derive(rows: list[Row]) -> None:
    """Adds ratios and verdicts to the rows of one shape."""
    by_kind = {row["kind"]: row.get("us") for row in rows if row["kind"] in ("stream", "exact", "fp8")}
    stream, exact, fp8 = (by_kind.get(kind) for kind in ("stream", "exact", "fp8"))
    for row in rows:
        if row["kind"] not in ("draws", "share") or "us" not in row:
            continue
        if exact is not None:
            row["over_exact"] = exact / row["us"]
        if fp8 is not None:
            row["over_fp8"] = fp8 / row["us"]
        if stream is not None and row["features"] > 0:
            row["over_stream"] = row["us"] / (stream * row["features"])
        row["verdict"] = verdict(row, exact, fp8)


def lines(rows: list[Row]) -> list[str]:
    """The table of one shape."""
    batch, kv_len = report.parse_shape(rows[0]["shape"])
    head = (
        f"    {'':34}{'us':>9}{'score us':>10}{'features':>10}{'/ stream':>10}{'x exact':>9}{'x fp8':>7}{'error':>10}"
        "  fastest"
    )
    out = [f"{batch} x {kv_len:,}", head]
    for row in rows:
        if "us" not in row:
            out.append(f"    {row['what']:34} {row['note']}")
            continue
        cells = [
            (row["us"], 9, ".1f"),
            (row.get("score_us"), 10, ".1f"),
            (row.get("features"), 10, ".3f"),
            (row.get("over_stream"), 10, ".2f"),
            (row.get("over_exact"), 9, ".2f"),
            (row.get("over_fp8"), 7, ".2f"),
            (row.get("error"), 10, ".1e"),
        ]
        text = "".join(f"{x:{width}{spec}}" if x is not None else "-".rjust(width) for x, width, spec in cells)
        out.append(f"    {row['what']:34}{text}  {row.get('verdict', '')}".rstrip())
    return out


class Benchmark:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.cuda = arguments.device == "cuda"
        self.rows: list[Row] = []
        self.failed = False
        self.stream = KStream() if self.cuda else None

    def measure(self, calls: list[Callable[[], object]]) -> float:
        return time_us(calls) if self.cuda else time_cpu_us(calls)

    def attempt(self, row: Row, fill: Callable[[Row], None]) -> Row:
        """The row with its figures, or with a note of why it has none."""
        try:
            fill(row)
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
            self.failed = True
        if self.cuda:
            torch.cuda.synchronize()  # raises if the device is lost, and ends the run
        return row

    def fill_exact(self, row: Row, problem: Problem, sets: list[tuple[Tensor, ...]], options: dict[str, Any]) -> None:
        q, k, v = sets[0]
        calls = [lambda s=s: santa.decode(*s, **options)[0] for s in sets]
        scale = K_SCALE if "k_scale" in options else 1.0
        self.check(row, Oracle(problem, q, k, v, k_scale=scale), calls[0]())
        row["us"] = self.measure(calls)

    def fill_bernoulli(
        self, row: Row, problem: Problem, sets: list[tuple[Tensor, ...]], options: dict[str, Any]
    ) -> None:
        q, k, v = sets[0]
        options = options | {"score": "bernoulli"}
        calls = [lambda s=s: santa.decode(*s, **options)[0] for s in sets]
        drawn = drawn_query(q, problem, options["num_draws"], options["score_sampler"])
        *_, features = santa.decode(q, k, v, return_features_read=True, **options)
        row["features"] = float(features.double().mean()) / problem.head_dim
        self.check(row, Oracle(problem, drawn, k.transpose(2, 3), v), calls[0]())
        row["us"] = self.measure(calls)
        row["score_us"] = kernel_us(calls, SCORE_KERNELS) if self.cuda else None

    def check(self, row: Row, oracle: Oracle, out: Tensor) -> None:
        row["error"] = oracle.error(out)
        bound = oracle.bound(self.arguments.samples, 0)
        if not row["error"] < bound:
            raise RuntimeError(f"wrong result: relative error {row['error']:.3g}, expected below {bound:.3g}")

    def run_shape(self, shape: str) -> None:
        a = self.arguments
        batch, kv_len = report.parse_shape(shape)
        problem = make_problem(
            batch,
            kv_len,
            num_qo_heads=a.num_qo_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            dtype=getattr(torch, a.dtype),
            device=a.device,
        )
        options = {
            "num_samples": a.samples,
            "sampler": a.sampler,
            "kv_layout": "HND",
            "min_sampled_len": 0,
        }
        rows: list[Row] = []

        def add(what: str, kind: str, fill: Callable[[Row], None], **more: Any) -> None:
            rows.append(self.attempt({"shape": shape, "what": what, "kind": kind} | more, fill))

        if self.stream is not None:
            calls = self.stream.calls([k for _, k, _ in problem.sets], "HND")
            add("K stream", "stream", lambda row: row.update(us=self.measure(calls)))
        add("exact scores", "exact", lambda row: self.fill_exact(row, problem, problem.sets, options))
        coded = [(q, (k / K_SCALE).to(torch.float8_e4m3fn), v) for q, k, v in problem.sets]
        scaled = options | {"k_scale": torch.full((problem.num_kv_heads,), K_SCALE, device=a.device)}
        add("exact scores, K fp8", "fp8", lambda row: self.fill_exact(row, problem, coded, scaled))
        sets = [(q, k.transpose(2, 3).contiguous(), v) for q, k, v in problem.sets]
        for score_sampler in a.score_samplers:
            for num_draws in a.draws:
                setting = {"num_draws": num_draws, "score_sampler": score_sampler}
                add(
                    f"{score_sampler} B={num_draws}",
                    "draws",
                    lambda row, s=setting: self.fill_bernoulli(row, problem, sets, options | s),
                    **setting,
                )
        setting = {"num_draws": 1, "score_sampler": "independent"}
        for share in a.shares:
            made = [(query_of_share(q, share), k, v) for q, k, v in sets]
            add(
                f"{share:.1%} of the features",
                "share",
                lambda row, m=made: self.fill_bernoulli(row, problem, m, options | setting),
                share=share,
            )
        derive(rows)
        self.rows += rows
        print("\n".join(lines(rows)) + "\n", flush=True)
        save_run(self.arguments, self.rows)


def plot(rows: list[Row], path: Path, device: str) -> None:
    """For each shape, the time of a call by the share of features read, beside exact scores and float8 keys."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, all_axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4.5), constrained_layout=True)
    for axes, shape in zip([all_axes] if len(shapes) == 1 else all_axes, shapes, strict=True):
        own = [row for row in rows if row["shape"] == shape and "us" in row]
        for number, kind in enumerate(("exact", "fp8")):
            for row in own:
                if row["kind"] == kind:
                    axes.axhline(row["us"], color="black", linestyle=("-", "--")[number], label=row["what"])
        swept = sorted((row["features"], row["us"], row.get("score_us")) for row in own if row["kind"] == "share")
        if swept:
            axes.plot([x for x, _, _ in swept], [us for _, us, _ in swept], marker="o", label="call, share given")
            if all(us is not None for *_, us in swept):
                axes.plot([x for x, *_ in swept], [us for *_, us in swept], marker="o", label="its score stage")
        for name in dict.fromkeys(row["score_sampler"] for row in own if row["kind"] == "draws"):
            points = [(r["features"], r["us"], r["num_draws"]) for r in own if r.get("score_sampler") == name]
            axes.scatter([x for x, *_ in points], [us for _, us, _ in points], marker="x", label=f"call, {name}")
            for x, us, num_draws in points:
                axes.annotate(f"{num_draws}", (x, us), fontsize="x-small")
        for row in own:
            if row["kind"] == "stream":
                axes.plot([0, 1], [0, row["us"]], color="grey", linestyle=":", label="reading as many bytes")
        batch, kv_len = report.parse_shape(shape)
        axes.set_title(f"{batch} x {kv_len:,}, {device}", fontsize="medium")
        axes.set_xlabel("share of the key features read (numbers: B)")
        axes.set_ylabel("us")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(SHAPES), metavar="BATCHxKV_LEN")
    add("--draws", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="B")
    add("--score-samplers", nargs="+", default=list(reference_bernoulli.SCORE_SAMPLERS))
    add("--shares", nargs="*", type=float, default=list(SHARES), help="shares of the features that are read")
    add("--samples", type=int, default=128, help="value rows drawn per query head; 0: all are read")
    add("--sampler", default="grouped", help="of the values")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--num-qo-heads", type=int, default=32)
    add("--num-kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path)
    add("--plot", type=Path, metavar="PNG")
    a = parser.parse_args(argv)
    for shape in a.shapes:
        try:
            report.parse_shape(shape)
        except ValueError as error:
            parser.error(str(error))
    if not all(0 < share <= 1 for share in a.shares):
        parser.error("--shares need to be above 0 and at most 1")
    return a


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_bernoulli.py needs a CUDA device; --device cpu times the CPU backend")
    print(environment(arguments.device) | {"santa": santa.__version__}, flush=True)
    benchmark = Benchmark(arguments)
    for shape in arguments.shapes:
        benchmark.run_shape(shape)
    if arguments.plot:
        plot(benchmark.rows, arguments.plot, environment(arguments.device)["device"])
    if benchmark.failed:
        sys.exit("some rows failed; the table says which and why")


if __name__ == "__main__":
    main()
