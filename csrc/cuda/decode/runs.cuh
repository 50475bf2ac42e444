// How the parts of rows are dealt out to CTAs: in runs of neighbouring parts, of about as many keys in all rows, so
// that all CTAs end together, whatever mix of lengths there is. Lengths may be on the device alone; then every warp
// works the cut out for itself. No bit of a result depends on it.
#pragma once

#include "core/tiling.h"
#include "cuda/common/reduce.cuh"
#include "cuda/decode/heuristics.h"
#include "params.h"

namespace santa::cuda {

struct Run {
  int batch_index, first_part, num_parts;  // num_parts may go beyond the row's end; 0: there is no such run
};

// Run `index` of a KV head (and head block). Called by whole warps.
__device__ __forceinline__ Run find_run(const DecodeParams& p, int index) {
  const CallPlan& plan = p.plan;
  if (plan.row_runs > 0) {
    const int row = index / plan.row_runs;
    return {row, (index - row * plan.row_runs) * plan.run_parts, plan.run_parts};
  }
  const int lane = threadIdx.x & 31;
  int64_t keys = 0, run_kv = 1, best_cost = INT64_MAX, wave_kv = 1;
  // Turns over all rows: the first adds up their keys. Then one for each number of waves to choose from, if there is a
  // choice: one wave of CTAs if they all live at once, two of half the length if that takes less time (heuristics.h).
  // The last finds the run.
  const int choices = plan.most_waves > 1 ? plan.most_waves : 0;
  for (int turn = 0; turn <= choices + 1; ++turn) {
    const bool finds = turn > choices;
    if (turn > 0 && !(finds && choices > 0)) {
      wave_kv = max(ceil_div(keys * p.num_units(), static_cast<int64_t>(plan.wanted_ctas) * max(min(turn, choices), 1)),
                    int64_t{1});
    }
    if (finds && choices > 0) wave_kv = run_kv;
    int runs_before = 0, longest = 0;  // runs of the rows before `first`
    for (int first = 0; first < p.batch; first += 32) {
      int kv_len = 0, part_shift = __ffs(kMinPartKv) - 1;  // of row first + lane; 0 keys if it is not there
      if (first + lane < p.batch) {
        const RowShape shape = row_shape_of(p, first + lane);
        if (shape.sampled()) kv_len = shape.kv_len, part_shift = __ffs(shape.tile_kv) - 1;
      }
      if (turn == 0) {
        keys += kv_len;
        continue;
      }
      const int parts = round_up(run_parts_of(wave_kv, part_shift), plan.run_multiple);
      const int runs = ceil_div_int(num_parts_of(kv_len, 1 << part_shift), parts);
      longest =
          max(longest, static_cast<int>(min(static_cast<int64_t>(parts) << part_shift, static_cast<int64_t>(kv_len))));
      const int end = inclusive_scan(runs);
      const uint32_t ends_after = __ballot_sync(0xffffffffu, index < runs_before + end);
      if (finds && ends_after != 0) {
        const int owner = __ffs(ends_after) - 1;
        const int run = index - runs_before - __shfl_sync(0xffffffffu, end - runs, owner);
        const int owner_parts = __shfl_sync(0xffffffffu, parts, owner);
        return {first + owner, run * owner_parts, owner_parts};
      }
      runs_before += __shfl_sync(0xffffffffu, end, 31);
    }
    if (turn == 0) {
      for (int offset = 16; offset > 0; offset >>= 1) keys += __shfl_xor_sync(0xffffffffu, keys, offset);
      // No row is in one pass: other kernels wait for this one to be gone. By a vote, so that the compiler sees that
      // all lanes agree.
      if (__ballot_sync(0xffffffffu, keys > 0) == 0) break;
    } else if (!finds) {
      for (int offset = 16; offset > 0; offset >>= 1) {
        longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, offset));
      }
      const int64_t rounds = ceil_div_int(runs_before * p.num_units(), plan.ctas_at_once);
      const int64_t cost = rounds * (longest + kStartKv);
      if (cost < best_cost) run_kv = wave_kv, best_cost = cost;
    }
  }
  return {0, 0, 0};
}

}  // namespace santa::cuda
