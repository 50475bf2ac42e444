"""The oracle of proposal keys: codes, their logits, draws and both sums, written from the equations.

Nothing here shares code with the kernels. `quantise` is float32 arithmetic, rounded as IEEE 754 has it, and gives the
codes of every backend to the bit. The rest is float64: `decode` makes the draws of the kernels from their random
numbers, but for a threshold that falls within a float32 rounding of a boundary between two keys; `moments` gives the
mean and the variance of both sums over those numbers, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from santa import reference
from santa.reference_bernoulli import philox

FLOOR_SHARE = 1 / 16
UNIT_BITS = 22  # of the boundaries between keys


def tile_kv(group: int) -> int:
    """Keys of a tile: 256 where blocks of query heads have up to 4, else 128."""
    first = reference.head_blocks(group)[0]
    return 256 if first.stop - first.start <= 4 else 128


def quantise(k: Tensor, center: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """codes int8 [..., head_dim] from -8 to 7 and scales float16 [...] of k [..., head_dim]; center and channel_scale
    broadcast. A key that is not finite has scale NaN and codes 0."""
    with np.errstate(all="ignore"):
        centred = (_float32(k) - _float32(center)) * (np.float32(1) / _float32(channel_scale))
        largest = np.abs(centred).max(axis=-1)
        scales = np.where(
            np.isfinite(largest), np.minimum(largest / np.float32(7), np.float32(65504)), np.float32("nan")
        )
        scales = scales.astype(np.float16)
        width = scales.astype(np.float32)[..., None]
        codes = np.where(width > 0, np.clip(np.rint(centred * (np.float32(1) / width)), -8, 7), 0).astype(np.int8)
    return torch.from_numpy(codes), torch.from_numpy(scales)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., head_dim] as they are stored: uint8 [..., head_dim / 2]."""
    low, high = (codes.to(torch.uint8) + 8).chunk(2, dim=-1)
    return low | high << 4


def unpack(packed: Tensor) -> Tensor:
    """The opposite of `pack`, int8."""
    return torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8) - 8


def _float32(x: Tensor) -> np.ndarray:
    return x.detach().cpu().float().numpy()


def proposal_scores(
    q: Tensor, packed: Tensor, scales: Tensor, center: Tensor, channel_scale: Tensor, sm_scale: float | None = None
) -> Tensor:
    """Logits of the proposal, natural: [group, n] for the query heads q [group, head_dim] of a KV head whose keys are
    packed [n, head_dim / 2], scales [n]; center and channel_scale [head_dim]. Queries are rounded to int8."""
    scaled = torch.from_numpy(_float32(q) * _float32(channel_scale))
    q_scale = (scaled.abs().amax(dim=-1, keepdim=True) / 127).float()
    codes = torch.where(q_scale > 0, (scaled * (1 / q_scale)).round().clamp(-127, 127), 0.0)
    products = codes.double() @ unpack(packed).double().T
    shift = q.double() @ center.double()
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    return scale * (q_scale.double() * scales.double() * products + shift[:, None])


