// The shape of the score warps of persistent.cuh, and what they take of shared memory.
#pragma once

#include "bernoulli_params.h"
#include "cuda/decode/heuristics.h"

namespace santa::cuda {

constexpr int kStageFeatures = 16;  // the K of a matrix product
constexpr int kFeatureStepKeys = 128;
constexpr int kFeatureBytes = kFeatureStepKeys * 2;  // of a step
constexpr int kStageBytes = kStageFeatures * kFeatureBytes;
constexpr int kFeatureStages = 4;  // of a warp's ring: all but the one that is scored are in flight
constexpr int kListPlaces = 2;     // for the block that is scored and the next

// A list: what persistent.cuh calls FeatureList, then counts [kPersistentHeads][head_dim + 8]. The pitch lets the lanes
// of a fragment read from different banks.
constexpr int kListHeadBytes = 96;
constexpr int count_pitch(int head_dim) { return head_dim + 8; }
constexpr int list_bytes(int head_dim) {
  return (kListHeadBytes + kPersistentHeads * count_pitch(head_dim) * 2 + 127) / 128 * 128;
}

inline ScoreWarps feature_score_warps(const DecodeParams& p) {
  return {max_score_warps(p.head_dim), kFeatureStages * kStageBytes,
          kListPlaces * list_bytes(p.head_dim) + 256};  // 256: rings are aligned
}

// Largest B whose counts are whole in q's dtype.
inline int max_persistent_draws(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 256 : 2048; }

}  // namespace santa::cuda
