#pragma once

#include "cpu/rows.h"

namespace santa::cpu {

// Throws std::invalid_argument where a row's range lies outside the cache.
void check_rows(const DecodeParams& p);

// Every row of the call, with exact scores; checks the rows first.
void decode(const DecodeParams& p);

// Every row of the call after check_rows, with scores from elsewhere. pilot_run: pilot_position of core/draw.h.
void decode_with(const DecodeParams& p, const ScoreKeys& score_keys, int pilot_run);

}  // namespace santa::cpu
