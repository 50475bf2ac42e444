"""Energy of one decode step of one layer: measured on the GPU, and estimated from the energy of single operations.

    python bench/energy.py --json out/energy.json    # both
    python bench/energy.py --estimate                # the estimate alone, which needs no GPU

Measured: the GPU's own energy counter (NVML, millijoules of the whole board), read while CUDA graphs of the call
replay over rotating buffers. Nothing is subtracted, not even what an idle board draws, which is printed beside. The
counter moves in steps tens of milliseconds apart: a measurement begins and ends where it moves. No setting of the GPU
is changed. "K read" and "V read" are shares of the bytes of 16-bit K and V.

Every result is checked against float64 before it is measured: dense and exact ones against attention, Bernoulli ones
against attention with the same ternary queries, `santa.reference_bernoulli`.

Estimated: operations and DRAM bytes, counted from the equations, times ENERGY_PJ. It knows nothing of caches, control
and clocks: it says where energy can go at all, not what a GPU takes.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import santa

sys.path.insert(0, str(Path(__file__).resolve().parent))
import report
from competitors import Call, Sdpa
from harness import ROUNDING, Oracle, Problem, capture, environment, make_problem

# Picojoules per operation, 45 nm at 0.9 V: M. Horowitz, "Computing's energy problem (and what we can do about it)",
# ISSCC 2014, figure 1.1.9. DRAM is the lower end of the 1.3 to 2.6 nJ given there for 64 bits.
ENERGY_PJ = {"16-bit multiplication": 1.1, "32-bit addition": 0.9, "DRAM byte": 1300 / 8}

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Work:
    """Operations on keys and values, and bytes of them from DRAM. The softmax, the same for all, is left out."""

    multiplications: float
    additions: float
    dram_bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.multiplications + other.multiplications,
            self.additions + other.additions,
            self.dram_bytes + other.dram_bytes,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.multiplications * factor, self.additions * factor, self.dram_bytes * factor)

    @property
    def arithmetic_mj(self) -> float:
        multiplications = self.multiplications * ENERGY_PJ["16-bit multiplication"]
        return (multiplications + self.additions * ENERGY_PJ["32-bit addition"]) * 1e-9

    @property
    def dram_mj(self) -> float:
        return self.dram_bytes * ENERGY_PJ["DRAM byte"] * 1e-9


# Each is for one KV head of one row: kv_len keys, group_size query heads.


def dense_stage(kv_len: int, group_size: int, head_dim: int, element_size: float = 2) -> Work:
    """All scores, or the sum over all values: a product and an addition for each head, key and feature."""
    products = group_size * kv_len * head_dim
    return Work(products, products, kv_len * head_dim * element_size)


def counted_value_stage(kv_len: int, group_size: int, head_dim: int, num_samples: int) -> Work:
    """The sum of S drawn rows per head, divided by S: the samplers with counts. Bytes as if no row were drawn twice."""
    rows = min(group_size * num_samples, kv_len)
    return Work(group_size * head_dim, group_size * num_samples * head_dim, rows * head_dim * 2)


def grouped_value_stage(kv_len: int, group_size: int, head_dim: int, num_samples: int) -> Work:
    """Up to S G rows, each of which enters every head with a weight."""
    rows = min(group_size * num_samples, kv_len)
    products = group_size * rows * head_dim
    return Work(products, products, rows * head_dim * 2)


def bernoulli_score_stage(
    kv_len: int, group_size: int, head_dim: int, num_draws: int, mean_probability: float, features_read: float
) -> Work:
    """B ternary queries per head: an addition for each non-zero entry and key, one product per head and key.

    mean_probability is the mean of |q_i| / max|q|, the share of non-zero entries; features_read the share of K's.
    """
    additions = group_size * kv_len * num_draws * mean_probability * head_dim
    return Work(group_size * kv_len, additions, kv_len * head_dim * 2 * features_read)


def gaussian_query_shares(group_size: int, head_dim: int, num_draws: int, seed: int = 0) -> dict[str, float]:
    """What Bernoulli draws do to Gaussian queries, as means over 4,096 groups of heads. "entries": non-zero entries of
    a ternary vector, the mean of p_hi = |q_hi| / max|q_h|. "independent" and "shared": features that some head of the
    group needs, 1 - prod_h (1 - p_hi)^B and 1 - (1 - max_h p_hi)^B."""
    q = torch.randn(4096, group_size, head_dim, generator=torch.Generator().manual_seed(seed)).abs()
    p = q / q.amax(-1, keepdim=True)
    return {
        "entries": float(p.mean()),
        "independent": float(1 - ((1 - p) ** num_draws).prod(1).mean()),
        "shared": float(1 - ((1 - p.amax(1)) ** num_draws).mean()),
    }


def estimates(
    num_kv_heads: int, kv_len: int, group_size: int, head_dim: int, num_samples: int, num_draws: int
) -> dict[str, Work]:
    """Name to work of one call; num_kv_heads are those of all rows together."""
    shape = (kv_len, group_size, head_dim)
    scores, values = dense_stage(*shape), dense_stage(*shape)
    counted, grouped = counted_value_stage(*shape, num_samples), grouped_value_stage(*shape, num_samples)
    found = {
        "dense": scores + values,
        f"systematic S={num_samples}": scores + counted,
        f"grouped S={num_samples}": scores + grouped,
        f"grouped S={num_samples}, K fp8": dense_stage(*shape, element_size=1) + grouped,
    }
    shares = gaussian_query_shares(group_size, head_dim, num_draws)
    for score_sampler in ("independent", "shared"):
        drawn = bernoulli_score_stage(*shape, num_draws, shares["entries"], shares[score_sampler])
        found[f"systematic S={num_samples}, Bernoulli B={num_draws} {score_sampler}"] = drawn + counted
    return {name: work * num_kv_heads for name, work in found.items()}


class EnergyMeter:
    """Calls give the millijoules that a GPU has taken since its driver was loaded (Volta or later).

    Raises:
        RuntimeError: there is no NVML, it does not know the GPU, or the GPU has no counter (MIG instances do not).
    """

    def __init__(self, uuid: str, library: str = "libnvidia-ml.so.1") -> None:
        try:
            self.nvml = ctypes.CDLL(library)
        except OSError as error:
            raise RuntimeError(f"{library} of the NVIDIA driver does not load: {error}") from None
        self.nvml.nvmlErrorString.restype = ctypes.c_char_p
        self.device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.device))
        self()

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self.nvml, name)(*arguments):
            raise RuntimeError(f"{name}: {self.nvml.nvmlErrorString(code).decode()}")

    def __call__(self) -> int:
        energy = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.device, ctypes.byref(energy))
        return energy.value


@dataclass(frozen=True)
class Reading:
    seconds: float
    millijoules: int
    calls: int  # finished so far


@dataclass(frozen=True)
class Energy:
    us: float
    mj: float
    watts: float


def readings(
    launch: Callable[[], Callable[[], object]],
    calls: int,
    meter: Callable[[], int],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Reading]:
    """Runs `launch`, which starts `calls` calls and returns how to wait for them, for some seconds. The next ones are
    in the queue before the last ones are waited for, so that the GPU does not idle."""
    found: list[Reading] = []
    stop = clock() + seconds
    wait = launch()
    while clock() < stop:
        following = launch()
        wait()
        found.append(Reading(clock(), meter(), calls * (len(found) + 1)))
        wait = following
    wait()
    return found


def between_steps(found: list[Reading]) -> Energy:
    """From the first reading that saw the counter move to the last one that did.

    Raises:
        RuntimeError: it moved fewer than five times, too few to say when it moves.
    """
    moved = [b for a, b in itertools.pairwise(found) if b.millijoules != a.millijoules]
    if len(moved) < 5:
        raise RuntimeError(f"the energy counter moved {len(moved)} times, expected 5 or more: measure for longer")
    seconds = moved[-1].seconds - moved[0].seconds
    millijoules, calls = moved[-1].millijoules - moved[0].millijoules, moved[-1].calls - moved[0].calls
    return Energy(seconds / calls * 1e6, millijoules / calls, millijoules / seconds / 1e3)


def measure(calls: list[Call], meter: Callable[[], int], seconds: float, chunk_ms: float = 10.0) -> Energy:
    """Energy of one of the calls, after half a second in which clocks and power settle."""
    graph = capture(calls)
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    replays = max(1, round(chunk_ms / 1e3 / (time.perf_counter() - start)))

    def launch() -> Callable[[], object]:
        for _ in range(replays):
            graph.replay()
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    readings(launch, replays * len(calls), meter, 0.5)
    return between_steps(readings(launch, replays * len(calls), meter, seconds))


def measure_idle(meter: Callable[[], int], seconds: float) -> float:
    """Watts of the board with nothing to do."""

    def launch() -> Callable[[], object]:
        return lambda: time.sleep(0.005)

    return between_steps(readings(launch, 1, meter, seconds)).watts


@dataclass(frozen=True)
class Method:
    """One way to compute a step, its calls ready to be measured; what it reads of K and V as shares of their bytes."""

    name: str
    calls: list[Call]
    error: float
    bound: float
    k_read: float
    v_read: float


def methods(problem: Problem, num_samples: int, num_draws: int, score_samplers: list[str]) -> Iterator[Method]:
    """Each with its inputs and checked when its turn comes; two at a time hold their buffers."""
    sampled = {"num_samples": num_samples, "kv_layout": problem.layout, "min_sampled_len": 0}
    q, k, v = problem.sets[0]
    oracle = Oracle(problem, q, k, v)

    dense = Sdpa().calls(problem)
    yield Method(Sdpa.name, dense, oracle.error(dense[0]()), ROUNDING, 1.0, 1.0)

    def santa_method(name: str, sets: list, oracle: Oracle, k_bytes: float, **options: Any) -> Method:
        options = sampled | options
        calls = [lambda s=s: santa.decode(*s, **options)[0] for s in sets]
        out, _, rows = santa.decode(*sets[0], return_rows_read=True, **options)
        v_read = float(rows.double().mean()) / problem.kv_len
        return Method(name, calls, oracle.error(out), oracle.bound(options["num_samples"]), k_bytes, v_read)

    yield santa_method("santa exact", problem.sets, oracle, 1.0, num_samples=0)
    yield santa_method(f"santa S={num_samples}", problem.sets, oracle, 1.0)

    # Keys of standard deviation 1: no scale is needed.
    eight = [(q, k.to(FP8), v) for q, k, v in problem.sets]
    yield santa_method(f"santa S={num_samples}, K fp8", eight, Oracle(problem, *eight[0]), 0.5)
    del eight

    transposed = [(q, k.transpose(-1, -2).contiguous(), v) for q, k, v in problem.sets]
    for score_sampler in score_samplers:
        name = f"santa S={num_samples}, Bernoulli B={num_draws} {score_sampler}"
        options = {"score": "bernoulli", "num_draws": num_draws, "score_sampler": score_sampler}
        features = santa.decode(*transposed[0], return_features_read=True, **sampled, **options)[-1]
        share = float(features.double().mean()) / problem.head_dim
        oracle = Oracle(problem, drawn_queries(problem, **options), k, v)
        yield santa_method(name, transposed, oracle, share, **options)


def drawn_queries(problem: Problem, *, num_draws: int, score_sampler: str, score: str = "bernoulli") -> Tensor:
    """The queries whose exact attention is what a Bernoulli score stage with seed 0 computes: max|q| times the mean of
    the ternary draws, float64."""
    from santa.reference_bernoulli import ternary_counts

    q = problem.sets[0][0]
    lens = torch.tensor(problem.row_lens, dtype=torch.int32)
    counts = ternary_counts(
        q.cpu(), num_kv_heads=problem.num_kv_heads, num_draws=num_draws, score_sampler=score_sampler, seed=0,
        row_seeds=None, kv_lens=lens,
    )  # fmt: skip
    return (counts.double() * (q.cpu().double().abs().amax(-1, keepdim=True) / num_draws)).to(q.device)


MEASURED_HEAD = """\
| measured | µs per call | mJ per call | mJ, to SDPA's | W | K read | V read |
|---|--:|--:|--:|--:|--:|--:|"""


def measured_line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One of `rows`; the ratio is empty where SDPA has no figure."""
    dense = next((r["mj"] for r in rows if r["what"] == Sdpa.name), None)
    ratio = "" if dense is None else f"{row['mj'] / dense:.2f}"
    return (
        f"| {row['what']} | {row['us']:.1f} | {row['mj']:.1f} | {ratio} | {row['watts']:.0f} "
        f"| {row['k_read']:.1%} | {row['v_read']:.1%} |"
    )


