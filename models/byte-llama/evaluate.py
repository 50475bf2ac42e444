"""Measure the byte-llama model: retrieval accuracy at chosen context lengths, and bits per byte.

    python models/byte-llama/evaluate.py --context 2048 8192 --prompts 200

Each prompt is prefilled into the KV cache except for its last byte; from there on the model decodes
greedily, one byte per step, its own output fed back. So every answer byte comes out of a decode step
(query length 1), the step whose attention ``--attn`` can replace. A prompt counts as right when the
whole answer is. Greedy decoding is right exactly if every answer byte is the most likely one after
the right bytes before it, so one forward pass over prompt and answer gives the same number in exact
arithmetic; ``--prefill`` measures it that way.

    python models/byte-llama/evaluate.py --attn santa --samples 16 64 256 --context 8192 --json santa.json

compares sampled with exact decode attention on the same prompts. Each batch of prompts is prefilled once,
and every setting, exact attention (S = 0) included, then decodes the question line and the answer from that
KV cache. All rows are sampled, short contexts too. The prompts of a batch have equal lengths and thus share
their random numbers; batches do not. ``--kv-dtype fp8-k`` lets decode attention, exact and sampled, see the keys
rounded to float8_e4m3, ``fp8`` keys and values; everything is then compared with exact attention over the model's
own KV cache.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import tasks
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from santa import SantaConfig

HERE = Path(__file__).resolve().parent

SAMPLERS = ("grouped", "systematic", "stratified", "multinomial")
KV_DTYPES = ("model", "fp8-k", "fp8")

QUESTION_LEN = max(len(tasks.question(word + b"-0000")) for word in tasks.WORDS)
"""Bytes of the longest question, up to its answer: decoding that many covers the question of every prompt."""


@dataclass(frozen=True)
class RetrievalResult:
    """How many of the prompts were answered in full, and how many answer bytes were right."""

    prompts: int
    right: int
    right_bytes: int

    @property
    def accuracy(self) -> float:
        """Share of prompts with every answer byte right."""
        return self.right / self.prompts

    @property
    def byte_accuracy(self) -> float:
        """Share of answer bytes that were right."""
        return self.right_bytes / (self.prompts * tasks.ANSWER_LEN)

    @property
    def standard_error(self) -> float:
        """Binomial standard error of :attr:`accuracy`."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.prompts)


@dataclass(frozen=True)
class SampledResult:
    """What one setting answered. The prompts are those of ``exact``, in the same order."""

    num_samples: int
    sampler: str
    right: Tensor
    """bool [prompts]: every byte of the answer is right."""
    right_bytes: int
    rows_read: float
    """V rows read over V rows there were, in all decode steps, layers and KV heads."""
    kv_dtype: str = "model"
    """What decode attention read, one of KV_DTYPES."""
    exact: SampledResult | None = None
    """The same prompts with exact attention over the model's KV cache; ``None`` in that result itself."""

    @property
    def accuracy(self) -> float:
        """Share of prompts with every answer byte right."""
        return self.right.double().mean().item()

    @property
    def byte_accuracy(self) -> float:
        """Share of answer bytes that were right."""
        return self.right_bytes / (len(self.right) * tasks.ANSWER_LEN)

    @property
    def difference(self) -> float:
        """:attr:`accuracy` minus that of exact attention."""
        return self._differences().mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`difference` over prompts; 0 if no prompt's outcome differs."""
        differences = self._differences()
        return differences.std(correction=0).item() / math.sqrt(len(differences))

    def _differences(self) -> Tensor:
        return self.right.double() - (self.exact or self).right.double()


