"""How csrc/core cuts rows into tiles, blocks and segments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.core import core, kv_lens
from helpers.properties import for_all
from hypothesis import example
from hypothesis import strategies as st

import santa


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
