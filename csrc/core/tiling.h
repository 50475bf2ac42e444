// How a row is cut: its keys into tiles (what is drawn from in one go) and parts (runs of tiles that leave one partial
// result), the query heads of a KV head into blocks that share their samples. All of it depends on the row's length and
// on the shape of the model, never on the batch or on the device: that is what makes results batch-invariant.
#pragma once

#include <algorithm>
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

// Query heads of a KV head that are scored with one read of its keys and, under `grouped` in one pass, share their
// samples: the N of the matrix instruction. Larger groups are cut into blocks as equal as can be.
constexpr int kHeadBlock = 8;

SANTA_HD int num_head_blocks_of(int gqa_group_size) { return ceil_div_int(gqa_group_size, kHeadBlock); }

// The tile of a row that is sampled in one pass: what a warp scores, draws from and hands on. Short rows take small
// ones, so that there is a tile for each of a GPU's warps; keys by features come 128 at a time.
constexpr int kDrawTileKv = 128;  // at most

SANTA_HD int draw_tile_kv_of(int64_t kv_len, bool by_features) {
  return kv_len <= 16384 && !by_features ? 64 : kDrawTileKv;
}

// With proposal keys a warp does all there is to do for a tile, so it has as many keys as there is room for the scores
// of: those of a block of up to 4 heads twice as many.
constexpr int kProposalScores = 1024;
constexpr int kMostProposalTileKv = kProposalScores / 4;

SANTA_HD int proposal_tile_kv_of(int block_heads) { return kProposalScores / (block_heads <= 4 ? 4 : 8); }

// Keys per part of such a row. One row alone should keep a GPU busy: 256 parts over all its KV heads and head blocks.
// A part costs a partial result, so it has 256 keys at least; beyond 4,096 keys longer parts save nothing.
constexpr int kMinPartKv = 256;
constexpr int kMaxPartKv = 4096;
constexpr int kPartsWanted = 256;
constexpr int kMostProposalPartKv = 2048;  // with proposal keys, which take less time

// The smallest power of two with which kPartsWanted parts are enough, within those limits.
SANTA_HD int part_kv_of(int64_t kv_len, int num_units, int most = kMaxPartKv) {
#if defined(__CUDA_ARCH__)
  const int bits = 64 - __clzll(kv_len * num_units - 1) - (__ffs(kPartsWanted) - 1);
  return kv_len == 0 ? kMinPartKv : min(max(1 << max(min(bits, 30), 0), kMinPartKv), most);
#else
  int part_kv = kMinPartKv;
  while (part_kv < most && static_cast<int64_t>(part_kv) * kPartsWanted < kv_len * num_units) part_kv *= 2;
  return part_kv;
#endif
}

SANTA_HD int num_parts_of(int kv_len, int part_kv) {  // part_kv, or that of a tile, is a power of two
#if defined(__CUDA_ARCH__)
  const int shift = __ffs(part_kv) - 1;
  return (kv_len >> shift) + ((kv_len & (part_kv - 1)) != 0 ? 1 : 0);
#else
  return ceil_div_int(kv_len, part_kv);
#endif
}

// Upper bound over all lengths up to max_kv_len: a row has most parts just before its parts grow, or at the end.
inline int max_num_parts(int64_t max_kv_len, int num_units, int most = kMaxPartKv) {
  int bound = static_cast<int>(ceil_div(max_kv_len, part_kv_of(max_kv_len, num_units, most)));
  for (int64_t part_kv = kMinPartKv; part_kv < most; part_kv *= 2) {
    const int64_t longest = part_kv * kPartsWanted / num_units;  // with parts of this size
    if (longest < max_kv_len) bound = std::max(bound, static_cast<int>(ceil_div(longest, part_kv)));
  }
  return bound;
}

// Rows below this length take the exact path when the caller gives no min_sampled_len. Sampling reads kv_len keys and
// up to S * gqa_group_size value rows where exact attention reads kv_len of each: it can pay only if the budget is a
// small part of the row (a quarter at most), and if the row is long enough for its reads to outweigh the extra stages.
SANTA_HD int64_t default_min_sampled_len(int64_t num_samples, int64_t gqa_group_size) {
  const int64_t budget_rows = 4 * num_samples * gqa_group_size;
  return budget_rows > 8192 ? budget_rows : 8192;
}

}  // namespace santa
