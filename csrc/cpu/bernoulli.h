#pragma once

#include "bernoulli_params.h"

namespace santa::cpu {

// Draws the features of every (batch row, KV head): fills the draws' workspace and features_read.
void draw_features(const BernoulliParams& p);

// All stages, with Bernoulli scores; throws std::invalid_argument where a row's range lies outside the cache.
void decode_bernoulli(const BernoulliParams& p);

// Throws std::invalid_argument, before anything is written, where a row has no place.
void append(const AppendParams& p);

}  // namespace santa::cpu
