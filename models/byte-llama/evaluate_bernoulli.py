"""What Bernoulli scores cost the byte-llama model: next-byte distributions, bits per byte, retrieval, and their bias.

    python models/byte-llama/evaluate_bernoulli.py --json out/bernoulli_model.json --plot out/bernoulli_model.png
    python models/byte-llama/evaluate_bernoulli.py --context 1024 --prompts 8 --windows 8 --draws 2 8 --samples 64

Retrieval prompts with their answers (tasks.py) and windows of held-out text, all of one length, are prefilled densely
except for their last bytes. These go through decode steps with Bernoulli scores and sampled values in every layer, each
row with random numbers of its own; every setting is fed the same bytes.

First table. S = 0 sums over all values, which leaves the score side alone.

    right           prompts with every answer byte the likeliest one after the right bytes before it: what greedy
                    decoding answers right
    TV text, TV answers   total variation distance of next-byte distributions to those of exact attention, mean
    bits/byte       of the text's bytes, minus those of exact attention, with the standard error over windows
    K read, V read  features of K over all, for the union of the heads that share them; rows of V over all

Second table: bias. The logits are unbiased, their softmax is not, and an average over draws does not undo it. For the
last decode step of windows of text (answers are too certain to tell noise from bias), at S = 0, over many seeds:
`noise` is the root mean square deviation of a draw from its mean, `bias` that of the mean from the exact result (the
variance of the mean of so many draws subtracted; 0 where nothing is left), both relative to the exact one. Of attention
outputs, where each layer gets the queries and the cache of exact attention, and of next-byte distributions, where all
layers draw. These draws are torch's own, in plain PyTorch, with the law of `santa.reference_bernoulli`.

`correction` subtracts half a variance from each logit, estimated from the features that were drawn. `logit`: the
logit's own, after E[exp(s - var / 2)] = exp(E[s]) of a Gaussian s. But keys share their errors, of which a softmax only
sees differences; `centred` takes the variance of a logit minus the mean logit under the attention itself, which is what
removes the bias to second order. For independent draws, whose law shared ones have too, head by head. Not for the
systematic sampler: its draws of different features depend on each other, and the variance is no sum over features.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

import santa
from santa import SantaConfig
from santa.integrations.transformers import attach, record_rows_read

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evaluate
import tasks

DRAWS = (1, 2, 4, 8, 16)
SCORE_SAMPLERS = ("independent", "systematic", "shared")
SAMPLES = (0, 64, 256)
CORRECTIONS = ("none", "logit", "centred")

DECODED = evaluate.QUESTION_LEN + tasks.ANSWER_LEN
"""Bytes of each row that are decoded: the whole question and its answer."""


@dataclass(frozen=True)
class Setting:
    """One way to decode. `num_draws` 0 computes exact scores, `num_samples` 0 sums over all values."""

    num_draws: int = 0
    score_sampler: str = "independent"
    num_samples: int = 0

    def config(self, seed: int) -> SantaConfig:
        options: dict[str, Any] = {"num_samples": self.num_samples, "seed": seed, "min_context": 0}
        if self.num_draws:
            options |= {"score": "bernoulli", "num_draws": self.num_draws, "score_sampler": self.score_sampler}
        return SantaConfig(**options)


@dataclass
class Found:
    """What one setting gave, row by row; rows are prompts first."""

    right: list[Tensor] = field(default_factory=list)  # bool [prompts]
    tv_answers: list[Tensor] = field(default_factory=list)  # [prompts]
    tv_text: list[Tensor] = field(default_factory=list)  # [windows]
    bits: list[Tensor] = field(default_factory=list)  # [windows], per byte
    features_read: float = 0.0
    rows_read: float = 0.0


def make_rows(
    text: np.ndarray, context_len: int, num_prompts: int, num_windows: int, num_pairs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Prompts with answers [num_prompts, context_len] and windows of text [num_windows, context_len], int64. The ends
    of the windows are spread evenly over the text."""
    if len(text) < context_len:
        raise ValueError(f"the text has {len(text)} bytes, fewer than a context of {context_len}")
    prompts, answers = tasks.retrieval_batch(context_len, num_prompts, seed, text=text, num_pairs=num_pairs)
    starts = np.linspace(0, len(text) - context_len, num_windows).astype(np.int64)
    windows = np.stack([text[start : start + context_len] for start in starts]).astype(np.int64)
    return torch.cat((prompts, answers), dim=1), torch.from_numpy(windows)


