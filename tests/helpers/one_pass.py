"""Rows that are sampled in one pass, long enough to have several tiles and parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import santa
from helpers.inputs import make_qkv, repeat_rows, working_dtype
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z
from santa import reference

SAMPLERS = ["systematic", "grouped"]
BUDGETS = ["streaming", "uniform"]
# For one KV head, in parts of 256 keys:
KV_LEN = 4096 + 77  # 66 tiles of 64 keys, the last one ragged, in 17 parts; with Bernoulli scores 33 tiles
LONG_KV_LEN = 16384 + 141  # 130 tiles of 128 keys, the last one ragged, in 65 parts


def draws_of(q: Tensor, k: Tensor, v: Tensor, *, count: int, seed: int = 0, **options: Any) -> tuple[Tensor, ...]:
    """`count` independent estimates of the one row given: [count, num_qo_heads, head_dim]."""
    row_seeds = torch.arange(count, dtype=torch.int64, device=q.device)
    options = {"min_sampled_len": 0} | options
    return santa.decode(*(repeat_rows(x, count) for x in (q, k, v)), row_seeds=row_seeds, seed=seed, **options)


class Problem:
    """One row of one KV head, and what float64 says of it."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.qkv = q, k, v
        p, values, lse = reference.probabilities(q[0].cpu(), k[0].cpu(), v[0].cpu())
        self.p, self.values, self.lse = p[0], values[0], lse[0]
        self.expected = self.p @ self.values


def gaussian(device: str, *, group: int = 4, kv_len: int = KV_LEN, logit_std: float = 1.5, seed: int = 1) -> Problem:
    return Problem(
        *make_qkv(1, group, 1, kv_len, 64, dtype=working_dtype(device), device=device, logit_std=logit_std, seed=seed)
    )


def with_peak(device: str, position: int, share: float = 0.5, **options: Any) -> Problem:
    """A row whose key at `position` takes about `share` of the mass of every head: the queries have a common part, and
    the key is along it."""
    q, k, v = gaussian(device, **options).qkv
    common = torch.zeros(64, dtype=torch.float64)
    common[0] = 8.0
    q, k = q.double().cpu(), k.double().cpu()
    q[..., 0], k[..., 0] = common[0], 0.0
    others = torch.logsumexp(torch.einsum("hd,nd->hn", q[0], k[0, :, 0]) / 8.0, dim=-1).mean()
    k[0, position] = 0.0
    k[0, position, 0, 0] = float(others) + torch.logit(torch.tensor(share)).item()  # score: 8 x / sqrt(64)
    dtype = working_dtype(device)
    return Problem(q.to(device, dtype), k.to(device, dtype), v)


def assert_unbiased(draws: Tensor, expected: Tensor) -> None:
    """The mean of draws [N, ...] is `expected`, by z-tests (false-alarm rate below 2e-6 for 256 elements); to rounding
    where nothing is left to chance."""
    if float(draws.double().std(dim=0).max()) < 1e-5:
        torch.testing.assert_close(draws[0].double().cpu(), expected, rtol=2e-3, atol=2e-3)
        return
    projected, largest = mean_z(draws, expected, rounding=torch.finfo(draws.dtype).eps / 2)
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST, (projected, largest)


def assert_mean(samples: Tensor, expected: float, slack: float = 0.0) -> None:
    """The mean of samples [N] is `expected`: 6 standard errors, a false-alarm rate of 2e-9."""
    samples = samples.double().cpu()
    error = float(samples.std() / len(samples) ** 0.5)
    assert abs(float(samples.mean()) - expected) <= 6 * error + slack, (float(samples.mean()), expected, error)
