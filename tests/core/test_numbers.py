"""How csrc/core stores numbers: float8 codes, shares as integers, softmax states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.core import core
from helpers.properties import for_all
from hypothesis import example
from hypothesis import strategies as st

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
    """exp2(tile_max - row_lse), and 0 for a head whose log-sum-exp is not finite."""
    assert core.tile_factor(3.0, 5.0) == 0.25
    assert core.tile_factor(-math.inf, 5.0) == 0.0
    for value in (math.nan, math.inf, -math.inf):
        assert not core.is_finite(value)
        assert core.tile_factor(3.0, value) == 0.0
    assert core.is_finite(-3.4e38) and core.is_finite(0.0)
