"""What holds for every selection of key blocks.

An operator in float32 and the oracle in float64 may differ where a mass lies within rounding of a threshold or of
another mass. `Oracle` bounds the error of every mass and gives the blocks that have to be kept and those that may be;
what the operator keeps has to lie between the two, and its statistics have to be those of what it keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import santa
from santa import reference_prefill as reference
from santa.reference_prefill import BLOCK, num_blocks

DENSITY, MEAN, MINIMUM, PERCENTILE, COLUMNS, SLASHES = range(6)


def make_qk(
    q_len: int,
    past_blocks: int = 0,
    *,
    batch: int = 1,
    num_qo_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention with columns, a window and far slashes over Gaussian noise, of different weight and sharpness in every
    head."""
    generator = torch.Generator().manual_seed(seed)
    kv_len = q_len + past_blocks * BLOCK
    codes = torch.randn(num_blocks(kv_len) + 8, head_dim, generator=generator) / math.sqrt(head_dim)
    block = torch.arange(kv_len) // BLOCK
    anchors = (torch.rand(num_kv_heads, num_blocks(kv_len), generator=generator) < 0.15).float()
    q = torch.randn(batch, num_qo_heads, q_len, head_dim, generator=generator)
    k = torch.randn(batch, num_kv_heads, kv_len, head_dim, generator=generator)
    weight = torch.rand(3, num_qo_heads, 1, 1, generator=generator) * 8
    ends = block[kv_len - q_len :]
    q += weight[0] * codes[ends] * 6 + weight[1] * codes[ends + 3] * 6
    q[..., 0] += weight[2, ..., 0] * 2
    q *= 0.05 + 0.35 * torch.rand(num_qo_heads, 1, 1, generator=generator)
    k += codes[block + 3] * 3 + codes[block] * 3
    k[..., 0] += anchors[:, block] * 4
    return q.to(device, dtype), k.to(device, dtype)


def keep_of(kv_cnt: Tensor, kv_idx: Tensor) -> Tensor:
    """bool [batch, num_qo_heads, nq, nk] of the lists, which have to be well formed."""
    kv_cnt, kv_idx = kv_cnt.cpu().long(), kv_idx.cpu().long()
    nq, nk = kv_idx.shape[2:]
    listed = torch.arange(nk) < kv_cnt.unsqueeze(-1)
    assert ((kv_cnt >= 1) & (kv_cnt <= torch.arange(nq) + nk - nq + 1)).all()
    assert (kv_idx[~listed] == 0).all()
    ascending = kv_idx.diff(dim=-1) > 0
    assert (ascending | ~listed[..., 1:]).all()
    last = kv_idx.gather(-1, (kv_cnt - 1).unsqueeze(-1)).squeeze(-1)
    assert (last == torch.arange(nq) + nk - nq).all(), "the diagonal block is the last one, and there is none after it"
    return torch.zeros(kv_idx.shape, dtype=torch.bool).scatter_(-1, kv_idx.where(listed, last.unsqueeze(-1)), True)


