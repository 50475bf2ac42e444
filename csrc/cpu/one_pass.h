// Rows that are sampled in one pass (core/draw.h): a part of a row goes through its tiles, and each is scored, drawn
// from and gathered before the next.
#pragma once

#include "core/draw.h"
#include "cpu/rows.h"

namespace santa::cpu {

// pilot_run: pilot_position.
void decode_one_pass(const DecodeParams& p, const ScoreKeys& score_keys, int pilot_run);

// How often each key of a tile is drawn, in key order: counts of units [count].
void draw_counts(const uint32_t* units, int count, uint32_t offset, int unit_bits, int32_t* counts);

}  // namespace santa::cpu
