// From softmax states to the shares that are sampled. A stream samples one query head (multinomial, stratified,
// systematic) or the mean distribution of all query heads of a KV head (grouped); everything here is a share of the
// mass of one segment. A head whose log-sum-exp is not finite takes no part: its output is NaN, its neighbours' are
// not.
#pragma once

#include <cmath>

#include "core/macros.h"
#include "core/softmax_state.h"

namespace santa {

SANTA_HD bool is_finite(float x) { return x - x == 0.0f; }

// exp2(tile_max - segment_lse): turns exp2(score - tile_max) into a probability within the segment.
SANTA_HD float tile_factor(float tile_max, float segment_lse) {
  return is_finite(segment_lse) ? exp2_below(tile_max, segment_lse) : 0.0f;
}

// exp2(segment_lse - row_lse): the segment's share of the row; 1 for the proportional budget, whose segment is the row.
SANTA_HD float segment_factor(float segment_lse, float row_lse) {
  return is_finite(row_lse) ? exp2_below(segment_lse, row_lse) : 0.0f;
}

}  // namespace santa
