#pragma once

#include <functional>

#include "cpu/rows.h"

namespace santa::cpu {

// Throws std::invalid_argument where a row's range lies outside the cache.
void check_rows(const DecodeParams& p);

// Every row of the call, with exact scores; checks the rows first.
void decode(const DecodeParams& p);

// Every row of the call after check_rows, with scores from elsewhere. pilot_run: pilot_position of core/draw.h.
void decode_with(const DecodeParams& p, const ScoreKeys& score_keys, int pilot_run);

// How rows in one pass get the partial results of their parts, and what a head's log-sum-exp is then, base 2.
struct OnePassStage {
  std::function<void()> run;
  std::function<float(int64_t group, int h, int num_parts)> lse;
};

// The same with another one-pass stage. `score_keys`, of attended_scores, is for rows of the other kinds.
void decode_rows(const DecodeParams& p, const ScoreKeys& score_keys, const OnePassStage& one_pass);

}  // namespace santa::cpu
