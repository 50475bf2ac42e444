"""Decode with a real model, exactly and with `santa`, and compare.

    python demo/demo.py

The bundled byte-level Llama reads thousands of bytes of the interpreter's standard-library sources, from
files it was not trained on, and writes on: once exactly, then with every sampler and several seeds, fed the same
bytes, so that the two next-byte distributions of each step can be compared. It then answers a question about a key
planted far back. Last, the attention of the exact run is estimated over and over to show how the error falls with
the number of samples. Runs on CUDA if there is a GPU, else on the CPU. Tables and plot go to out/demo.

What the table says of errors varies with the text, which is that of the interpreter's version, and from seed to seed:
64 steps of one seed are few, so the mean over seeds is printed with its spread.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel, StaticCache

import santa
from santa.integrations.transformers import attach, record_rows_read

ROOT = Path(__file__).resolve().parents[1]
SAMPLERS = ("multinomial", "stratified", "systematic", "grouped")
# (sampler, S) of the table's rows, after the exact ones.
SETTINGS = [("grouped", 16), ("grouped", 64), ("grouped", 256), *((sampler, 64) for sampler in SAMPLERS[:3])]
CURVE_SAMPLES = (4, 8, 16, 32, 64, 128, 256)
CURVE_SEEDS = 6
TABLE_SEEDS = 4
# The layers of a run draw from streams of their own, which follow each other: seeds have to be further apart.
SEED_STRIDE = 1000
# Total variation distance between the next-token distributions of pretrained models in bfloat16 and in float32.
# Measured once, by hand, on two models that are too large for this demo: an error below it is less than a dtype makes.
BFLOAT16_LEVEL = (0.013, 0.018)


@dataclass
class TableRow:
    """One line of the table. Distances are to the exact run's next-byte distributions."""

    attention: str
    num_samples: int
    rows_read: float
    """V rows read over kv_len, averaged over steps, layers and KV heads."""
    tokens_per_s: float
    """One over the median time of a step; NaN where it was not measured."""
    top1_agreement: float
    """Mean over the seeds, as is total_variation."""
    total_variation: float
    spread: float
    """Standard deviation of total_variation over the seeds; 0 where nothing is drawn."""


@dataclass
class CurvePoint:
    """Error of estimated attention outputs over layers, steps and heads, for one sampler and S."""

    sampler: str
    num_samples: int
    rows_read: float
    relative_rmse: float
    """Mean over the seeds of ||estimate - exact|| / ||exact||."""
    spread: float
    """Standard deviation of that over the seeds."""
    relative_time: float
    """Time of the attention calls over that of exact ones, in `santa`; the median over the seeds."""


def decode_step(model: PreTrainedModel, token: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits [vocab] after one more token; the cache grows by it."""
    return model(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1]


@dataclass
class Prefilled:
    """A context that was read once: its cache, copied for each run, and the logits after its last byte."""

    model: PreTrainedModel
    cache: Cache
    logits: torch.Tensor

    def steps(self, num_steps: int, forced: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Decode: yields the logits [vocab] of each step, which continue with `forced` or else greedily.

        forced: token ids [num_steps].
        """
        cache = copy.deepcopy(self.cache)
        logits = self.logits
        for step in range(num_steps):
            token = logits.argmax() if forced is None else forced[step]
            logits = decode_step(self.model, token, cache)
            yield logits


def prefill(model: PreTrainedModel, text: bytes, new_tokens: int, label: str) -> Prefilled:
    """Read a context with dense attention, in one pass."""
    input_ids = torch.tensor(list(text), device=model.device)[None]
    # DynamicCache copies all K and V at every step, which would drown what sampling saves.
    cache = StaticCache(config=model.config, max_cache_len=len(text) + new_tokens)
    layers = model.get_decoder().layers
    with tqdm(total=len(layers), desc=f"read {label}, {len(text):,} bytes", unit="layer", leave=False) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        hooks = [layer.register_forward_hook(advance) for layer in layers]
        logits = model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1).logits
        for hook in hooks:
            hook.remove()
    return Prefilled(model, cache, logits[0, -1])


def use_santa(model: PreTrainedModel, num_samples: int, sampler: str = "grouped", seed: int = 0) -> None:
    # min_context=0: the table is about the samplers, so even rows too short to gain are sampled.
    attach(model, santa.SantaConfig(num_samples=num_samples, sampler=sampler, seed=seed, min_context=0))


