"""csrc/core, through the test-only module `santa_core_test`: random numbers, CDF draws, tiling, softmax
states.

The laws are exact and are tested in Python integers, apart from the uniformity of the random bits.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import build_test_module
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import santa

core = build_test_module.build()


def for_all(*strategies):
    """200 examples, the same in every run."""
    return lambda test: settings(max_examples=200, deadline=None, derandomize=True)(given(*strategies)(test))


MULTINOMIAL, STRATIFIED, SYSTEMATIC, GROUPED = (
    core.Sampler.MULTINOMIAL,
    core.Sampler.STRATIFIED,
    core.Sampler.SYSTEMATIC,
    core.Sampler.GROUPED,
)
SORTED = [STRATIFIED, SYSTEMATIC, GROUPED]
MAX_TOTAL = 2**32 - 1  # what Draws promises to take: a total of 32 bits
MAX_DRAWS = 2**31 - 1  # and R < 2^31; num_samples and gqa_group_size at their limits need 2^30

int64s = st.integers(-(2**63), 2**63 - 1)
uint32s = st.integers(0, 2**32 - 1)
kv_lens = st.integers(0, 2**31 - 1)
totals = st.one_of(st.integers(1, 100), st.integers(1, MAX_TOTAL), st.just(2**31), st.just(MAX_TOTAL))
small_budgets = st.integers(1, 600)
budgets = st.one_of(st.integers(1, 5000), st.integers(1, MAX_DRAWS), st.sampled_from([2**20, 2**20 * 1024, MAX_DRAWS]))
streams = st.builds(core.RandomStream, int64s, int64s, kv_lens, st.integers(0, 2**16))


def make_draws(sampler, stream, num_draws, total, segment=0):
    return core.Draws(sampler=sampler, stream=stream, segment=segment, num_draws=num_draws, total=total)


# float8 -----------------------------------------------------------------------------------------------


def test_float8_is_torchs():
    """All 256 codes of float8_e4m3fn: the same bits as torch gives, -0 and subnormals included; NaN stays NaN."""
    codes = np.arange(256, dtype=np.uint8)
    ours = torch.from_numpy(core.float_of_e4m3(codes))
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    numbers = ~expected.isnan()
    assert torch.equal((~numbers).nonzero().flatten(), torch.tensor([0x7F, 0xFF]))
    assert torch.equal(ours[numbers].view(torch.int32), expected[numbers].view(torch.int32))
    assert ours[~numbers].isnan().all()


# Random numbers ---------------------------------------------------------------------------------------


def philox_model(counter, key):
    """Philox4x32-10 in Python integers, from the paper's equations (Salmon et al., SC 2011, section 4.2)."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 % 2**32, (p0 >> 32) ^ x3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that Random123 ships (kat_vectors, philox4x32 10)."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert core.philox4x32_10(words[0], words[1]) == words[2]
    assert philox_model(words[0], words[1]) == words[2]


@for_all(st.lists(uint32s, min_size=4, max_size=4), st.lists(uint32s, min_size=2, max_size=2))
def test_philox_equals_its_equations(counter, key):
    assert core.philox4x32_10(counter, key) == philox_model(counter, key)


@for_all(int64s, int64s, kv_lens, uint32s.filter(lambda head: head < 2**31), uint32s, uint32s)
def test_stream_is_the_documented_function(seed, row_seed, kv_len, head, segment, draw):
    """A seed reproduces its draws in every release, so the function is pinned: the identity is hashed into a
    key, and the counter is (draw, segment, 0, 0)."""
    seed_bits, row_bits = seed % 2**64, row_seed % 2**64
    identity = (row_bits % 2**32, row_bits >> 32, kv_len, head)
    key = philox_model(identity, (seed_bits % 2**32, seed_bits >> 32))[:2]
    low, high = philox_model((draw, segment, 0, 0), key)[:2]
    stream = core.RandomStream(seed=seed, row_seed=row_seed, kv_len=kv_len, head=head)
    assert stream.key == key
    assert stream.bits(segment=segment, draw=draw) == (high << 32 | low)


