// How the one-pass kernel is set up on a device. Nothing here changes a bit of a result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/draw.h"
#include "params.h"

namespace santa::cuda {

constexpr int kMaxScoreWarps = 6;  // of any kernel
constexpr int kMaxSlots = 8;       // of a score warp's ring
constexpr int kGatherWarps = 2;
constexpr int kChunkDraws = 16;       // draws that a score warp hands on at a time
constexpr int kQueueChunks = 2;       // of a score warp: full, or being read
constexpr int kChunkHeadBytes = 352;  // of a DrawChunk, weights apart; draw.cuh checks it
constexpr int kSharedBytes = 512;     // of OnePassShared; one_pass.cuh checks it

// What scores of one kind need: bytes of shared memory for the slot of a ring, for a warp of the pilot, and once per
// CTA; slots of a ring; warps, at most.
struct ScoreNeeds {
  int slot, pilot, once;
  int num_slots, max_warps;
};

// Warps that score keys in rows: in 8 bits it is them that limit, otherwise it is memory, and more of them than
// schedulers only get into each other's way. With two CTAs on a multiprocessor, registers have room for 6 up to a
// head_dim of 128.
constexpr int max_key_warps(bool float8, int head_dim) { return float8 && head_dim <= 128 ? kMaxScoreWarps : 4; }

// What __launch_bounds__ is told of threads: more than there are where that leaves them registers enough, 128 with two
// CTAs on a multiprocessor, for then there is room for one of the next kernel's CTAs beside them. It is set up before
// they end, which shows in single rows.
constexpr int bound_threads(int score_warps, int head_dim) {
  return head_dim <= 128 ? 256 : (score_warps + kGatherWarps) * 32;
}

// Elements from one row of a slot to the next. Rows of 96 are stored with the pitch of 128, so that the permutation of
// their chunks (load.cuh) stays inside the row.
constexpr int slot_row_pitch(int head_dim) { return head_dim == 96 ? 128 : head_dim; }

// Keys of a slot, where they lie in rows. Two matrix products at a time, so that one need not wait for the other, as
// far as registers allow.
constexpr int slot_keys(int head_dim) { return head_dim <= 192 ? 32 : 16; }

// A ring has 64 keys: what is on its way on a multiprocessor then covers the latency of memory; more makes the rows of
// V wait longer behind the keys. Rows of 1 byte an element lie in their slots without gaps.
constexpr int key_slot_bytes(bool float8, int head_dim) {
  return slot_keys(head_dim) * (float8 ? head_dim : slot_row_pitch(head_dim) * 2);
}

inline ScoreNeeds key_score_needs(const DecodeParams& p) {
  const bool float8 = p.k_dtype == Dtype::kFloat8E4M3;
  const int slot = key_slot_bytes(float8, p.head_dim);
  return {slot, slot, 0, 64 / slot_keys(p.head_dim), max_key_warps(float8, p.head_dim)};
}

// Floats from the scores of a key to those of the next.
SANTA_HD int score_pitch_of(int num_heads) { return num_heads <= 4 ? 4 : 8; }

SANTA_HD int align_up(int bytes) { return (bytes + 511) / 512 * 512; }

SANTA_HD int chunk_bytes_of(int pitch) { return kChunkHeadBytes + kChunkDraws * pitch * 4; }

// Of a score warp: its ring, the scores of its tile, its queue of draws.
SANTA_HD int warp_bytes_of(int slot_bytes, int num_slots, int pitch) {
  return align_up(num_slots * slot_bytes + kDrawTileKv * pitch * 4 + kQueueChunks * chunk_bytes_of(pitch));
}

// Of a gather warp's sums, for its neighbour.
SANTA_HD int sum_bytes_of(const DecodeParams& p) { return align_up(head_block_of(p, 0).count * p.head_dim * 4); }

struct DeviceLimits {
  int num_sms;
  int sm_bytes;   // shared memory of a multiprocessor
  int cta_bytes;  // of one CTA, at most
  bool has_clusters;
};

// Set by a test operator, to see that results do not depend on it; 0: what the heuristics say.
struct ForcedPlan {
  int num_warps = 0, num_slots = 0, wanted_ctas = 0;
};

inline ForcedPlan& forced_plan() {
  static ForcedPlan plan;
  return plan;
}

// How many CTAs to cut rows for. One wave of long runs has the fewest starts and ends, but with few more units than
// CTAs live at once a second one would be nearly empty: what counts is the time of all waves, each of them as long as a
// run and a start, which takes as long as some keys. The host decides for rows that it knows to be equally long, the
// device (runs.cuh) for others.
constexpr int kStartKv = 1024, kExactStartKv = 512;  // exact rows have V to read too
constexpr int kMostWaves = 8;                        // that the host chooses from

// Parts of 1 << part_shift keys in a run.
SANTA_HD int run_parts_of(int64_t run_kv, int part_shift) {
  return static_cast<int>((run_kv + (int64_t{1} << part_shift) - 1) >> part_shift);
}

// `multiple`: a power of two.
SANTA_HD int round_up(int value, int multiple) { return (value + multiple - 1) & -multiple; }

// Of a row of `parts` parts, `units` rows in all.
inline int equal_run_parts(int64_t units, int parts, int64_t wanted_ctas) {
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(ceil_div(units * parts, wanted_ctas), 1), parts));
}

