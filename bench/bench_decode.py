"""Decode attention: santa against dense kernels, in one run.

    python bench/bench_decode.py                       # the README's table
    python bench/bench_decode.py --shapes 4x32768 --samples 128 --json out/decode.json
    python bench/bench_decode.py --device cpu --shapes 1x16384

Every result is checked against the float64 oracle before it is timed. Columns: microseconds per call (median; on CUDA
of CUDA-graph replays over rotating buffers), the speed-up over torch SDPA, bytes of K per second, distinct V rows read
and the relative error of the output.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import santa
from santa import reference

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import Problem, environment, make_problem, time_cpu_us, time_us


def sdpa_calls(problem: Problem):
    def call(q, k, v):
        k, v = (x if problem.layout == "HND" else x.transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

    return [lambda s=s: call(*s) for s in problem.sets]


def santa_calls(problem: Problem, **options):
    return [lambda s=s: santa.decode(*s, kv_layout=problem.layout, **options) for s in problem.sets]


def check_and_count(problem: Problem, **options) -> tuple[float, float]:
    """Relative error of the first row against the oracle, and mean distinct V rows read.

    Exits if the error is more than rounding (exact), or more than twice what multinomial sampling, the sampler of the
    highest variance, is expected to have.
    """
    q, k, v = problem.sets[0]
    out, _, rows = santa.decode(q, k, v, kv_layout=problem.layout, return_rows_read=True, **options)
    p, values, _ = reference.probabilities(q[0].cpu(), k[0].cpu(), v[0].cpu(), kv_layout=problem.layout)
    expected = (p @ values).flatten(0, 1)
    error = float((out[0].double().cpu() - expected).norm() / expected.norm())
    bound = 2e-2
    if options["num_samples"]:
        bound += 2 * float(((p @ values**2).sum() / options["num_samples"]).sqrt() / expected.norm())
    if not error < bound:
        shape = f"{problem.batch} x {problem.kv_len}"
        sys.exit(f"{shape}, {options}: wrong result, relative error {error:.3g}, expected below {bound:.3g}")
    return error, float(rows.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x8192", "1x32768", "4x32768", "16x32768", "1x131072"])
    parser.add_argument("--samples", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--samplers", nargs="+", default=["grouped", "systematic"])
    parser.add_argument("--layout", default="HND", choices=["HND", "NHD"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_decode.py needs a CUDA device; --device cpu times the CPU backend")
    measure = time_us if arguments.device == "cuda" else time_cpu_us

    rows = []
    for shape in tqdm(arguments.shapes, desc="shapes"):
        batch, kv_len = (int(x) for x in shape.split("x"))
        problem = make_problem(
            batch,
            kv_len,
            layout=arguments.layout,
            dtype=getattr(torch, arguments.dtype),
            device=arguments.device,
        )
        sdpa = measure(sdpa_calls(problem))
        rows.append({"shape": shape, "what": "torch SDPA", "us": sdpa, "speedup": 1.0})
        settings = [{"num_samples": 0}] + [
            {"num_samples": s, "sampler": sampler} for sampler in arguments.samplers for s in arguments.samples
        ]
        for options in settings:
            error, v_rows = check_and_count(problem, **options)
            exact = options["num_samples"] == 0
            us = measure(santa_calls(problem, **options))
            name = "santa exact" if exact else f"santa {options['sampler']} S={options['num_samples']}"
            rows.append(
                {
                    "shape": shape,
                    "what": name,
                    "us": us,
                    "k_gbps": problem.k_bytes / us / 1e3,
                    "speedup": sdpa / us,
                    "v_rows": v_rows,
                    "error": error,
                }
            )
        del problem
        if arguments.device == "cuda":
            torch.cuda.empty_cache()

    print({**environment(arguments.device), "dtype": arguments.dtype, "layout": arguments.layout})
    print(f"{'batch x kv_len':>14}  {'what':24} {'us':>8} {'x SDPA':>7} {'K GB/s':>7} {'V rows':>8} {'error':>8}")
    for row in rows:
        print(
            f"{row['shape']:>14}  {row['what']:24} {row['us']:8.1f} {row['speedup']:7.2f} "
            f"{row.get('k_gbps', 0):7.0f} {row.get('v_rows', 0):8.0f} {row.get('error', 0):8.1e}"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"environment": environment(arguments.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
