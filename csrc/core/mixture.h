// From softmax states to the shares that are sampled under the proportional budget. A stream samples one query head
// (multinomial, stratified, systematic) or the mean distribution of all query heads of a KV head (grouped); everything
// here is a share of the mass of a row. A head whose log-sum-exp is not finite takes no part: its output is NaN, its
// neighbours' are not.
#pragma once

#include <cmath>

#include "core/macros.h"
#include "core/softmax_state.h"

namespace santa {

SANTA_HD bool is_finite(float x) { return x - x == 0.0f; }

// exp2(tile_max - row_lse): turns exp2(score - tile_max) into a probability.
SANTA_HD float tile_factor(float tile_max, float row_lse) {
  return is_finite(row_lse) ? exp2_below(tile_max, row_lse) : 0.0f;
}

}  // namespace santa
