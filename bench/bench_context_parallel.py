"""Context parallelism: time of a decode step of one layer whose keys and values lie on several GPUs.

    python bench/bench_context_parallel.py --json out/context_parallel.json
    python bench/bench_context_parallel.py --device cpu --shapes 1x131072 --ranks 1 2

Ranks are processes, one to a GPU, and talk through NCCL; with fewer than two GPUs, and with --device cpu, they share
the CPU's cores and talk through gloo, over a shorter row unless --shapes names one. One rank is santa.decode over the
whole row, more are santa.distributed.decode_context_parallel. Every result is checked against float64 before it is
timed. Times are medians, of the slowest rank; on CUDA, events around CUDA-graph replays over buffers that rotate past
the L2, collectives included.

Columns: speed-up over one rank; microseconds of a step; of the operator over a slice alone, on the slowest rank, so
that the rest is the pilot's levels, the collectives and the merge; value rows read per KV head on all ranks together.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import santa
from santa.distributed import decode_context_parallel, shard_rows

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
import report
from harness import Oracle, Problem, capture, environment, make_problem, save_run

SHAPES = {"cuda": "1x1048576", "cpu": "1x131072"}
QUICK_SHAPES = {"cuda": "1x131072", "cpu": "1x2048"}
Row = dict[str, Any]


def median_us(calls: list[Callable[[], object]], *, cuda: bool, replays: int, rounds: int = 5) -> float:
    """Median time of one call; every rank has to make as many. `calls` are the same call on different buffers."""
    if not cuda:
        for call in calls:
            call()
        samples = []
        for i in range(replays):
            start = time.perf_counter()
            calls[i % len(calls)]()
            samples.append((time.perf_counter() - start) * 1e6)
        return statistics.median(samples)
    graph = capture(calls)
    graph.replay()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples = []
    for _ in range(replays):
        torch.cuda.synchronize()
        start.record()
        for _ in range(rounds):  # ranks do not start at the same time
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(samples)


class Rank:
    """One rank's part of the rows, in slices of the same length on all ranks."""

    def __init__(self, problem: Problem, rank: int, world_size: int):
        start, end = shard_rows(problem.kv_len, world_size)[rank]
        self.whole, self.world_size = problem.sets, world_size
        self.slices = [(q, k[:, :, start:end], v[:, :, start:end]) for q, k, v in problem.sets]
        self.lens = {
            name: torch.full((problem.batch,), length, dtype=torch.int32, device=problem.sets[0][0].device)
            for name, length in (("kv_lens", end - start), ("whole_lens", problem.kv_len), ("shard_starts", start))
        }

    def steps(self, **options: Any) -> list[Callable[[], tuple[Tensor, ...]]]:
        if self.world_size == 1:
            return [lambda s=s: santa.decode(*s, **options) for s in self.whole]
        return [lambda s=s: decode_context_parallel(*s, **self.lens, **options) for s in self.slices]

    def operators(self, levels: list[Tensor], **options: Any) -> list[Callable[[], object]]:
        """The operator over this rank's slices alone."""
        return [
            lambda s=s, levels=levels: santa.decode(*s, **self.lens, levels=levels, **options)
            for s, levels in zip(self.slices, levels, strict=True)
        ]


