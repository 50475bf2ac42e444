"""Queries, keys and values for the prefill benchmark: with planted structure, or captured from the bundled model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 128
MODEL = Path(__file__).resolve().parent.parent / "models" / "byte-llama"
# Shares of a late row's mass: planted columns, planted slashes; the rest is spread over all keys.
COLUMN_MASS, SLASH_MASS = 0.50, 0.47
MAX_SLASHES = 4  # more would drown in the noise of their codes


@dataclass(frozen=True)
class Planted:
    """q [1, num_qo_heads, length, head_dim], k and v [1, num_kv_heads, length, head_dim], and what is in them."""

    q: Tensor
    k: Tensor
    v: Tensor
    columns: list[list[int]]  # per query head: key blocks
    slashes: list[list[int]]  # per query head: distances from the diagonal, in blocks


def planted(
    length: int,
    structures: float,
    *,
    num_qo_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> Planted:
    """Heads of which each has a few columns and slashes of its own: `structures` of them on average, the first head 0.4
    and the last 1.6 times as many.

    A query head has one dimension of the keys for itself, which its columns have a value in. Slashes come from a random
    code of +-1 for each block: keys have that of their own block, queries the sum of those of the blocks that lie
    their slashes' distances back. The other dimensions are Gaussian, logits of standard deviation 1.
    """
    group_size, nk = num_qo_heads // num_kv_heads, -(-length // BLOCK)
    code_dims = head_dim * 3 // 4
    noise_dims = head_dim - code_dims - group_size
    if noise_dims < 1:
        raise ValueError(f"group size is {group_size}; it needs to be below {head_dim - code_dims} for {head_dim=}")
    host = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device=device).manual_seed(seed)

    def randn(heads: int, dims: int) -> Tensor:
        return torch.randn(1, heads, length, dims, dtype=dtype, device=device, generator=generator)

    def tokens(x: Tensor) -> Tensor:
        """By block -> by token, along the first dimension."""
        return x.repeat_interleave(BLOCK, dim=0)[:length]

    q, k = randn(num_qo_heads, head_dim), randn(num_kv_heads, head_dim)
    v = randn(num_kv_heads, head_dim)
    k[..., : code_dims + group_size] = 0
    q[..., : code_dims + group_size] = 0
    # Scores are divided by sqrt(head_dim).
    q[..., code_dims + group_size :] *= math.sqrt(head_dim / noise_dims)
    columns, slashes = [], []
    for h in range(num_qo_heads):
        kv_head, place = divmod(h, group_size)
        if place == 0:
            codes = torch.randint(0, 2, (nk, code_dims), generator=host).to(device, torch.float32) * 2 - 1
            k[0, kv_head, :, :code_dims] = tokens(codes.to(dtype))
        count = max(2, round(structures * (0.4 + 1.2 * h / max(num_qo_heads - 1, 1))))
        num_slashes = min(count // 2, MAX_SLASHES, nk)
        num_columns = min(count - num_slashes, nk)
        # The sink and the diagonal are among them.
        columns.append([0, *(1 + torch.randperm(nk - 1, generator=host)[: num_columns - 1]).tolist()])
        slashes.append([0, *(1 + torch.randperm(nk - 1, generator=host)[: num_slashes - 1]).tolist()])
        column_logit, slash_logit = _logits(length, num_columns, num_slashes, code_dims)

        is_column = torch.zeros(nk, device=device, dtype=dtype)
        is_column[torch.tensor(columns[-1], device=device)] = 1
        k[0, kv_head, :, code_dims + place] = tokens(is_column)
        q[0, h, :, code_dims + place] = column_logit * math.sqrt(head_dim)
        behind = torch.zeros(nk, code_dims, device=device)
        for distance in slashes[-1]:
            behind[distance:] += codes[: nk - distance]
        q[0, h, :, :code_dims] = tokens((behind * (slash_logit / code_dims * math.sqrt(head_dim))).to(dtype))
    return Planted(q, k, v, columns, slashes)


def _logits(length: int, num_columns: int, num_slashes: int, code_dims: int) -> tuple[float, float]:
    """Logits at which columns and slashes hold their shares of the last row's mass."""
    spread_mass = 1 - COLUMN_MASS - SLASH_MASS
    slash_logit = 0.0
    for _ in range(8):  # the noise of the codes is part of what is spread, and grows with the logit
        variance = 1 + slash_logit**2 * num_slashes / code_dims
        spread = math.log(length) + variance / 2
        slash_logit = spread + math.log(SLASH_MASS / spread_mass / (BLOCK * num_slashes))
    return spread + math.log(COLUMN_MASS / spread_mass / (BLOCK * num_columns)), slash_logit


def planted_at(
    length: int, density: float, density_of: Callable[[Planted], float], *, steps: int = 7, **options: object
) -> Planted:
    """Planted structure of which the selection keeps at most, and nearly, `density` of the causal blocks.

    density_of measures it. Bisection over the number of structures; if the fewest keep more, these.
    """
    few, many = 2.0, max(16.0, 1.5 * density * length / BLOCK)
    best = planted(length, few, **options)
    if density_of(best) > density:
        return best
    for _ in range(steps):
        middle = math.sqrt(few * many)
        tried = planted(length, middle, **options)
        if density_of(tried) <= density:
            few, best = middle, tried
        else:
            many = middle
    return best


def captured(length: int, *, layers: int = 4, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Planted:
    """q, k, v of the bundled model's first layers, side by side as heads, while it reads a retrieval prompt.

    It has positions for 16,384 bytes. Longer ones are tiled: the tokens of that prompt, again and again.
    """
    from transformers import AttentionInterface, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sys.path.insert(0, str(MODEL))
    import tasks

    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def capture(module: object, query: Tensor, key: Tensor, value: Tensor, *rest: object, **options: object) -> object:
        found.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    AttentionInterface.register("santa_bench_capture", capture)
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=dtype).to(device).eval()
    model.set_attn_implementation("santa_bench_capture")
    context = min(length, model.config.max_position_embeddings)
    prompts, answers = tasks.retrieval_batch(context, 1, 0, text=tasks.load_corpus().heldout, num_pairs=8)
    with torch.inference_mode():
        model(torch.cat([prompts, answers], dim=1).to(device), use_cache=False, logits_to_keep=1)
    tensors = [torch.cat(parts, dim=1) for parts in zip(*found[:layers], strict=True)]
    q, k, v = (x.repeat(1, 1, -(-length // context), 1)[:, :, :length].clone() for x in tensors)
    return Planted(q, k, v, [], [])
