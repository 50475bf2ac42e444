// How the persistent kernel is set up on a device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace santa::cuda {

struct DeviceLimits {
  int num_sms;
  int shared_bytes;  // of one CTA, at most
};

// `fixed_bytes` are those of PersistentShared, `slot_bytes` those of a ring slot. The row's path may depend on the device,
// but on nothing of the batch: a longer cache changes the size of the buffers only while all rows are short.
inline PersistentPlan plan_persistent(const DecodeParams& p, const DeviceLimits& device, int fixed_bytes,
                                      int slot_bytes, int max_score_warps, int select_warps) {
  PersistentPlan plan{};
  plan.max_kv_len = -1;
  if (p.num_samples == 0 || p.gqa_group_size > 8 || p.max_kv_len == 0) return plan;
  const auto round_up = [](int64_t bytes) { return static_cast<int>((bytes + 127) / 128 * 128); };

  // Two buffers let selection overlap with scoring; one is enough to be right.
  for (int buffers = 2; buffers >= 1; --buffers) {
    const int64_t longest =
        std::min<int64_t>(p.max_kv_len, static_cast<int64_t>(buffers) * device.num_sms * kMaxBlockKv);
    // Outputs of 4 heads from every warp take the place of 2 planes.
    const int partial_bytes = select_warps * 4 * p.head_dim * 4, pairs = (p.gqa_group_size + 1) / 2;
    plan.plane_pitch = block_kv_of(longest) + 8;
    if (pairs > 2) plan.plane_pitch = std::max(plan.plane_pitch, partial_bytes / 16 + 8);
    plan.buffer_bytes = round_up(std::max(pairs * plan.plane_pitch * 8, partial_bytes));
    const int cumulative_bytes = p.sampler == Sampler::kGrouped ? plan.plane_pitch * 4 : 0;
    const int room = device.shared_bytes - round_up(fixed_bytes) - buffers * plan.buffer_bytes - cumulative_bytes;
    // Bytes in flight are what keeps the memory busy: deep rings first, then fewer warps.
    if (room >= max_score_warps * 4 * slot_bytes) {
      plan.ring_slots = 4, plan.num_score_warps = max_score_warps;
    } else if (room >= 2 * 3 * slot_bytes) {
      plan.ring_slots = 3, plan.num_score_warps = std::min(max_score_warps, room / (3 * slot_bytes));
    } else if (room >= 2 * slot_bytes) {
      plan.ring_slots = 2, plan.num_score_warps = std::min(max_score_warps, room / (2 * slot_bytes));
    } else {
      continue;
    }
    plan.max_kv_len = static_cast<int64_t>(buffers) * device.num_sms * kMaxBlockKv;
    plan.num_buffers = buffers;
    int64_t most_blocks = static_cast<int64_t>(p.batch) * p.num_kv_heads;
    most_blocks *= p.lengths_known() ? ceil_div(longest, block_kv_of(longest)) : std::max<int64_t>(16, ceil_div(longest, kMaxBlockKv));
    plan.num_ctas = static_cast<int>(std::min<int64_t>(device.num_sms, most_blocks));
    return plan;
  }
  return plan;
}

inline int persistent_shared_bytes(const DecodeParams& p, int fixed_bytes, int slot_bytes) {
  const PersistentPlan& plan = p.persistent;
  return (fixed_bytes + 127) / 128 * 128 + plan.num_buffers * plan.buffer_bytes +
         (p.sampler == Sampler::kGrouped ? plan.plane_pitch * 4 : 0) + plan.num_score_warps * plan.ring_slots * slot_bytes;
}

}  // namespace santa::cuda
