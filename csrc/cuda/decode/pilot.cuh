// The pilot of streaming rows: one CTA per row, KV head and head block estimates the log-sum-exp of its query heads
// from kPilotKeys keys, a warp 32 of them. The one-pass kernel starts meanwhile, and waits for it before its first
// draw.
#pragma once

#include "core/draw.h"
#include "cuda/common/ptx.cuh"
#include "cuda/decode/draw.cuh"
#include "params.h"

namespace santa::cuda {

struct PilotShared {
  SoftmaxState states[kPilotKeys / 16][kHeadBlock];
};
static_assert(sizeof(PilotShared) <= kPilotHeadBytes);

// The states of 16 pilot keys. `logits`: of pilot keys 16 group + g and 8 more, heads 2 t and the next, in the order of
// score_slot.
__device__ __forceinline__ void put_pilot(const DecodeParams& p, const RowUnit& unit, PilotShared& shared, int group,
                                          const float (&logits)[4], float spaced, int lane) {
  const int low = group * 16 + (lane >> 2), high = low + 8, kv_len = unit.row.kv_len, size = pilot_size(kv_len);
  const float low_weight = low < size ? pilot_log2_weight(low, kv_len, spaced) : -INFINITY;
  const float high_weight = high < size ? pilot_log2_weight(high, kv_len, spaced) : -INFINITY;
  float own[4] = {logits[0], logits[1], logits[2], logits[3]};
  if (changes_logits(p)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const KeyRange visible = visible_keys(p, unit.row.end(), unit.heads.first + 2 * (lane & 3) + (i & 1));
      // Only the first and the last few keys can be out of sight: the pilot begins and ends as the row does.
      const int key = i < 2 ? low : high, position = key < kPilotFirst ? key : kv_len - size + key;
      own[i] = attended_logit(p, visible, position, own[i]);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float first = own[j] + low_weight, second = own[2 + j] + high_weight;
    const float max = max_over_keys(fmaxf(first, second)), below = finite_max(max);
    float sum = exp2_approx(first - below) + exp2_approx(second - below);
    for (int offset = 4; offset < 32; offset <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane < 4) shared.states[group][2 * lane + j] = {max, sum};
  }
}

// By all warps of the CTA. `bytes`: PilotShared and what the warps need.
template <typename Scorer>
__device__ __forceinline__ void find_level(const DecodeParams& p, const RowUnit& unit, Scorer& scorer,
                                           unsigned char* bytes) {
  auto& shared = *reinterpret_cast<PilotShared*>(bytes);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, size = pilot_size(unit.row.kv_len);
  const float spaced = spaced_log2_weight(unit.row.kv_len);
  if (warp * kPilotWarpKeys < size) {
    scorer.score_pilot(
        shared_address(bytes) + kPilotHeadBytes + warp * Scorer::kPilotBytes, warp, unit, lane,
        [&](int group, const float (&logits)[4]) { put_pilot(p, unit, shared, group, logits, spaced, lane); });
  }
  __syncthreads();
  if (warp > 0) return;
  // Lanes of the same head take groups in turn and merge as a tree.
  const int num_groups = ceil_div_int(size, kPilotWarpKeys) * (kPilotWarpKeys / 16);
  SoftmaxState state = empty_softmax_state();
  // Loops: code that runs once has to be fetched first.
#pragma unroll 1
  for (int group = lane >> 3; group < num_groups; group += 4) state = merge(state, shared.states[group][lane & 7]);
#pragma unroll 1
  for (int offset = 8; offset < 32; offset <<= 1) {
    state = merge(state,
                  {__shfl_xor_sync(0xffffffffu, state.max, offset), __shfl_xor_sync(0xffffffffu, state.sum, offset)});
  }
  if (lane < unit.heads.count) {
    p.level[p.output_index(unit.batch_index, unit.kv_head, unit.heads.first + lane)] = log2_sum(state);
  }
}

}  // namespace santa::cuda
