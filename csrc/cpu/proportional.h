// Rows under the proportional budget: thresholds run over the row's whole CDF (core/samplers.h), so all of it is scored
// before anything is drawn. score -> plan -> gather, as on the GPU.
#pragma once

#include "cpu/rows.h"

namespace santa::cpu {

void decode_proportional(const DecodeParams& p, const ScoreKeys& score_keys);

// Counts per row of one tile: adds one to counts[row_at(threshold)] for each of the draws [first, last) that falls into
// the tile. `cumulative` holds the running sums of the tile's row weights.
void draw_tile(const Draws& draws, uint32_t first, uint32_t last, uint32_t tile_start, uint32_t tile_mass,
               const uint32_t* cumulative, int num_rows, int32_t* counts);

}  // namespace santa::cpu
