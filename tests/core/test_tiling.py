"""How csrc/core cuts rows into tiles and parts."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core import core, kv_lens
from helpers.properties import for_all
from hypothesis import example
from hypothesis import strategies as st

import santa
from santa import reference, reference_proposal


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


def test_exact_tiles_of_every_length():
    lengths = np.arange(70_001)
    tiles = -(-lengths // core.exact_tile_kv_of(lengths))
    np.testing.assert_array_equal(core.max_exact_tiles(lengths), np.maximum.accumulate(tiles))


@pytest.mark.parametrize("num_units", [1, 2, 8, 9, 32, 64, 1000, 65_535])
def test_parts_of_every_length(num_units):
    """256 to 4,096 keys: twice as many where 256 parts over all units would not hold the row. max_num_parts bounds the
    parts of all lengths so far, and is at most an eighth more than needed."""
    lengths = np.arange(0, 300_001, 7)
    parts_kv = core.part_kv_of(lengths, num_units)
    assert set(parts_kv.tolist()) <= {256, 512, 1024, 2048, 4096}
    assert (np.diff(parts_kv) >= 0).all()
    assert ((parts_kv == 4096) | (parts_kv * 256 >= lengths * num_units)).all()
    assert ((parts_kv == 256) | (parts_kv // 2 * 256 < lengths * num_units)).all()
    needed = np.maximum.accumulate(-(-lengths // parts_kv))
    bound = core.max_num_parts(lengths, num_units)
    assert (bound >= needed).all() and (bound <= needed + needed // 8 + 1).all()


def test_tiles_of_rows_in_one_pass():
    """64 keys up to 16,384 of them, 128 in longer rows and where keys are stored by features: what the oracle says, and
    every part holds whole tiles."""
    lengths = np.arange(70_001)
    for by_features, pilot_run in ((False, 1), (True, 8)):
        tiles_kv = core.draw_tile_kv_of(lengths, by_features)
        assert tiles_kv.tolist() == [reference.tile_kv(n, pilot_run) for n in range(70_001)]
        assert set(tiles_kv.tolist()) == ({128} if by_features else {64, 128})
        assert (core.part_kv_of(lengths, 1) % tiles_kv == 0).all()
    assert core.draw_tile_kv_of(2**31 - 1, False) == 128


@pytest.mark.parametrize("num_units", [1, 8, 64, 1000])
def test_parts_of_rows_with_proposal_keys(num_units):
    """Those of other rows, up to 2,048 keys, in whole tiles: what the oracle says of them."""
    lengths, most = np.arange(0, 300_001, 7), core.MOST_PROPOSAL_PART_KV
    parts_kv = core.part_kv_of(lengths, num_units, most)
    np.testing.assert_array_equal(parts_kv, np.minimum(core.part_kv_of(lengths, num_units), 2048))
    needed = np.maximum.accumulate(-(-lengths // parts_kv))
    bound = core.max_num_parts(lengths, num_units, most)
    assert (bound >= needed).all() and (bound <= needed + needed // 8 + 1).all()
    for group in range(1, 17):
        block = reference.head_blocks(group)[0]
        tile_kv = core.proposal_tile_kv_of(block.stop - block.start)
        assert tile_kv == reference_proposal.tile_kv(group)
        assert (parts_kv % tile_kv == 0).all()


@for_all(kv_lens, kv_lens, st.integers(1, 2**26))
@example(2**31 - 1, 2**31 - 1, 1)
@example(131_073, 131_072, 1)
def test_parts_of_long_rows(a, b, num_units):
    for kv_len in (a, b):
        assert -(-kv_len // core.part_kv_of(kv_len, num_units)) <= core.max_num_parts(max(a, b), num_units)


@for_all(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
@example(2**31 - 1, 2**31 - 1)
@example(2**31 - 1, 1)
def test_ceil_div_int(a, b):
    assert core.ceil_div_int(a, b) == -(-a // b)


@for_all(st.integers(0, 2**20), st.integers(1, 1024))
def test_default_min_sampled_len(num_samples, group_size):
    """The documented rule, and the same in C++ and Python."""
    expected = max(8192, 4 * num_samples * group_size)
    assert core.default_min_sampled_len(num_samples=num_samples, gqa_group_size=group_size) == expected
    assert santa.default_min_sampled_len(num_samples, group_size) == expected
