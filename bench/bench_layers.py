"""What a call of attention costs between the matrix products of a model, where code and data are cold.

    python bench/bench_layers.py --json out/layers.json
    python bench/bench_layers.py --device cpu --quick

A loop over attention alone finds its code, its q and its tables in the caches. In a model the weights of a layer go by
between two calls, and other kernels. Here a decode step is the matrix products of a model's layers, with weights of
their own (defaults: the shape of Llama 3.1 8B, half of its layers), and attention in each: one CUDA graph. Per layer,
medians: what attention adds to the time without it, and that over what torch SDPA adds.

* SDPA, and santa exact: rows of one length, which the host knows.
* paged, exact: num_samples=0, pages of 16 keys, lengths on the device, room for --room keys in each row.
* paged, may be sampled: the same with num_samples=128: what a server captures. Rows below 8,192 keys, which such a call
  reads exactly, run behind the kernels of sampled rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

import santa

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import environment, save_run, time_cpu_us, time_us
from report import parse_shape

SHAPES = ["1x512", "8x4096"]
PAGE_SIZE = 16
DTYPE = torch.bfloat16
Attention = Callable[[int, Tensor], Tensor]  # layer, q [batch, heads, head_dim]


class Model:
    """The matrix products of some layers."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        hidden, heads = a.num_qo_heads * a.head_dim, a.num_qo_heads + 2 * a.num_kv_heads
        generator = torch.Generator(a.device).manual_seed(0)

        def weight(rows: int, columns: int) -> Tensor:
            w = torch.randn(rows, columns, generator=generator, device=a.device, dtype=DTYPE)
            return w * rows**-0.5

        self.layers = [
            (
                weight(hidden, heads * a.head_dim),
                weight(hidden, hidden),
                weight(hidden, 2 * a.intermediate),
                weight(a.intermediate, hidden),
            )
            for _ in range(a.layers)
        ]

    def step(self, x: Tensor, attention: Attention | None) -> Tensor:
        a = self.a
        for layer, (qkv, o, up, down) in enumerate(self.layers):
            q = (x @ qkv)[:, : o.shape[0]].reshape(len(x), a.num_qo_heads, a.head_dim).contiguous()
            y = q if attention is None else attention(layer, q)
            x = x + y.reshape(len(x), -1) @ o
            gate, value = (x @ up).chunk(2, dim=1)
            x = x + (silu(gate) * value) @ down
        return x


def attentions(a: argparse.Namespace, batch: int, kv_len: int) -> dict[str, Attention]:
    """By name, each over caches of its layers, which all of them share."""
    shape = (batch * kv_len // PAGE_SIZE, PAGE_SIZE, a.num_kv_heads, a.head_dim)
    generator = torch.Generator(a.device).manual_seed(1)
    pages = [
        tuple(torch.randn(shape, generator=generator, device=a.device, dtype=DTYPE) for _ in "kv")
        for _ in range(a.layers)
    ]
    rows = [tuple(x.view(batch, kv_len, a.num_kv_heads, a.head_dim) for x in layer) for layer in pages]
    lens = torch.full((batch,), kv_len, dtype=torch.int32, device=a.device)
    table = torch.zeros(batch, max(a.room, kv_len) // PAGE_SIZE, dtype=torch.int32, device=a.device)
    own = torch.arange(shape[0], dtype=torch.int32, device=a.device).view(batch, -1)
    table[:, : own.shape[1]] = own

    def sdpa(layer: int, q: Tensor) -> Tensor:
        k, v = (x.transpose(1, 2) for x in rows[layer])
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def paged(num_samples: int) -> Attention:
        options: dict[str, Any] = {"page_table": table, "kv_lens": lens, "num_samples": num_samples}
        return lambda layer, q: santa.decode_paged(q, *pages[layer], **options)[0]

    return {
        "torch SDPA": sdpa,
        "santa exact": lambda layer, q: santa.decode(q, *rows[layer], num_samples=0)[0],
        "santa paged, exact": paged(0),
        "santa paged, may be sampled": paged(128),
    }


def run(a: argparse.Namespace) -> list[dict[str, Any]]:
    timer = time_us if a.device == "cuda" else time_cpu_us
    model, results = Model(a), []
    for batch, kv_len in a.shapes:
        x = torch.randn(batch, a.num_qo_heads * a.head_dim, device=a.device, dtype=DTYPE)
        alone = timer([lambda x=x: model.step(x, None)]) / a.layers
        print(f"{batch}x{kv_len}: {alone:.1f} us per layer without attention", flush=True)
        expected, base = None, 0.0
        for name, attention in attentions(a, batch, kv_len).items():
            out = model.step(x, attention).float()
            expected = out if expected is None else expected
            if (out - expected).norm() > 0.05 * expected.norm():
                raise SystemExit(f"{batch}x{kv_len}, {name}: not what SDPA gives")
            us = timer([lambda x=x, f=attention: model.step(x, f)]) / a.layers - alone
            base = base or us
            row = {"shape": f"{batch}x{kv_len}", "what": name, "us": us, "alone_us": alone, "ratio": us / base}
            results.append(row)
            print(f"    {name:<28} + {us:7.1f} us per layer   {us / base:5.2f} x SDPA", flush=True)
        save_run(a, results)
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=None, help="batch x kv_len, in pages of 16 keys")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--num-qo-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=14336, help="columns of the gate of a layer's MLP")
    parser.add_argument("--room", type=int, default=131072, help="keys that a row of the page table has room for")
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--json", type=Path, help="where results go as well")
    a = parser.parse_args(argv)
    try:
        a.shapes = [parse_shape(shape) for shape in a.shapes or (["2x64"] if a.quick else SHAPES)]
    except ValueError as error:
        parser.error(str(error))
    for batch, kv_len in a.shapes:
        if kv_len % PAGE_SIZE:
            parser.error(f"--shapes has {batch}x{kv_len}; kv_len needs to be a multiple of {PAGE_SIZE}, a page")
    if a.quick:
        a.layers, a.num_qo_heads, a.num_kv_heads, a.head_dim, a.intermediate, a.room = 2, 4, 2, 64, 128, 16384
    return a


def main() -> None:
    a = parse()
    print(", ".join(f"{name} {value}" for name, value in environment(a.device).items()))
    print(f"{a.layers} layers, {a.num_qo_heads} / {a.num_kv_heads} heads, head_dim {a.head_dim}, bfloat16, NHD")
    run(a)


if __name__ == "__main__":
    main()
