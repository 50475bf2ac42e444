"""Intervals, and what follows from a table: plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev

from torch import Tensor

MAX_PERPLEXITY_CHANGE = 0.005
MAX_TOTAL_VARIATION = 0.02


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """Two-sided quantile of Student's t, by the Cornish-Fisher expansion: within 0.2% from 5 degrees of freedom on, 5%
    for 3."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def mean_interval(by_text: Tensor) -> tuple[float, float]:
    """Mean of a quantity [texts, steps], and half the width of its 95% interval: Student's t over the texts' means. The
    steps of a text are not independent: what one gets wrong stays in the cache. Those of several runs lie side by side.
    Infinite for a single text."""
    means = by_text.double().mean(dim=1).tolist()
    if len(means) < 2:
        return means[0], math.inf
    return mean(means), t_quantile(len(means) - 1) * stdev(means) / math.sqrt(len(means))


def wilson_interval(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Bounds of a share of which `right` of `total` were seen."""
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Point:
    """A method with one S in one model and context: a line of the table.

    nll_change and its half width: mean paired difference of code length to exact attention, nats per token, over all
        seeds; nll_change_by_seed: of each.
    variation and its half width, variation_99: total variation distance of next-token distributions, mean over tokens
        and 99th percentile.
    rows_share: V rows read; bytes_share: bytes of K and V, of dense attention's, in 16 bits.
    """

    model: str
    context: int
    method: str
    num_samples: int
    nll_change: float
    nll_half_width: float
    nll_change_by_seed: list[float]
    variation: float
    variation_half_width: float
    variation_99: float
    agreement: float
    rows_share: float
    bytes_share: float

    @property
    def perplexity_change(self) -> tuple[float, float, float]:
        """Lower bound, estimate and upper bound of perplexity over exact perplexity, minus 1."""
        bounds = (-self.nll_half_width, 0.0, self.nll_half_width)
        return tuple(math.expm1(min(self.nll_change + bound, 700.0)) for bound in bounds)

    @property
    def holds_perplexity(self) -> bool:
        low, _, high = self.perplexity_change
        return low >= -MAX_PERPLEXITY_CHANGE and high <= MAX_PERPLEXITY_CHANGE

    @property
    def holds_variation(self) -> bool:
        return self.variation <= MAX_TOTAL_VARIATION


@dataclass
class Advice:
    """The least S from which on every larger one measured holds a target too; None: none does."""

    model: str
    context: int
    method: str
    for_variation: int | None
    for_perplexity: int | None

    @property
    def for_both(self) -> int | None:
        if self.for_variation is None or self.for_perplexity is None:
            return None
        return max(self.for_variation, self.for_perplexity)


def advise(points: Sequence[Point]) -> list[Advice]:
    """One for each method, in each model and context."""
    found: dict[tuple[str, int, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.model, point.context, point.method), []).append(point)
    return [
        Advice(*key, _least(of_one, "holds_variation"), _least(of_one, "holds_perplexity"))
        for key, of_one in found.items()
    ]


def _least(points: Sequence[Point], target: str) -> int | None:
    least = None
    for point in sorted(points, key=lambda point: -point.num_samples):
        if not getattr(point, target):
            break
        least = point.num_samples
    return least
