// What proposal keys take of shared memory.
#pragma once

#include "cuda/decode/heuristics.h"

namespace santa::cuda {

// Keys of a slot: their codes, row behind row, then their scales.
constexpr int code_slot_keys(int head_dim) { return head_dim <= 128 ? 64 : 32; }
constexpr int code_slot_bytes(int head_dim) { return code_slot_keys(head_dim) * (head_dim / 2 + 2); }
constexpr int kCodeSlots = 3;

// Warps that score, at most: what registers have room for, and where a multiprocessor has less shared memory than that
// of sm_90 (and sm_100) what that has, or little less.
constexpr int kLargeSmBytes = 228 * 1024;
constexpr int max_code_warps(bool large_sm, int head_dim) { return head_dim > 128 ? 3 : large_sm ? kMaxScoreWarps : 4; }

// Once per CTA: QueryCodes; code_score.cuh checks it.
constexpr int query_bytes(int head_dim) { return kHeadBlock * (head_dim * 5 + 12); }

inline ScoreNeeds code_score_needs(const DecodeParams& p, bool large_sm = true) {
  const int slot = code_slot_bytes(p.head_dim), warps = max_code_warps(large_sm, p.head_dim);
  return {slot, slot, query_bytes(p.head_dim), kCodeSlots, warps, kProposedDrawBytes};
}

}  // namespace santa::cuda
