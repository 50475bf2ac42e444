"""A decode step of a whole model in Transformers: `generate` with a static cache, by SDPA and by santa, with exact and
with proposal keys, in one run.

    python bench/bench_transformers.py --json out/transformers.json
    python bench/bench_transformers.py --device cpu --quick

The model has the shape of Llama 3.1 8B and random weights, in bfloat16. The static cache holds N(0, 1) from the start:
`generate` computes new tokens alone, with the decode step that it compiles. ms per step is the difference between calls
with many and with few new tokens, over the difference of the tokens: the median of --repeats.

attention, matrix products and rest are kernel times of a step by torch.profiler, in a call of their own. What is left
of the step is idle: the GPU waits for the host.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import santa
from santa.integrations.transformers import attach

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_vllm import KINDS, LLAMA_3_1_8B, kind_of, sizes_of
from harness import environment, save_run

SHAPES = ["1x32768", "8x32768"]
ENGINES = ["sdpa", "exact", "santa", "proposal"]
FEW, MANY = 8, 72


def make_model(a: argparse.Namespace) -> LlamaForCausalLM:
    longest = max(sizes_of(shape)[1] for shape in a.shapes) + 2 * MANY
    small = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 256, "vocab_size": 512} if a.quick else {}
    fields = {
        name: value for name, value in LLAMA_3_1_8B.items() if name not in ("architectures", "model_type", "dtype")
    }
    config = LlamaConfig(**fields | small, max_position_embeddings=longest, eos_token_id=None, pad_token_id=0)
    with torch.device(a.device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def use(model: LlamaForCausalLM, engine: str, a: argparse.Namespace) -> None:
    torch.compiler.reset()
    if engine == "sdpa":
        model.set_attn_implementation("sdpa")
    else:
        shortest = 0 if a.quick else None
        keys = "proposal" if engine == "proposal" else "exact"
        samples = 0 if engine == "exact" else a.samples
        attach(model, santa.SantaConfig(num_samples=samples, min_sampled_len=shortest, keys=keys))


class Rows:
    """Rows of a batch that have `context` keys already."""

    def __init__(self, model: LlamaForCausalLM, batch: int, context: int) -> None:
        self.model, self.context = model, context
        config = model.config
        self.cache = StaticCache(config, max_cache_len=context + MANY + 8)
        heads, dim = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(batch, heads, dim, model.dtype, model.device)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        # The first ids stand for what the cache holds, and are not looked at.
        self.ids = torch.ones(batch, context + 1, dtype=torch.long, device=model.device)

    def generate(self, new_tokens: int) -> float:
        """Seconds of one call."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        synchronize(self.model.device)
        began = time.perf_counter()
        self.model.generate(
            self.ids, past_key_values=self.cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        synchronize(self.model.device)
        return time.perf_counter() - began

    def step_ms(self, repeats: int) -> float:
        self.generate(FEW)  # compiles
        return statistics.median(
            (self.generate(MANY) - self.generate(FEW)) * 1e3 / (MANY - FEW) for _ in range(repeats)
        )

    def breakdown(self) -> dict[str, float]:
        """ms of a step's kernels by kind."""
        from torch.profiler import ProfilerActivity, profile

        kinds: dict[str, float] = dict.fromkeys([*KINDS, "rest"], 0.0)
        totals = []
        for new_tokens in (FEW, 2 * FEW):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                self.generate(new_tokens)
            total = dict.fromkeys(kinds, 0.0)
            for entry in profiler.key_averages():
                total[kind_of(entry.key)] += entry.self_device_time_total * 1e-3
            totals.append(total)
        return {kind: (totals[1][kind] - totals[0][kind]) / FEW for kind in kinds}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(a: argparse.Namespace) -> list[dict[str, Any]]:
    model = make_model(a)
    rows: list[dict[str, Any]] = []
    for shape, engine in tqdm([(s, e) for s in a.shapes for e in a.engines], unit="case"):
        use(model, engine, a)
        case = Rows(model, *sizes_of(shape))
        row: dict[str, Any] = {"shape": shape, "engine": engine, "ms": case.step_ms(a.repeats)}
        if a.device == "cuda":
            row |= case.breakdown()
        rows.append(row)
        tqdm.write(report(rows).splitlines()[-1])
        save_run(a, rows)
        del case
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Each engine beside the first of its shape."""
    base = {row["shape"]: row for row in reversed(rows)}
    lines = []
    for row in rows:
        first = base[row["shape"]]
        line = f"{row['shape']:>10}  {row['engine']:<8} {row['ms']:8.2f} ms/step  {first['ms'] / row['ms']:5.2f} x "
        line += first["engine"]
        kernels = {kind: row[kind] for kind in [*KINDS, "rest"] if kind in row}
        if kernels:
            kernels["idle"] = max(0.0, row["ms"] - sum(kernels.values()))
            line += "   " + ", ".join(f"{kind} {ms:.2f}" for kind, ms in kernels.items())
        lines.append(line)
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=None, help="batch x context")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--samples", type=int, default=128, help="num_samples of santa")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two narrow layers and short rows, to see that it runs")
    parser.add_argument("--json", type=Path, help="where results go as well")
    a = parser.parse_args(argv)
    if a.shapes is None:
        a.shapes = ["1x128"] if a.quick else SHAPES
    return a


def main() -> None:
    a = parse()
    print(", ".join(f"{name} {value}" for name, value in environment(a.device).items()))
    print(f"Llama 3.1 8B shape, random weights, bfloat16; santa S = {a.samples}")
    with torch.inference_mode():
        run(a)


if __name__ == "__main__":
    main()