def load_model(
    folder: str | Path = HERE, *, device: str = "auto", attn: str = "sdpa", dtype: torch.dtype | None = None
) -> LlamaForCausalLM:
    """The checkpoint in ``folder``; bfloat16 on a GPU and float32 on a CPU unless told otherwise."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if attn == "santa":
        from santa.integrations.transformers import register

        register()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
    return model.to(device).eval()


def _batches(
    context_len: int,
    num_prompts: int,
    seed: int,
    text: np.ndarray | None,
    num_pairs: int,
    batch_size: int,
    depth: float | None,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    prompts, answers = tasks.retrieval_batch(
        context_len,
        num_prompts,
        seed,
        text=tasks.load_corpus().heldout if text is None else text,
        num_pairs=num_pairs,
        depth=depth,
    )
    for begin in range(0, num_prompts, batch_size):
        chosen = slice(begin, begin + batch_size)
        yield prompts[chosen].to(device), answers[chosen].to(device)


def _check_decoded(decoded_prompt_bytes: int, context_len: int) -> None:
    if not 1 <= decoded_prompt_bytes < context_len - tasks.ANSWER_LEN:
        raise ValueError("decoded_prompt_bytes must leave at least one byte of the prompt to prefill")


def _prefill(model: PreTrainedModel, tokens: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _decode_answers(model: PreTrainedModel, cache: Cache, forced: Tensor) -> Tensor:
    """Feeds forced [batch, at least 1] and then the model's own bytes, one per step: answers [batch, ANSWER_LEN]."""
    steps = list(forced.split(1, dim=1))
    produced: list[Tensor] = []
    for step in range(len(steps) + tasks.ANSWER_LEN - 1):
        token = steps[step] if step < len(steps) else produced[-1]
        logits = model(token, past_key_values=cache, use_cache=True).logits
        if step >= len(steps) - 1:
            produced.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(produced, dim=1)


def _count(outputs: list[Tensor], answers: list[Tensor]) -> RetrievalResult:
    right = torch.cat(outputs) == torch.cat(answers)
    return RetrievalResult(len(right), int(right.all(dim=1).sum()), int(right.sum()))


@torch.inference_mode()
def retrieval_accuracy(
    model: PreTrainedModel,
    context_len: int,
    num_prompts: int,
    seed: int = 0,
    *,
    text: np.ndarray | None = None,
    num_pairs: int = 24,
    batch_size: int = 16,
    depth: float | None = None,
    decoded_prompt_bytes: int = 1,
) -> RetrievalResult:
    """Answer ``num_prompts`` questions by greedy decoding.

    Args:
        model: a causal language model over bytes that takes and fills a ``DynamicCache``.
        context_len: bytes in a prompt with its answer.
        num_prompts, seed: prompt ``i`` depends on ``(seed, i)`` alone, so two models, or one model
            under two attention implementations, answer the same questions.
        text: the text around the key lines; default: the held-out standard-library sources.
        num_pairs: planted pairs per prompt, of which one is asked for.
        batch_size: prompts decoded together; all have the same length, so nothing is padded.
        depth: place of the asked pair, 0 (far back) to 1 (near); ``None``: uniformly random.
        decoded_prompt_bytes: how many of the prompt's last bytes go through decode steps, at least
            1. The first answer byte is predicted when the last prompt byte is read, so 1 puts the
            prediction of every answer byte, and of nothing else, into decode steps.
    """
    _check_decoded(decoded_prompt_bytes, context_len)
    outputs, expected = [], []
    for prompts, answers in _batches(context_len, num_prompts, seed, text, num_pairs, batch_size, depth, model.device):
        cache = _prefill(model, prompts[:, :-decoded_prompt_bytes])
        outputs.append(_decode_answers(model, cache, prompts[:, -decoded_prompt_bytes:]))
        expected.append(answers)
    return _count(outputs, expected)