@contextmanager
def streams_of_rows(first_row: int) -> Iterator[None]:
    """Inside, each row of a batch draws random numbers of its own: rows of equal length would share them."""
    decode = santa.decode

    def decode_apart(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        rows = torch.arange(first_row, first_row + len(q), device=q.device)
        return decode(q, k, v, **options | {"row_seeds": rows})

    with mock.patch.object(santa, "decode", decode_apart):
        yield


def decode_forced(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor) -> Tensor:
    """log2 of the next-byte distributions after each of tokens [rows, steps], one decode step each, float32 [rows,
    steps, 256]. The cache is left as it was."""
    steps = [model(token, past_key_values=cache, use_cache=True).logits[:, -1] for token in tokens.split(1, dim=1)]
    cache.crop(-tokens.shape[1])
    return torch.stack(steps, dim=1).float().log_softmax(-1) / math.log(2)


def total_variation(log2_p: Tensor, log2_q: Tensor) -> Tensor:
    return (log2_p.exp2() - log2_q.exp2()).abs().sum(-1) / 2


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    prompts: Tensor,
    windows: Tensor,
    settings: Sequence[Setting],
    *,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> list[Found]:
    """Decodes the last DECODED bytes of all rows with each setting. The first setting has to be exact attention."""
    if settings[0] != Setting():
        raise ValueError("the first setting needs to be exact attention: the others are compared with it")
    rows = torch.cat((prompts, windows))
    prefilled = rows.shape[1] - DECODED
    results = [Found() for _ in settings]
    batches = range(0, len(rows), batch_size)
    with tqdm(total=len(batches) * len(settings), desc="settings", disable=not progress, leave=False) as bar:
        for first in batches:
            batch = rows[first : first + batch_size].to(model.device)
            num_prompts = min(max(len(prompts) - first, 0), len(batch))
            attach(model, SantaConfig(num_samples=0))
            cache = evaluate._prefill(model, batch[:, :prefilled])
            targets = batch[:, prefilled + 1 :]
            exact = None
            for setting, found in zip(settings, results, strict=True):
                attach(model, setting.config(seed))
                with streams_of_rows(first), record_rows_read(model) as record:
                    logs = decode_forced(model, cache, batch[:, prefilled:-1])
                exact = logs if exact is None else exact
                distance = total_variation(logs, exact)
                right = logs.argmax(-1) == targets
                found.right.append(right[:num_prompts, -tasks.ANSWER_LEN :].all(1).cpu())
                found.tv_answers.append(distance[:num_prompts, -tasks.ANSWER_LEN :].mean(1).cpu())
                found.tv_text.append(distance[num_prompts:].mean(1).cpu())
                found.bits.append(-logs[num_prompts:].gather(-1, targets[num_prompts:, :, None]).mean((1, 2)).cpu())
                found.rows_read += record.share() * len(batch) / len(rows)
                found.features_read += (record.feature_share() if setting.num_draws else 1.0) * len(batch) / len(rows)
                bar.update()
    return results


def result(setting: Setting, found: Found, exact: Found) -> dict[str, Any]:
    """A row of the first table."""
    right, bits = torch.cat(found.right), torch.cat(found.bits)
    difference = (bits - torch.cat(exact.bits)).double()
    return vars(setting) | {
        "right": int(right.sum()),
        "tv_text": float(torch.cat(found.tv_text).mean()),
        "tv_answers": float(torch.cat(found.tv_answers).mean()),
        "bits_per_byte": float(bits.mean()),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(correction=0) / math.sqrt(len(difference))),
        "features_read": found.features_read,
        "rows_read": found.rows_read,
    }


# The second table, in plain PyTorch.