class Oracle:
    """Masses in float64, and how far the operator's may be from them."""

    def __init__(self, q: Tensor, k: Tensor, num_chunks: int = 0):
        self.nq, self.nk = num_blocks(q.shape[2]), num_blocks(k.shape[2])
        self.group_size = q.shape[1] // k.shape[1]
        self.sampled = reference.sampled_blocks(self.nq, num_chunks)
        self.masses, self.valid = reference.block_masses(q, k, self.sampled)
        # A float32 dot product of D terms, summed in any order, is within (D + 2) u of sum |q_i k_i|, u = 2^-23 with
        # room for matrix units that truncate. A share of a softmax moves by at most twice that in its logarithm;
        # exponentials add 2^-20 in all.
        norms = q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() / math.sqrt(q.shape[-1])
        self.error = math.expm1(2 * (q.shape[-1] + 2) * 2.0**-23 * float(norms)) + 2.0**-20

    def stats(self, keep: Tensor) -> Tensor:
        """Density and retained mass of a mask: [batch, num_qo_heads, 4]."""
        retained = reference.retained_mass(self.masses, keep, self.sampled)[:, :, self.valid].sort(dim=-1).values
        causal = self.nq * (self.nk - self.nq + 1) + self.nq * (self.nq - 1) // 2
        return torch.stack(
            [
                keep.sum(dim=(-2, -1)) / causal,
                retained.mean(dim=-1),
                retained[..., 0],
                retained[..., (retained.shape[-1] - 1) // 20],
            ],
            dim=-1,
        )

    def cover(self, x: Tensor, alpha: float, forced: int) -> tuple[Tensor, Tensor]:
        """Entries of x [nk] that have to be selected, and those that may be."""
        always = torch.arange(len(x)) < forced
        if alpha <= 0 or alpha >= 1:
            return always | (alpha >= 1), always | (alpha >= 1)
        x = x / x.sum()
        low, high = x * (1 - self.error), x * (1 + self.error) + 2.0**-39
        others = ~torch.eye(len(x), dtype=torch.bool)
        before_at_most = (others & (high >= low[:, None])).double() @ high
        before_at_least = (others & (low > high[:, None])).double() @ low
        return always | (before_at_most < alpha * (1 - self.error)), always | (
            before_at_least < alpha * (1 + self.error)
        )

    def bounds(self, options: dict) -> tuple[Tensor, Tensor]:
        """The masks between which the paper's rule has to be."""
        offset = self.nk - self.nq
        must, may = [], []
        for by_block in self.masses.sum(dim=3).flatten(0, 1):
            slash_scores = sum(reference._shifted(w, a + offset) for w, a in zip(by_block, self.sampled, strict=True))
            columns = self.cover(by_block.sum(dim=0), options["alpha_c"], options["sink_blocks"])
            slashes = self.cover(slash_scores, options["alpha_s"], options["window_blocks"])
            must.append(reference.expand(columns[0], slashes[0], self.nq))
            may.append(reference.expand(columns[1], slashes[1], self.nq))
        masks = (torch.stack(x).unflatten(0, self.masses.shape[:2]) for x in (must, may))
        if options.get("gqa") == "union":
            masks = (
                x.unflatten(1, (-1, self.group_size)).any(dim=2).repeat_interleave(self.group_size, dim=1)
                for x in masks
            )
        return tuple(masks)


DEFAULTS = {"alpha_c": 0.95, "alpha_s": 0.95, "num_chunks": 0, "sink_blocks": 1, "window_blocks": 2}


def check_laws(q: Tensor, k: Tensor, select=santa.sample_select, **options) -> Tensor:
    """What holds for every selection; returns its mask."""
    options = {**DEFAULTS, **options}
    oracle = Oracle(q, k, options["num_chunks"])
    kv_cnt, kv_idx, stats = select(q, k, **options)
    keep = keep_of(kv_cnt, kv_idx)
    stats = stats.cpu().double()
    distance = (torch.arange(oracle.nq) + oracle.nk - oracle.nq).unsqueeze(-1) - torch.arange(oracle.nk)
    causal = distance >= 0
    forced = (torch.arange(oracle.nk) < options["sink_blocks"]) | (distance < options["window_blocks"])
    assert not (keep & ~causal).any()
    assert (keep | ~(forced & causal)).all()

    expected = oracle.stats(keep)
    torch.testing.assert_close(stats[..., DENSITY], expected[..., DENSITY], rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[..., MEAN : PERCENTILE + 1], expected[..., 1:], rtol=0, atol=oracle.error)
    alpha = max(options["alpha_c"], options["alpha_s"])
    assert (expected[..., MEAN] >= min(alpha, 1) - 2 * oracle.error).all()
    assert (expected[..., MINIMUM] >= options.get("min_mass", 0) - 2 * oracle.error).all()
    everything = alpha >= 1 or options.get("min_mass", 0) == 1
    if everything:
        assert (keep == causal).all() and (stats[..., : PERCENTILE + 1] == 1).all()
    if options.get("gqa") == "union":
        grouped = keep.unflatten(1, (-1, oracle.group_size))
        assert (grouped == grouped[:, :, :1]).all()
    if options.get("selection", "paper") == "paper" and options.get("min_mass", 0) == 0:
        must, may = oracle.bounds(options)
        assert (keep | ~must).all() and (may | ~keep).all()
    return keep


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