def estimate_lines(works: dict[str, Work]) -> list[str]:
    lines = [
        "| estimate | multiplications | additions | DRAM bytes | arithmetic, mJ | DRAM, mJ | sum, to dense |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    first = next(iter(works.values()))
    for name, work in works.items():
        ratio = (work.arithmetic_mj + work.dram_mj) / (first.arithmetic_mj + first.dram_mj)
        lines.append(
            f"| {name} | {work.multiplications:.2e} | {work.additions:.2e} | {work.dram_bytes:.2e} "
            f"| {work.arithmetic_mj:.2f} | {work.dram_mj:.1f} | {ratio:.2f} |"
        )
    return lines


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="16x32768", help="batch x kv_len")
    parser.add_argument("--num-qo-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128, help="S, draws of values per query head")
    parser.add_argument("--draws", type=int, default=4, help="B, ternary draws per query")
    parser.add_argument("--score-samplers", nargs="+", default=["independent", "shared"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--estimate", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    batch, kv_len = report.parse_shape(args.shape)
    group_size = args.num_qo_heads // args.num_kv_heads
    heads = f"{args.num_qo_heads} / {args.num_kv_heads} heads, head_dim {args.head_dim}"
    content: dict[str, Any] = {"shape": args.shape, "heads": heads, "measured": []}
    failed = False
    if not args.estimate:
        if not torch.cuda.is_available():
            print("torch sees no GPU to measure: --estimate needs none", file=sys.stderr)
            return 1
        content["environment"] = environment("cuda")
        meter = EnergyMeter("GPU-" + str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-"))
        content["idle_watts"] = measure_idle(meter, 2.0)
        device = content["environment"]["device"]
        print(
            f"{device}, idle {content['idle_watts']:.0f} W; {args.shape}, {heads}, bfloat16, HND\n\n{MEASURED_HEAD}",
            flush=True,
        )
        sizes = {"num_qo_heads": args.num_qo_heads, "num_kv_heads": args.num_kv_heads, "head_dim": args.head_dim}
        problem = make_problem(batch, kv_len, **sizes)
        for method in methods(problem, args.samples, args.draws, args.score_samplers):
            if not method.error < method.bound:
                print(
                    f"{method.name}: wrong result: relative error {method.error:.3g}, expected below {method.bound:.3g}"
                )
                failed = True
                continue
            energy = measure(method.calls, meter, args.seconds)
            reads = {"k_read": method.k_read, "v_read": method.v_read, "error": method.error}
            content["measured"].append({"what": method.name} | vars(energy) | reads)
            print(measured_line(content["measured"][-1], content["measured"]), flush=True)
            torch.cuda.empty_cache()
    works = estimates(batch * args.num_kv_heads, kv_len, group_size, args.head_dim, args.samples, args.draws)
    figures = ", ".join(f"{name} {pj:g} pJ" for name, pj in ENERGY_PJ.items())
    print(f"\nAn estimate, not a measurement: {args.shape}, {heads}, Gaussian queries.")
    print(f"Horowitz, ISSCC 2014, 45 nm: {figures}")
    shares = gaussian_query_shares(group_size, args.head_dim, args.draws)
    features = ", ".join(f"{shares[name]:.1%} ({name})" for name in ("independent", "shared"))
    print(
        f"B = {args.draws}: {shares['entries']:.1%} of a ternary vector's entries, {features} of a group's features\n"
    )
    print("\n".join(estimate_lines(works)))
    content["estimate"] = {name: vars(work) for name, work in works.items()}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