def run_rank(rank: int, world_size: int, a: argparse.Namespace, directory: str) -> None:
    cuda = a.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, a.threads // world_size))
        if a.quick:  # two sets of buffers will do
            harness.CPU_CACHE_BYTES = 0
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{directory}/rendezvous{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=5),
    )
    rows = [row for shape in a.shapes for row in measure(a, shape, rank, world_size, cuda)]
    torch.save(rows, f"{directory}/{world_size}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(a: argparse.Namespace, shape: str, rank: int, world_size: int, cuda: bool) -> list[Row]:
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
    oracle = Oracle(problem, *problem.sets[0]) if rank == 0 else None
    part = Rank(problem, rank, world_size)
    options = {"kv_layout": "HND", "min_sampled_len": 0}
    levels = [step()[1] for step in part.steps(num_samples=0, **options)]
    rows = []
    for num_samples in (0, a.samples):
        options["num_samples"] = num_samples
        out, _, rows_read = part.steps(**options, return_rows_read=True)[0]()
        row = {"shape": shape, "ranks": world_size, "what": f"grouped S={num_samples}" if num_samples else "exact"}
        row["v_rows"] = float(rows_read.double().mean())
        if oracle is not None:
            row["error"], row["bound"] = oracle.error(out), oracle.bound(num_samples)
        row["us"] = median_us(part.steps(**options), cuda=cuda, replays=a.replays)
        if world_size > 1:
            row["slice_us"] = median_us(part.operators(levels, **options), cuda=cuda, replays=a.replays)
        rows.append(row)
    return rows


def together(ranks: list[list[Row]]) -> list[Row]:
    """The rows of one number of ranks, from what each of them measured."""
    rows = []
    for own in zip(*ranks, strict=True):
        row = dict(own[0])  # with the error
        for name in ("us", "slice_us"):
            if name in row:
                row[name] = max(other[name] for other in own)
        row["v_rows"] = sum(other["v_rows"] for other in own)
        rows.append(row)
    return rows


def derive(rows: list[Row]) -> None:
    """Adds speedup, over the row of one rank, where there is one."""
    one = {(row["shape"], row["what"]): row["us"] for row in rows if row["ranks"] == 1}
    for row in rows:
        if (row["shape"], row["what"]) in one:
            row["speedup"] = one[row["shape"], row["what"]] / row["us"]


def lines(rows: list[Row]) -> list[str]:
    """A table for each shape."""
    out = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        batch, kv_len = report.parse_shape(shape)
        out.append(f"{batch} x {kv_len:,}")
        out.append(f"    {'':18}{'ranks':>6}{'x 1 rank':>10}{'us':>11}{'slice us':>11}{'V rows':>10}{'error':>10}")
        for row in sorted((row for row in rows if row["shape"] == shape), key=lambda row: (row["what"], row["ranks"])):
            cells = [
                (row.get("speedup"), 10, ".2f"),
                (row["us"], 11, ".1f"),
                (row.get("slice_us"), 11, ".1f"),
                (row["v_rows"], 10, ".0f"),
                (row["error"], 10, ".1e"),
            ]
            text = "".join(f"{x:{width}{spec}}" if x is not None else "-".rjust(width) for x, width, spec in cells)
            out.append(f"    {row['what']:18}{row['ranks']:6}{text}")
    return out


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    gpus = torch.cuda.device_count()
    add("--device", default="cuda" if gpus >= 2 else "cpu", choices=["cuda", "cpu"])
    add("--shapes", nargs="+", metavar="BATCHxKV_LEN", help="default: 1x1048576, on the CPU 1x131072")
    add("--ranks", nargs="+", type=int, default=[1, 2])
    add("--samples", type=int, default=128)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--num-qo-heads", type=int, default=32)
    add("--num-kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--replays", type=int, help="default: 30, on the CPU 10")
    add("--quick", action="store_true", help="a short row, few replays")
    add("--json", type=Path)
    a = parser.parse_args(argv)
    a.shapes = a.shapes or [(QUICK_SHAPES if a.quick else SHAPES)[a.device]]
    a.replays = a.replays or (3 if a.quick else 30 if a.device == "cuda" else 10)
    a.threads = torch.get_num_threads()
    for shape in a.shapes:
        try:
            report.parse_shape(shape)
        except ValueError as error:
            parser.error(str(error))
    if min(a.ranks) < 1 or min(a.replays, a.samples) < 1:
        parser.error("--ranks, --replays and --samples need to be at least 1")
    if a.device == "cuda" and max(a.ranks) > gpus:
        parser.error(f"--ranks {max(a.ranks)} needs as many GPUs; torch sees {gpus}")
    return a


def main() -> None:
    a = parse()
    print(environment(a.device) | {"santa": santa.__version__})
    print(f"{'NCCL' if a.device == 'cuda' else 'gloo, on the cores of one CPU'}; heads {a.num_qo_heads} / ", end="")
    print(f"{a.num_kv_heads}; head_dim {a.head_dim}; {a.dtype}\n", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for world_size in a.ranks:
            mp.spawn(run_rank, (world_size, a, directory), nprocs=world_size)
            found = [torch.load(f"{directory}/{world_size}.{rank}.pt") for rank in range(world_size)]
            rows += together(found)
            derive(rows)
            save_run(a, rows)
    print("\n".join(lines(rows)))
    wrong = [f"{row['what']}, {row['ranks']} ranks" for row in rows if not row["error"] < row["bound"]]
    if wrong:
        sys.exit(f"wrong results: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
