"""Thresholds and their counts in csrc/core: exact laws, tested in Python integers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from helpers.core import (
    GROUPED,
    MAX_DRAWS,
    MAX_TOTAL,
    MULTINOMIAL,
    SORTED,
    STRATIFIED,
    SYSTEMATIC,
    budgets,
    core,
    make_draws,
    small_budgets,
    streams,
    totals,
    uint32s,
)
from helpers.properties import for_all
from hypothesis import example
from hypothesis import strategies as st


def point_of(bits, total):
    """floor(bits total / 2^64), and the next 24 bits of that product as a fraction."""
    return bits * total >> 64, Fraction(bits * total >> 40 & 0xFFFFFF, 2**24)


@for_all(st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1])), totals)
@example(2**64 - 1, MAX_TOTAL)
@example(2**64 - 1, 1)
def test_random_point_is_the_documented_function(bits, total):
    """bits / 2^64 of [0, total) to within 2^-24 units, downwards; the fraction stays below 1."""
    point = core.random_point(bits=bits, total=total)
    assert (point.scaled, Fraction(point.fraction)) == point_of(bits, total)
    assert 0 <= point.scaled < total
    assert 0 <= point.fraction < 1
    assert 0 <= Fraction(bits * total, 2**64) - point.scaled - Fraction(point.fraction) < Fraction(1, 2**24)


@for_all(st.sampled_from([MULTINOMIAL, *SORTED]), streams, uint32s, budgets, totals, st.data())
@example(SYSTEMATIC, core.RandomStream(), 0, MAX_DRAWS, MAX_TOTAL, None)
@example(STRATIFIED, core.RandomStream(), 0, MAX_DRAWS, MAX_TOTAL, None)
def test_threshold_is_the_documented_function(sampler, stream, segment, num_draws, total, data):
    """m total + r in units of 1 / R for a random point r of [0, total), and r itself in whole units for multinomial
    sampling; without overflow up to total = 2^32 - 1 and R = 2^31 - 1."""
    draws = make_draws(sampler, stream, num_draws, total, segment)
    assert draws.sorted == (sampler != MULTINOMIAL)
    assert draws.unit == (1 if sampler == MULTINOMIAL else num_draws)
    middle = num_draws // 2 if data is None else data.draw(st.integers(0, num_draws - 1))
    for m in {0, num_draws - 1, middle}:
        draw = m if sampler in (MULTINOMIAL, STRATIFIED) else 0
        whole, fraction = point_of(stream.bits(segment, draw), total)
        threshold = draws.threshold(m)
        assert threshold.scaled == (whole if sampler == MULTINOMIAL else m * total + whole)
        assert Fraction(threshold.fraction) == fraction


@for_all(st.sampled_from(SORTED), streams, uint32s, small_budgets, totals)
def test_sorted_thresholds_one_in_each_stratum(sampler, stream, segment, num_draws, total):
    """Threshold m lies in [m total / R, (m + 1) total / R), exactly: in units of 1 / R, with its fraction. So all lie
    in [0, total), in order."""
    scaled, fraction = make_draws(sampler, stream, num_draws, total, segment).thresholds()
    assert fraction.min() >= 0 and fraction.max() < 1
    for m, threshold in enumerate(scaled.tolist()):
        assert m * total <= threshold <= (m + 1) * total - 1


@for_all(streams, uint32s, small_budgets, totals)
def test_multinomial_thresholds_in_range(stream, segment, num_draws, total):
    scaled, fraction = make_draws(MULTINOMIAL, stream, num_draws, total, segment).thresholds()
    assert scaled.max() < total
    assert fraction.min() >= 0 and fraction.max() < 1


@for_all(streams, uint32s, small_budgets, totals)
def test_systematic_shares_one_number_and_stratified_does_not(stream, segment, num_draws, total):
    """Systematic thresholds are equally far apart, exactly; grouped are the same ones. Stratified ones take a number
    each, of which the first is the systematic one."""
    systematic, fraction = make_draws(SYSTEMATIC, stream, num_draws, total, segment).thresholds()
    assert (np.diff(systematic) == total).all()
    assert (fraction == fraction[0]).all()
    grouped = make_draws(GROUPED, stream, num_draws, total, segment).thresholds()
    assert (grouped[0] == systematic).all() and (grouped[1] == fraction).all()
    stratified = make_draws(STRATIFIED, stream, num_draws, total, segment).thresholds()
    assert (stratified[0][0], stratified[1][0]) == (systematic[0], fraction[0])
    if num_draws >= 50:
        # R - 1 fractions of 24 bits, all equal to the first: never. Likewise R - 1 offsets of 20 bits or more.
        assert (stratified[1] != fraction).any()
        assert total < 2**20 or (stratified[0] != systematic).any()


def boundary_positions(scaled, num_draws, total, data):
    """Positions that a comparison could get wrong: on both sides of thresholds, the ends, beyond, and anywhere."""
    near = [t // num_draws + step for t in scaled.tolist() for step in (-1, 0, 1, 2)]
    anywhere = data.draw(st.lists(st.integers(0, total), max_size=50))
    positions = {0, 1, total - 1, total, total + 1, MAX_TOTAL, *near, *anywhere}
    return np.array(sorted(x for x in positions if 0 <= x <= MAX_TOTAL), dtype=np.uint32)


@for_all(st.sampled_from(SORTED), streams, small_budgets, totals, st.data())
def test_count_below_is_counting(sampler, stream, num_draws, total, data):
    """count_below(x) = #{m: threshold_m < x}, next to every threshold, at the ends and anywhere."""
    draws = make_draws(sampler, stream, num_draws, total)
    scaled, _ = draws.thresholds()
    positions = boundary_positions(scaled, num_draws, total, data)
    expected = np.searchsorted(scaled, positions.astype(np.uint64) * np.uint64(num_draws), side="left")
    np.testing.assert_array_equal(draws.counts_below(positions), expected)


