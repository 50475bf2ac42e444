#pragma once

#include <functional>

#include "params.h"

namespace santa::cpu {

struct TileIndex {
  int batch_index, kv_head, tile;
};

// The scores, base 2, of keys [first, first + count) of the row for every head of the group: [gqa_group_size, stride].
using ScoreKeys =
    std::function<void(TileIndex at, const RowShape& row, int64_t first, int count, float* scores, int64_t stride)>;

// Throws std::invalid_argument where a row's range lies outside the cache.
void check_rows(const DecodeParams& p);

// Runs every stage, with exact scores; checks the rows first.
void decode(const DecodeParams& p);

// Runs every stage after check_rows, with scores from elsewhere.
void decode_with(const DecodeParams& p, const ScoreKeys& score_keys);

int element_size(Dtype dtype);

// Query head h of the tile's group, widened to q [head_dim].
void widen_query(const DecodeParams& p, TileIndex at, int h, float* q);

// Counts per row of one tile: adds one to counts[row_at(threshold)] for each of the draws [first, last) that falls into
// the tile. `cumulative` holds the running sums of the tile's row weights.
void draw_tile(const Draws& draws, uint32_t first, uint32_t last, uint32_t tile_start, uint32_t tile_mass,
               const uint32_t* cumulative, int num_rows, int32_t* counts);

}  // namespace santa::cpu
