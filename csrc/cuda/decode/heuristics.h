// The shape of the persistent kernel, and how it is set up on a device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace santa::cuda {

constexpr int kSelectWarps = 8;
constexpr int kMaxScoreWarps = 6;
constexpr int kScoreSlots = 2;      // of a score warp's ring
constexpr int kStepKeys = 32;       // that a score warp takes at a time: two matrix products' worth, for the latencies
constexpr int kStepCodedKeys = 64;  // the same for keys in 8 bits: as many bytes in flight
constexpr int kPersistentSharedBytes = 11008;  // PersistentShared, rounded up; persistent.cuh checks it

// At 256 elements per row a ring takes 32 KB. Four are what 227 KB hold beside two grouped buffers, and what was
// measured.
constexpr int max_score_warps(int head_dim) { return head_dim > 192 ? 4 : kMaxScoreWarps; }

// Elements from one row of a slot to the next. Rows of 96 are stored with the pitch of 128, so that the swizzle of
// their chunks (chunk_offset) stays inside the row.
constexpr int slot_row_pitch(int head_dim) { return head_dim == 96 ? 128 : head_dim; }

// Of keys of 1 or 2 bytes per element. Keys in 8 bits lie without gaps (code_offset).
constexpr int step_keys(int element_size) { return element_size == 1 ? kStepCodedKeys : kStepKeys; }
constexpr int step_bytes(int head_dim, int element_size) {
  return step_keys(element_size) * (element_size == 1 ? head_dim : slot_row_pitch(head_dim) * 2);
}

// What the score warps of a call take of shared memory, and how many there are at most.
struct ScoreWarps {
  int most;
  int ring_bytes;    // of one of them
  int shared_bytes;  // of all together
};

inline ScoreWarps key_score_warps(const DecodeParams& p) {
  return {max_score_warps(p.head_dim), kScoreSlots * step_bytes(p.head_dim, p.k_dtype == Dtype::kFloat8E4M3 ? 1 : 2),
          0};
}

struct DeviceLimits {
  int num_sms;
  int shared_bytes;  // of one CTA, at most
};

// The row's path may depend on the device, but on nothing of the batch: a longer cache changes the size of the buffers
// only while all rows are short.
inline PersistentPlan plan_persistent(const DecodeParams& p, const DeviceLimits& device, const ScoreWarps& warps) {
  PersistentPlan plan{};
  plan.max_kv_len = -1;
  if (p.num_samples == 0 || p.gqa_group_size > kPersistentHeads || p.max_kv_len == 0) return plan;
  const auto round_up = [](int bytes) { return (bytes + 127) / 128 * 128; };

  // If few multiprocessors are lost by it, the number of CTAs is a multiple of the blocks of a row's KV head, so that
  // those are scored at the same time: a CTA that has to wait for blocks of the next round holds up all others.
  const int least_ctas = std::max(device.num_sms * 9 / 10, 1);

  // Two buffers let selection overlap with scoring, a third lets it wait for slower CTAs; one is enough to be right.
  for (int buffers = 3; buffers >= 1; --buffers) {
    // A row's blocks have to fit the buffers of all CTAs at once, or they would wait for each other for ever: see
    // BlockQueue. Short rows have up to 16 blocks, however few keys.
    if (buffers * least_ctas < kShortRowBlocks) continue;
    const int64_t limit = static_cast<int64_t>(buffers) * least_ctas * kMaxBlockKv;
    const int64_t longest = std::min<int64_t>(p.max_kv_len, limit);
    // The sums of 4 heads, 8 numbers of each from every lane, take the place of 2 planes; those of 8 heads that of 4.
    const int pairs = (p.gqa_group_size + 1) / 2, partial_bytes = kSelectWarps * 32 * (pairs > 2 ? 8 : 4) * 8 * 4;
    const bool grouped = p.sampler == Sampler::kGrouped;
    const auto bytes_of_buffer = [&](int pitch) { return round_up(std::max(pairs * pitch * 8, partial_bytes)); };
    // Sums over score warps must not depend on the length of the cache, so there is room for the largest blocks.
    constexpr int kMaxPitch = kMaxBlockKv + 8;
    const int room = device.shared_bytes - kPersistentSharedBytes - buffers * bytes_of_buffer(kMaxPitch) -
                     (grouped ? kMaxPitch * 4 : 0) - warps.shared_bytes;
    plan.num_score_warps = std::min(warps.most, room / warps.ring_bytes);
    if (plan.num_score_warps < (buffers > 1 ? 4 : 1)) continue;
    plan.plane_pitch = pairs > 2 ? kMaxPitch : block_kv_of(longest) + 8;
    plan.buffer_bytes = bytes_of_buffer(plan.plane_pitch);
    plan.max_kv_len = limit;
    plan.num_buffers = buffers;
    const int row_blocks = static_cast<int>(ceil_div(longest, block_kv_of(longest)));
    const int whole_rows = device.num_sms / row_blocks * row_blocks;
    const int64_t most_blocks = static_cast<int64_t>(p.batch) * p.num_kv_heads *
                                (p.lengths_known() ? row_blocks : std::max(kShortRowBlocks, row_blocks));
    plan.blocks_per_row = p.lengths_known() ? row_blocks : 0;
    plan.num_ctas =
        static_cast<int>(std::min<int64_t>(whole_rows >= least_ctas ? whole_rows : device.num_sms, most_blocks));
    return plan;
  }
  return plan;
}

inline int persistent_shared_bytes(const DecodeParams& p, const ScoreWarps& warps) {
  const PersistentPlan& plan = p.persistent;
  return kPersistentSharedBytes + plan.num_buffers * plan.buffer_bytes +
         (p.sampler == Sampler::kGrouped ? plan.plane_pitch * 4 : 0) + warps.shared_bytes +
         plan.num_score_warps * warps.ring_bytes;
}

}  // namespace santa::cuda