def compare(context: Prefilled, num_steps: int) -> tuple[list[TableRow], torch.Tensor]:
    """The table, and the token ids [num_steps] that the first run wrote and all runs were fed.

    The runs take turns at every step, so that whatever else the machine does slows all of them alike.
    """
    model = context.model
    runs = [("exact (PyTorch SDPA)", 0), ("exact (santa)", 0), *SETTINGS]
    caches = [copy.deepcopy(context.cache) for _ in runs]
    logits: list[list[torch.Tensor]] = [[] for _ in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    shares: list[list[float]] = [[] for _ in runs]
    tokens = [context.logits.argmax()]
    # Counting rows takes time, so a step is either timed or counted.
    num_timed = num_steps - max(1, num_steps // 4)
    with tqdm(total=num_steps * len(runs), desc="decode", unit="token", leave=False) as bar:
        for step in range(num_steps):
            for index, (name, num_samples) in enumerate(runs):
                if index == 0:
                    model.set_attn_implementation("sdpa")
                else:
                    use_santa(model, num_samples, name if num_samples else "grouped")
                counted = index > 0 and step >= num_timed
                with record_rows_read(model) if counted else nullcontext() as record:
                    start = time.perf_counter()
                    step_logits = decode_step(model, tokens[step], caches[index])
                    if step_logits.is_cuda:
                        torch.cuda.synchronize(step_logits.device)
                    if step < num_timed:
                        seconds[index].append(time.perf_counter() - start)
                if record:
                    shares[index].append(record.share())
                logits[index].append(step_logits)
                bar.update()
            tokens.append(logits[0][-1].argmax())

    forced = torch.stack(tokens[:num_steps])
    exact = next_bytes(logits[0])
    # The first seed has run, timed; the others run for their distances alone.
    distances = [[distance(next_bytes(steps), exact)] for steps in logits]
    more = [(index, seed) for index in range(2, len(runs)) for seed in range(1, TABLE_SEEDS)]
    for index, seed in tqdm(more, desc="other seeds", unit="run", leave=False):
        use_santa(model, runs[index][1], runs[index][0], seed * SEED_STRIDE)
        distances[index].append(distance(next_bytes(context.steps(num_steps, forced)), exact))
    rows = []
    for index, (name, num_samples) in enumerate(runs):
        agreement, variation = zip(*distances[index], strict=True)
        rows.append(
            TableRow(
                attention=name,
                num_samples=num_samples,
                rows_read=statistics.mean(shares[index] or [1.0]),
                tokens_per_s=1 / statistics.median(seconds[index]),
                top1_agreement=statistics.mean(agreement),
                total_variation=statistics.mean(variation),
                spread=statistics.stdev(variation) if len(variation) > 1 else 0.0,
            )
        )
    rows.insert(1, rounding(context, forced, exact))
    return rows, forced


def next_bytes(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Next-byte distributions [num_steps, vocab] of the logits of each step."""
    return torch.stack(list(logits)).float().softmax(-1)


def distance(probabilities: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(share of steps whose likeliest byte is the same, total variation distance, mean over steps)"""
    agreement = (probabilities.argmax(-1) == exact.argmax(-1)).float().mean().item()
    return agreement, 0.5 * (probabilities - exact).abs().sum(-1).mean().item()


def rounding(context: Prefilled, forced: torch.Tensor, exact: torch.Tensor) -> TableRow:
    """What another dtype does to the same steps: exact attention, weights and cache in bfloat16 where the demo runs in
    float32, and the other way round. The measure for the errors of sampling."""
    dtype = torch.float32 if context.model.dtype == torch.bfloat16 else torch.bfloat16
    # Loaded again: of a model that is converted the rotary frequencies are rounded too, which no model in use has.
    name = context.model.name_or_path
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa").eval()
    model = model.to(context.model.device)
    cache = copy.deepcopy(context.cache)
    for layer in cache.layers:
        layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype
    steps = Prefilled(model, cache, context.logits).steps(len(forced), forced)
    agreement, variation = distance(next_bytes(steps), exact)
    return TableRow(f"exact, in {str(dtype).removeprefix('torch.')}", 0, 1.0, math.nan, agreement, variation, 0.0)


@contextmanager
def captured_attention(calls: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]) -> Iterator[None]:
    """Collect the inputs of every `santa.decode` call of the model."""
    decode = santa.decode

    def spy(*args: Any, **kwargs: Any) -> Any:
        # q only lives for one step. k and v are the cache, whose rows up to kv_len no later step changes.
        calls.append(((args[0].clone(), *args[1:]), dict(kwargs)))
        return decode(*args, **kwargs)

    with mock.patch.object(santa, "decode", spy):
        yield


def error_curves(context: Prefilled, forced: torch.Tensor) -> list[CurvePoint]:
    """How far estimated attention outputs are from exact ones, on the model's own q, k and v."""
    calls: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = []
    use_santa(context.model, num_samples=0)
    with captured_attention(calls):
        for _ in context.steps(len(forced), forced):
            pass
    exact = [santa.decode(*args, **kwargs)[0].float() for args, kwargs in calls]
    norm = torch.stack([out.square().sum() for out in exact]).sum()
    points = []
    settings = [(sampler, num_samples) for sampler in SAMPLERS for num_samples in CURVE_SAMPLES]
    for sampler, num_samples in tqdm(settings, desc="error curves", leave=False):
        errors, shares, times = [], [], []
        for seed in range(CURVE_SEEDS):
            squared = read = available = 0.0
            for (args, kwargs), expected in zip(calls, exact, strict=True):
                options = {**kwargs, "num_samples": num_samples, "sampler": sampler, "return_rows_read": True}
                # kwargs["seed"] is the layer's stream.
                options["seed"] = kwargs["seed"] + SEED_STRIDE * seed
                out, _, rows = santa.decode(*args, **options)
                squared += (out.float() - expected).square().sum()
                read += rows.sum()
                available += kwargs["kv_lens"].sum() * rows.shape[1]
            errors.append(float((squared / norm).sqrt()))
            shares.append(float(read / available))
            # Beside each other: whatever else the machine does slows both.
            exact_time = attention_time(calls, {})
            times.append(attention_time(calls, {"num_samples": num_samples, "sampler": sampler}) / exact_time)
        points.append(
            CurvePoint(
                sampler,
                num_samples,
                statistics.mean(shares),
                statistics.mean(errors),
                statistics.stdev(errors),
                statistics.median(times),
            )
        )
    return points


def attention_time(calls: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]], options: dict[str, Any]) -> float:
    """Seconds that the calls take, one after the other, with other options."""
    start = time.perf_counter()
    for args, kwargs in calls:
        out = santa.decode(*args, **{**kwargs, **options})[0]
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return time.perf_counter() - start


