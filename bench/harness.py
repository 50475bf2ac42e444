"""Timing: medians over rotating buffers larger than the last cache, all in one process; on CUDA by graph replays."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# More than the last-level cache share of a few cores.
CPU_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Problem:
    """One decode step of one layer. `copies` independent sets of (q, k, v), so that no run finds its data in the L2."""

    batch: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layout: str
    sets: list[tuple[Tensor, Tensor, Tensor]]

    @property
    def k_bytes(self) -> int:
        """Bytes of K: what any method that scores every key has to read."""
        return self.batch * self.kv_len * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


def make_problem(
    batch: int,
    kv_len: int,
    *,
    num_qo_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "HND",
    logit_std: float = 2.0,
    seed: int = 0,
    device: str = "cuda",
) -> Problem:
    """Gaussian keys and values; queries scaled so that logits have standard deviation `logit_std`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    kv_shape = (batch, num_kv_heads, kv_len, head_dim) if layout == "HND" else (batch, kv_len, num_kv_heads, head_dim)
    set_bytes = 2 * batch * kv_len * num_kv_heads * head_dim * dtype.itemsize
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE_BYTES
    copies = max(2, min(64, -(-4 * cache_bytes // max(set_bytes, 1))))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    sets = [
        (randn(batch, num_qo_heads, head_dim) * logit_std, randn(*kv_shape), randn(*kv_shape)) for _ in range(copies)
    ]
    return Problem(batch, kv_len, num_qo_heads, num_kv_heads, head_dim, dtype, layout, sets)


def time_us(calls: list[Callable[[], object]], *, replays: int = 15, min_ms: float = 1.0) -> float:
    """Median time of one call on CUDA in microseconds. `calls` are the same call on different buffers; a CUDA graph
    runs them in turn, often enough for one replay to last `min_ms`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
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


def time_cpu_us(calls: list[Callable[[], object]], *, rounds: int = 15) -> float:
    """Median time of one call on the CPU in microseconds; the calls run in turn."""
    for call in calls:
        call()
    samples = []
    for _ in range(rounds):
        for call in calls:
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


def environment(device: str) -> dict[str, str]:
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
