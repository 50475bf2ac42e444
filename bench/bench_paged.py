"""Decode from caches as servers keep them: in pages, with lengths on the device, for several new tokens at once.

    python bench/bench_paged.py --json out/paged.json
    python bench/bench_paged.py --device cpu --quick

Every row compares with the contiguous operator for one token, told the lengths as the others are, on the same keys in
the same run. Pages lie in random order, and give its bits. Medians over buffers that rotate past the cache, on CUDA by
CUDA-graph replays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import santa

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
from harness import Problem, environment, make_problem, save_run, time_cpu_us, time_us

SHAPES = ["1x32768", "16x32768"]
PAGE_SIZES = [256, 64, 16, 1]
TOKENS = [2, 4, 8]


def paged(problem: Problem, page_size: int, seed: int = 0) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """The problem's keys and values, NHD, in pages [num_pages, page_size, num_kv_heads, head_dim] that lie in random
    order, and int32 [batch, max_pages], where those of each row are."""
    num_pages = problem.batch * problem.kv_len // page_size
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).to(problem.sets[0][0].device)

    def scatter(cache: Tensor) -> Tensor:
        pages = torch.empty_like(cache).view(num_pages, page_size, problem.num_kv_heads, problem.head_dim)
        pages[order] = cache.view_as(pages)
        return pages

    return [(q, scatter(k), scatter(v)) for q, k, v in problem.sets], order.int().view(problem.batch, -1)


def cases(
    problem: Problem, page_sizes: list[int], tokens: list[int], **options: Any
) -> Iterator[tuple[str, list[Callable[[], tuple[Tensor, ...]]]]]:
    """What is timed: a name, and the same call on each of the problem's sets. Caches live while they are timed."""
    lens = torch.full((problem.batch,), problem.kv_len, dtype=torch.int32, device=problem.sets[0][0].device)
    yield "lengths known", [lambda s=s: santa.decode(*s, **options) for s in problem.sets]
    yield "contiguous", [lambda s=s: santa.decode(*s, kv_lens=lens, **options) for s in problem.sets]
    for size in page_sizes:
        caches, table = paged(problem, size)
        arguments = {"page_table": table, "kv_lens": lens, **options}
        yield f"page_size {size}", [lambda s=s, a=arguments: santa.decode_paged(*s, **a) for s in caches]
    for count in tokens:
        sets = [(q[:, None].repeat(1, count, 1, 1), k, v) for q, k, v in problem.sets]
        yield f"{count} tokens", [lambda s=s: santa.decode(*s, kv_lens=lens, **options) for s in sets]


def run(a: argparse.Namespace) -> list[dict[str, Any]]:
    timer = time_us if a.device == "cuda" else time_cpu_us
    rows: list[dict[str, Any]] = []
    for shape in a.shapes:
        batch, kv_len = (int(x) for x in shape.split("x"))
        problem = make_problem(
            batch,
            kv_len,
            num_qo_heads=a.num_qo_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            dtype=getattr(torch, a.dtype),
            layout="NHD",
            device=a.device,
        )
        for num_samples in a.samples:
            base = expected = None
            for name, timed in cases(problem, a.page_sizes, a.tokens, num_samples=num_samples):
                got = timed[0]()
                expected = got if name == "contiguous" else expected
                if name.startswith("page") and not all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)):
                    raise SystemExit(f"{shape}, {name}: not the contiguous operator's bits")
                us = timer(timed)
                base = us if name == "contiguous" else base
                row = {"shape": shape, "samples": num_samples, "what": name, "us": us}
                row["ratio"] = None if base is None else us / base
                rows.append(row)
                ratio = "" if base is None else f"{us / base:6.2f} x contiguous"
                print(f"{shape:>12}  S={num_samples:<5} {name:<14} {ratio:>20}  {us:10.1f} us", flush=True)
            save_run(a, rows)
        del problem
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=None, help="batch x kv_len, 1x32768 for one")
    parser.add_argument("--samples", nargs="+", type=int, default=[128, 0], help="num_samples; 0 is exact")
    parser.add_argument("--page-sizes", nargs="+", type=int, default=PAGE_SIZES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="new tokens of a row")
    parser.add_argument("--num-qo-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--json", type=Path, help="where results go as well")
    a = parser.parse_args(argv)
    if a.shapes is None:
        a.shapes = ["1x2048"] if a.quick else SHAPES
    for shape in a.shapes:
        sizes = shape.split("x")
        if len(sizes) != 2 or not all(x.isdigit() and int(x) > 0 for x in sizes):
            parser.error(f"--shapes has {shape}; it needs batch x kv_len, as 16x32768")
        if any(int(sizes[1]) % size for size in a.page_sizes):
            parser.error(f"--shapes has {shape}; kv_len needs to be a multiple of every page size")
    return a


def main() -> None:
    a = parse()
    print(", ".join(f"{name} {value}" for name, value in environment(a.device).items()))
    print(f"{a.num_qo_heads} / {a.num_kv_heads} heads, head_dim {a.head_dim}, {a.dtype}, grouped")
    if a.device == "cpu" and a.quick:
        harness.CPU_CACHE_BYTES = 0
    run(a)


if __name__ == "__main__":
    main()
