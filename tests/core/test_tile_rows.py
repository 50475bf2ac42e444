"""From a threshold to a row of a tile in csrc/core."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from helpers.core import MAX_DRAWS, MAX_TOTAL, MULTINOMIAL, SORTED, budgets, core, make_draws
from helpers.properties import for_all
from helpers.statistics import chi_square_z
from hypothesis import example
from hypothesis import strategies as st

tile_mass = st.one_of(st.integers(1, 1000), st.integers(1, MAX_TOTAL))
weight_sum = st.one_of(st.integers(1, 1000), st.integers(1, 2**31 + 512))
units = st.one_of(st.just(1), budgets)


@for_all(units, tile_mass, weight_sum, st.data())
@example(1, 2**31, 2**30 + 512, None)
@example(1, 1, 2**31, None)
@example(MAX_DRAWS, MAX_TOTAL, 2**31 + 512, None)
@example(MAX_DRAWS, 1, 2**30 + 512, None)
def test_position_in_tile_is_monotone_and_in_range(unit, mass, weights, data):
    """floor of (offset + fraction) weights / width, exact but for a few roundings of float64, which are below 2^-18 of
    a unit of weight; in [0, weights); a larger threshold never gives a smaller position."""
    start = MAX_TOTAL - mass if data is None else data.draw(st.integers(0, MAX_TOTAL - mass))
    first, width = start * unit, mass * unit
    drawn = [width // 2] if data is None else data.draw(st.lists(st.integers(0, width - 1), max_size=30))
    offsets = sorted({0, width - 1, *drawn, *(min(x + 1, width - 1) for x in drawn)})
    fractions = [0, 2.0**-24, 0.5, 1 - 2.0**-24]
    points = list(itertools.product(offsets, fractions))  # in order
    scaled = np.array([first + offset for offset, _ in points], dtype=np.uint64)
    fraction = np.array([fraction for _, fraction in points], dtype=np.float32)
    assert np.all(core.tile_contains(unit, start, mass, scaled, fraction))
    outside = np.array([x for x in (first - 1, first + width) if x >= 0], dtype=np.uint64)
    assert not np.any(core.tile_contains(unit, start, mass, outside, np.float32(0.5)))
    positions = core.tile_position(unit, start, mass, scaled, fraction, weights).tolist()
    assert positions == sorted(positions)
    assert positions[0] == 0 and positions[-1] < weights
    for (offset, fraction), position in zip(points, positions, strict=True):
        exact = (offset + Fraction(fraction)) * weights / width
        assert -Fraction(1, 2**18) < exact - position < 1 + Fraction(1, 2**18)


@pytest.mark.parametrize("sampler", [MULTINOMIAL, *SORTED])
@pytest.mark.parametrize(("total", "start"), [(1, 0), (3, 1)])
def test_a_tile_of_one_unit_reaches_all_its_rows(sampler, total, start):
    """The fraction adds 24 bits below a unit: with R = 1 the positions in a tile of mass 1 are spread evenly over
    [0, 2^30). 2^14 seeds, of which a third falls into the second tile of three. 8 pairs of 2^24 positions or fewer
    are expected to coincide, more than 40 with probability 1e-16. Top bytes are uniform: chi-square with 255 degrees
    of freedom, two cases (draw 0 is the same for all samplers) at 5 sigma, two-sided, false alarm 1e-6."""
    positions = []
    for seed in range(2**14):
        draws = make_draws(sampler, core.RandomStream(seed=seed), 1, total)
        threshold = draws.threshold(0)
        if core.tile_contains(draws.unit, start, 1, threshold.scaled, threshold.fraction):
            positions.append(core.tile_position(draws.unit, start, 1, threshold.scaled, threshold.fraction, 2**30))
    assert len(positions) >= 2**14 // total * 0.9
    assert len(set(positions)) >= len(positions) - 40
    assert abs(chi_square_z(np.array(positions) >> 22, 256)) < 5


@for_all(
    st.lists(st.one_of(st.just(0), st.integers(0, 4), st.integers(0, 2**22)), min_size=1, max_size=512).filter(any)
)
def test_row_at_is_searchsorted(weights):
    """The row whose interval [c_{n-1}, c_n) holds the position: at every boundary and its neighbours. Rows
    without weight are never found."""
    cumulative = np.cumsum(weights).astype(np.uint32)
    total = int(cumulative[-1])
    near = [int(c) + step for c in cumulative for step in (-1, 0, 1)]
    positions = np.array(sorted({x for x in [0, total - 1, *near] if 0 <= x < total}), dtype=np.uint32)
    rows = core.rows_at(cumulative, positions)
    np.testing.assert_array_equal(rows, np.searchsorted(cumulative, positions, side="right"))
    assert all(weights[row] > 0 for row in rows)


@for_all(st.integers(1, MAX_DRAWS), tile_mass, weight_sum, st.data())
def test_expected_draws(num_draws, mass, weights, data):
    """R (mass / total) (weight / weights), within the rounding of eight float32 operations."""
    weight, total = data.draw(st.integers(1, weights)), data.draw(st.integers(mass, MAX_TOTAL))
    actual = core.expected_draws(num_draws=num_draws, tile_mass=mass, total=total, weight=weight, weight_sum=weights)
    exact = Fraction(num_draws * mass * weight, total * weights)
    assert abs(Fraction(actual) / exact - 1) < 8 * 2.0**-24
