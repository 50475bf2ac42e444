"""csrc/core/draw.h: the pilot, the shares and the draws of rows that are sampled in one pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.core import GROUPED, SYSTEMATIC, core, streams
from helpers.properties import for_all
from hypothesis import example
from hypothesis import strategies as st

from santa import reference

sampled_lens = st.integers(1, 2**31 - 1)


@for_all(sampled_lens, st.sampled_from([1, 8]))
@example(256, 8)
@example(257, 1)
@example(257, 8)
@example(2**31 - 1, 8)
def test_pilot(kv_len, run):
    """Different positions, ascending, inside the row, which are the oracle's; their weights add up to the row."""
    size = core.pilot_size(kv_len)
    assert size == min(kv_len, 256)
    i = np.arange(size)
    positions = core.pilot_position(i, kv_len, run)
    assert (np.diff(positions) > 0).all() and positions[0] == 0 and positions[-1] == kv_len - 1
    expected, weights = reference.pilot(kv_len, run)
    np.testing.assert_array_equal(positions, expected.numpy())
    np.testing.assert_allclose(core.pilot_log2_weight(i, kv_len), weights.log2().numpy(), rtol=1e-6, atol=1e-6)
    assert math.isclose(float(weights.sum()), kv_len, rel_tol=1e-12)


def test_shares():
    """The tile's part of the level's mass, between a quarter of its part of the keys and 1; never NaN."""
    assert core.streaming_share(2.0, 2.0, 5.0, 128, 4096) == 0.25
    assert core.streaming_share(1.0, 16.0, 3.0, 128, 4096) == 1.0
    floor = np.float32(0.25 * 128 / 4096)
    nothing = (-math.inf, 0.0)
    for tile, level in ((nothing, 5.0), ((-43.0, 8.0), 5.0), (nothing, -math.inf), ((3.0, 1.0), math.inf)):
        assert core.streaming_share(*tile, level, 128, 4096) == floor
    for tile in ((3.0, math.nan), (-math.inf, math.nan), (math.inf, math.nan)):
        assert core.streaming_share(*tile, 5.0, 128, 4096) == floor
    for tile, level in (((3.0, 1.0), -math.inf), ((200.0, 1.0), -200.0)):
        assert core.streaming_share(*tile, level, 128, 4096) == 1.0
    assert core.uniform_share(77, 4173) == np.float32(77) / np.float32(4173)


@for_all(st.integers(1, 2**20))
@example(2**20)
def test_units_fit_32_bits(num_samples):
    """A tile of which one head expects S draws, over one key or evenly: its units and any offset stay below 2^32, and
    no unit is wasted: one more bit would not do, or there are as many as grouped draws have."""
    bits = core.unit_bits_of(SYSTEMATIC, num_samples)
    assert core.unit_bits_of(GROUPED, num_samples) == 24
    assert bits == 24 or (num_samples << (bits + 1)) > 2**31 - 256
    for keys in (1, 128):
        units = int(core.draw_units(num_samples / keys, float(num_samples), bits)) * keys
        assert units <= 2**31 and units + (1 << bits) < 2**32
        assert units >= num_samples << bits
    assert core.inclusion_units(1e30) * 128 + (1 << 24) < 2**32


@for_all(st.floats(0, 2, width=32), st.integers(0, 24))
def test_units(expected, bits):
    """Rounded to the nearest unit, and to one at least: whatever has mass can be drawn."""

    def off(units: int, unit_bits: int) -> float:
        return abs(units - min(expected, 1.0) * 2**unit_bits)

    units, included = int(core.draw_units(expected, 1.0, bits)), int(core.inclusion_units(expected))
    if expected == 0:
        assert units == included == 0
        return
    # From 2^23 units on, adding a half to a float can take it to the next one.
    assert units >= 1 and (units == 1 or off(units, bits) <= (0.5 if units < 2**23 else 1.0))
    assert 1 <= included <= 2**24 and (included == 1 or off(included, 24) <= (0.5 if included < 2**23 else 1.0))
    if units == 1:
        assert min(expected, 1.0) * 2**bits < 1.5
    assert core.draw_units(math.nan, 1.0, bits) == core.draw_units(-1.0, 1.0, bits) == 0


tile_sizes = st.sampled_from([64, 128])


@for_all(streams, st.integers(0, 2**24 - 1), tile_sizes, st.integers(0, 24))
def test_streaming_offsets_are_those_of_tiles(stream, tile, tile_kv, bits):
    """A number of its own for each tile, below a draw."""
    (offset,) = core.tile_offsets(core.Budget.STREAMING, stream, [tile * tile_kv], tile_kv, 2**31 - 1, 1, bits)
    assert offset < 1 << bits
    assert offset == (stream.bits(tile, 0) >> (64 - bits) if bits else 0)


@for_all(streams, st.integers(1, 200_000), st.integers(1, 2**23), tile_sizes, st.integers(0, 24))
@example(core.RandomStream(), 200_000, 2**23, 128, 24)
@example(core.RandomStream(), 16_384, 2**23, 64, 24)
def test_uniform_offsets_are_one_line(stream, kv_len, num_draws, tile_kv, bits):
    """A tile begins where R first / n draws and the random offset have come to, modulo whole draws."""
    first = np.arange(0, kv_len, tile_kv)
    offsets = core.tile_offsets(core.Budget.UNIFORM, stream, first, tile_kv, kv_len, num_draws, bits).astype(np.int64)
    assert (offsets < 1 << bits).all()
    start = stream.bits(0, 0) >> 32
    for tile in {0, len(first) // 2, len(first) - 1}:
        gone_on = ((num_draws * int(first[tile]) % kv_len) << 32) // kv_len
        assert offsets[tile] == ((start + gone_on) % 2**32) >> (32 - bits)


@pytest.mark.parametrize("tile_kv", [64, 128])
@pytest.mark.parametrize("num_draws", [1, 64, 300])
def test_uniform_draws_add_up_to_the_budget(num_draws, tile_kv):
    """Over a row of equal keys: R draws, up to the rounding of its units."""
    kv_len = 4173
    first = np.arange(0, kv_len, tile_kv)
    units = int(core.inclusion_units(num_draws / kv_len))
    for seed in range(200):
        stream = core.RandomStream(seed)
        offsets = core.tile_offsets(core.Budget.UNIFORM, stream, first, tile_kv, kv_len, num_draws, 24)
        total = 0
        for begin, offset in zip(first, offsets, strict=True):
            keys = min(tile_kv, kv_len - int(begin))
            total += int(core.draws_between(np.arange(keys) * units, units, offset, 24).sum())
        assert abs(total - num_draws) <= 1
