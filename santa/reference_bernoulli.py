"""The oracle of Bernoulli scores: draws, logits and attention in NumPy and float64, written from the equations.

Nothing here shares code with the kernels. Of the random numbers nothing is left open: `ternary_counts` gives the counts
of both backends to the bit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SCORE_SAMPLERS = ("independent", "systematic", "shared")
_MASK = np.uint64(0xFFFFFFFF)
_ONE = 1 << 32  # probability 1


def philox(counter: list[np.ndarray | int], key: tuple[np.ndarray | int, np.ndarray | int]) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al., SC 2011) over arrays: four counter words and two key words that broadcast."""
    words = [np.asarray(word, dtype=np.uint64) for word in counter]
    key_0, key_1 = (np.asarray(word, dtype=np.uint64) for word in key)
    shift = np.uint64(32)
    for _ in range(10):
        product_0, product_1 = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (product_1 >> shift) ^ words[1] ^ key_0,
            product_1 & _MASK,
            (product_0 >> shift) ^ words[3] ^ key_1,
            product_0 & _MASK,
        ]
        key_0, key_1 = (key_0 + np.uint64(0x9E3779B9)) & _MASK, (key_1 + np.uint64(0xBB67AE85)) & _MASK
    return words


def _stream(seed: int, row_seed: int, position: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """The Philox key of a head's scores. The top bit of the head word keeps it apart from the value draws."""
    identity = [row_seed & 0xFFFFFFFF, row_seed >> 32 & 0xFFFFFFFF, position & 0xFFFFFFFF, head | 0x80000000]
    words = philox(identity, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return words[0], words[1]


def draw_weights(q: Tensor) -> Tensor:
    """round(2^32 |q_i| / max|q|) over the last dimension, int64; 0 for a head that is zero or not finite."""
    magnitude = q.double().abs()
    largest = magnitude.amax(dim=-1, keepdim=True)  # NaN if any element is
    usable = torch.isfinite(largest) & (largest > 0)
    share = torch.where(usable, magnitude / largest, 0.0)
    return (share * _ONE + 0.5).floor().to(torch.int64)


def score_scale(q: Tensor, num_draws: int) -> Tensor:
    """max|q| / B, float64, q's shape without its last dimension: what <counts, k> is to be multiplied with. 0 for a
    head that is zero, NaN for one that is not finite."""
    scale = q.double().abs().amax(dim=-1) / num_draws
    return torch.where(torch.isfinite(scale), scale, math.nan)


def ternary_counts(
    q: Tensor,
    *,
    num_kv_heads: int,
    num_draws: int,
    score_sampler: int | str = "independent",
    seed: int = 0,
    row_seeds: Tensor | None = None,
    kv_lens: Tensor,
) -> Tensor:
    """Sum of the B ternary vectors of each query head: int32 [batch, num_qo_heads, head_dim], in [-B, B].

    Args:
        q: [batch, num_qo_heads, head_dim], any floating dtype.
        num_draws: B. score_sampler: one of SCORE_SAMPLERS or its index.
        row_seeds: int64 [batch]; None: 0. kv_lens: integers [batch], which are the positions of the random streams.
    """
    name = SCORE_SAMPLERS[score_sampler] if isinstance(score_sampler, int) else score_sampler
    if name not in SCORE_SAMPLERS:
        raise ValueError(f"score_sampler is {score_sampler!r}; it needs to be one of {SCORE_SAMPLERS}")
    batch, num_qo_heads, head_dim = q.shape
    weights = draw_weights(q).cpu().numpy().astype(np.uint64)
    sign = np.where(q.cpu().double().numpy() < 0, -1, 1)
    counts = np.zeros(weights.shape, dtype=np.int64)
    draws = np.arange(num_draws, dtype=np.uint64)[:, None]
    chunks = np.arange(-(-head_dim // 4), dtype=np.uint64)[None, :]
    for b in range(batch):
        row_seed = 0 if row_seeds is None else int(row_seeds[b])
        for h in range(num_qo_heads):
            head = h // (num_qo_heads // num_kv_heads) if name == "shared" else h
            key = _stream(seed, row_seed, int(kv_lens[b]), head)
            if name == "systematic":
                u = philox([0, 0, 0, 0], key)[0]
                ends = np.cumsum(weights[b, h])
                above = (np.concatenate([[np.uint64(0)], ends]) * np.uint64(num_draws) + u) >> np.uint64(32)
                counts[b, h] = np.diff(above.astype(np.int64))
            else:
                words = np.stack(np.broadcast_arrays(*philox([draws, chunks, 0, 0], key)), axis=-1)
                uniform = words.reshape(num_draws, -1)[:, :head_dim]
                counts[b, h] = (uniform < weights[b, h]).sum(axis=0)
    return torch.from_numpy(counts * sign).to(torch.int32)


def features_read(counts: Tensor, num_kv_heads: int) -> Tensor:
    """Features that any head of the group reads: int32 [batch, num_kv_heads], of counts [batch, num_qo_heads, D]."""
    return (counts.unflatten(1, (num_kv_heads, -1)) != 0).any(dim=2).sum(dim=-1).to(torch.int32)


def logits(
    q: Tensor,
    k_features: Tensor,
    counts: Tensor,
    num_draws: int,
    *,
    kv_start: int = 0,
    kv_len: int | None = None,
    sm_scale: float | None = None,
) -> Tensor:
    """Noisy logits of one batch row: sm_scale max|q| / B <counts, k>, float64 [num_qo_heads, kv_len].

    Args:
        q, counts: [num_qo_heads, head_dim]. k_features: [num_kv_heads, head_dim, max_kv_len].

    A feature with a count of 0 is not read, whatever it holds.
    """
    stop = k_features.shape[-1] if kv_len is None else kv_start + kv_len
    keys = k_features[..., kv_start:stop].double().cpu()
    grouped = counts.double().cpu().unflatten(0, (keys.shape[0], -1))
    terms = torch.where(grouped[..., None] != 0, grouped[..., None] * keys[:, None], 0.0)
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    return terms.sum(dim=2).flatten(0, 1) * (score_scale(q.cpu(), num_draws) * scale)[:, None]


def decode(
    q: Tensor,
    k_features: Tensor,
    v: Tensor,
    counts: Tensor,
    num_draws: int,
    *,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_layout: str = "NHD",
    sm_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the noisy logits: out [batch, num_qo_heads, head_dim] and lse [batch, num_qo_heads],
    float64. What the samplers of the value stage estimate. Shapes as in `santa.decode`, counts as `ternary_counts` has
    them."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        start = 0 if kv_starts is None else int(kv_starts[b])
        length = k_features.shape[-1] - start if kv_lens is None else int(kv_lens[b])
        scores = logits(q[b], k_features[b], counts[b], num_draws, kv_start=start, kv_len=length, sm_scale=sm_scale)
        values = (v[b].transpose(0, 1) if kv_layout == "NHD" else v[b])[:, start : start + length].double().cpu()
        lse = torch.logsumexp(scores, dim=-1)
        p = torch.exp(scores - lse[:, None]).unflatten(0, (values.shape[0], -1))
        outs.append(torch.einsum("gmn,gnd->gmd", p, values).flatten(0, 1))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)
