// How the one-pass kernel is set up on a device. Nothing here changes a bit of a result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace santa::cuda {

constexpr int kMaxScoreWarps = 6;  // of any kernel
constexpr int kMaxSlots = 8;  // of a score warp's ring
constexpr int kGatherWarps = 2;
constexpr int kChunkDraws = 16;    // draws that a score warp hands on at a time
constexpr int kQueueChunks = 2;    // of a score warp: full, or being read
constexpr int kChunkBytes = 736;   // of a DrawChunk, for 8 heads; draw.cuh checks it
constexpr int kSharedBytes = 512;  // of OnePassShared; one_pass.cuh checks it

constexpr int kPilotWarpKeys = 32;  // of a warp of the pilot

// What scores of one kind need: bytes of shared memory for the slot of a ring, for the keys of a warp of the pilot, and
// once per CTA; slots of a ring; warps, at most.
struct ScoreNeeds {
  int slot, pilot, once;
  int num_slots, max_warps;
};

// Warps that score keys in rows: in 8 bits it is them that limit, otherwise it is memory, and more of them than
// schedulers only get into each other's way. With two CTAs on a multiprocessor, registers have room for 6 up to a
// head_dim of 128.
constexpr int max_key_warps(bool float8, int head_dim) { return float8 && head_dim <= 128 ? kMaxScoreWarps : 4; }

// Elements from one row of a slot to the next. Rows of 96 are stored with the pitch of 128, so that the permutation of
// their chunks (load.cuh) stays inside the row.
constexpr int slot_row_pitch(int head_dim) { return head_dim == 96 ? 128 : head_dim; }

// Keys of a slot, where they lie in rows. Two matrix products at a time, so that one need not wait for the other, as far
// as registers allow.
constexpr int slot_keys(int head_dim) { return head_dim <= 192 ? 32 : 16; }

// A ring has 64 keys: what is on its way on a multiprocessor then covers the latency of memory; more makes the rows of V
// wait longer behind the keys. Rows of 1 byte an element lie in their slots without gaps.
inline ScoreNeeds key_score_needs(const DecodeParams& p) {
  const bool float8 = p.k_dtype == Dtype::kFloat8E4M3;
  const int row_bytes = float8 ? p.head_dim : slot_row_pitch(p.head_dim) * 2;
  return {slot_keys(p.head_dim) * row_bytes, kPilotWarpKeys * row_bytes, 0, 64 / slot_keys(p.head_dim),
          max_key_warps(float8, p.head_dim)};
}

// Floats from the scores of a key to those of the next.
SANTA_HD int score_pitch_of(int num_heads) { return num_heads <= 4 ? 4 : 8; }

SANTA_HD int align_up(int bytes) { return (bytes + 511) / 512 * 512; }

// Of a score warp: its ring, the scores of its tile, its queue of draws.
SANTA_HD int warp_bytes_of(int slot_bytes, int num_slots, int pitch) {
  return align_up(num_slots * slot_bytes + kDrawTileKv * pitch * 4 + kQueueChunks * kChunkBytes);
}

// Of a gather warp's sums, for its neighbour.
SANTA_HD int sum_bytes_of(const DecodeParams& p) { return align_up(head_block_of(p, 0).count * p.head_dim * 4); }

struct DeviceLimits {
  int num_sms;
  int sm_bytes;   // shared memory of a multiprocessor
  int cta_bytes;  // of one CTA, at most
};

// Set by a test operator, to see that results do not depend on it; 0: what the heuristics say.
struct ForcedPlan {
  int num_warps = 0, num_slots = 0;
  RunCut runs = {0, 0, 0};
};

inline ForcedPlan& forced_plan() {
  static ForcedPlan plan;
  return plan;
}

// How the parts of rows are cut into runs. Every CTA has a start and an end that cost as much time as some keys do. One
// wave of equal CTAs has the fewest, but some finish late, since not all multiprocessors are equally near to memory. So
// either all runs are equal, or a wave of long ones does most of the work, and short ones fill up what it leaves. With
// lengths that the host does not know, rows can be much shorter than they may be, and a few long runs would be waited
// for: then runs stay short.
constexpr int kStartKv = 1024;
constexpr int kUnknownRunKv = 4096;
constexpr double kLongShare = 0.75;  // of the work, at most
constexpr double kUneven = 0.06;     // how much later than the mean the last CTA of equal runs ends

