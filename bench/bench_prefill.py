"""Sparse prefill: selection, attention over the selected blocks, and dense kernels, in one run.

    python bench/bench_prefill.py --fa3 DIR --targets --json out/prefill.json --plot out/prefill.png
    python bench/bench_prefill.py --lengths 32768 --densities 0.1 --selection joint
    python bench/bench_prefill.py --device cpu --lengths 1024

Data: heads with planted columns and slashes, as many as make the selection keep at most the density asked for; and the
heads of the bundled model, reading a prompt of 16,384 bytes, which is tiled to longer lengths ("model, tiled"). Every
length is a whole prompt, batch 1. Before it is timed, each sparse result is checked on 32 query rows at equal
distances: against float32 attention over the selected blocks (kernel), where only rounding may differ, and against
dense attention (error), where the difference is what sparsity costs. Kept is the smallest and the mean share of their
softmax mass that these rows keep; few of them are among the rows that were sampled.

Times are medians of CUDA events, milliseconds: of the selection, of attention over the lists that it gave, and of
santa.prefill, which is both. Compilation is not in them; it is printed at the end.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import santa

sys.path.insert(0, str(Path(__file__).resolve().parent))
import competitors
import report
import targets
from harness import ROUNDING, Stopwatch, environment, save_run
from prefill_data import Planted, captured, planted_at

# The package's attribute of that name is the function.
prefill_module = importlib.import_module("santa.prefill")

LENGTHS = (16384, 32768, 65536, 131072, 524288)
DENSITIES = (0.2, 0.1)
CAPTURED_LENGTHS = (16384, 32768, 131072)
CHECKED_ROWS = 32


def time_ms(call: Callable[[], object], *, cuda: bool, budget_ms: float = 400.0, most: int = 15) -> float:
    """Median milliseconds of a call that was made before, of as many repeats as fit the budget, at least one."""
    samples: list[float] = []
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
    while len(samples) < most and (not samples or sum(samples) + samples[-1] <= budget_ms):
        if cuda:
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            call()
            samples.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(samples)


class Rows:
    """Attention of a few query rows in float32, dense and within blocks."""

    def __init__(self, data: Planted):
        length = data.q.shape[2]
        self.data = data
        count = min(CHECKED_ROWS, length)
        self.index = torch.tensor([length * (i + 1) // count - 1 for i in range(count)], device=data.q.device)
        self.dense_out, self.dense_lse = self.attention(None)

    def attention(self, lists: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """out [num_qo_heads, rows, head_dim], lse [num_qo_heads, rows]; head by head, to keep the scores small."""
        q, k, v = (x[0] for x in (self.data.q, self.data.k, self.data.v))
        group_size, block = q.shape[0] // k.shape[0], santa.select.BLOCK
        future = torch.arange(k.shape[1], device=q.device) > self.index.unsqueeze(-1)
        outs, lses = [], []
        for h in range(q.shape[0]):
            keys, values = k[h // group_size].float(), v[h // group_size].float()
            scores = (q[h, self.index].float() @ keys.T) / math.sqrt(q.shape[-1])
            scores.masked_fill_(future, -math.inf)
            if lists is not None:
                kv_cnt, kv_idx = (x[0, h, self.index // block] for x in lists)
                used = torch.arange(kv_idx.shape[-1], device=q.device) < kv_cnt.unsqueeze(-1)
                kept = torch.zeros_like(kv_idx).scatter_add_(-1, kv_idx.long(), used.int()) > 0
                scores.masked_fill_(~kept.repeat_interleave(block, dim=-1)[:, : k.shape[1]], -math.inf)
            outs.append(scores.softmax(-1) @ values)
            lses.append(scores.logsumexp(-1))
        return torch.stack(outs), torch.stack(lses)

    def of(self, out: Tensor) -> Tensor:
        """The checked rows of an output [1, num_qo_heads, length, head_dim]."""
        return out[0, :, self.index].float()


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


class Dense:
    """`call(data)` gives a function of output [1, num_qo_heads, length, head_dim]."""

    def __init__(self, name: str, call: Callable[[Planted], Callable[[], Tensor]]):
        self.name, self.call = name, call


def load_dense(names: list[str], fa3: Path | None) -> tuple[list[Dense], dict[str, str]]:
    def sdpa(data: Planted) -> Callable[[], Tensor]:
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            data.q, data.k, data.v, is_causal=True, enable_gqa=True
        )

    def flash_attention_3(data: Planted) -> Callable[[], Tensor]:
        # vLLM's build takes packed sequences alone: [tokens, heads, head_dim].
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (data.q, data.k, data.v))
        length = q.shape[0]
        ends = torch.tensor([0, length], dtype=torch.int32, device=q.device)

        def call() -> Tensor:
            outputs = competitors.call_with_nones(
                kernels.fwd,
                q=q,
                k=k,
                v=v,
                cu_seqlens_q=ends,
                cu_seqlens_k=ends,
                max_seqlen_q=length,
                max_seqlen_k=length,
                softmax_scale=q.shape[-1] ** -0.5,
                is_causal=True,
                window_size_left=-1,
                window_size_right=-1,
                softcap=0.0,
                is_rotary_interleaved=True,
                num_splits=1,
                sm_margin=0,
                cp_world_size=1,
                cp_rank=0,
            )
            return outputs[0].transpose(0, 1).unsqueeze(0)

        return call

    def flex(data: Planted) -> Callable[[], Tensor]:
        return lambda: santa.prefill(data.q, data.k, data.v, alpha=1, backend="flex")[0]

    loaded, missing = [], {}
    if "sdpa" in names:
        loaded.append(Dense("torch SDPA", sdpa))
    if "flex" in names:
        loaded.append(Dense("FlexAttention, alpha 1", flex))
    if "fa3" in names:
        found, missing = competitors.load(["fa3"], fa3)
        if found:
            kernels = found[0]
            loaded.append(Dense("FlashAttention-3", flash_attention_3))
    return loaded, missing


class Benchmark:
    """Runs data sets, prints each as it is done, and keeps the rows."""

    def __init__(self, arguments: argparse.Namespace, dense: list[Dense], missing: dict[str, str]):
        self.arguments, self.dense, self.missing = arguments, dense, missing
        self.rows: list[dict[str, Any]] = []
        self.dense_ms: dict[tuple[int, int], dict[str, float]] = {}  # by length and head_dim
        self.watch = Stopwatch()
        self.failed = False
        self.cuda = arguments.device == "cuda"
        self.options = {
            "alpha": arguments.alpha,
            "num_chunks": arguments.num_chunks,
            "selection": arguments.selection,
            "min_mass": arguments.min_mass,
        }
        self.select_options = {name: value for name, value in self.options.items() if name != "alpha"}
        self.select_options |= {"alpha_c": arguments.alpha, "alpha_s": arguments.alpha}

    def select(self, data: Planted) -> tuple[Tensor, Tensor, Tensor]:
        return santa.sample_select(data.q, data.k, **self.select_options)

    def run(self, name: str, length: int, make: Callable[[], Planted]) -> None:
        row: dict[str, Any] = {"suite": "prefill", "data": name, "shape": f"1x{length}", "length": length}
        try:
            self.fill(row, make)
        except torch.OutOfMemoryError as error:
            row["note"] = f"not run: {error}".splitlines()[0][:120]
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
            self.failed = True
        self.rows.append(row)
        print("\n".join(report.prefill_lines([row])), flush=True)
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
        self.save()

    def fill(self, row: dict[str, Any], make: Callable[[], Planted]) -> None:
        backend = "flex" if self.cuda else "reference"
        with self.watch.part("inputs"):
            data = make()
        row["head_dim"], row["num_qo_heads"] = data.q.shape[3], data.q.shape[1]
        with self.watch.part("compilation and first calls"):
            *lists, stats = self.select(data)
            out, _, run = santa.prefill(data.q, data.k, data.v, backend=backend, return_stats=True, **self.options)
            row["density"] = run.density
        with self.watch.part("float32"):
            rows = Rows(data)
            expected, lse = rows.attention(lists)
            row["kernel_error"] = relative_error(rows.of(out), expected)
            row["error"] = relative_error(rows.of(out), rows.dense_out)
            kept = (lse - rows.dense_lse).exp()
            row["kept_min"], row["kept_mean"] = float(kept.min()), float(kept.mean())
            row["sampled_min"] = float(stats[..., 2].min())
        if not row["kernel_error"] < ROUNDING:
            raise RuntimeError(
                f"wrong result: relative error {row['kernel_error']:.3g} within the selected blocks, expected below "
                f"{ROUNDING}"
            )
        del out, expected, lse
        with self.watch.part("dense kernels"):
            row["dense"] = self.time_dense(data, rows)
        sm_scale = data.q.shape[-1] ** -0.5
        attend = torch.no_grad()(prefill_module._flex if self.cuda else prefill_module._reference)
        with self.watch.part("selection"):
            row["selection_ms"] = time_ms(lambda: self.select(data), cuda=self.cuda)
        with self.watch.part("attention"):
            row["attention_ms"] = time_ms(lambda: attend(data.q, data.k, data.v, *lists, sm_scale), cuda=self.cuda)
        with self.watch.part("santa.prefill"):
            row["total_ms"] = time_ms(
                lambda: santa.prefill(data.q, data.k, data.v, backend=backend, **self.options), cuda=self.cuda
            )
        report.derive_prefill(row)

    def save(self) -> None:
        save_run(self.arguments, self.rows, missing=self.missing, seconds=self.watch.seconds)

    def time_dense(self, data: Planted, rows: Rows) -> dict[str, float]:
        """A dense kernel's time does not depend on the data: once for each length and head_dim."""
        key = (data.q.shape[2], data.q.shape[3])
        if key not in self.dense_ms:
            self.dense_ms[key] = {}
            for dense in self.dense:
                if data.q.shape[2] > self.arguments.longest_of_all_dense and dense.name != "FlashAttention-3":
                    continue
                call = dense.call(data)
                error = relative_error(rows.of(call()), rows.dense_out)
                if error < ROUNDING:
                    self.dense_ms[key][dense.name] = time_ms(call, cuda=self.cuda)
                else:
                    self.missing[f"{dense.name} at {key[0]:,}"] = f"wrong result: relative error {error:.3g}"
        return self.dense_ms[key]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, help=f"default: {' '.join(map(str, LENGTHS))}; 2048 on the CPU")
    add(
        "--densities",
        nargs="*",
        type=float,
        default=list(DENSITIES),
        help="of the planted data, at most; default 0.2 0.1",
    )
    add("--captured-lengths", nargs="*", type=int, help="of the bundled model's heads; default 16384 32768 131072")
    add("--alpha", type=float, default=0.95)
    add("--num-chunks", type=int, default=0)
    add("--selection", default="paper", choices=["paper", "joint"])
    add("--min-mass", type=float, default=0.0)
    add("--dynamic", action="store_true", help="FlexAttention with symbolic lengths instead of buckets")
    add("--num-qo-heads", type=int)
    add("--num-kv-heads", type=int)
    add("--head-dim", type=int, default=128, choices=[64, 128])
    add("--dtype", choices=["bfloat16", "float16", "float32"])
    add("--dense", nargs="*", choices=["sdpa", "fa3", "flex"], help="default: sdpa fa3 on CUDA, sdpa on the CPU")
    add("--longest-of-all-dense", type=int, default=131072, help="above it, FlashAttention-3 is the one dense kernel")
    add("--fa3", type=Path, metavar="DIR", help="folder with _vllm_fa3_C.abi3.so; default: that of an installed vLLM")
    add("--targets", action="store_true", help="say of each target whether it is met")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path)
    add("--plot", type=Path, metavar="PNG", help="time by length")
    a = parser.parse_args(argv)

    cpu = a.device == "cpu"
    a.lengths_given = a.lengths is not None
    if a.captured_lengths is None:
        # Whoever asks for lengths gets planted data of these.
        a.captured_lengths = [] if cpu or a.lengths_given else list(CAPTURED_LENGTHS)
    if a.lengths is None:
        a.lengths = [2048] if cpu else list(LENGTHS)
    if a.dense is None:
        a.dense = ["sdpa"] if cpu else ["sdpa", "fa3"]
    if cpu and set(a.dense) - {"sdpa"}:
        parser.error("on the CPU the one dense kernel is sdpa")
    if min([*a.lengths, *a.captured_lengths], default=128) < 128:
        parser.error("lengths need to be at least 128")
    a.dtype = a.dtype or ("float32" if cpu else "bfloat16")
    a.num_qo_heads = a.num_qo_heads or (4 if cpu else 32)
    a.num_kv_heads = a.num_kv_heads or (2 if cpu else 8)
    return a


