"""A decode step of a whole model in vLLM: FlashAttention and santa, with exact and with proposal keys, on one card.

    python bench/bench_vllm.py --json out/vllm.json
    python bench/bench_vllm.py --caches fp8 --shapes 8x32768 --engines dense santa exact

The model has the shape of Llama 3.1 8B and dummy weights, in bfloat16. Engines have vLLM's defaults, but room for 16
requests and CUDA graphs of the batches alone; decode steps are full graphs. They run one after the other, each in a
process of its own.

Prompts are not prefilled, which would take minutes: a KV connector (vllm_random_cache.py) fills the whole cache with
N(0, 1) and says that all but the last token of each prompt are computed. Every request has blocks of its own: nothing
is shared, and no step finds its keys in the L2. Decode steps do what they would after a prefill. With dummy weights and
random keys softmax is almost uniform, so santa reads about as many different rows of V as it can. With proposal keys
one prompt is prefilled before all else: with it santa codes the whole cache.

* ms per step: the median time between a step's tokens and the next step's, while all requests are running.
* KV tokens: what the cache has room for with vLLM's default share of the memory: what the engine itself leaves.
* TTFT: of one true prefill of --ttft tokens, the second of two.
* attention, matrix products, rest: kernel times of a step by torch.profiler, in a run of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import environment, save_run

SHAPES = ["8x32768", "16x32768", "4x131072", "8x4096", "1x512"]
CACHES = {"bf16": "auto", "fp8": "fp8"}
ENGINES = ["dense", "santa", "proposal", "exact"]
# What speed over dense is to be, bf16 and fp8 caches.
TARGETS = {
    "santa": {
        "8x32768": {"bf16": 1.25, "fp8": 1.3},
        "16x32768": {"bf16": 1.35, "fp8": 1.4},
        "4x131072": {"bf16": 1.4, "fp8": 1.4},
        "8x4096": {"bf16": 0.98, "fp8": 0.98},
        "1x512": {"bf16": 0.98, "fp8": 0.98},
    },
    "proposal": {"8x32768": {"bf16": 1.5}, "16x32768": {"bf16": 1.8}, "4x131072": {"bf16": 1.9}},
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
# Kernels by what their names have, the first that fits.
KINDS = {
    "attention": ("santa", "flash", "varlen", "fmha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "gemv"),
}
WARM_UP, PROFILED = 8, 4
# Of the prompt with which santa freezes the statistics of proposal keys.
CODED_PROMPT = 4096


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")


def sizes_of(shape: str) -> tuple[int, int]:
    batch, context = (int(x) for x in shape.split("x"))
    return batch, context


# One engine, in a process of its own --------------------------------------------------------------------


def start(a: argparse.Namespace, folder: str) -> Any:
    from vllm import LLM

    longest = max([a.ttft, CODED_PROMPT, *(sizes_of(shape)[1] for shape in a.shapes)]) + 64
    config = LLAMA_3_1_8B | {"max_position_embeddings": longest} | ({"num_hidden_layers": 2} if a.quick else {})
    Path(folder, "config.json").write_text(json.dumps(config))
    batches = sorted({sizes_of(shape)[0] for shape in a.shapes} | {1})
    santa: dict[str, Any] = {"num_samples": 0 if a.one == "exact" else a.samples}
    if a.one == "proposal":
        santa["keys"] = "proposal"
    return LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend="FLASH_ATTN" if a.one == "dense" else "CUSTOM",
        additional_config={} if a.one == "dense" else {"santa": santa},
        kv_cache_dtype=CACHES[a.caches[0]],
        max_model_len=longest,
        max_num_seqs=max(16, *batches),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": batches},
        kv_transfer_config={
            "kv_connector": "RandomCacheConnector",
            "kv_connector_module_path": "vllm_random_cache",
            "kv_role": "kv_both",
            # It fills the cache before the codes are made.
            "kv_connector_extra_config": {"santa_proposal_codes": True},
        },
    )


def add(llm: Any, names: list[str], length: int, new_tokens: int, *, varied: bool = False, **extra: Any) -> None:
    """Requests whose prompts are one token over and over, or `varied` ones."""
    from vllm import SamplingParams

    for i, name in enumerate(names):
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": extra} if extra else None,
        )
        rest = [(37 * j) % 50021 + 1 if varied else 7 for j in range(length - 1)]
        llm.llm_engine.add_request(name, {"prompt_token_ids": [i + 1, *rest]}, parameters)


def arrivals(llm: Any, count: int) -> list[float]:
    """When the tokens of each of `count` steps came, in seconds."""
    times: list[float] = []
    while len(times) < count:
        if llm.llm_engine.step():
            times.append(time.perf_counter())
    return times


def drain(llm: Any) -> None:
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def step_times(llm: Any, batch: int, context: int, steps: int) -> list[float]:
    """ms of each step; rows have `context` keys in the last one."""
    tokens = WARM_UP + steps
    add(llm, [f"step {i}" for i in range(batch)], context - tokens, tokens + 4)
    times = arrivals(llm, tokens)
    drain(llm)
    return [(y - x) * 1e3 for x, y in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]


def breakdown(llm: Any, batch: int, context: int) -> dict[str, float]:
    """ms of a step's kernels by kind."""
    from torch.profiler import ProfilerActivity, profile

    tokens = WARM_UP + PROFILED
    add(llm, [f"profile {i}" for i in range(batch)], context - tokens, tokens + 4)
    arrivals(llm, WARM_UP)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        arrivals(llm, PROFILED)
    drain(llm)
    kinds = dict.fromkeys([*KINDS, "rest"], 0.0)
    for entry in profiler.key_averages():
        if entry.self_device_time_total > 0:
            kinds[kind_of(entry.key)] += entry.self_device_time_total * 1e-3 / PROFILED
    return kinds


