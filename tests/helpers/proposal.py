"""Rows with proposal keys, good and bad, through the operator and through their oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import santa
from helpers.inputs import make_qkv, repeat_rows, working_dtype
from santa import ProposalKeys
from santa import reference_proposal as oracle

# 17 tiles of 64 keys, the last one ragged, in 5 parts of 256.
KV_LEN = 1024 + 13
CODES = ["good", "random", "constant", "scale 0"]


def spoiled(proposal: ProposalKeys, codes: str, seed: int = 3) -> ProposalKeys:
    """The same with codes that say nothing of the keys."""
    if codes == "random":
        noise = torch.randint(0, 256, proposal.codes.shape, generator=torch.Generator().manual_seed(seed))
        return replace(proposal, codes=noise.to(proposal.codes))
    if codes == "constant":
        return replace(proposal, codes=torch.full_like(proposal.codes, 0x5B))
    if codes == "scale 0":
        return replace(proposal, scales=torch.zeros_like(proposal.scales))
    assert codes == "good"
    return proposal


def repeated(proposal: ProposalKeys, count: int) -> ProposalKeys:
    """That of one row for `count` of them, without a copy."""
    return replace(proposal, codes=repeat_rows(proposal.codes, count), scales=repeat_rows(proposal.scales, count))


def selected(proposal: ProposalKeys, rows: list[int] | slice) -> ProposalKeys:
    return replace(proposal, **{name: x[rows] for name, x in proposal.tensors().items()})


def rows_of(q: Tensor, k: Tensor, v: Tensor, proposal: ProposalKeys, b: int = 0, **span: int) -> list[oracle.Row]:
    """The oracle's view of batch row b, NHD."""
    tensors = {name: x[0 if x.shape[0] == 1 else b] for name, x in proposal.tensors().items()}
    return oracle.rows_of(q[b], k[b], v[b], tensors, **span)


@dataclass
class Problem:
    """One row of one KV head, and what float64 says of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    proposal: ProposalKeys

    @property
    def row(self) -> oracle.Row:
        return rows_of(self.q, self.k, self.v, self.proposal)[0]

    @property
    def lse(self) -> Tensor:
        return torch.logsumexp(self.row.exact, dim=-1)

    @property
    def expected(self) -> Tensor:
        return torch.softmax(self.row.exact, dim=-1) @ self.row.values

    def draws(self, count: int, **options: Any) -> tuple[Tensor, ...]:
        """`count` independent estimates: out [count, group, D], lse [count, group], ..."""
        options = {"min_sampled_len": 0, "row_seeds": torch.arange(count, device=self.q.device)} | options
        tensors = (repeat_rows(x, count) for x in (self.q, self.k, self.v))
        return santa.decode(*tensors, proposal=repeated(self.proposal, count), **options)

    def sums(self, count: int, **options: Any) -> tuple[Tensor, Tensor]:
        """N [count, group, D] and Z [count, group] of as many draws, in units of the exact row's sum, float64."""
        out, lse = self.draws(count, **options)
        z = torch.exp(lse.double().cpu() - self.lse)
        return out.double().cpu() * z[..., None], z


def problem(
    device: str, codes: str = "good", *, group: int = 4, kv_len: int = KV_LEN, logit_std: float = 1.5, seed: int = 1
) -> Problem:
    q, k, v = make_qkv(
        1, group, 1, kv_len, 64, dtype=working_dtype(device), device=device, logit_std=logit_std, seed=seed
    )
    return Problem(q, k, v, spoiled(santa.make_proposal_keys(k), codes))


def all_rows(kv_len: int) -> int:
    """num_samples with which the floor alone draws every key of a row."""
    return math.ceil(16 * kv_len)