@dataclass
class Row:
    """One KV head of one batch row: the exact logits and those of the proposal, natural, [group, n]; values [n, D]."""

    exact: Tensor
    proposal: Tensor
    values: Tensor

    def expected_draws(self, num_samples: int) -> Tensor:
        """What a head block expects of each key, [blocks, n]: S a_h softmax_t(s~_h) summed over its heads, and the
        floor. Not yet cut to 1."""
        group, kv_len = self.proposal.shape
        p = torch.softmax(self.proposal, dim=-1)
        shares = reference.tile_shares(p, "streaming", tile_keys=tile_kv(group))
        tiles = self.proposal.split(tile_kv(group), dim=-1)
        within = torch.cat([shares[:, i : i + 1] * torch.softmax(t, dim=-1) for i, t in enumerate(tiles)], dim=-1)
        sums = []
        for block in reference.head_blocks(group):
            heads = len(range(group)[block])
            sums.append(num_samples * (within[block].sum(dim=0) + FLOOR_SHARE * heads / kv_len))
        return torch.stack(sums)

    def inclusion(self, num_samples: int) -> Tensor:
        """pi of each key for each head: [group, n]."""
        pi = self.expected_draws(num_samples).clamp(max=1.0)
        blocks = reference.head_blocks(len(self.exact))
        return torch.cat([pi[i].expand(len(self.exact[block]), -1) for i, block in enumerate(blocks)])

    def _lines(self, num_samples: int, *, seed: int, row_seed: int, position: int, kv_head: int) -> list[list[Tensor]]:
        """For each head block and tile, where its keys begin and end on the line that has a threshold at every multiple
        of 2^UNIT_BITS: [keys + 1]."""
        group = len(self.exact)
        blocks = reference.head_blocks(group)
        units = (self.expected_draws(num_samples).clamp(max=1.0) * 2**UNIT_BITS + 0.5).floor().long().clamp(min=1)
        lines = []
        for i in range(len(blocks)):
            key = _stream_key(seed, row_seed, position, kv_head * len(blocks) + i)
            tiles = units[i].split(tile_kv(group))
            offsets = [int(philox([0, tile, 0, 0], key)[1]) >> (32 - UNIT_BITS) for tile in range(len(tiles))]
            starts = [torch.tensor([offset]) for offset in offsets]
            lines.append(
                [torch.cumsum(torch.cat([start, tile]), dim=0) for start, tile in zip(starts, tiles, strict=True)]
            )
        return lines

    def draw(self, num_samples: int, *, seed: int, row_seed: int, position: int, kv_head: int) -> Tensor:
        """Which keys the kernels draw for each head: bool [group, n]."""
        lines = self._lines(num_samples, seed=seed, row_seed=row_seed, position=position, kv_head=kv_head)
        drawn = []
        for block, of_block in zip(reference.head_blocks(len(self.exact)), lines, strict=True):
            counts = torch.cat([(line >> UNIT_BITS).diff() for line in of_block])
            drawn.append((counts > 0).expand(len(range(len(self.exact))[block]), -1))
        return torch.cat(drawn)

    def closest_threshold(self, num_samples: int, *, seed: int, row_seed: int, position: int, kv_head: int) -> float:
        """How close a threshold comes to a boundary between two keys, in draws. Backends round the boundaries
        differently: one that is nearer than their rounding can draw either key."""
        lines = self._lines(num_samples, seed=seed, row_seed=row_seed, position=position, kv_head=kv_head)
        ends = torch.cat([line[1:] for of_block in lines for line in of_block]) & (2**UNIT_BITS - 1)
        return min(int(ends.min()), 2**UNIT_BITS - int(ends.max())) / 2**UNIT_BITS

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """In units of the exact row's sum: exp(s) v [group, n, D] and exp(s) - exp(s~) [group, n], which the two sums
        add up over what is drawn, each over pi; and the sum of exp(s~) over all keys [group]."""
        lse = torch.logsumexp(self.exact, dim=-1, keepdim=True)
        p, proposed = torch.exp(self.exact - lse), torch.exp(self.proposal - lse)
        return p[..., None] * self.values, p - proposed, proposed.sum(dim=-1)

    def estimate(self, drawn: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """N [group, D], Z [group] and the plain sum H [group] that Z is guarded with, in units of the exact row's sum,
        of the keys drawn [group, n]."""
        weights = torch.where(drawn, 1.0 / self.inclusion(num_samples), 0.0)
        values, corrections, proposed = self.terms()
        lse = torch.logsumexp(self.exact, dim=-1, keepdim=True)
        plain = (weights * torch.exp(self.exact - lse)).sum(dim=-1)
        return (
            torch.einsum("gn,gnd->gd", weights, values),
            proposed + (weights * corrections).sum(dim=-1),
            plain,
        )

    def moments(self, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and variance of N [group, D] and of Z [group], not guarded, over the random numbers: the tiles draw
        independently, each by one uniform number."""
        m, values_and_corrections = self.expected_draws(num_samples).clamp(max=1.0), self.terms()
        values, corrections, proposed = values_and_corrections
        group, kv_len = self.exact.shape
        means, variances = [], []
        for i, block in enumerate(reference.head_blocks(group)):
            for h in range(group)[block]:
                terms = torch.cat([values[h], corrections[h, :, None]], dim=-1) / m[i, :, None]
                mean, variance = torch.zeros(terms.shape[-1]).double(), torch.zeros(terms.shape[-1]).double()
                for tile in torch.arange(kv_len).split(tile_kv(group)):
                    line = torch.cat([m.new_zeros(1), torch.cumsum(m[i, tile], dim=0)])
                    of_tile = reference.systematic_sums(line[:-1], line[1:], terms[tile])
                    mean, variance = mean + of_tile[0], variance + of_tile[1]
                means.append(mean), variances.append(variance)
        mean, variance = torch.stack(means), torch.stack(variances)
        return mean[:, :-1], variance[:, :-1], mean[:, -1] + proposed, variance[:, -1]


def _stream_key(seed: int, row_seed: int, position: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """The Philox key of a head block's draws."""
    identity = [row_seed & 0xFFFFFFFF, row_seed >> 32 & 0xFFFFFFFF, position & 0xFFFFFFFF, head & 0xFFFFFFFF]
    words = philox(identity, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return words[0], words[1]


def rows_of(
    q: Tensor, k: Tensor, v: Tensor, proposal: dict[str, Tensor], *, kv_len: int | None = None, kv_start: int = 0
) -> list[Row]:
    """The KV heads of one batch row, NHD: q [num_qo_heads, D], k and v [max_kv_len, num_kv_heads, D], and what
    ProposalKeys.tensors() has of that row: codes [max_kv_len, num_kv_heads, D / 2], center [num_kv_heads, D], ..."""
    stop = k.shape[0] if kv_len is None else kv_start + kv_len
    heads, keys = k.shape[1], slice(kv_start, stop)
    rows = []
    for g, queries in enumerate(q.cpu().unflatten(0, (heads, -1))):
        exact = queries.double() @ k[keys, g].cpu().double().T / math.sqrt(q.shape[-1])
        packed, scales = (proposal[name][keys, g].cpu() for name in ("codes", "scales"))
        center, channel_scale = (proposal[name][g].cpu() for name in ("center", "channel_scale"))
        scores = proposal_scores(queries, packed, scales, center, channel_scale)
        rows.append(Row(exact, scores, v[keys, g].cpu().double()))
    return rows


def decode(
    rows: list[Row], num_samples: int, *, seed: int = 0, row_seed: int = 0, position: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out [num_qo_heads, D], lse [num_qo_heads] and rows_read [num_kv_heads] of one batch row, as the kernels draw."""
    outs, lses, counts = [], [], []
    for kv_head, row in enumerate(rows):
        where = row.exact.shape[-1] if position is None else position
        drawn = row.draw(num_samples, seed=seed, row_seed=row_seed, position=where, kv_head=kv_head)
        n, z, plain = row.estimate(drawn, num_samples)
        z = torch.where(z < plain / 2, plain / 2, z)
        outs.append(n / z[:, None])
        lses.append(torch.logsumexp(row.exact, dim=-1) + z.log())
        counts.append(sum(int(drawn[block][0].sum()) for block in reference.head_blocks(len(drawn))))
    return torch.cat(outs), torch.cat(lses), torch.tensor(counts, dtype=torch.int32)