def ttft(llm: Any, length: int) -> float:
    """Seconds to the first token of a prompt that is computed, the second of two."""
    for i in range(2):
        began = time.perf_counter()
        add(llm, [f"ttft {i}"], length, 1, prefill=True)
        seconds = arrivals(llm, 1)[0] - began
        drain(llm)
    return seconds


def run_one(a: argparse.Namespace) -> None:
    """Measures one engine; each result is a line of JSON, which the caller reads."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        llm = start(a, folder)

        def say(**row: Any) -> None:
            print("RESULT " + json.dumps({"engine": a.one, "cache": a.caches[0], **row}), flush=True)

        if a.one == "proposal":
            add(llm, ["codes"], CODED_PROMPT, 1, varied=True, prefill=True)
            drain(llm)
        cache = llm.llm_engine.vllm_config.cache_config
        room = cache.num_gpu_blocks * cache.block_size
        free, total = torch.cuda.mem_get_info()
        say(kv_tokens=room, gpu_gib=(total - free) / 2**30)
        for shape in a.shapes:
            batch, context = sizes_of(shape)
            fitting = min(batch, room // (context + 32))
            if 4 < fitting < batch:
                fitting -= fitting % 2  # the same for engines that leave a little more or less
            if fitting == 0:
                say(shape=shape, batch=0)
                continue
            ms = statistics.median(step_times(llm, fitting, context, a.steps))
            say(shape=shape, batch=fitting, ms=ms, tokens_per_s=fitting / ms * 1e3, **breakdown(llm, fitting, context))
        if a.ttft:
            say(ttft_s=ttft(llm, a.ttft), ttft_tokens=a.ttft)
        llm.llm_engine.engine_core.shutdown()


# All of them --------------------------------------------------------------------------------------------


def run_engine(a: argparse.Namespace, engine: str, cache: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--one", engine, "--caches", cache, "--shapes", *a.shapes]
    command += ["--samples", str(a.samples), "--steps", str(a.steps), "--ttft", str(a.ttft)]
    command += ["--quick"] if a.quick else []
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    child = os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(command, env=child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = list(process.stdout)
    if process.returncode != 0:
        print("".join(lines)[-4000:], flush=True)
        print(f"{engine}, {cache}: the engine failed with exit status {process.returncode}", flush=True)
    return [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]


def report(rows: list[dict[str, Any]]) -> str:
    """Steps beside dense ones of the same cache, then what is not about steps."""
    timed = [row for row in rows if "ms" in row]
    dense = {(r["cache"], r["shape"], r["batch"]): r["ms"] for r in timed if r["engine"] == "dense"}
    head = f"{'shape':>10} {'batch':>5} {'cache':>5} {'engine':>8} {'ms/step':>8} {'tokens/s':>8} {'over dense':>10} "
    head += f"{'target':>6}"
    lines = [head + "".join(f" {kind:>15}" for kind in [*KINDS, "rest"])]
    for row in sorted(timed, key=lambda r: (SHAPES.index(r["shape"]) if r["shape"] in SHAPES else 99, r["cache"])):
        base = dense.get((row["cache"], row["shape"], row["batch"]))
        target = TARGETS.get(row["engine"], {}).get(row["shape"], {}).get(row["cache"])
        line = f"{row['shape']:>10} {row['batch']:>5} {row['cache']:>5} {row['engine']:>8} {row['ms']:8.2f}"
        line += f" {row['tokens_per_s']:8.0f} " + (f"{base / row['ms']:9.2f}x" if base else f"{'-':>10}")
        line += f" {target:5.2f}x" if target else f" {'-':>6}"
        lines.append(line + "".join(f" {row[kind]:12.2f} ms" for kind in [*KINDS, "rest"]))
    for row in rows:
        name = f"{row['engine']}, {row['cache']}"
        if "kv_tokens" in row:
            lines.append(f"{name}: room for {row['kv_tokens']:,} KV tokens, {row['gpu_gib']:.1f} GiB of the GPU in use")
        elif "ttft_s" in row:
            lines.append(f"{name}: TTFT of {row['ttft_tokens']:,} tokens {row['ttft_s']:.2f} s")
        elif row.get("batch") == 0:
            lines.append(f"{name}: {row['shape']} has no room")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, help="batch x context; the largest batch that fits is taken"
    )
    parser.add_argument("--caches", nargs="+", default=list(CACHES), choices=CACHES)
    parser.add_argument("--engines", nargs="+", default=ENGINES[:3], choices=ENGINES)
    parser.add_argument("--samples", type=int, default=128, help="num_samples of santa and proposal")
    parser.add_argument("--steps", type=int, default=48, help="steps that are timed")
    parser.add_argument("--ttft", type=int, default=32768, help="tokens of the prompt that is prefilled; 0: none")
    parser.add_argument("--quick", action="store_true", help="two layers, to see that it runs")
    parser.add_argument("--json", type=Path, help="where results go as well")
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    for shape in a.shapes:
        sizes = shape.split("x")
        if len(sizes) != 2 or not all(x.isdigit() and int(x) > 0 for x in sizes):
            parser.error(f"--shapes has {shape}; it needs batch x context, as 8x32768")
        if int(sizes[1]) <= WARM_UP + a.steps:
            parser.error(
                f"--shapes has {shape}; the context needs to be more than {WARM_UP + a.steps}, warm-up and --steps"
            )
    return a


def main() -> None:
    a = parse()
    if a.one:
        run_one(a)
        return
    from tqdm import tqdm

    a.device = "cuda"
    print(", ".join(f"{name} {value}" for name, value in environment("cuda").items()))
    print(f"Llama 3.1 8B shape, dummy weights; santa S = {a.samples}")
    rows: list[dict[str, Any]] = []
    for engine, cache in tqdm([(e, c) for c in a.caches for e in a.engines], desc="engines", unit="engine"):
        rows += run_engine(a, engine, cache)
        save_run(a, rows)
    print(report(rows))


if __name__ == "__main__":
    main()
