"""Bernoulli scores through the operator and through their oracle."""

from __future__ import annotations

import torch

import santa
from santa import reference_bernoulli as oracle

SCORE_SAMPLERS = list(oracle.SCORE_SAMPLERS)
NAN = float("nan")


def feature_major(k):
    """[batch, kv_len, heads, head_dim] to [batch, heads, head_dim, kv_len]."""
    return k.permute(0, 2, 3, 1).contiguous()


def draw(q, num_kv_heads, num_draws, score_sampler, *, seed=0, row_seeds=None, kv_lens=None):
    """The operator's counts [batch, num_qo_heads, head_dim], on the CPU."""
    batch = q.shape[0]
    row_seeds = torch.zeros(batch, dtype=torch.int64) if row_seeds is None else row_seeds
    kv_lens = torch.full((batch,), 100, dtype=torch.int32) if kv_lens is None else kv_lens
    return torch.ops.santa._ternary_counts(
        q,
        kv_lens.to(q.device, torch.int32),
        row_seeds.to(q.device),
        num_kv_heads,
        num_draws,
        SCORE_SAMPLERS.index(score_sampler),
        seed,
    ).cpu()


def oracle_of(q, k, v, num_draws, score_sampler, *, seed=0, row_seeds=None, kv_lens=None, **options):
    """(out, lse, counts) of the oracle, with exact values; k is feature-major."""
    starts = options.get("kv_starts")
    lens = kv_lens
    if lens is None:
        lens = torch.full((q.shape[0],), k.shape[3]) - (0 if starts is None else starts.cpu())
    counts = oracle.ternary_counts(
        q,
        num_kv_heads=k.shape[1],
        num_draws=num_draws,
        score_sampler=score_sampler,
        seed=seed,
        row_seeds=row_seeds,
        kv_lens=lens,
    )
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = oracle.decode(q.cpu(), k.cpu(), v.cpu(), counts, num_draws, kv_lens=lens.cpu(), **on_cpu)
    return out, lse, counts


def bernoulli(q, k, v, **options):
    options = {"num_draws": 2, "num_samples": 0, "min_sampled_len": 0} | options
    return santa.decode(q, k, v, score="bernoulli", **options)


def tolerance(dtype):
    """Relative error of an exact value stage: rounding of the output, and of its weights where V is 16 bits."""
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
