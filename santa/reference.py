"""The oracle: exact attention and every estimator in plain PyTorch, float64, written from the equations.

Nothing here is fast or shares code with the kernels. `exact` is softmax attention; `moments` gives the mean and the
variance of each estimator over its random numbers, exactly: in closed form for multinomial and stratified sampling, and
by enumeration for the samplers with a single uniform number U, whose estimate is piecewise constant in U.

The streaming and the uniform budget draw from a row tile by tile: `tile_shares`, `one_pass_draws`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Exact decode attention. Shapes as in `santa.decode`, options as in `probabilities`; returns out [batch,
    num_qo_heads, head_dim] and lse [batch, num_qo_heads], or both with [batch, q_len, ...] as q has them, float64. Only
    the valid range of each row is touched."""
    outs, lses = [], []
    for b, tokens in enumerate(q if q.dim() == 4 else q.unsqueeze(1)):
        start = 0 if kv_starts is None else int(kv_starts[b])
        kv_len = _max_kv_len(k, options) - start if kv_lens is None else int(kv_lens[b])
        for ahead, token in zip(reversed(range(len(tokens))), tokens, strict=True):
            # The new tokens are the last keys of the row, and each sees those up to its own.
            visible = max(0, kv_len - ahead)
            p, values, lse = probabilities(token, k[b], v[b], kv_start=start, kv_len=visible, **options)
            outs.append(torch.einsum("gmn,gnd->gmd", p, values).flatten(0, 1))
            lses.append(lse.flatten())
    out_shape = (*q.shape[:-1], v.shape[-1])
    return torch.stack(outs).reshape(out_shape), torch.stack(lses).reshape(q.shape[:-1])


def _max_kv_len(k: Tensor, options: dict[str, Any]) -> int:
    return k.shape[1 if options.get("kv_layout", "NHD") == "NHD" else 2]


