"""The oracle of prefill: which key blocks SampleAttention keeps, in plain PyTorch, float64, from the equations.

Source: SampleAttention (arXiv 2406.15486; columns and slashes as in its MLSys 2025 version). Queries are sampled at
equal distances; nothing is drawn. Blocks have 128 tokens throughout, columns and slashes included, so that the mass
attributed to a column or a slash is the mass that it keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128


def sample_select(
    q: Tensor,
    k: Tensor,
    *,
    alpha_c: float = 0.95,
    alpha_s: float = 0.95,
    num_chunks: int = 0,
    sink_blocks: int = 1,
    window_blocks: int = 2,
    sm_scale: float | None = None,
    gqa: int = 0,
    selection: int = 0,
    min_mass: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Key blocks that each query block attends to; arguments and results as in `santa.sample_select`.

    With nq query blocks, nk key blocks and A(a) = a + nk - nq, the diagonal block of query block a, one head's
    selection is a set of columns b and a set of slashes d, both within [0, nk). Query block a keeps key block
    b <= A(a) iff b is a column or A(a) - b is a slash. Both sets come from W[c, b], the mass of sampled block c on key
    block b (`block_masses`, summed over rows).

    selection 0 (the paper's rule): columns are `cover`(C, alpha_c) and the first sink_blocks, slashes are
    `cover`(S, alpha_s) and the first window_blocks, where C[b] = sum_c W[c, b] and S[d] = sum_c W[c, A(s_c) - d].

    selection 1 (joint greedy cover): `joint_cover`, alpha = max(alpha_c, alpha_s).

    min_mass > 0: `repair` follows either. gqa 1: then the union of the sets within each group of query heads.

    A head that has a sampled row without a softmax (a NaN or +inf among its scores, or nothing but -inf) keeps
    everything, and its three masses in the statistics are NaN.
    """
    offset = num_blocks(k.shape[2]) - num_blocks(q.shape[2])
    sampled = sampled_blocks(num_blocks(q.shape[2]), num_chunks)
    masses, valid = block_masses(q, k, sampled, sm_scale=sm_scale, dtype=dtype)
    batch, num_qo_heads, _, _, nk = masses.shape
    nq = nk - offset

    columns = torch.zeros(batch, num_qo_heads, nk, dtype=torch.bool)
    slashes = torch.zeros_like(columns)
    for b in range(batch):
        for h in range(num_qo_heads):
            columns[b, h], slashes[b, h] = _select_head(
                masses[b, h],
                [a + offset for a in sampled],
                nq,
                alphas=(alpha_c, alpha_s),
                forced=(sink_blocks, window_blocks),
                selection=selection,
                min_mass=min_mass,
            )
    if gqa == 1:
        group_size = num_qo_heads // k.shape[1]
        columns, slashes = (
            sets.unflatten(1, (-1, group_size)).any(dim=2).repeat_interleave(group_size, dim=1)
            for sets in (columns, slashes)
        )

    keep = expand(columns, slashes, nq)
    kv_cnt = keep.sum(dim=-1, dtype=torch.int32)
    # A stable descending sort of the flags puts the kept blocks first, in ascending order.
    kv_idx = torch.sort(keep.int(), dim=-1, descending=True, stable=True).indices
    kv_idx = torch.where(torch.arange(nk) < kv_cnt.unsqueeze(-1), kv_idx, 0).int()

    causal_blocks = sum(a + offset + 1 for a in range(nq))
    retained = retained_mass(masses, keep, sampled)[:, :, valid]  # [batch, num_qo_heads, rows]
    ordered = torch.sort(retained, dim=-1).values
    broken = retained.isnan().any(dim=-1)
    stats = torch.stack(
        [
            kv_cnt.sum(dim=-1) / causal_blocks,
            retained.mean(dim=-1),
            torch.where(broken, torch.nan, ordered[..., 0]),
            torch.where(broken, torch.nan, ordered[..., (ordered.shape[-1] - 1) // 20]),
            columns.sum(dim=-1),
            slashes.sum(dim=-1),
        ],
        dim=-1,
    )
    return kv_cnt, kv_idx, stats.float()


def num_blocks(length: int) -> int:
    return -(-length // BLOCK)


def sampled_blocks(nq: int, num_chunks: int = 0) -> list[int]:
    """The query blocks at the tails of min(num_chunks, nq) equal segments; 0 is clamp(ceil(nq / 50), 2, 8) of them."""
    count = min(num_chunks or min(max(-(-nq // 50), 2), 8), nq)
    return [(c + 1) * nq // count - 1 for c in range(count)]


def block_masses(
    q: Tensor, k: Tensor, sampled: list[int], *, sm_scale: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Exact causal softmax of the sampled query blocks, summed over key blocks.

    Returns masses [batch, num_qo_heads, chunks, 128, nk] and valid, bool [chunks, 128]: rows past the end of the prompt
    are not valid and have no mass. A row without a softmax is NaN.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    rows = torch.tensor(sampled)[:, None] * BLOCK + torch.arange(BLOCK)
    valid = rows < q_len
    queries = q.cpu()[:, :, rows.clamp(max=q_len - 1)].to(dtype)  # [batch, num_qo_heads, chunks, 128, head_dim]
    keys = k.cpu().to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhcrd,bhnd->bhcrn", queries, keys) * scale
    future = torch.arange(kv_len) > (rows + kv_len - q_len).unsqueeze(-1)
    scores = scores.masked_fill(future, -torch.inf)
    probabilities = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))
    padded = torch.nn.functional.pad(probabilities, (0, -kv_len % BLOCK))
    masses = padded.unflatten(-1, (-1, BLOCK)).sum(dim=-1)
    return masses.masked_fill(~valid.unsqueeze(-1), 0.0), valid


def cover(x: Tensor, alpha: float) -> Tensor:
    """bool [n]: the largest entries of x [n] that make up the part alpha of its sum, ties to the lower index.

    alpha <= 0 selects none and alpha >= 1 all: how a cumulative sum rounds near its ends means nothing.
    """
    if alpha <= 0 or alpha >= 1:
        return torch.full(x.shape, alpha >= 1)
    ordered, order = torch.sort(x / x.sum(), descending=True, stable=True)
    count = int((torch.cumsum(ordered, dim=0) < alpha).sum()) + 1
    selected = torch.zeros(x.shape, dtype=torch.bool)
    selected[order[:count]] = True
    return selected


def expand(columns: Tensor, slashes: Tensor, nq: int) -> Tensor:
    """keep, bool [..., nq, nk], of the sets columns and slashes, bool [..., nk]."""
    nk = columns.shape[-1]
    distance = (torch.arange(nq) + nk - nq).unsqueeze(-1) - torch.arange(nk)
    return (columns.unsqueeze(-2) | slashes[..., distance.clamp(min=0)]) & (distance >= 0)


def retained_mass(masses: Tensor, keep: Tensor, sampled: list[int]) -> Tensor:
    """[..., chunks, 128]: what the blocks in keep [..., nq, nk] hold of each row of masses [..., chunks, 128, nk]."""
    return torch.where(keep[..., sampled, :].unsqueeze(-2), masses, 0.0).sum(dim=-1)


def _select_head(
    masses: Tensor,
    diagonals: list[int],
    nq: int,
    *,
    alphas: tuple[float, float],
    forced: tuple[int, int],
    selection: int,
    min_mass: float,
) -> tuple[Tensor, Tensor]:
    """columns, slashes of masses [chunks, 128, nk]; diagonals are A(s_c)."""
    nk = masses.shape[-1]
    everything = torch.ones(nk, dtype=torch.bool)
    if not masses.isfinite().all() or min_mass >= 1:
        return everything, everything.clone()
    by_block = masses.sum(dim=1)  # W
    columns, slashes = torch.arange(nk) < forced[0], torch.arange(nk) < forced[1]
    if selection == 0:
        slash_scores = sum(_shifted(w, diagonal) for w, diagonal in zip(by_block, diagonals, strict=True))
        columns = columns | cover(by_block.sum(dim=0), alphas[0])
        slashes = slashes | cover(slash_scores, alphas[1])
    else:
        columns, slashes = joint_cover(by_block, diagonals, nq, columns, slashes, max(alphas))
    return repair(masses, diagonals, nq, columns, slashes, min_mass)


def _shifted(w: Tensor, diagonal: int) -> Tensor:
    """By distance from the diagonal: result[d] = w[diagonal - d]."""
    result = torch.zeros_like(w)
    result[: diagonal + 1] = w[: diagonal + 1].flip(0)
    return result


def added_blocks(columns: Tensor, slashes: Tensor, nq: int) -> tuple[Tensor, Tensor]:
    """How many (query block, key block) pairs each column and each slash would add to what is kept, int64 [nk]."""
    nk = columns.shape[0]
    distance = (torch.arange(nq) + nk - nq).unsqueeze(-1) - torch.arange(nk)
    new = ~expand(columns, slashes, nq) & (distance >= 0)
    by_slash = torch.zeros(nk, dtype=torch.int64).index_add_(0, distance[distance >= 0], new[distance >= 0].long())
    return new.sum(dim=0), by_slash


def joint_cover(
    by_block: Tensor, diagonals: list[int], nq: int, columns: Tensor, slashes: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Columns and slashes chosen together, added to the given ones. by_block is W [chunks, nk].

    While the kept part of W is below alpha of its sum, the column or slash that gains the most mass of W per block it
    adds (`added_blocks`: over all query blocks, not the sampled ones alone) is chosen; of equals, columns before
    slashes and lower indices first. alpha <= 0 adds none and alpha >= 1 all.
    """
    if alpha >= 1:
        return torch.ones_like(columns), torch.ones_like(slashes)
    columns, slashes, left = columns.clone(), slashes.clone(), by_block.clone()
    for c, diagonal in enumerate(diagonals):
        left[c, columns | _shifted(slashes.to(left.dtype), diagonal).bool()] = 0
    while by_block.sum() - left.sum() < alpha * by_block.sum():
        gain = torch.stack([left.sum(dim=0), sum(_shifted(w, a) for w, a in zip(left, diagonals, strict=True))])
        cost = torch.stack(added_blocks(columns, slashes, nq))
        best = int(torch.where(gain > 0, gain / cost, 0.0).argmax())
        _choose(best, columns, slashes)
        for c, diagonal in enumerate(diagonals):
            block = best if best < len(columns) else diagonal - (best - len(columns))
            if block >= 0:
                left[c, block] = 0
    return columns, slashes


def repair(
    masses: Tensor, diagonals: list[int], nq: int, columns: Tensor, slashes: Tensor, min_mass: float
) -> tuple[Tensor, Tensor]:
    """Adds columns and slashes until every valid row of masses [chunks, 128, nk] keeps min_mass of its mass.

    The row that keeps least is served first (of equals, the first): of the blocks that it does not keep, the one with
    the most mass per added block, where a block is added by its column or by its slash, whichever adds fewer blocks
    (of equals, the column; of equal blocks, the first). 0 adds none; 1 needs everything and is not handled here.
    """
    columns, slashes = columns.clone(), slashes.clone()
    nk = len(columns)
    diagonal = torch.tensor(diagonals)[:, None]
    distance = diagonal - torch.arange(nk)
    flat = masses.flatten(0, 1)
    total = flat.sum(dim=-1)
    while min_mass > 0:
        kept = (columns | slashes[distance.clamp(min=0)]) & (distance >= 0)  # [chunks, nk]
        retained = (masses * kept.unsqueeze(1)).flatten(0, 1).sum(dim=-1)
        share = torch.where(total > 0, retained / total, 1.0)
        row = int(share.argmin())
        if share[row] >= min_mass:
            break
        chunk = row // BLOCK
        cost = added_blocks(columns, slashes, nq)
        blocks = torch.arange(diagonals[chunk] + 1)
        of_slash = cost[1][diagonals[chunk] - blocks]
        cheapest = torch.minimum(cost[0][blocks], of_slash)
        mass = torch.where(kept[chunk, blocks], 0.0, flat[row, blocks])
        block = int(torch.where(mass > 0, mass / cheapest, 0.0).argmax())
        by_column = cost[0][block] <= of_slash[block]
        _choose(block if by_column else nk + diagonals[chunk] - block, columns, slashes)
    return columns, slashes


def _choose(item: int, columns: Tensor, slashes: Tensor) -> None:
    """Items are columns, then slashes."""
    if item < len(columns):
        columns[item] = True
    else:
        slashes[item - len(columns)] = True
