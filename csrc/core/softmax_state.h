// The running state of a softmax in base 2: the maximum and the sum of exp2(score - max). Merging states is the algebra
// by which tiles, warps and splits are combined; it is applied in a fixed order everywhere.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace santa {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct SoftmaxState {
  float max;  // -inf: no key yet
  float sum;
};

SANTA_HD SoftmaxState empty_softmax_state() { return {-INFINITY, 0.0f}; }

// exp2(score - max) where max is the largest of the scores: a score of -inf weighs 0 even if there is no larger one.
// NaN scores stay NaN; the maximum passes over them.
SANTA_HD float exp2_below(float score, float max) { return score == -INFINITY ? 0.0f : exp2f(score - max); }

SANTA_HD SoftmaxState merge(SoftmaxState a, SoftmaxState b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * exp2_below(a.max, max) + b.sum * exp2_below(b.max, max)};
}

// log2 of the total; -inf for an empty state, NaN where any score was NaN.
SANTA_HD float log2_sum(SoftmaxState state) { return state.max + log2f(state.sum); }

}  // namespace santa