@for_all(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@example(2**64 - 1, 2**64 - 1)
def test_mul_high(a, b):
    assert core.mul_high(a, b) == a * b >> 64


def chi_square_z(values: np.ndarray, bins: int) -> float:
    """The chi-square statistic of `values` in [0, bins) against uniformity, as a standard normal
    (Wilson-Hilferty)."""
    expected = len(values) / bins
    statistic = float(((np.bincount(values, minlength=bins) - expected) ** 2).sum() / expected)
    freedom = bins - 1
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


def bits_along(axis: str, count: int) -> np.ndarray:
    """The 64-bit numbers met by counting up one component of the identity, the others fixed."""
    if axis == "draw":
        return core.RandomStream(seed=1, kv_len=32768).bits_of(segment=0, first=0, count=count)
    if axis == "segment":
        stream = core.RandomStream(seed=1, kv_len=32768)
        return np.array([stream.bits(segment, 0) for segment in range(count)], dtype=np.uint64)
    identities = ({"kv_len": 1000, axis: i} for i in range(count))
    return np.array([core.RandomStream(**identity).bits(0, 0) for identity in identities], dtype=np.uint64)


AXES = ["seed", "row_seed", "kv_len", "head", "segment", "draw"]


@pytest.mark.parametrize("axis", AXES)
def test_bits_are_uniform(axis):
    """Every byte of 2^15 consecutive numbers, and the pairs of top nibbles of neighbours, by chi-square with
    255 degrees of freedom: consecutive steps of a request (kv_len + 1) are as good as independent. 9
    statistics an axis, 54 in all, each above 5 sigma with probability 3e-7, or below -5 (too even) as rarely:
    false alarm 4e-5 over the choice of seeds."""
    bits = bits_along(axis, 2**15)
    statistics = {f"byte {i}": chi_square_z((bits >> np.uint64(8 * i)).astype(np.uint8), 256) for i in range(8)}
    top = (bits >> np.uint64(60)).astype(np.int64)
    statistics["serial pairs"] = chi_square_z(top[0::2] * 16 + top[1::2], 256)
    assert all(abs(z) < 5 for z in statistics.values()), statistics


@pytest.mark.parametrize(
    ("component", "width"),
    [("seed", 64), ("row_seed", 64), ("kv_len", 31), ("head", 31), ("segment", 32), ("draw", 32)],
)
def test_each_bit_of_the_identity_changes_the_draw(component, width):
    """Flipping any one bit of the identity changes about half of the 64 bits. A binomial (64, 1/2) is outside
    [8, 56] with probability 8e-11: false alarm 2e-8 over all 254 bits. A component that is ignored, cut short
    or mixed in without hashing gives 0 to 2 changed bits."""

    def bits(**identity):
        where = {"segment": identity.pop("segment", 0), "draw": identity.pop("draw", 0)}
        return core.RandomStream(**identity).bits(**where)

    base = bits()
    for bit in range(width):
        value = 1 << bit if bit < 63 else -(2**63)
        changed = bin(base ^ bits(**{component: value})).count("1")
        assert 8 <= changed <= 56, f"{component} bit {bit}: {changed} of 64 bits changed"


@pytest.mark.parametrize("component", ["seed", "row_seed", "kv_len", "head", "segment"])
def test_streams_are_independent(component):
    """The same draws of two streams that differ by one in one component agree in half of their bits. 2^12
    draws of 64 bits: the share is 0.5 with deviation 0.5 / 512. Five tests at 5 sigma, two-sided: false alarm
    3e-6."""
    count = 2**12

    def bits(value):
        segment = value if component == "segment" else 0
        identity = {"kv_len": 4096, **({} if component == "segment" else {component: value})}
        return core.RandomStream(**identity).bits_of(segment=segment, first=0, count=count)

    agree = np.unpackbits((~(bits(7) ^ bits(8))).view(np.uint8)).mean()
    assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(64 * count), agree


def test_components_of_the_identity_are_not_mixed_up():
    """(seed 1, row seed 2) is not (2, 1), and so on: 2 to each pair of components, all different keys."""
    identities = [
        dict.fromkeys(pair, 0) | {pair[0]: low, pair[1]: high}
        for pair in itertools.combinations(["seed", "row_seed", "kv_len", "head"], 2)
        for low, high in [(1, 2), (2, 1)]
    ]
    assert len({tuple(core.RandomStream(**identity).key) for identity in identities}) == len(identities)


# Shares to integers ------------------------------------------------------------------------------------


@for_all(st.floats(0, 1.25, width=32))
@example(0.0)
@example(2.0**-149)
@example(1.0)
@example(1.25)
def test_shares_round_down_to_units_and_keep_one(share):
    """floor(share * 2^31) + 1 and floor(share * 2^30) + 1: monotone, and whatever has mass can be drawn."""
    assert core.tile_mass_of(share) == (math.floor(share * 2**31) + 1 if share > 0 else 0)
    assert core.row_weight_of(share) == (math.floor(share * 2**30) + 1 if share > 0 else 0)


@pytest.mark.parametrize("share", [math.nan, -1.0, -math.inf])
def test_shares_that_are_no_probability(share):
    assert core.tile_mass_of(share) == core.row_weight_of(share) == 0


@pytest.mark.parametrize("share", [math.inf, 5.0, 2.0, 1.5])
def test_shares_above_their_range(share):
    """Tiles are capped at 1.25 and rows at 2: no overflow, no undefined conversion. A row's tiles share its mass, so
    their total stays in 32 bits even with one unit for each of the 2^22 tiles of the longest row."""
    assert core.tile_mass_of(share) == 5 * 2**29 + 1 < 2**32
    assert core.row_weight_of(share) == int(min(share, 2) * 2**30) + 1 < 2**32
    assert core.tile_mass_of(1.0) + core.max_num_tiles(2**31 - 1) < 2**32


# Thresholds -------------------------------------------------------------------------------------------


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


# Rows of a tile ---------------------------------------------------------------------------------------


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


# Tiles and segments -----------------------------------------------------------------------------------


def test_tiles_cover_every_length_and_max_num_tiles_bounds_them():
    """Every length up to 70,000: the tiles hold the row without an empty one, and max_num_tiles is the
    largest number of tiles of any length so far: enough, and no more than needed."""
    lengths = np.arange(70_001)
    tile_kv, tiles = core.tile_kv_of(lengths), core.num_tiles_of(lengths)
    assert tile_kv.max() <= 512
    assert (tiles.astype(np.int64) * tile_kv >= lengths).all()
    assert ((tiles.astype(np.int64) - 1) * tile_kv < np.maximum(lengths, 1)).all()
    np.testing.assert_array_equal(core.max_num_tiles(lengths), np.maximum.accumulate(tiles))


@for_all(kv_lens, kv_lens)
@example(2**31 - 1, 2**31 - 1)
def test_max_num_tiles_of_long_rows(a, b):
    """The bound holds for any pair of lengths up to 2^31 - 1."""
    assert core.num_tiles_of(min(a, b)) <= core.max_num_tiles(max(a, b))
    assert core.num_tiles_of(a) * core.tile_kv_of(a) >= a


def test_blocks_of_every_length():
    """Every length up to 70,000: a block is a sixteenth of the row, rounded up to whole tiles, between 512 and 2,048
    keys. It never shrinks as the row grows, and up to 32,768 keys at most 16 cover the row. max_num_blocks bounds the
    blocks of all lengths so far, and is no more than needed once 16 of the smallest blocks are."""
    lengths = np.arange(70_001)
    block_kv, tile_kv = core.block_kv_of(lengths).astype(np.int64), core.tile_kv_of(lengths).astype(np.int64)
    sixteenth = -(-lengths // 16)
    np.testing.assert_array_equal(block_kv, np.clip(-(-sixteenth // tile_kv) * tile_kv, 512, 2048))
    assert (block_kv % tile_kv == 0).all()
    assert block_kv.min() == 512 and block_kv.max() == 2048
    assert (np.diff(block_kv) >= 0).all()
    blocks = -(-lengths // block_kv)
    assert blocks[:32_769].max() == 16
    needed, bound = np.maximum.accumulate(blocks), core.max_num_blocks(lengths)
    assert (bound >= needed).all()
    np.testing.assert_array_equal(bound[8192:], needed[8192:])


@for_all(kv_lens, kv_lens)
@example(2**31 - 1, 2**31 - 1)
@example(32_769, 2**31 - 1)
def test_blocks_of_long_rows(a, b):
    """Without overflow up to 2^31 - 1 keys, where max_num_blocks bounds any pair of lengths."""
    for kv_len in (a, b):
        block_kv, tile_kv = core.block_kv_of(kv_len), core.tile_kv_of(kv_len)
        assert block_kv == min(max(-(-kv_len // (16 * tile_kv)) * tile_kv, 512), 2048)
        assert -(-kv_len // block_kv) <= core.max_num_blocks(max(a, b))


@for_all(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
@example(2**31 - 1, 2**31 - 1)
@example(2**31 - 1, 1)
def test_ceil_div_int(a, b):
    assert core.ceil_div_int(a, b) == -(-a // b)


def assert_uniform_plan(num_tiles, tiles_per_block, num_samples):
    tiles_per_segment, num_segments, draws = core.plan_segments(num_tiles, tiles_per_block, num_samples, True)
    what = (
        f"{num_tiles} tiles, {tiles_per_block} to a block, S {num_samples}: {(tiles_per_segment, num_segments, draws)}"
    )
    num_blocks = -(-num_tiles // tiles_per_block)
    assert tiles_per_segment % tiles_per_block == 0, what
    assert num_segments <= min(num_samples, num_blocks), what
    assert tiles_per_segment * (num_segments - 1) < num_tiles <= tiles_per_segment * num_segments, what
    assert draws == -(-num_samples // num_segments), what
    assert num_samples <= num_segments * draws < 2 * num_samples, what
    # The same blocks, each of one tile: the same segments of blocks, the same draws.
    in_blocks = [tiles_per_segment // tiles_per_block, num_segments, draws]
    assert core.plan_segments(num_blocks, 1, num_samples, True) == in_blocks, what


@pytest.mark.parametrize("tiles_per_block", [1, 2, 3, 4, 16])
def test_uniform_budget_exhaustive(tiles_per_block):
    """Segments of equally many whole blocks cover the row without an empty one, at most S of them, with ceil(S /
    segments) draws each: S or more, below 2 S. How finely blocks are cut into tiles does not matter."""
    for num_tiles, num_samples in itertools.product(range(1, 200), range(1, 200)):
        assert_uniform_plan(num_tiles, tiles_per_block, num_samples)


@for_all(st.integers(1, 4_194_304), st.integers(1, 16), st.integers(1, 2**20))
@example(4_194_304, 1, 1)
@example(4_194_304, 1, 2**20)
@example(4_194_304, 4, 2**20)
@example(4_194_303, 4, 1)
@example(1, 1, 2**20)
@example(1, 4, 2**20)
def test_uniform_budget_of_long_rows(num_tiles, tiles_per_block, num_samples):
    assert_uniform_plan(num_tiles, tiles_per_block, num_samples)


@pytest.mark.parametrize("num_samples", [1, 3, 16, 64, 1000])
def test_uniform_budget_of_every_length(num_samples):
    """What the stages see, tiles of a row, and what the persistent kernel sees, its blocks, are cut into the same
    segments of keys: lengths up to 70,000, those next to a multiple of 128 and some between."""
    lengths = {n + step for n in range(128, 70_001, 128) for step in (-1, 0, 1)} | set(range(1, 70_001, 61))
    for kv_len in sorted(lengths):
        tile_kv, block_kv = core.tile_kv_of(kv_len), core.block_kv_of(kv_len)
        tiles = core.plan_segments(core.num_tiles_of(kv_len), block_kv // tile_kv, num_samples, True)
        blocks = core.plan_segments(-(-kv_len // block_kv), 1, num_samples, True)
        assert tiles[1:] == blocks[1:], kv_len
        assert tiles[0] * tile_kv == blocks[0] * block_kv, kv_len


@for_all(st.integers(0, 4_194_304), st.integers(1, 16), st.integers(1, 2**20))
def test_proportional_budget_is_one_segment(num_tiles, tiles_per_block, num_samples):
    plan = core.plan_segments(num_tiles, tiles_per_block, num_samples, False)
    assert plan == [num_tiles, min(num_tiles, 1), num_samples]
    assert core.plan_segments(0, tiles_per_block, num_samples, True)[1] == 0


@for_all(st.integers(0, 2**20), st.integers(1, 1024))
def test_default_min_sampled_len(num_samples, group_size):
    """The documented rule, and the same in C++ and Python."""
    expected = max(8192, 4 * num_samples * group_size)
    assert core.default_min_sampled_len(num_samples=num_samples, gqa_group_size=group_size) == expected
    assert santa.default_min_sampled_len(num_samples, group_size) == expected


# Softmax states ---------------------------------------------------------------------------------------


EMPTY = core.empty_softmax_state()
states = st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(1, 512, width=32))


@for_all(states, states)
def test_merge_is_log_sum_exp(a, b):
    """log2(a + b) in float64, within a few roundings of float32; the order of the two does not matter, bit
    for bit."""
    merged = core.merge(a, b)
    assert merged == core.merge(b, a)
    top = max(a[0], b[0])
    expected = top + math.log2(sum(s * 2.0 ** max(m - top, -1000.0) for m, s in (a, b)))
    assert abs(core.log2_sum(merged) - expected) <= 2**-22 * (abs(expected) + 10)


@for_all(states)
def test_empty_state_is_the_identity(state):
    assert core.merge(state, EMPTY) == core.merge(EMPTY, state) == state


def test_merge_of_what_is_not_finite():
    """No keys: -inf, not NaN. A NaN score makes the total NaN, whatever it is merged with."""
    assert core.merge(EMPTY, EMPTY) == (-math.inf, 0.0)
    assert core.log2_sum(EMPTY) == -math.inf
    for other in [EMPTY, (1.0, 1.0), (math.inf, 1.0), (math.nan, math.nan)]:
        for merged in (core.merge((math.nan, math.nan), other), core.merge(other, (math.nan, math.nan))):
            assert math.isnan(core.log2_sum(merged)), other


def test_factors_of_heads_that_take_part():
    """exp2(tile_max - segment_lse), and 0 for a head whose log-sum-exp is not finite."""
    assert core.tile_factor(3.0, 5.0) == core.segment_factor(3.0, 5.0) == 0.25
    assert core.tile_factor(-math.inf, 5.0) == 0.0
    for value in (math.nan, math.inf, -math.inf):
        assert not core.is_finite(value)
        assert core.tile_factor(3.0, value) == core.segment_factor(3.0, value) == 0.0
    assert core.is_finite(-3.4e38) and core.is_finite(0.0)