@contextmanager
def _kv_dtype(kv_dtype: str) -> Iterator[None]:
    """Inside, `santa.decode` gets keys ("fp8-k") or keys and values ("fp8") in float8_e4m3fn, a scale per KV head.

    The model's own cache stays as it is, and is rounded anew in each step. The scale is that of all rows of the batch
    so far: in a cache that is kept in float8 it would stay that of the prefill.
    """
    if kv_dtype == "model":
        yield
        return
    import santa

    decode = santa.decode

    def decode_float8(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        k, options["k_scale"] = santa.quantize_kv(k, kv_layout=options["kv_layout"])
        if kv_dtype == "fp8":
            v, options["v_scale"] = santa.quantize_kv(v, kv_layout=options["kv_layout"])
        return decode(q, k, v, **options)

    with mock.patch.object(santa, "decode", decode_float8):
        yield


@torch.inference_mode()
def sampled_accuracy(
    model: PreTrainedModel,
    context_len: int,
    num_prompts: int,
    settings: Sequence[SantaConfig],
    seed: int = 0,
    *,
    text: np.ndarray | None = None,
    num_pairs: int = 24,
    batch_size: int = 16,
    depth: float | None = None,
    decoded_prompt_bytes: int = QUESTION_LEN,
    kv_dtype: str = "model",
    progress: bool = False,
) -> list[SampledResult]:
    """Answer the same questions with exact attention and with each of ``settings``.

    Arguments as in :func:`retrieval_accuracy`, and:

    Args:
        settings: how to sample. Their ``seed`` is replaced by one of ``seed`` and the batch, which no other
            batch and no other ``seed`` shares.
        decoded_prompt_bytes: default: the whole question line. It is harder than 1: the question is looked at by
            sampled attention too, and what that gets wrong stays in the KV cache the answer is decoded from.
        kv_dtype: one of KV_DTYPES: what decode attention reads. The prefill, whose attention is dense, and exact
            attention, which the others are compared with, read the model's own KV cache.
        progress: show a progress bar.

    Returns:
        The result of exact attention (``num_samples`` 0, through the same operator), then, unless ``kv_dtype`` is
        "model", that of exact attention over the rounded cache, then one per setting.
    """
    from santa import SantaConfig
    from santa.integrations.transformers import attach, record_rows_read

    _check_decoded(decoded_prompt_bytes, context_len)
    exact = SantaConfig(num_samples=0)
    runs = [(exact, "model"), *((setting, kv_dtype) for setting in settings)]
    if kv_dtype != "model":
        runs.insert(1, (exact, kv_dtype))
    right: list[list[Tensor]] = [[] for _ in runs]
    rows_read = [0.0] * len(runs)
    prefilled = context_len - tasks.ANSWER_LEN - decoded_prompt_bytes
    total = math.ceil(num_prompts / batch_size) * (1 + len(runs))
    with tqdm(total=total, desc=f"context {context_len}", unit="run", disable=not progress, leave=False) as bar:
        batches = _batches(context_len, num_prompts, seed, text, num_pairs, batch_size, depth, model.device)
        for index, (prompts, answers) in enumerate(batches):
            cache = _prefill(model, prompts[:, :prefilled])
            bar.update()
            # Layer i draws from stream seed + i.
            stream = (seed << 32) + index * model.config.num_hidden_layers
            for number, (setting, dtype) in enumerate(runs):
                attach(model, replace(setting, seed=stream))
                with _kv_dtype(dtype), record_rows_read(model) as record:
                    outputs = _decode_answers(model, cache, prompts[:, prefilled:])
                # The next setting decodes from the prefilled positions again. Negative: the number to remove.
                cache.crop(prefilled - cache.get_seq_length())
                right[number].append(outputs == answers)
                rows_read[number] += record.share() * len(prompts) / num_prompts
                bar.update()
    results: list[SampledResult] = []
    for (setting, dtype), batches_right, share in zip(runs, right, rows_read, strict=True):
        bytes_right = torch.cat(batches_right).cpu()
        results.append(
            SampledResult(
                setting.num_samples,
                setting.sampler.name.lower() if setting.num_samples else "exact",
                bytes_right.all(dim=1),
                int(bytes_right.sum()),
                share,
                dtype,
                results[0] if results else None,
            )
        )
    return results


@torch.inference_mode()
def prefill_accuracy(
    model: PreTrainedModel,
    context_len: int,
    num_prompts: int,
    seed: int = 0,
    *,
    text: np.ndarray | None = None,
    num_pairs: int = 24,
    batch_size: int = 16,
    depth: float | None = None,
) -> RetrievalResult:
    """The same questions, answered by one forward pass over prompt and answer.

    ``right`` is the count greedy decoding gives; ``right_bytes`` may be higher, because here a wrong
    byte is not fed back.
    """
    outputs, expected = [], []
    for prompts, answers in _batches(context_len, num_prompts, seed, text, num_pairs, batch_size, depth, model.device):
        tokens = torch.cat((prompts, answers), dim=1)[:, :-1]
        logits = model(tokens, use_cache=False, logits_to_keep=tasks.ANSWER_LEN).logits
        outputs.append(logits.argmax(-1))
        expected.append(answers)
    return _count(outputs, expected)


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel, context_len: int, *, text: np.ndarray | None = None, max_bytes: int = 1 << 20
) -> float:
    """Mean code length of ``text`` (default: held out) in windows of ``context_len`` bytes.

    Windows do not overlap and each starts without any context; its first byte is not counted.
    """
    data = tasks.load_corpus().heldout if text is None else text
    windows = min(len(data), max_bytes) // context_len
    if not windows:
        raise ValueError(f"fewer than {context_len} bytes of text")
    total = 0.0
    for row in np.array(data[: windows * context_len]).reshape(windows, context_len):
        tokens = torch.from_numpy(row.astype(np.int64)).to(model.device)
        logits = model(tokens[None, :-1], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
    return total / (windows * (context_len - 1)) / math.log(2)


def _measure_dense(model: PreTrainedModel, text: np.ndarray, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a line per context and returns it as the ``results`` of the JSON file."""
    records = []
    for context in args.context:
        start = time.perf_counter()
        options = dict(text=text, num_pairs=args.pairs, batch_size=args.batch, depth=args.depth)
        if args.prefill:
            result = prefill_accuracy(model, context, args.prompts, args.seed, **options)
        else:
            options["decoded_prompt_bytes"] = args.decoded_prompt_bytes
            result = retrieval_accuracy(model, context, args.prompts, args.seed, **options)
        line = (
            f"context {context:6d}: {result.right}/{result.prompts} answers right = {result.accuracy:.2%} "
            f"(standard error {result.standard_error:.2%}), {result.byte_accuracy:.2%} of answer bytes"
        )
        record = dict(context=context, right=result.right, accuracy=result.accuracy, byte_accuracy=result.byte_accuracy)
        if args.text_bytes >= context:
            record["bits_per_byte"] = bits_per_byte(model, context, text=text, max_bytes=args.text_bytes)
            line += f"; held-out text {record['bits_per_byte']:.3f} bits/byte"
        print(f"{line}; {time.perf_counter() - start:.1f} s", flush=True)
        records.append(record)
    return records


def _measure_sampled(model: PreTrainedModel, text: np.ndarray, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints one table and returns its rows as the ``results`` of the JSON file; differences are shares, not points."""
    from santa import SantaConfig

    settings = [
        SantaConfig(num_samples=num_samples, sampler=sampler, budget=args.budget, layers=args.layers, min_context=0)
        for sampler in args.samplers
        for num_samples in args.samples
    ]
    start = time.perf_counter()
    records, lines = [], []
    for context in args.context:
        results = sampled_accuracy(
            model,
            context,
            args.prompts,
            settings,
            args.seed,
            text=text,
            num_pairs=args.pairs,
            batch_size=args.batch,
            depth=args.depth,
            decoded_prompt_bytes=args.decoded_prompt_bytes,
            kv_dtype=args.kv_dtype,
            progress=True,
        )
        for result in results:
            records.append(
                dict(
                    context=context,
                    kv_dtype=result.kv_dtype,
                    sampler=result.sampler,
                    num_samples=result.num_samples,
                    right=int(result.right.sum()),
                    accuracy=result.accuracy,
                    byte_accuracy=result.byte_accuracy,
                    difference=result.difference,
                    standard_error=result.standard_error,
                    rows_read=result.rows_read,
                )
            )
            versus = f"{100 * result.difference:+.2f} ± {100 * result.standard_error:.2f}" if result.exact else ""
            right = f"{records[-1]['right']}/{args.prompts}"
            lines.append(
                f"| {context:7,d} | {result.kv_dtype:8s} | {result.sampler:11s} | {result.num_samples:5d} "
                f"| {right:>13s} | {versus:>19s} | {result.byte_accuracy:12.2%} | {result.rows_read:11.2%} |"
            )
    print("| context | KV cache | sampler     |     S | answers right ", end="")
    print("| minus exact, points | answer bytes | V rows read |")
    print("|--------:|----------|-------------|------:|--------------:", end="")
    print("|--------------------:|-------------:|------------:|")
    print("\n".join(lines))
    decoded = f"the last {args.decoded_prompt_bytes} bytes of each decoded"
    print(f"{args.prompts} prompts per context, {decoded}; {time.perf_counter() - start:.1f} s", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="folder of the checkpoint")
    parser.add_argument("--context", type=int, nargs="+", default=[8192], help="bytes of prompt and answer")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=24, help="planted pairs per prompt, the asked one included")
    parser.add_argument("--depth", type=float, help="place of the asked pair, 0 (far) to 1 (near); default: random")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts, and of the draws with --attn santa")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attn", default="sdpa", help="transformers' attn_implementation, or santa")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--corpus", type=Path, help="read Python sources here, not from this interpreter")
    parser.add_argument("--prefill", action="store_true", help="one forward pass, no decode steps; not for santa")
    parser.add_argument(
        "--decoded-prompt-bytes",
        type=int,
        help=f"last bytes of the prompt that are decoded, not prefilled; default: {QUESTION_LEN} (the whole question) "
        "with --attn santa, else 1",
    )
    parser.add_argument(
        "--text-bytes", type=int, default=1 << 19, help="held-out bytes to score; 0: none; not for santa"
    )
    parser.add_argument("--json", type=Path, help="write settings and results to this file")
    sampled = parser.add_argument_group("with --attn santa")
    sampled.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    sampled.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256], help="draws per query head, S")
    sampled.add_argument(
        "--budget", choices=("streaming", "proportional", "uniform"), help="default: that of santa.decode, by sampler"
    )
    sampled.add_argument("--layers", type=int, nargs="+", help="layers that sample, the others are exact; default: all")
    sampled.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="model",
        help="what decode attention reads: the model's KV cache, keys rounded to float8, or keys and values",
    )
    args = parser.parse_args()

    is_santa = args.attn == "santa"
    if is_santa and args.prefill:
        parser.error("--prefill runs no decode step, the only one that --attn santa samples")
    if is_santa and min(args.samples) < 1:
        parser.error("--samples takes numbers from 1 on; exact attention is always measured")
    if args.decoded_prompt_bytes is None:
        args.decoded_prompt_bytes = QUESTION_LEN if is_santa else 1
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = load_model(args.model, device=args.device, attn=args.attn, dtype=dtype)
    text = tasks.load_corpus(args.corpus).heldout
    name = str(model.dtype).removeprefix("torch.")
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    print(f"{device}, {name}, attention: {args.attn}, {args.pairs} pairs")
    records = (_measure_sampled if is_santa else _measure_dense)(model, text, args)
    if args.json:
        options = ["attn", "prompts", "pairs", "depth", "batch", "seed"]
        options += (
            ["samplers", "samples", "budget", "layers", "decoded_prompt_bytes", "kv_dtype"] if is_santa else ["prefill"]
        )
        head = dict(device=device, dtype=name, torch=torch.__version__, transformers=transformers.__version__)
        head |= {option: getattr(args, option) for option in options}
        args.json.write_text(json.dumps({**head, "results": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