inline int wanted_ctas_of(int64_t units, int parts, int part_kv, const RunCut& cut) {
  int best = cut.ctas_at_once;
  int64_t best_cost = INT64_MAX;
  for (int waves = 1; waves <= kMostWaves; ++waves) {
    const int run_parts = equal_run_parts(units, parts, static_cast<int64_t>(waves) * cut.ctas_at_once);
    const int64_t rounds = ceil_div(units * ceil_div(parts, run_parts), cut.ctas_at_once);
    const int64_t cost = rounds * (static_cast<int64_t>(run_parts) * part_kv + cut.start_kv);
    if (cost < best_cost) best = waves * cut.ctas_at_once, best_cost = cost;
  }
  return best;
}

// Where rows of `kv_len` keys at most, in parts of `part_kv`, are cut; `most_parts` is a bound for any length. The cut
// has ctas_at_once and start_kv. `chooses`: whether the device may choose between two cuts.
inline void cut_rows(const DecodeParams& p, RunCut& cut, int kv_len, int part_kv, int most_parts, bool lengths_known,
                     bool chooses, int run_multiple = 1) {
  const int64_t units = static_cast<int64_t>(p.batch) * p.num_units();
  const int parts = std::max(ceil_div_int(kv_len, part_kv), 1), forced_ctas = forced_plan().wanted_ctas;
  cut.run_multiple = run_multiple;
  cut.wanted_ctas = forced_ctas > 0 ? forced_ctas
                    : lengths_known ? wanted_ctas_of(units, parts, part_kv, cut)
                                    : cut.ctas_at_once * (chooses || units <= cut.ctas_at_once ? 1 : 2);
  // CTAs that turn out to have no run cost time too: with few units it is one wave, full or not.
  const bool few = 2 * units <= cut.ctas_at_once;
  cut.other_quarters = !chooses || forced_ctas > 0 || lengths_known || p.batch == 1 ? 0 : few ? 3 : 8;
  cut.run_parts = round_up(equal_run_parts(units, parts, cut.wanted_ctas), run_multiple);
  cut.row_runs = lengths_known ? ceil_div_int(parts, cut.run_parts) : 0;
  // Without known lengths as many as are wanted, and less than one more for each row.
  cut.max_runs =
      lengths_known
          ? static_cast<int64_t>(p.batch) * cut.row_runs
          : std::min<int64_t>(
                ceil_div(static_cast<int64_t>(cut.wanted_ctas) * std::max(cut.other_quarters, 4), 4 * p.num_units()) +
                    p.batch - 1,
                static_cast<int64_t>(p.batch) * std::max(most_parts, 1));
}

constexpr int kPilotWarpKeys = 32;
constexpr int kPilotWarps = kPilotKeys / kPilotWarpKeys;
constexpr int kPilotHeadBytes =
    1024;  // of PilotShared; what the warps and the Scorer need follows; pilot.cuh checks it

inline int pilot_shared_bytes(const ScoreNeeds& needs) {
  return kPilotHeadBytes + kPilotWarps * needs.pilot + needs.once;
}

inline int one_pass_shared_bytes(const DecodeParams& p, const ScoreNeeds& needs) {
  const int pitch = score_pitch_of(head_block_of(p, 0).count);
  return kSharedBytes + align_up(needs.once) + sum_bytes_of(p) +
         p.plan.num_warps * warp_bytes_of(needs.slot, p.plan.num_slots, pitch);
}

// Exact rows: warps of a CTA, slots of a warp's ring, of 16 rows of q's dtype or 32 in float8, and shared memory: what
// fits on every architecture.
constexpr int kTileSlots = 3;
constexpr int kTileSlotRows = 16;
constexpr int kTileHeadBytes = 1024;  // TileShared; tile.cuh checks it
constexpr int tile_warps(int head_dim) { return head_dim <= 128 ? 8 : 4; }
constexpr int tile_shared_bytes(int head_dim) {
  return kTileHeadBytes + tile_warps(head_dim) * kTileSlots * kTileSlotRows * slot_row_pitch(head_dim) * 2;
}

// Proportional rows: warps of the kernel of scores at most, and what a CTA and each of its warps take of shared memory.
constexpr int kProportionalWarps = 6;
constexpr int kProportionalSharedBytes = 512;  // of what the CTA shares; proportional_score.cuh checks it

SANTA_HD int proportional_warp_bytes(int slot_bytes, int num_slots, int pitch) {
  return align_up(num_slots * slot_bytes + kDrawTileKv * pitch * 4);
}

