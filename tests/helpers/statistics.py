"""Errors, and the statistics with bounds that chance does not reach."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

# Bounds of the two statistics of mean_z, so wide that a change of seed is no risk.
Z_PROJECTED = 4.9  # two-sided false-alarm rate 1e-6
Z_LARGEST = 6.0  # 2e-9 for one element, 5e-7 for the largest of 256; heavier tails are allowed for by many draws


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def mean_z(draws: Tensor, expected: Tensor, rounding: float = 0.0) -> tuple[float, float]:
    """Tests that the mean of draws [N, ...] is `expected` [...]. Draws that are rounded to 16 bits can be off by
    `rounding` of their size, all in the same direction where they take few values: an element is off by what is beyond.

    Returns (projected, largest): the z statistic of the draws' component along `expected`, which any relative bias
    moves, and the largest |z| over the single elements.
    """
    draws, expected = draws.double().cpu().flatten(1), expected.double().cpu().flatten()
    component = draws @ expected / expected.norm() ** 2
    root = len(draws) ** 0.5
    projected = float((component.mean() - 1.0) / (component.std() / root))
    spread = draws.std(dim=0)
    moved = spread > 1e-7
    off = ((draws.mean(dim=0) - expected).abs() - rounding * draws.abs().mean(dim=0)).clamp(min=0.0)
    return projected, float((off[moved] / (spread[moved] / root)).max())


def chi_square_z(values: np.ndarray, bins: int) -> float:
    """The chi-square statistic of `values` in [0, bins) against uniformity, as a standard normal
    (Wilson-Hilferty)."""
    expected = len(values) / bins
    statistic = float(((np.bincount(values, minlength=bins) - expected) ** 2).sum() / expected)
    freedom = bins - 1
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