def plot_curves(points: list[CurvePoint], rows: list[TableRow], path: Path, title: str) -> str:
    """Error of attention against S, V rows read and time, and of the next byte against S beside what bfloat16 does.

    Says what it wrote, or why it could not."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: no plot, the numbers are in the CSV files"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5))
    panels = list(axes.flat)
    for panel in panels:
        panel.set_yscale("log")
        panel.margins(y=0.08)
    for sampler in SAMPLERS:
        curve = [point for point in points if point.sampler == sampler]
        error = np.array([point.relative_rmse for point in curve])
        spread = np.array([point.spread for point in curve])
        for panel, field in zip(panels, ("num_samples", "rows_read", "relative_time"), strict=False):
            x = [getattr(point, field) for point in curve]
            panel.plot(x, error, marker="o", markersize=4, label=sampler)
            if field != "relative_time":  # not in the order of S
                panel.fill_between(x, error - spread, error + spread, alpha=0.2)
        of_sampler = [row for row in rows if row.attention == sampler]
        panels[3].errorbar(
            [row.num_samples for row in of_sampler],
            [row.total_variation for row in of_sampler],
            [row.spread for row in of_sampler],
            marker="o",
            markersize=4,
            capsize=3,
            label=sampler,
        )
    for panel in panels[:3]:
        panel.set_ylabel("relative RMSE of the attention output\n(lower is better)")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for panel in (panels[0], panels[3]):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("samples S per query head")
    panels[1].set_xscale("log")
    panels[1].set_xlabel("V rows read / kv_len")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].xaxis.set_major_formatter(PercentFormatter(xmax=1))
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    panels[2].axvline(1, color="grey", linestyle=":", label="exact attention")
    panels[2].set_xlabel("time of the attention calls, of exact ones (further left is faster)")
    panels[3].set_ylabel("TV distance of the next byte (lower is better)")
    panels[3].axhspan(*BFLOAT16_LEVEL, color="grey", alpha=0.3, label="bfloat16 for float32, pretrained models")
    panels[3].axhline(rows[1].total_variation, color="grey", linestyle="--", label=f"{rows[1].attention}, this model")
    for panel in panels:
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="both")
    for panel in panels[2:]:
        panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"plot: {path}"


def write_csv(path: Path, records: list[TableRow] | list[CurvePoint]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(records[0]))
        writer.writerows(astuple(record) for record in records)


HEADER = ("attention", "S", "V rows read", "tokens/s", "to SDPA's", "top-1 agreement", "TV distance")


def cells_of(rows: list[TableRow]) -> list[tuple[str, ...]]:
    return [
        (
            row.attention,
            str(row.num_samples or "-"),
            f"{row.rows_read:.1%}",
            "-" if math.isnan(row.tokens_per_s) else f"{row.tokens_per_s:.1f}",
            "-" if math.isnan(row.tokens_per_s) else f"{row.tokens_per_s / rows[0].tokens_per_s:.2f}",
            f"{row.top1_agreement:.1%}",
            f"{row.total_variation:.4f}" + (f" ± {row.spread:.4f}" if row.spread else ""),
        )
        for row in rows
    ]


def print_table(rows: list[TableRow], *, markdown: bool) -> None:
    lines = [HEADER, *cells_of(rows)]
    if markdown:
        print("\n".join(f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER), *lines[1:])))
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    print(rule)
    for line in lines:
        right = "  ".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print(f"{line[0].ljust(widths[0])}  {right}")
        if line is HEADER:
            print(rule)
    print(rule)


def retrieval(model: PreTrainedModel, text: np.ndarray, context_len: int, num_samples: int) -> None:
    """One key planted early in the context, asked for at its end: both answers, printed."""
    import tasks

    prompt, answer = tasks.retrieval_prompt(context_len, np.random.default_rng(1), text=text, depth=0.15)
    context = prefill(model, prompt, tasks.ANSWER_LEN, "the retrieval prompt")
    question = prompt[prompt.rindex(b"\n") + 1 :]
    key = question.removeprefix(b"# recall ").removesuffix(b" is ")
    planted = prompt.index(b"# key " + key)
    print("\nA key planted far back, asked for at the end:")
    print(f"  byte {planted:>6,}  ... {tasks.key_line(key, answer.strip()).decode().strip()} ...")
    print(f"  byte {len(prompt):>6,}  {question.decode()}_")
    for label, samples in (("exact", 0), (f"santa, grouped, S = {num_samples}", num_samples)):
        use_santa(model, samples)
        logits = [context.logits, *context.steps(tasks.ANSWER_LEN - 1)]
        written = bytes(int(step.argmax()) for step in logits)
        verdict = "right" if written == answer else f"wrong, should be {answer.decode().strip()}"
        print(f"  {label + ':':<24} {written.decode(errors='replace').strip()}  ({verdict})")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "byte-llama", help="model and tasks.py")
    parser.add_argument("--context", type=int, help="bytes of context (default: 8192; on CUDA what was trained)")
    parser.add_argument("--steps", type=int, default=64, help="bytes to decode per setting (default: 64)")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="folder for tables and plot")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")
    if not (arguments.model / "config.json").exists():
        parser.error(f"--model must name a folder with the model, {arguments.model} has no config.json")
    return arguments


@torch.inference_mode()
def main() -> None:
    started = time.perf_counter()
    arguments = parse_arguments()
    # The tasks belong to the model, which lives outside the package.
    sys.path.insert(0, str(arguments.model))
    import tasks

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    longest = model.config.max_position_embeddings - arguments.steps
    context_len = min(arguments.context or (longest if device.type == "cuda" else 8192), longest)

    text = tasks.load_corpus().heldout
    context = prefill(model, text[:context_len].tobytes(), arguments.steps, "the context")
    rows, forced = compare(context, arguments.steps)
    config = model.config
    model_name = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M-parameter byte-level Llama"
    print(
        f"{model_name}: {config.num_hidden_layers} layers, {config.num_attention_heads} query heads, "
        f"{config.num_key_value_heads} KV heads; {str(dtype).removeprefix('torch.')} on {device_name(device)}; context "
        f"{context_len:,} bytes of the sources of Python {platform.python_version()}; {arguments.steps} steps per row, "
        f"all fed the bytes that the first row writes; mean and deviation of {TABLE_SEEDS} seeds"
    )
    print_table(rows, markdown=arguments.markdown)
    ending = text[max(0, context_len - 40) : context_len].tobytes().decode(errors="replace")
    print(f"The context ends with {ending!r},")
    print(f"exact decoding goes on {bytes(forced.tolist()).decode(errors='replace')!r}.")

    retrieval(model, text, context_len, num_samples=256)

    points = error_curves(context, forced[:2])
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "table.csv", rows)
    write_csv(arguments.out / "error_curves.csv", points)
    title = f"Attention of the {model_name} at {context_len:,} bytes; mean and deviation of {CURVE_SEEDS} seeds"
    title += f", of {TABLE_SEEDS} for the next byte"
    print()
    print(plot_curves(points, rows, arguments.out / "error_curves.png", title))
    print(f"numbers: {arguments.out / 'table.csv'}, {arguments.out / 'error_curves.csv'}")
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