inline RunCut run_cut_of(int64_t units, int max_parts, int part_kv, bool lengths_known, int ctas_at_once) {
  const int longest = lengths_known ? max_parts : std::max(1, kUnknownRunKv / part_kv);
  const double start = static_cast<double>(kStartKv) / part_kv;  // in parts, as all that follows
  const double mean = static_cast<double>(units) * max_parts / ctas_at_once;
  RunCut best{0, 0, 1};
  double best_cost = 1e30;
  const auto consider = [&](const RunCut& cut, double cost) {
    if (cost < best_cost) best = cut, best_cost = cost;
  };
  // Equal runs: of those of the same number, the shortest.
  const auto shortened = [&](int run) { return static_cast<int>(ceil_div(max_parts, ceil_div(max_parts, run))); };
  for (int run = max_parts; run >= 1; run = run > 1 ? shortened(run - 1) : 0) {
    if (run > longest) continue;
    const int64_t rounds = ceil_div(units * ceil_div(max_parts, run), ctas_at_once);
    consider({0, 0, run}, rounds * (run + start) + kUneven * mean);
  }
  for (int long_runs = 1; long_runs <= max_parts; ++long_runs) {
    const int64_t rounds = ceil_div(units * long_runs, ctas_at_once);
    const int parts = std::min({static_cast<int>(kLongShare * mean / rounds), longest, max_parts / long_runs});
    for (int run = 1; 2 * run <= parts; run *= 2) {
      const double others = static_cast<double>(units) * ceil_div(max_parts - long_runs * parts, run) / ctas_at_once;
      consider({long_runs, parts, run}, mean + (rounds + others) * start + run);
    }
  }
  return best;
}

constexpr int kMaxRuns = 65535;  // blockIdx.z

inline int one_pass_shared_bytes(const DecodeParams& p, const ScoreNeeds& needs) {
  const int pitch = score_pitch_of(head_block_of(p, 0).count);
  return kSharedBytes + align_up(needs.once) + sum_bytes_of(p) +
         p.plan.num_warps * warp_bytes_of(needs.slot, p.plan.num_slots, pitch);
}

// Two CTAs live on a multiprocessor: one draws and merges while the other streams; one, if there are no more. As many
// warps as fit with two slots each, then as many slots as they need.
inline void plan_one_pass(DecodeParams& p, const DeviceLimits& device, const ScoreNeeds& needs) {
  if (!p.plan.one_pass) return;
  CallPlan& plan = p.plan;
  constexpr int kReserved = 1024;  // by the system, per CTA
  const ForcedPlan& forced = forced_plan();
  const int64_t units = static_cast<int64_t>(p.batch) * p.num_units();
  const int part_kv = part_kv_of(p.max_kv_len, p.num_units());
  plan.runs = forced.runs.short_parts > 0 ? forced.runs
                                          : run_cut_of(units, plan.max_parts, part_kv, !plan.exact, 2 * device.num_sms);
  while (plan.runs.num_runs(plan.max_parts) > kMaxRuns) plan.runs.short_parts *= 2;
  const bool alone = units * plan.runs.num_runs(plan.max_parts) <= device.num_sms;
  const int room = std::min(device.sm_bytes / (alone ? 1 : 2) - kReserved, device.cta_bytes);
  const auto fits = [&](int num_warps, int num_slots) {
    plan.num_warps = num_warps, plan.num_slots = num_slots;
    return one_pass_shared_bytes(p, needs) <= room;
  };
  int num_warps = needs.max_warps, num_slots = 2;
  while (num_warps > 1 && !fits(num_warps, num_slots)) --num_warps;
  // No more than what the tiles of a run take as many turns with.
  const int longest_run = std::max(plan.runs.long_parts, plan.runs.short_parts);
  const int tiles = ceil_div_int(longest_run * part_kv, draw_tile_kv_of(p.max_kv_len, p.by_features));
  num_warps = ceil_div_int(tiles, ceil_div_int(tiles, num_warps));
  if (forced.num_warps > 0) num_warps = std::min(forced.num_warps, num_warps);
  const int wanted = forced.num_slots > 0 ? forced.num_slots : needs.num_slots;
  while (num_slots < std::min(wanted, kMaxSlots) && fits(num_warps, num_slots + 1)) ++num_slots;
  plan.num_warps = num_warps, plan.num_slots = num_slots;
}

}  // namespace santa::cuda