@for_all(st.sampled_from(SORTED), small_budgets, totals, st.sampled_from([0.0, 0.25, 1.0]), st.data())
def test_count_below_of_extreme_offsets_is_counting(sampler, num_draws, total, where, data):
    """The same if the shared offset, which the first guess starts from, is at the ends of [0, total): the thresholds
    of stratified sampling do not follow it, so its guess is off by as much as it can be."""
    draws = make_draws(sampler, core.RandomStream(), num_draws, total)
    draws.shared_offset = core.Threshold(int(where * (total - 1)), 1 - 2.0**-24)
    scaled, _ = draws.thresholds()
    positions = boundary_positions(scaled, num_draws, total, data)
    expected = np.searchsorted(scaled, positions.astype(np.uint64) * np.uint64(num_draws), side="left")
    np.testing.assert_array_equal(draws.counts_below(positions), expected)


def exact_count(position, offset, num_draws, total):
    """#{m: m total + offset < position R} = ceil((position R - offset) / total), in [0, R]."""
    return min(max(-((offset - position * num_draws) // total), 0), num_draws)


@for_all(st.sampled_from(SORTED), streams, budgets, totals, st.data())
@example(SYSTEMATIC, core.RandomStream(), 2**20 * 16, 2**31, None)
@example(STRATIFIED, core.RandomStream(), 2**20 * 16, 2**31 - 1, None)
@example(SYSTEMATIC, core.RandomStream(), MAX_DRAWS, MAX_TOTAL, None)
@example(STRATIFIED, core.RandomStream(), MAX_DRAWS, MAX_TOTAL, None)
def test_count_below_of_large_budgets(sampler, stream, num_draws, total, data):
    """The same for budgets too large to list: threshold c - 1 is below x and threshold c is not; for
    systematic sampling c is known, in Python integers."""
    draws = make_draws(sampler, stream, num_draws, total)
    middle = [total // 2, total // 3] if data is None else data.draw(st.lists(st.integers(0, total), max_size=20))
    chosen = [0, num_draws - 1] if data is None else [data.draw(st.integers(0, num_draws - 1))]
    near = [draws.threshold(m).scaled // num_draws + step for m in chosen for step in (-1, 0, 1, 2)]
    for position in [0, 1, total - 1, total, *middle, *(x for x in near if 0 <= x <= MAX_TOTAL)]:
        count = draws.count_below(position)
        assert 0 <= count <= num_draws
        assert count == 0 or draws.threshold(count - 1).scaled < position * num_draws
        assert count == num_draws or draws.threshold(count).scaled >= position * num_draws
        if sampler != STRATIFIED:
            assert count == exact_count(position, draws.shared_offset.scaled, num_draws, total)


@for_all(st.sampled_from([SYSTEMATIC, GROUPED]), budgets, totals, st.integers(0, 2), st.booleans(), st.data())
@example(SYSTEMATIC, MAX_DRAWS, MAX_TOTAL, 0, True, None)
@example(SYSTEMATIC, MAX_DRAWS, MAX_TOTAL, 0, False, None)
def test_count_below_of_extreme_offsets(sampler, num_draws, total, step, from_the_end, data):
    """Offsets at the very ends of [0, total), for any budget; on both sides of thresholds."""
    draws = make_draws(sampler, core.RandomStream(), num_draws, total)
    offset = min(max(total - 1 - step if from_the_end else step, 0), total - 1)
    draws.shared_offset = core.Threshold(offset)
    chosen = [] if data is None else data.draw(st.lists(st.integers(0, num_draws - 1), min_size=1, max_size=20))
    for m in {0, num_draws // 2, num_draws - 1, *chosen}:
        scaled = m * total + offset
        assert draws.threshold(m).scaled == scaled
        for position in {max(scaled // num_draws - 1, 0), scaled // num_draws, scaled // num_draws + 1}:
            if position <= MAX_TOTAL:
                assert draws.count_below(position) == exact_count(position, offset, num_draws, total)


@for_all(budgets, totals, st.integers(-2, 2), st.data())
@example(MAX_DRAWS, MAX_TOTAL, -1, None)
@example(MAX_DRAWS, MAX_TOTAL, 0, None)
@example(MAX_DRAWS, MAX_TOTAL, 1, None)
def test_count_below_corrects_a_guess_that_is_rounded(num_draws, total, step, data):
    """A threshold at x R or next to it, by units of 1 / R: too close for float64 to tell, so the guess for position x
    is one too many or one too few."""
    position = total // 3 * 2 if data is None else data.draw(st.integers(0, total - 1))
    draws = make_draws(SYSTEMATIC, core.RandomStream(), num_draws, total)
    offset = (position * num_draws + step) % total
    draws.shared_offset = core.Threshold(offset)
    assert draws.count_below(position) == exact_count(position, offset, num_draws, total)
    m = (position * num_draws + step) // total
    if 0 <= m < num_draws:
        assert draws.threshold(m).scaled == position * num_draws + step


tile_masses = st.lists(st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 2**26)), min_size=1, max_size=60).filter(
    any
)


def assert_counts_are_shares(sampler, counts, num_draws, masses, total):
    """Counts add up to R exactly, and a tile without mass gets none; systematic counts are floor or ceil of R w / T;
    stratified ones are within the strata that the tile touches."""
    assert sum(counts) == num_draws
    slack = 1 if sampler == STRATIFIED else 0
    for mass, count in zip(masses, counts, strict=True):
        assert num_draws * mass // total - slack <= count <= -(-num_draws * mass // total) + slack
        assert mass > 0 or count == 0


@for_all(st.sampled_from(SORTED), streams, budgets, tile_masses)
def test_counts_of_tiles_sum_to_the_budget(sampler, stream, num_draws, masses):
    total = sum(masses)
    draws = make_draws(sampler, stream, num_draws, total)
    boundaries = np.cumsum([0, *masses]).astype(np.uint32)
    counts = np.diff(draws.counts_below(boundaries).astype(np.int64)).tolist()
    assert_counts_are_shares(sampler, counts, num_draws, masses, total)


@pytest.mark.parametrize("num_draws", [2**20 * 16, MAX_DRAWS])
def test_counts_at_the_limits(num_draws):
    """A total next to 2^32, R = 2^20 * 16 (S at its limit, group of 16) and R = 2^31 - 1, over 8,192 tiles from 1 unit
    up."""
    masses = [1] * 4096 + [(2**32 - 4096) // 4096 - 1] * 4096
    total = sum(masses)
    assert 2**32 - 2**13 < total < 2**32
    boundaries = np.cumsum([0, *masses]).astype(np.uint32)
    for sampler, seed in itertools.product(SORTED, range(5)):
        draws = make_draws(sampler, core.RandomStream(seed=seed), num_draws, total)
        counts = np.diff(draws.counts_below(boundaries).astype(np.int64)).tolist()
        assert_counts_are_shares(sampler, counts, num_draws, masses, total)
        # The first half as one tile of 4,096 units: their counts are not rounded one by one.
        halves = [sum(counts[:4096]), sum(counts[4096:])]
        assert_counts_are_shares(sampler, halves, num_draws, [4096, total - 4096], total)


@for_all(st.sampled_from([MULTINOMIAL, *SORTED]), streams, small_budgets, tile_masses)
def test_every_threshold_is_in_one_tile(sampler, stream, num_draws, masses):
    """TilePositions.contains: each threshold lies in exactly one tile, one with mass; of a sorted sampler it is the
    tile whose boundaries have its index between their counts."""
    draws = make_draws(sampler, stream, num_draws, sum(masses))
    scaled, fraction = draws.thresholds()
    start, tiles_of = 0, np.zeros(num_draws, dtype=int)
    for mass in masses:
        inside = np.array(core.tile_contains(draws.unit, start, mass, scaled, fraction))
        np.testing.assert_array_equal(
            inside, [start * draws.unit <= t < (start + mass) * draws.unit for t in scaled.tolist()]
        )
        if sampler != MULTINOMIAL:
            first, last = draws.count_below(start), draws.count_below(start + mass)
            np.testing.assert_array_equal(np.flatnonzero(inside), np.arange(first, last))
        tiles_of += inside
        start += mass
    assert (tiles_of == 1).all()


def test_systematic_inclusion_is_its_share():
    """P(tile of 1/8 of a stratum is drawn) = 1/8: 2^14 seeds, deviation 0.0026. Five sigma: false alarm 6e-7
    for each sampler. A number r that is not uniform in [0, total) shows here."""
    total, num_draws, trials = 2**31 + 12345, 64, 2**14
    width = total // num_draws // 8
    start = 17 * total // num_draws + 3 * width  # inside stratum 17, away from its edges
    for sampler in SORTED:
        hits = 0
        for seed in range(trials):
            draws = make_draws(sampler, core.RandomStream(seed=seed), num_draws, total)
            hits += draws.count_below(start + width) - draws.count_below(start)
        assert abs(hits / trials - 1 / 8) < 5 * math.sqrt(1 / 8 * 7 / 8 / trials)