def probabilities(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_start: int = 0,
    kv_len: int | None = None,
    kv_layout: str = "NHD",
    sm_scale: float | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of one token of one batch row: q [num_qo_heads, head_dim], k and v without the batch dimension. k_scale
    and v_scale, a number, [], [1] or [num_kv_heads], multiply keys and values. With sinks [num_qo_heads], which take
    part in the softmax without a value, p sums to less than 1.

    Returns p [num_kv_heads, gqa_group_size, n], values [num_kv_heads, n, head_dim] and lse [num_kv_heads,
    gqa_group_size], float64; n is kv_len, or window_left + 1 if that is less.
    """
    if kv_layout == "NHD":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    stop = k.shape[1] if kv_len is None else kv_start + kv_len
    first = kv_start if window_left < 0 else max(kv_start, stop - 1 - window_left)
    keys, values = _scaled(k[:, first:stop], k_scale), _scaled(v[:, first:stop], v_scale)
    queries = q.double().unflatten(0, (keys.shape[0], -1))
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    scores = torch.einsum("gmd,gnd->gmn", queries, keys) * scale
    if logits_soft_cap:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double().view_as(lse))
    # kv_len 0: no keys, lse -inf or the sinks, p empty.
    return torch.exp(scores - lse.unsqueeze(-1)), values, lse


def _scaled(x: Tensor, scale: Tensor | float | None) -> Tensor:
    """x [num_kv_heads, kv_len, head_dim] times its scale, float64."""
    return x.double() if scale is None else x.double() * torch.as_tensor(scale).double().reshape(-1, 1, 1)


def systematic_counts(p: Tensor, num_samples: int, u: float) -> Tensor:
    """Counts of systematic sampling: thresholds (m + u) / S, m = 0..S-1, on the CDF of p [n]. Sums to S.

    Row n is hit by the thresholds in [F_{n-1}, F_n): ceil(S F_n - u) - ceil(S F_{n-1} - u).
    """
    return _telescoping_counts(p, num_samples, torch.tensor(u, dtype=torch.float64))


def _telescoping_counts(p: Tensor, num_samples: int, u: Tensor) -> Tensor:
    boundaries = torch.cumsum(p, dim=-1)
    below = torch.ceil(num_samples * boundaries / boundaries[-1] - u.unsqueeze(-1)).clamp(0, num_samples)
    below[..., -1] = num_samples
    return torch.diff(below, prepend=torch.zeros_like(below[..., :1]))


def stratified_counts(p: Tensor, num_samples: int, u: Tensor) -> Tensor:
    """Counts of stratified sampling: thresholds (m + u[m]) / S on the CDF of p [n]; u is [S]. Sums to S."""
    thresholds = (torch.arange(num_samples, dtype=torch.float64) + u) / num_samples
    return _counts_of_thresholds(p, thresholds)


def multinomial_counts(p: Tensor, num_samples: int, u: Tensor) -> Tensor:
    """Counts of S i.i.d. draws from p [n] by inversion; u is [S]. Sums to S."""
    return _counts_of_thresholds(p, u)


def _counts_of_thresholds(p: Tensor, thresholds: Tensor) -> Tensor:
    boundaries = torch.cumsum(p, dim=0)
    rows = torch.searchsorted(boundaries / boundaries[-1], thresholds, right=True).clamp(max=len(p) - 1)
    return torch.bincount(rows, minlength=len(p)).double()


def grouped_weights(p: Tensor, num_samples: int, u: float) -> Tensor:
    """Horvitz-Thompson weights [group, n] of the grouped sampler for p [group, n]: 0 for rows that are not selected.

    One systematic pass with R = S * group thresholds over the group mean of p selects row n with probability
    min(1, R mean_n); a selected row enters head h with p[h, n] / that.
    """
    draws = num_samples * p.shape[0]
    mean = p.mean(dim=0)
    selected = _telescoping_counts(mean, draws, torch.tensor(u, dtype=torch.float64)) > 0
    inclusion = (draws * mean).clamp(max=1.0)
    return torch.where(selected & (inclusion > 0), p / inclusion, 0.0)


# The one-pass budgets: keys of the pilot, keys of a tile, and the most query heads that share their samples.
PILOT_FIRST, PILOT_SPACED, PILOT_LAST = 16, 192, 48
HEAD_BLOCK = 8


def tile_kv(kv_len: int, pilot_run: int = 1) -> int:
    """Keys of a tile: 64 in rows of up to 16,384 keys, 128 in longer ones and where keys are stored by features, which
    is where the pilot takes neighbours."""
    return 64 if kv_len <= 16384 and pilot_run == 1 else 128


def pilot(kv_len: int, run: int = 1) -> tuple[Tensor, Tensor]:
    """Positions of the pilot keys of a row, ascending, and how many keys each stands for.

    All of a row of up to 256 keys. Else the first 16, the last 48, and 192 between them for all the others: the keys
    between in 192 / run equal strata, `run` neighbours from the middle of each.
    """
    if kv_len <= PILOT_FIRST + PILOT_SPACED + PILOT_LAST:
        return torch.arange(kv_len), torch.ones(kv_len, dtype=torch.float64)
    between, strata = kv_len - PILOT_FIRST - PILOT_LAST, PILOT_SPACED // run
    # The middle of stratum r lies (2 r + 1) between / (2 strata) keys in, half a run before it the run's first key.
    first = ((2 * torch.arange(strata) + 1) * between - run * strata) // (2 * strata)
    spaced = PILOT_FIRST + (first[:, None] + torch.arange(run)).flatten()
    positions = torch.cat([torch.arange(PILOT_FIRST), spaced, torch.arange(kv_len - PILOT_LAST, kv_len)])
    weights = torch.ones(len(positions), dtype=torch.float64)
    weights[PILOT_FIRST : PILOT_FIRST + PILOT_SPACED] = between / PILOT_SPACED
    return positions, weights


def tile_shares(p: Tensor, budget: str, *, pilot_run: int = 1, tile_keys: int | None = None) -> Tensor:
    """The shares a of their draws that heads give to each tile, of `tile_keys` or tile_kv keys: p [group, n] ->
    [group, tiles].

    uniform: the tile's part of the keys. streaming: its part of the mass, by what the pilot says the mass is; at least
    a quarter of its part of the keys, at most 1.
    """
    kv_len = p.shape[-1]
    tile_keys = tile_keys or tile_kv(kv_len, pilot_run)
    keys = torch.tensor([len(tile) for tile in torch.arange(kv_len).split(tile_keys)], dtype=torch.float64)
    if budget == "uniform":
        return (keys / kv_len).expand(p.shape[0], -1)
    if budget != "streaming":
        raise ValueError(f"budget is {budget!r}; it needs to be streaming or uniform")
    positions, weights = pilot(kv_len, pilot_run)
    level = (p[:, positions] * weights).sum(dim=-1, keepdim=True)
    mass = torch.stack([tile.sum(dim=-1) for tile in p.split(tile_keys, dim=-1)], dim=-1)
    return torch.maximum(mass / level, keys / (4 * kv_len)).clamp(max=1.0)


def head_blocks(group: int) -> list[slice]:
    """The query heads of a KV head in blocks of at most 8, as equal as can be: what shares samples under grouped."""
    count = -(-group // HEAD_BLOCK)
    size = -(-group // count)
    return [slice(first, min(first + size, group)) for first in range(0, group, size)]


def one_pass_draws(p: Tensor, num_samples: int, sampler: str, budget: str, *, pilot_run: int = 1) -> Tensor:
    """Expected draws m of each key for each head: [group, n]. systematic: S a softmax within the tile. grouped: the sum
    of that over the heads of a block, at most 1, which is the probability that the block reads the key."""
    shares = tile_shares(p, budget, pilot_run=pilot_run)
    within = [tile / tile.sum(dim=-1, keepdim=True) for tile in p.split(tile_kv(p.shape[-1], pilot_run), dim=-1)]
    m = num_samples * torch.cat([shares[:, i : i + 1] * tile for i, tile in enumerate(within)], dim=-1)
    if sampler == "systematic":
        return m
    if sampler != "grouped":
        raise ValueError(f"sampler is {sampler!r}; it needs to be systematic or grouped")
    return torch.cat([m[b].sum(dim=0).clamp(max=1.0).expand_as(m[b]) for b in head_blocks(len(p))])


def one_pass_rows(p: Tensor, num_samples: int, sampler: str, budget: str, *, pilot_run: int = 1) -> float:
    """Expected rows_read of a KV head: keys that any head of a block draws, added up over blocks. Under systematic the
    heads draw independently of each other."""
    missed = 1.0 - one_pass_draws(p, num_samples, sampler, budget, pilot_run=pilot_run).clamp(max=1.0)
    blocks = [missed[b] if sampler == "systematic" else missed[b][:1] for b in head_blocks(len(p))]
    return sum(float((1.0 - block.prod(dim=0)).sum()) for block in blocks)


def _one_pass_moments(
    p: Tensor, values: Tensor, num_samples: int, sampler: str, budget: str, pilot_run: int
) -> tuple[Tensor, Tensor]:
    """For `moments`. A key drawn c times adds c p / m v: under the streaming budget from one uniform number per tile,
    so that variances add up; under the uniform one from one per row, which has gone on by R tile_keys / n draws where
    the next tile begins."""
    m = one_pass_draws(p, num_samples, sampler, budget, pilot_run=pilot_run)
    ratio = torch.where(m > 0, p / m, 0.0)
    kv_len = p.shape[-1]
    results = []
    for block in head_blocks(len(p)):
        heads = range(len(p))[block]
        for together in [heads] if sampler == "grouped" else [range(h, h + 1) for h in heads]:
            terms = torch.cat([ratio[h, :, None] * values for h in together], dim=-1)
            pieces = []  # what one uniform number draws from: begin and end of each key on the line, and its term
            for tile in torch.arange(kv_len).split(tile_kv(kv_len, pilot_run)):
                gone_on = len(together) * num_samples * int(tile[0]) / kv_len if budget == "uniform" else 0.0
                line = gone_on % 1.0 + torch.cat([m.new_zeros(1), torch.cumsum(m[together[0], tile], dim=0)])
                pieces.append((line[:-1], line[1:], terms[tile]))
            if budget == "uniform":
                pieces = [tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))]
            moments_of = [systematic_sums(*piece) for piece in pieces]
            results.append([sum(parts).reshape(len(together), -1) for parts in zip(*moments_of, strict=True)])
    return torch.cat([mean for mean, _ in results]), torch.cat([variance for _, variance in results])


def systematic_sums(begin: Tensor, end: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over U in [0, 1) of sum_n (floor(end_n + U) - floor(begin_n + U)) terms_n: the sum at U = 0
    and after every jump of a floor, each with how long it lasts."""
    jumps, order = torch.sort(torch.cat([1.0 - end.frac(), 1.0 - begin.frac()]))
    start = (end.floor() - begin.floor()) @ terms
    sums = torch.cumsum(torch.cat([start[None], torch.cat([terms, -terms])[order]]), dim=0)
    return _weighted_moments(sums, torch.diff(torch.cat([jumps.new_zeros(1), jumps, jumps.new_ones(1)])))


def moments(
    p: Tensor, values: Tensor, num_samples: int, sampler: str, budget: str = "proportional", *, pilot_run: int = 1
) -> tuple[Tensor, Tensor]:
    """Mean and variance of an estimator over its random numbers.

    Args:
        p: [group, n] probabilities of the query heads that share a KV head. values: [n, head_dim].
        sampler: "multinomial", "stratified", "systematic" or "grouped".
        budget: "proportional", or for the last two samplers "streaming" or "uniform".
        pilot_run: of `pilot`; 8 for Bernoulli scores.

    Returns:
        mean, variance: [group, head_dim]. The mean equals p @ values for every sampler (computed, not assumed, for
        those that are enumerated).
    """
    if budget != "proportional":
        return _one_pass_moments(p.double(), values.double(), num_samples, sampler, budget, pilot_run)
    p, values = p.double(), values.double()
    mean = p @ values
    if sampler == "multinomial":
        return mean, (p @ values**2 - mean**2) / num_samples
    if sampler == "stratified":
        return mean, torch.stack([_stratified_variance(row, values, num_samples) for row in p])
    if sampler == "systematic":
        results = [
            _enumerate(row, num_samples, lambda u, row=row: _telescoping_counts(row, num_samples, u) / num_samples)
            for row in p
        ]
        pieces = [(weights, mass) for weights, mass in results]
        both = [_weighted_moments(weights @ values, mass) for weights, mass in pieces]
        return torch.stack([m for m, _ in both]), torch.stack([s for _, s in both])
    if sampler == "grouped":
        draws, group_mean = num_samples * p.shape[0], p.mean(dim=0)
        selected, mass = _enumerate(group_mean, draws, lambda u: _telescoping_counts(group_mean, draws, u) > 0)
        inclusion = (draws * group_mean).clamp(max=1.0)
        ratio = torch.where(inclusion > 0, p / inclusion, 0.0)
        both = [_weighted_moments((selected * row) @ values, mass) for row in ratio]
        return torch.stack([m for m, _ in both]), torch.stack([s for _, s in both])
    raise ValueError(f"sampler is {sampler!r}; it needs to be multinomial, stratified, systematic or grouped")


def _stratified_variance(p: Tensor, values: Tensor, num_samples: int) -> Tensor:
    """Sum over strata of the variance of one draw in each: (1/S^2) sum_m (E_m[v^2] - E_m[v]^2)."""
    high = torch.cumsum(p, dim=0)
    low = high - p
    edges = torch.arange(num_samples + 1, dtype=torch.float64) / num_samples
    overlap = torch.minimum(high, edges[1:, None]) - torch.maximum(low, edges[:-1, None])
    within = overlap.clamp(min=0) * num_samples  # [S, n]: distribution inside each stratum
    variance = within @ values**2 - (within @ values) ** 2
    return variance.sum(dim=0) / num_samples**2


def _enumerate(p: Tensor, num_draws: int, weights_at) -> tuple[Tensor, Tensor]:
    """All values that a function of U can take: evaluated at the middle of every piece between the breakpoints
    frac(R F_n), with the pieces' lengths."""
    cuts = torch.remainder(num_draws * torch.cumsum(p, dim=0), 1.0)
    cuts = torch.cat([cuts.new_zeros(1), torch.sort(cuts).values, cuts.new_ones(1)])
    lengths = torch.diff(cuts)
    keep = lengths > 1e-12
    middle = (cuts[:-1] + cuts[1:])[keep] / 2
    return weights_at(middle).double(), lengths[keep] / lengths[keep].sum()


def _weighted_moments(outcomes: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    mean = mass @ outcomes
    return mean, mass @ (outcomes - mean) ** 2
