#pragma once

#include "params.h"

namespace santa::cpu {

// Runs every stage; throws std::invalid_argument where a row's range lies outside the cache.
void decode(const DecodeParams& p);

// Counts per row of one tile: adds one to counts[row_at(threshold)] for each of the draws [first, last) that falls into
// the tile. `cumulative` holds the running sums of the tile's row weights.
void draw_tile(const Draws& draws, uint32_t first, uint32_t last, uint32_t tile_start, uint32_t tile_mass,
               const uint32_t* cumulative, int num_rows, int32_t* counts);

}  // namespace santa::cpu
