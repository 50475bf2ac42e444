// How decode with proposal keys is set up on a device. Nothing here changes a bit of a result.
#pragma once

#include "cuda/decode/heuristics.h"

namespace santa::cuda {

constexpr int kProposalWarps = 4;                   // of a CTA; the last step of a part's sums is over them
constexpr int kCodeSlotKeys = 32;                   // of a slot: their codes, row behind row, then their scales
constexpr int kMostCodeSlots = 4;                   // of a warp's ring
constexpr int kLevelAheadKeys = 3 * kCodeSlotKeys;  // of the first tile, left to score when levels are asked for
constexpr int kListedDraws = 32;                    // of a tile, at a time
constexpr int kDrawsAtOnce = 8;                     // whose keys are scored by one matrix product

// CTAs on a multiprocessor, as far as registers have room: four where there is shared memory for as many, as on sm_90.
// At 64 it is the compiler that takes more.
constexpr int most_proposal_ctas(int head_dim) { return head_dim == 96 || head_dim == 128 ? 4 : 3; }

constexpr int code_slot_bytes(int head_dim) { return kCodeSlotKeys * (head_dim / 2 + 2); }

// Elements from a query vector to the next, so that eight of them are read without bank conflicts.
constexpr int query_pitch(int head_dim) { return head_dim + 8; }
// QueryCodes; code_score.cuh checks it.
constexpr int query_bytes(int head_dim) { return kHeadBlock * (query_pitch(head_dim) * 2 + head_dim + 12); }

constexpr int head_quads(int block_heads) { return block_heads <= 4 ? 1 : 2; }
// WarpShared; draw.cuh checks it.
constexpr int proposal_warp_bytes(int head_dim, int quads) {
  return (kProposalScores * 4 + kListedDraws * 16 + 240 + quads * (16 * head_dim + kDrawsAtOnce * 16) + 127) / 128 *
         128;
}
constexpr int kProposalSharedBytes = 512;  // of ProposalShared; draw.cuh checks it
constexpr int aligned_query_bytes(int head_dim) { return (query_bytes(head_dim) + 127) / 128 * 128; }

inline int proposal_shared_bytes(const DecodeParams& p, int num_slots) {
  const int quads = head_quads(head_block_of(p, 0).count);
  return kProposalSharedBytes + aligned_query_bytes(p.head_dim) +
         kProposalWarps * (proposal_warp_bytes(p.head_dim, quads) + num_slots * code_slot_bytes(p.head_dim));
}

constexpr int pilot_proposal_bytes(int head_dim) {
  return kPilotHeadBytes + kPilotWarps * code_slot_bytes(head_dim) + query_bytes(head_dim);
}

// As many CTAs on a multiprocessor as have room for two slots, then as many slots as have room.
inline void plan_one_pass_proposal(DecodeParams& p, const DeviceLimits& device) {
  if (!p.plan.one_pass) return;
  CallPlan& plan = p.plan;
  const auto fits = [&](int ctas, int num_slots) {
    return proposal_shared_bytes(p, num_slots) <= shared_room(device, ctas);
  };
  int ctas = most_proposal_ctas(p.head_dim);
  while (ctas > 1 && !fits(ctas, 2)) --ctas;
  const int most = forced_plan().num_slots > 0 ? std::min(forced_plan().num_slots, kMostCodeSlots) : kMostCodeSlots;
  plan.num_slots = 2;
  while (plan.num_slots < most && fits(ctas, plan.num_slots + 1)) ++plan.num_slots;
  // Whole parts for each warp, if that keeps nearly all of them busy.
  const int64_t parts = ceil_div(p.max_kv_len, part_kv_of(p.max_kv_len, p.num_units(), p.most_part_kv));
  const int64_t items = static_cast<int64_t>(p.batch) * p.num_units() * parts;
  const int64_t warps = static_cast<int64_t>(ctas) * device.num_sms * kProposalWarps;
  plan.whole_parts =
      forced_plan().num_warps > 0 ? forced_plan().num_warps == 1 : 10 * items >= 9 * ceil_div(items, warps) * warps;
  cut_sampled_rows(p, ctas * device.num_sms, plan.whole_parts ? kProposalWarps : 1);
}

}  // namespace santa::cuda
