// How a row of keys is cut: into tiles (the unit of work and of partial results) and into segments (runs of tiles that
// share one CDF and one budget). Both depend on kv_len and num_samples alone, never on batch size or device: that is
// what makes results batch-invariant.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace santa {

constexpr int kMaxTileKv = 512;

// Keys per tile. Short rows take small tiles, because a few hundred tiles must exist to fill a GPU; long rows take
// large ones, because every tile costs a partial result of group x head_dim floats.
SANTA_HD int tile_kv_of(int64_t kv_len) {
  if (kv_len <= 4096) return 128;
  if (kv_len <= 16384) return 256;
  return kMaxTileKv;
}

// Keys per tile of a row that takes the exact path: no scores have to be kept, so tiles are larger. A row of one tile
// needs no partial results at all.
SANTA_HD int exact_tile_kv_of(int64_t kv_len) {
  if (kv_len <= 8192) return 512;
  return kv_len <= 32768 ? 1024 : 2048;
}

SANTA_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same for operands whose sum stays below 2^32: a 64-bit division takes a GPU a hundred instructions.
SANTA_HD int ceil_div_int(int a, int b) {
  return static_cast<int>((static_cast<unsigned>(a) + static_cast<unsigned>(b) - 1) / static_cast<unsigned>(b));
}

SANTA_HD int num_tiles_of(int64_t kv_len) { return static_cast<int>(ceil_div(kv_len, tile_kv_of(kv_len))); }

// Upper bounds over all lengths up to max_kv_len: the number of tiles is not monotone where the tile grows.
inline int max_num_tiles(int64_t max_kv_len) {
  int bound = num_tiles_of(max_kv_len);
  if (max_kv_len > 4096 && num_tiles_of(4096) > bound) bound = num_tiles_of(4096);
  if (max_kv_len > 16384 && num_tiles_of(16384) > bound) bound = num_tiles_of(16384);
  return bound;
}
inline int max_exact_tiles(int64_t max_kv_len) {
  const auto tiles = [](int64_t kv_len) { return static_cast<int>(ceil_div(kv_len, exact_tile_kv_of(kv_len))); };
  int bound = tiles(max_kv_len);
  if (max_kv_len > 8192 && tiles(8192) > bound) bound = tiles(8192);
  if (max_kv_len > 32768 && tiles(32768) > bound) bound = tiles(32768);
  return bound;
}

// Keys per block of a sampled row: the unit of the uniform budget, and the tile of the persistent CUDA kernel, which
// keeps the scores of a block on chip. A sixteenth of the row, so that 8 KV heads fill a GPU, from 512 keys (a block
// costs a partial result) to 2,048 (its scores have to fit). A multiple of the row's tile.
constexpr int kMinBlockKv = 512;
constexpr int kMaxBlockKv = 2048;
constexpr int kShortRowBlocks = 16;  // the most that a row has as long as its blocks are below kMaxBlockKv

SANTA_HD int block_kv_of(int64_t kv_len) {
  if (kv_len > 16 * (kMaxBlockKv - kMaxTileKv)) return kMaxBlockKv;
  const unsigned length = static_cast<unsigned>(kv_len), tile = static_cast<unsigned>(tile_kv_of(kv_len));
  const unsigned block = ((length + 15) / 16 + tile - 1) & ~(tile - 1);
  return block <= kMinBlockKv ? kMinBlockKv : static_cast<int>(block);
}

// The budget of one row. Proportional: one segment, the whole row, with all S draws. Uniform: segments of equally many
// blocks, at most S of them, each with ceil(S / num_segments) draws; the total is below 2 S.
struct SegmentPlan {
  int tiles_per_segment;
  int num_segments;
  int draws;  // per query head and segment
};

SANTA_HD SegmentPlan plan_segments(int num_tiles, int tiles_per_block, int num_samples, bool uniform) {
  if (!uniform || num_tiles == 0) return {num_tiles, num_tiles > 0 ? 1 : 0, num_samples};
  const int num_blocks = ceil_div_int(num_tiles, tiles_per_block);
  const int tiles_per_segment = ceil_div_int(num_blocks, num_samples) * tiles_per_block;
  const int num_segments = ceil_div_int(num_tiles, tiles_per_segment);
  return {tiles_per_segment, num_segments, ceil_div_int(num_samples, num_segments)};
}

// Rows below this length take the exact path when the caller gives no min_sampled_len. Sampling reads kv_len keys and
// up to S * gqa_group_size value rows where exact attention reads kv_len of each: it can pay only if the budget is a
// small part of the row (a quarter at most), and if the row is long enough for its reads to outweigh the extra stages.
SANTA_HD int64_t default_min_sampled_len(int64_t num_samples, int64_t gqa_group_size) {
  const int64_t budget_rows = 4 * num_samples * gqa_group_size;
  return budget_rows > 8192 ? budget_rows : 8192;
}

}  // namespace santa