def draw_counts(
    q: Tensor, num_kv_heads: int, num_draws: int, score_sampler: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Magnitudes of the counts and p = |q_i| / max|q|, both like q [rows, num_qo_heads, head_dim] in float32."""
    p = q.float().abs()
    p = p / p.amax(-1, keepdim=True)
    rows, num_qo_heads, head_dim = q.shape
    if score_sampler == "systematic":
        # B p_i end to end, float64 for the running sum; a whole number of draws falls into each up to its two ends.
        ends = (p.double() * num_draws).cumsum(-1)
        u = torch.rand(rows, num_qo_heads, 1, dtype=torch.float64, device=q.device, generator=generator)
        above = (ends + u).floor()
        return torch.diff(above, prepend=torch.zeros_like(u)).float(), p
    heads = num_kv_heads if score_sampler == "shared" else num_qo_heads
    u = torch.rand(num_draws, rows, heads, head_dim, device=q.device, generator=generator)
    return (u.repeat_interleave(num_qo_heads // heads, dim=2) < p).sum(0).float(), p


def variance_weights(counts: Tensor, p: Tensor, num_draws: int) -> Tensor:
    """w with E[sum_i w_i k_i^2] = Var<counts, k>, for draws that are independent of feature to feature: the variance
    B p (1 - p) of a binomial count over the probability that a feature is drawn at all, and 0 for those that were not
    (Horvitz-Thompson)."""
    drawn = 1 - (1 - p) ** num_draws
    weights = num_draws * p * (1 - p) / drawn.clamp(min=torch.finfo(drawn.dtype).tiny)
    return torch.where(counts > 0, weights, 0.0)


def bernoulli_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_draws: int,
    score_sampler: str,
    correction: str,
    sm_scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Attention of one decode step with Bernoulli scores and all values: q [rows, num_qo_heads, head_dim], k and v
    [rows, num_kv_heads, kv_len, head_dim]; computed and returned in float32, like q. num_draws 0: exact."""
    k, v = k.float(), v.float()
    factor = sm_scale
    drawn = q.float()
    if num_draws:
        counts, p = draw_counts(q, k.shape[1], num_draws, score_sampler, generator)
        drawn = counts * q.sign()
        factor = sm_scale * q.float().abs().amax(-1, keepdim=True) / num_draws

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x.unflatten(1, (k.shape[1], -1)) @ y.transpose(-1, -2)).flatten(1, 2)

    logits = factor * dot(drawn, k)
    if num_draws and correction != "none":
        weights = variance_weights(counts, p, num_draws)
        variance = dot(weights, k.square())
        if correction == "centred":
            # sum_i w_i (k_i - mean_i)^2, without the term that all keys share.
            mean = (logits.softmax(-1).unflatten(1, (k.shape[1], -1)) @ k).flatten(1, 2)
            variance = variance - 2 * dot(weights * mean, k)
        logits = logits - factor**2 / 2 * variance
    return (logits.softmax(-1).unflatten(1, (k.shape[1], -1)) @ v).flatten(1, 2)


@dataclass
class Moments:
    """Mean and variance over seeds of vectors [..., d], as they come, against what they should be."""

    exact: Tensor
    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    distance: float = 0.0

    def add(self, drawn: Tensor) -> None:
        # Around the exact value: differences of large numbers would lose the bias.
        off = drawn.double() - self.exact.double()
        self.count += 1
        self.total = self.total + off
        self.squares = self.squares + off.square().sum(-1)
        self.distance += float(off.abs().sum(-1).mean()) / 2

    def summary(self) -> dict[str, float]:
        """noise and bias, root mean square over the vectors, relative to each one's norm; tv: half the L1 distance of a
        draw, tv_mean: that of the mean of all draws, which has their noise too."""
        mean = self.total / self.count
        variance = (self.squares - self.count * mean.square().sum(-1)).clamp(min=0) / (self.count - 1)
        bias = mean.square().sum(-1) - variance / self.count
        norm = self.exact.double().square().sum(-1)
        return {
            "noise": float((variance / norm).mean().sqrt()),
            "bias": float((bias / norm).mean().clamp(min=0).sqrt()),
            "tv": self.distance / self.count,
            "tv_mean": float(mean.abs().sum(-1).mean()) / 2,
        }


