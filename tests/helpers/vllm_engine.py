"""vLLM engines over tiny random models, and comparisons of what they generate.

Import it where vLLM is known to be there.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from helpers.models import VOCAB, make_model

MAX_LEN = 1024
# Where the best token leads by less, rounding may choose the other: logits of order 10 have 7 bits behind the
# point in float16.
NEAR_TIE = 0.05


def save_model(folder: Path, family: str = "llama", **changes: Any) -> str:
    """A tiny random model that vLLM can load, without a tokenizer. Returns its path."""
    shape: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "max_position_embeddings": MAX_LEN}
    make_model(family, **shape | changes).half().save_pretrained(folder)
    return str(folder)


def make_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@contextlib.contextmanager
def engine(model: str, *, santa: dict[str, Any] | None = None, graphs: bool = False, **options: Any) -> Iterator[LLM]:
    """A small engine, shut down afterwards: santa's with the settings `santa`, else FlashAttention's.

    Steps of at most 256 tokens cut prompts and mix them with decode steps. Without `graphs` it is eager; with them
    decode steps are full CUDA graphs, and nothing is compiled, which would take most of a test's time.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    defaults: dict[str, Any] = dict(
        attention_backend="FLASH_ATTN" if santa is None else "CUSTOM",
        additional_config={} if santa is None else {"santa": santa},
        skip_tokenizer_init=True,
        dtype="float16",
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        block_size=16,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=not graphs,
    )
    if graphs:
        defaults["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        }
    llm = None
    try:
        llm = LLM(model, **defaults | options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        # The process has one memory pool for graphs, which ended with this engine's.
        type(current_platform)._global_graph_pool = None
        cleanup_dist_env_and_memory()


def generate(
    llm: LLM, prompts: Sequence[list[int]], new_tokens: Sequence[int] | int = 16, seeds: Sequence[int] | None = None
) -> list[Any]:
    """Greedy outputs in order, each with `token_ids`, `logprobs` of the two best tokens, and `num_cached_tokens`."""
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    parameters = [
        SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            logprobs=2,
            detokenize=False,
            seed=None if seeds is None else seeds[i],
        )
        for i, count in enumerate(counts)
    ]
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    for result in results:
        result.outputs[0].num_cached_tokens = result.num_cached_tokens
    return [result.outputs[0] for result in results]


def best_logprobs(output: Any) -> list[float]:
    """Of each generated token."""
    return [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]


def lead(step: dict[int, Any]) -> float:
    """By how much the best token of a step leads."""
    first, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
    return first - second


def check_same_tokens(
    ours: Sequence[Any], dense: Sequence[Any], *, least_share: float = 0.8, near_tie: float = NEAR_TIE
) -> None:
    """Tokens are equal, or part at a step where the dense engine all but tied; most have to be compared before that."""
    compared = total = 0
    for row, (a, b) in enumerate(zip(ours, dense, strict=True)):
        assert len(a.token_ids) == len(b.token_ids)
        total += len(b.token_ids)
        for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
            if x != y:
                gap = lead(b.logprobs[i])
                assert gap < near_tie, f"row {row}, token {i}: {x}, dense {y}, which leads by {gap:.3f}"
                break
            compared += 1
    assert compared >= least_share * total, f"{compared} of {total} tokens were compared"


def metric(llm: LLM, name: str) -> float:
    """The sum of a counter of the engine, which needs disable_log_stats=False."""
    return sum(entry.value for entry in llm.get_metrics() if entry.name == f"vllm:{name}")
