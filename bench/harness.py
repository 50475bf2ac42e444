"""Inputs, the float64 check, and timing: medians over rotating buffers larger than the last cache, in one process."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from santa import reference

# More than the last-level cache share of a few cores.
CPU_CACHE_BYTES = 64 << 20
# Relative error that rounding to 16 bits may make.
ROUNDING = 2e-2


@dataclass(frozen=True)
class Problem:
    """One decode step of one layer: independent sets of (q, k, v), so that no call finds its K in the L2."""

    batch: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layout: str
    sets: list[tuple[Tensor, Tensor, Tensor]]
    kv_lens: Tensor | None = None  # int32 [batch]; None: kv_len for every row

    @property
    def row_lens(self) -> list[int]:
        return [self.kv_len] * self.batch if self.kv_lens is None else self.kv_lens.tolist()

    @property
    def k_bytes(self) -> int:
        """Bytes of the valid part of K: what any method that scores every key has to read."""
        return sum(self.row_lens) * self.num_kv_heads * self.head_dim * self.sets[0][1].element_size()

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


def num_copies(k_bytes: int, cache_bytes: int, most: int = 256) -> int:
    """Sets to rotate over: K alone fills the cache four times, so that a method that reads little V gains nothing."""
    return max(2, min(most, -(-4 * cache_bytes // max(k_bytes, 1))))


def make_problem(
    batch: int,
    kv_len: int,
    *,
    num_qo_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "HND",
    kv_lens: list[int] | None = None,
    logit_std: float = 2.0,
    seed: int = 0,
    device: str = "cuda",
) -> Problem:
    """Gaussian keys and values; queries scaled so that logits have standard deviation `logit_std`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    kv_shape = (batch, num_kv_heads, kv_len, head_dim) if layout == "HND" else (batch, kv_len, num_kv_heads, head_dim)
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE_BYTES
    k_bytes = batch * kv_len * num_kv_heads * head_dim * dtype.itemsize
    copies = num_copies(k_bytes, cache_bytes, most=256 if device == "cuda" else 32)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    sets = [
        (randn(batch, num_qo_heads, head_dim) * logit_std, randn(*kv_shape), randn(*kv_shape)) for _ in range(copies)
    ]
    lens = None if kv_lens is None else torch.tensor(kv_lens, dtype=torch.int32, device=device)
    return Problem(batch, kv_len, num_qo_heads, num_kv_heads, head_dim, dtype, layout, sets, lens)


def geometric_lens(count: int, shortest: int, longest: int) -> list[int]:
    """`count` lengths from `longest` down to `shortest`, each the same fraction of the one before."""
    ratio = (shortest / longest) ** (1 / max(count - 1, 1))
    return [round(longest * ratio**i) for i in range(count)]


class Oracle:
    """Exact attention in float64 of the first and the last row of a batch, and what sampling may err by.

    Two rows, because a check of all of them would take longer than the benchmark; the last one finds wrong strides.
    """

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor, k_scale: float = 1.0, v_scale: float = 1.0):
        """k and v may be stored in 8 bits; their values are k * k_scale and v * v_scale."""
        self.rows = []
        lens = problem.row_lens
        for b in sorted({0, problem.batch - 1}):
            p, values, _ = reference.probabilities(
                q[b], k[b].double() * k_scale, v[b].double() * v_scale, kv_len=lens[b], kv_layout=problem.layout
            )
            expected = (p @ values).flatten(0, 1)
            self.rows.append((b, lens[b], expected, float((p @ values.square_()).sum())))

    def error(self, out: Tensor) -> float:
        """The larger relative error of the two rows; nan if anything in the whole output is not finite."""
        if not bool(torch.isfinite(out).all()):
            return float("nan")
        errors = [(out[b].double() - expected).norm() / expected.norm() for b, _, expected, _ in self.rows]
        return float(torch.stack(errors).max())

    def bound(self, num_samples: int, min_sampled_len: int = 0) -> float:
        """Rounding if all is exact; else also twice the error expected of multinomial sampling, the sampler of the
        highest variance."""
        bounds = [ROUNDING]
        for _, kv_len, expected, second_moment in self.rows:
            if num_samples and kv_len >= min_sampled_len:
                bounds.append(ROUNDING + 2 * (second_moment / num_samples) ** 0.5 / float(expected.norm()))
        return max(bounds)


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph that runs the calls in turn; each has run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_us(calls: list[Callable[[], object]], *, replays: int = 15, min_ms: float = 1.0) -> float:
    """Median time of one call on CUDA in microseconds. `calls` are the same call on different buffers; a CUDA graph
    runs them in turn, often enough for one replay to last `min_ms`."""
    graph = capture(calls)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    torch.cuda.synchronize()
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    rounds = max(1, round(min_ms / max(start.elapsed_time(stop), 1e-3)))
    samples = []
    for _ in range(replays):
        start.record()
        for _ in range(rounds):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(samples)


def time_cpu_us(calls: list[Callable[[], object]], *, repeats: int = 30) -> float:
    """Median time of one call on the CPU in microseconds; the calls run in turn."""
    for call in calls:
        call()
    samples = []
    for _ in range(-(-repeats // len(calls))):
        for call in calls:
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


@dataclass
class Stopwatch:
    """Wall-clock seconds by part of the run, in the order in which the parts were first met."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds >= 0.05)
        return f"{sum(self.seconds.values()):.1f} s" + (f" ({parts})" if parts else "")


def environment(device: str) -> dict[str, str]:
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def save_run(arguments: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """What a benchmark has so far, to arguments.json if that is given: a run that is cut short keeps what it has."""
    if arguments.json is None:
        return
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    content = {"environment": environment(arguments.device), "options": options, **more, "rows": rows}
    arguments.json.write_text(json.dumps(content, indent=1))