def main(argv: list[str] | None = None) -> None:
    a = parse(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_prefill.py needs a CUDA device; --device cpu runs the plain PyTorch path")
    prefill_module.DYNAMIC_SHAPES = a.dynamic
    dtype = getattr(torch, a.dtype)
    dense, missing = load_dense(a.dense, a.fa3)
    print(environment(a.device) | {"santa": santa.__version__})
    heads = f"heads {a.num_qo_heads} / {a.num_kv_heads}; head_dim {a.head_dim}; {a.dtype}"
    print(f"{heads}; alpha {a.alpha}; selection {a.selection}; min_mass {a.min_mass}\n")
    print(report.PREFILL_HEAD, flush=True)

    benchmark = Benchmark(a, dense, missing)
    try:
        for length in a.lengths:
            for density in a.densities:
                benchmark.run(
                    f"planted {density:g}",
                    length,
                    lambda length=length, density=density: planted_at(
                        length,
                        density,
                        lambda data: float(benchmark.select(data)[2][..., 0].mean()),
                        num_qo_heads=a.num_qo_heads,
                        num_kv_heads=a.num_kv_heads,
                        head_dim=a.head_dim,
                        dtype=dtype,
                        device=a.device,
                    ),
                )
        for length in a.captured_lengths:
            benchmark.run(
                "model" if length <= 16384 else "model, tiled",
                length,
                lambda length=length: captured(length, device=a.device, dtype=dtype),
            )
    finally:
        for name, reason in missing.items():
            print(f"{name}: not measured: {reason}")
        if a.targets:
            print("\n" + "\n".join(report.target_lines(targets.evaluate_prefill(benchmark.rows))))
        print(f"whole run: {benchmark.watch}")
        benchmark.save()
    if a.plot:
        report.plot_prefill(benchmark.rows, a.plot, environment(a.device)["device"])
    if benchmark.failed:
        sys.exit("some rows failed; the table says which and why")


if __name__ == "__main__":
    main()
