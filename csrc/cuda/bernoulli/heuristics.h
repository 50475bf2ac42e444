// The shape of the score warps of persistent.cuh, and what they take of shared memory.
#pragma once

#include "bernoulli_params.h"
#include "cuda/decode/heuristics.h"

namespace santa::cuda {

constexpr int kStageFeatures = 16;  // the K of a matrix product
constexpr int kFeatureStepKeys = 128;
constexpr int kFeatureBytes = kFeatureStepKeys * 2;  // of a step
constexpr int kStageBytes = kStageFeatures * kFeatureBytes;
constexpr int kFeatureStages = 3;  // of a warp's ring, all but the one that is added in flight; more gain nothing
constexpr int kListPlaces = 2;     // for the block that is scored and the next

// A list: what persistent.cuh calls FeatureList, then counts [kPersistentHeads][head_dim + 8]. The pitch lets the lanes
// of a fragment read from different banks.
constexpr int kListHeadBytes = 320;
constexpr int count_pitch(int head_dim) { return head_dim + 8; }
constexpr int list_bytes(int head_dim) {
  return (kListHeadBytes + kPersistentHeads * count_pitch(head_dim) * 2 + 127) / 128 * 128;
}

inline ScoreWarps feature_score_warps(const DecodeParams& p) {
  return {max_score_warps(p.head_dim), kFeatureStages * kStageBytes,
          kListPlaces * list_bytes(p.head_dim) + 256};  // 256: rings are aligned
}

// Counts have to be whole numbers in q's dtype, and a feature's keys have to be found by 32-bit arithmetic.
inline bool may_be_persistent(const BernoulliParams& p) {
  return p.num_draws <= (p.decode.dtype == Dtype::kBFloat16 ? 256 : 2048) && p.stride_k_feature < (int64_t{1} << 31);
}

}  // namespace santa::cuda