inline int proportional_shared_bytes(const DecodeParams& p, const ScoreNeeds& needs) {
  const int pitch = score_pitch_of(head_block_of(p, 0).count);
  return kProportionalSharedBytes + p.plan.num_warps * proportional_warp_bytes(needs.slot, p.plan.num_slots, pitch);
}

inline int one_pass_threads(const DecodeParams& p) { return (p.plan.num_warps + kGatherWarps) * 32; }

// What a CTA can have of a multiprocessor that others share with it.
inline int shared_room(const DeviceLimits& device, int ctas) {
  constexpr int kReserved = 1024;  // by the system, per CTA
  return std::min(device.sm_bytes / ctas - kReserved, device.cta_bytes);
}

// Keys of a part, or of a proportional row's tile, of the longest row.
inline int longest_part_kv(const DecodeParams& p) {
  return p.plan.proportional ? tile_kv_of(p.max_kv_len) : part_kv_of(p.max_kv_len, p.num_units(), p.most_part_kv);
}

// Into how many runs, of a multiple of `run_multiple` parts, for a device on which `ctas_at_once` CTAs live.
inline void cut_sampled_rows(DecodeParams& p, int ctas_at_once, int run_multiple = 1) {
  CallPlan& plan = p.plan;
  plan.sampled_cut = {.ctas_at_once = ctas_at_once, .start_kv = kStartKv};
  cut_rows(p, plan.sampled_cut, p.max_kv_len, longest_part_kv(p), plan.max_parts, !plan.exact, true, run_multiple);
}

// Two CTAs live on a multiprocessor: one draws and merges while the other streams; one, if there are no more. As many
// warps as fit with two slots each, but no more than what the `tiles` of a run take as many turns with; then as many
// slots as are wanted. bytes_of: of shared memory, that a CTA of the plan asks for.
template <typename BytesOf, typename SlotsWanted>
inline void plan_warps(DecodeParams& p, const DeviceLimits& device, int tiles, int most_warps, const BytesOf& bytes_of,
                       const SlotsWanted& slots_wanted) {
  CallPlan& plan = p.plan;
  const ForcedPlan& forced = forced_plan();
  const bool alone = p.plan.sampled_cut.max_runs * p.num_units() <= device.num_sms;
  const int room = shared_room(device, alone ? 1 : 2);
  const auto fits = [&](int num_warps, int num_slots) {
    plan.num_warps = num_warps, plan.num_slots = num_slots;
    return bytes_of() <= room;
  };
  int num_warps = most_warps, num_slots = 2;
  while (num_warps > 1 && !fits(num_warps, num_slots)) --num_warps;
  num_warps = ceil_div_int(tiles, ceil_div_int(tiles, num_warps));
  if (forced.num_warps > 0) num_warps = std::min(forced.num_warps, num_warps);
  const int wanted = std::min(forced.num_slots > 0 ? forced.num_slots : slots_wanted(num_warps), kMaxSlots);
  while (num_slots < wanted && fits(num_warps, num_slots + 1)) ++num_slots;
  plan.num_warps = num_warps, plan.num_slots = num_slots;
}

inline void plan_one_pass(DecodeParams& p, const DeviceLimits& device, const ScoreNeeds& needs) {
  if (!p.plan.one_pass) return;
  cut_sampled_rows(p, 2 * device.num_sms);
  const int run_kv = p.plan.sampled_cut.run_parts * longest_part_kv(p);
  const int tiles = ceil_div_int(run_kv, draw_tile_kv_of(p.max_kv_len, p.by_features));
  plan_warps(
      p, device, tiles, needs.max_warps, [&] { return one_pass_shared_bytes(p, needs); },
      [&](int) { return needs.num_slots; });
}

// Exact rows are shorter: where only the device knows lengths, to choose takes more time than it saves.
inline void plan_tiles(DecodeParams& p, const DeviceLimits& device) {
  CallPlan& plan = p.plan;
  if (!plan.exact) return;
  const int ctas = tile_shared_bytes(p.head_dim) <= shared_room(device, 2) ? 2 : 1;
  plan.exact_cut = {.ctas_at_once = ctas * device.num_sms, .start_kv = kExactStartKv};
  const int longest = plan.equal_rows ? plan.row.kv_len : plan.longest_exact;
  cut_rows(p, plan.exact_cut, longest, exact_tile_kv_of(longest), max_exact_tiles(longest), plan.equal_rows, false);
  // Larger clusters than pairs take longer to start than they save.
  plan.row_pairs = plan.exact_cut.row_runs == 2 && device.has_clusters;
}

// The kernel of scores. In short runs, of fewer tiles than four warps take, those that there are have more on their
// way.
inline void plan_scores(DecodeParams& p, const DeviceLimits& device, const ScoreNeeds& needs) {
  if (!p.plan.proportional) return;
  cut_sampled_rows(p, 2 * device.num_sms);
  plan_warps(
      p, device, p.plan.sampled_cut.run_parts, kProportionalWarps, [&] { return proportional_shared_bytes(p, needs); },
      [&](int num_warps) { return needs.num_slots * std::max(4 / num_warps, 1); });
}

}  // namespace santa::cuda
