"""Measure the byte-llama model: retrieval accuracy at chosen context lengths, and bits per byte.

    python models/byte-llama/evaluate.py --context 2048 8192 --prompts 200

Each prompt is prefilled into the KV cache except for its last byte; from there on the model decodes
greedily, one byte per step, its own output fed back. So every answer byte comes out of a decode step
(query length 1), the step whose attention ``--attn`` can replace. A prompt counts as right when the
whole answer is. Greedy decoding is right exactly if every answer byte is the most likely one after
the right bytes before it, so one forward pass over prompt and answer gives the same number in exact
arithmetic; ``--prefill`` measures it that way.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tasks
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent


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


def load_model(
    folder: str | Path = HERE, *, device: str = "auto", attn: str = "sdpa", dtype: torch.dtype | None = None
) -> LlamaForCausalLM:
    """The checkpoint in ``folder``; bfloat16 on a GPU and float32 on a CPU unless told otherwise."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
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
    if not 1 <= decoded_prompt_bytes < context_len - tasks.ANSWER_LEN:
        raise ValueError("decoded_prompt_bytes must leave at least one byte of the prompt to prefill")
    outputs, expected = [], []
    for prompts, answers in _batches(context_len, num_prompts, seed, text, num_pairs, batch_size, depth, model.device):
        cache = DynamicCache(config=model.config)
        model(prompts[:, :-decoded_prompt_bytes], past_key_values=cache, use_cache=True, logits_to_keep=1)
        forced = list(prompts[:, -decoded_prompt_bytes:].split(1, dim=1))
        produced: list[Tensor] = []
        while len(produced) < tasks.ANSWER_LEN:
            token = forced.pop(0) if forced else produced[-1]
            logits = model(token, past_key_values=cache, use_cache=True).logits
            if not forced:
                produced.append(logits[:, -1].argmax(-1, keepdim=True))
        outputs.append(torch.cat(produced, dim=1))
        expected.append(answers)
    return _count(outputs, expected)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="folder of the checkpoint")
    parser.add_argument("--context", type=int, nargs="+", default=[8192], help="bytes of prompt and answer")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=24, help="planted pairs per prompt, the asked one included")
    parser.add_argument("--depth", type=float, help="place of the asked pair, 0 (far) to 1 (near); default: random")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attn", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--corpus", type=Path, help="read Python sources here, not from this interpreter")
    parser.add_argument("--prefill", action="store_true", help="one forward pass instead of decode steps")
    parser.add_argument("--text-bytes", type=int, default=1 << 19, help="held-out bytes to score; 0: none")
    args = parser.parse_args()

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = load_model(args.model, device=args.device, attn=args.attn, dtype=dtype)
    text = tasks.load_corpus(args.corpus).heldout
    name = str(model.dtype).removeprefix("torch.")
    print(f"{model.device}, {name}, attention: {args.attn}, {args.pairs} pairs")
    measure = prefill_accuracy if args.prefill else retrieval_accuracy
    for context in args.context:
        start = time.perf_counter()
        result = measure(
            model,
            context,
            args.prompts,
            args.seed,
            text=text,
            num_pairs=args.pairs,
            batch_size=args.batch,
            depth=args.depth,
        )
        line = (
            f"context {context:6d}: {result.right}/{result.prompts} answers right = {result.accuracy:.2%} "
            f"(standard error {result.standard_error:.2%}), {result.byte_accuracy:.2%} of answer bytes"
        )
        if args.text_bytes >= context:
            bits = bits_per_byte(model, context, text=text, max_bytes=args.text_bytes)
            line += f"; held-out text {bits:.3f} bits/byte"
        print(f"{line}; {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