@contextmanager
def plain_decode(attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Iterator[None]:
    """Inside, decode steps compute `attend(q, k, v, sm_scale)` of keys without padding, in whatever dtype it likes."""

    def decode(q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float | None, **_: Any) -> tuple[Tensor, None]:
        scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        return attend(q, k, v, scale).to(q.dtype), None

    with mock.patch.object(santa, "decode", decode):
        yield


@torch.inference_mode()
def measure_bias(
    model: PreTrainedModel,
    rows: Tensor,
    settings: Sequence[tuple[int, str, str]],
    num_seeds: int,
    *,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The second table: of the decode step that reads the last byte of rows [rows, context_len]. `settings` are
    (num_draws, score_sampler, correction)."""
    rows = rows.to(model.device)
    attach(model, SantaConfig(num_samples=0))
    cache = evaluate._prefill(model, rows[:, :-1])
    last = rows[:, -1:]
    layers: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def exactly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        options = {"num_draws": 0, "score_sampler": "", "correction": "none"}
        return bernoulli_attention(q, k, v, sm_scale=scale, generator=generator, **options)

    def recording(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        layers.append((q, k, v, scale))
        return exactly(q, k, v, scale)

    generator = torch.Generator(device=model.device).manual_seed(seed)
    with plain_decode(recording):
        exact = decode_forced(model, cache, last)[:, 0].exp2()
    outputs = [exactly(*layer) for layer in layers]

    found = []
    for num_draws, score_sampler, correction in tqdm(settings, desc="bias", disable=not progress, leave=False):
        options = {"num_draws": num_draws, "score_sampler": score_sampler, "correction": correction}
        generator.manual_seed(seed)

        def drawn(q: Tensor, k: Tensor, v: Tensor, scale: float, options: dict[str, Any] = options) -> Tensor:
            return bernoulli_attention(q, k, v, sm_scale=scale, generator=generator, **options)

        attention = [Moments(output) for output in outputs]
        next_byte = Moments(exact)
        with plain_decode(drawn):
            for _ in range(num_seeds):
                for moments, layer in zip(attention, layers, strict=True):
                    moments.add(drawn(*layer))
                next_byte.add(decode_forced(model, cache, last)[:, 0].exp2())
        of_layers = [moments.summary() for moments in attention]
        mean = {
            name: math.sqrt(sum(layer[name] ** 2 for layer in of_layers) / len(of_layers)) for name in ("noise", "bias")
        }
        found.append(options | {"attention": mean, "layers": of_layers, "next_byte": next_byte.summary()})
    return found


HEAD = """\
| score sampler | B | S | right | TV text | TV answers | bits/byte, minus exact | K read | V read |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""
BIAS_HEAD = """\
| score sampler | B | correction | attention: noise | bias | next byte: noise | bias | TV of a draw | TV of the mean |
|---|--:|---|--:|--:|--:|--:|--:|--:|"""


def line(row: dict[str, Any], prompts: int) -> str:
    sampler, draws = (row["score_sampler"], row["num_draws"]) if row["num_draws"] else ("exact", "")
    return (
        f"| {sampler} | {draws} | {row['num_samples']} | {row['right']}/{prompts} | {row['tv_text']:.4f} "
        f"| {row['tv_answers']:.4f} | {row['difference']:+.4f} ± {row['standard_error']:.4f} "
        f"| {row['features_read']:.1%} | {row['rows_read']:.1%} |"
    )


def bias_line(row: dict[str, Any]) -> str:
    attention, next_byte = row["attention"], row["next_byte"]
    return (
        f"| {row['score_sampler']} | {row['num_draws']} | {row['correction']} | {attention['noise']:.1%} "
        f"| {attention['bias']:.1%} | {next_byte['noise']:.1%} | {next_byte['bias']:.1%} "
        f"| {next_byte['tv']:.4f} | {next_byte['tv_mean']:.4f} |"
    )


def plot(path: Path, results: list[dict[str, Any]], bias: list[dict[str, Any]]) -> None:
    """TV distance against the share of K read, and noise and bias against B."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 if bias else 1, figsize=(13.5 if bias else 5.5, 4.4), squeeze=False)
    figure.set_layout_engine("constrained")
    left = axes[0, 0]
    samples = sorted({row["num_samples"] for row in results if row["num_draws"]})
    samplers = list(dict.fromkeys(row["score_sampler"] for row in results if row["num_draws"]))
    for color, sampler in enumerate(samplers):
        for style, number in zip(("-o", "--s", ":^", "-.d"), samples, strict=False):
            rows = [
                r for r in results if r["num_draws"] and (r["score_sampler"], r["num_samples"]) == (sampler, number)
            ]
            where = [100 * row["features_read"] for row in rows]
            label = f"{sampler}, S = {number or 'all values'}"
            left.plot(where, [row["tv_text"] for row in rows], style, color=f"C{color}", label=label)
    left.set(xlabel="features of K read, %", ylabel="TV distance of next-byte distributions", yscale="log")
    left.legend(fontsize="small")
    draws = sorted({row["num_draws"] for row in results if row["num_draws"]})
    left.set_title(f"held-out text; B = {', '.join(map(str, draws))}")
    if bias:
        plot_bias(axes[0, 1], bias)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_bias(axis: Any, bias: list[dict[str, Any]]) -> None:
    samplers = list(dict.fromkeys(row["score_sampler"] for row in bias))
    for color, sampler in enumerate(samplers):
        for correction, style in zip(CORRECTIONS, ("-o", "--s", ":^"), strict=True):
            rows = [row for row in bias if (row["score_sampler"], row["correction"]) == (sampler, correction)]
            draws = [row["num_draws"] for row in rows]
            if rows:
                label = sampler if correction == "none" else f"{sampler}, {correction} correction"
                figures = [100 * row["attention"]["bias"] for row in rows]
                axis.plot(draws, figures, style, color=f"C{color}", label=f"bias, {label}")
            if rows and correction == "none":
                figures = [100 * row["attention"]["noise"] for row in rows]
                axis.plot(draws, figures, "-", color=f"C{color}", alpha=0.35, label=f"noise, {label}")
    axis.set(xlabel="draws per query, B", ylabel="of the attention output's norm, %", xscale="log", yscale="log")
    axis.set_xscale("log", base=2)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title("bias and noise of attention outputs, all values")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=evaluate.HERE, help="folder of the checkpoint")
    parser.add_argument("--context", type=int, default=8192, help="bytes of a row")
    parser.add_argument("--prompts", type=int, default=128, help="retrieval prompts")
    parser.add_argument("--windows", type=int, default=64, help="windows of held-out text")
    parser.add_argument("--pairs", type=int, default=24, help="planted pairs per prompt, the asked one included")
    parser.add_argument("--draws", type=int, nargs="+", default=list(DRAWS), help="B")
    parser.add_argument("--score-samplers", nargs="+", choices=SCORE_SAMPLERS, default=list(SCORE_SAMPLERS))
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), help="S; 0: all values")
    parser.add_argument("--bias-rows", type=int, default=32, help="windows of the second table, at most all")
    parser.add_argument("--bias-seeds", type=int, default=64, help="draws of the second table; 0: no such table")
    parser.add_argument("--batch", type=int, default=256, help="rows decoded together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--json", type=Path, help="write settings and results to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.perf_counter()
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = evaluate.load_model(args.model, device=args.device, dtype=dtype)
    name = str(model.dtype).removeprefix("torch.")
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    text = tasks.load_corpus().heldout
    prompts, windows = make_rows(text, args.context, args.prompts, args.windows, args.pairs, args.seed)
    settings = [Setting(num_samples=s) for s in sorted({0, *args.samples})]
    settings += [Setting(b, x, s) for x in args.score_samplers for b in args.draws for s in args.samples]
    print(f"{device}, {name}; {args.context:,} bytes, {args.prompts} prompts and {args.windows} windows of text")
    found = measure(model, prompts, windows, settings, seed=args.seed, batch_size=args.batch, progress=True)
    results = [result(setting, of_setting, found[0]) for setting, of_setting in zip(settings, found, strict=True)]
    print(f"exact attention: {results[0]['bits_per_byte']:.3f} bits/byte\n\n{HEAD}")
    print("\n".join(line(row, args.prompts) for row in results), flush=True)

    bias: list[dict[str, Any]] = []
    if args.bias_seeds:
        rows = windows[torch.linspace(0, len(windows) - 1, min(args.bias_rows, len(windows))).long()]
        corrected = [x for x in args.score_samplers if x == "independent"]
        cases = [(b, x, "none") for x in args.score_samplers for b in args.draws]
        cases += [(b, x, c) for x in corrected for c in CORRECTIONS[1:] for b in args.draws]
        bias = measure_bias(model, rows, cases, args.bias_seeds, seed=args.seed, progress=True)
        print(f"\n{len(rows)} windows, {args.bias_seeds} draws\n\n{BIAS_HEAD}")
        print("\n".join(bias_line(row) for row in bias))
    if args.plot:
        plot(args.plot, results, bias)
    print(f"\n{time.perf_counter() - start:.1f} s")
    if args.json:
        head = dict(device=device, dtype=name, torch=torch.__version__, transformers=transformers.__version__)
        options = ("context", "prompts", "windows", "pairs", "bias_rows", "bias_seeds", "batch", "seed")
        content = head | {option: getattr(args, option) for option in options} | {"results": results, "bias": bias}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
