// What Bernoulli scores in one pass take of shared memory.
#pragma once

#include "bernoulli_params.h"
#include "cuda/decode/heuristics.h"

namespace santa::cuda {

constexpr int kFeatureScoreWarps = 4;  // a lane keeps the sums of a whole tile
constexpr int kFeatureSlots = 4;
constexpr int kSlotFeatures = 16;               // the K of a matrix product
constexpr int kFeatureBytes = kDrawTileKv * 2;  // of a slot
constexpr int kSlotBytesOfFeatures = kSlotFeatures * kFeatureBytes;

// A list: what one_pass.cuh calls FeatureList, then counts [kHeadBlock][head_dim + 8]. The pitch lets the lanes of a
// fragment read from different banks.
constexpr int kListHeadBytes = 320;
constexpr int count_pitch(int head_dim) { return head_dim + 8; }
constexpr int list_bytes(int head_dim) { return kListHeadBytes + kHeadBlock * count_pitch(head_dim) * 2; }

inline ScoreNeeds feature_score_needs(const DecodeParams& p) {
  return {kSlotBytesOfFeatures, 0, list_bytes(p.head_dim), kFeatureSlots, kFeatureScoreWarps};
}

}  // namespace santa::cuda
