// How the parts of rows are dealt out to CTAs: in runs of neighbouring parts, of about as many keys in all rows, so
// that all CTAs end together, whatever mix of lengths there is. Lengths may be on the device alone; then every warp
// works the cut out for itself. No bit of a result depends on it.
#pragma once

#include "core/tiling.h"
#include "cuda/common/reduce.cuh"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/heuristics.h"
#include "params.h"

namespace santa::cuda {

struct Run {
  int batch_index, first_part, num_parts;  // num_parts may go beyond the row's end; 0: there is no such run
};

// Run `index` of a KV head (and head block), of sampled or of exact rows whose lengths are on the device; of exact
// ones, one without keys has a run too. Called by whole warps.
template <bool SAMPLED>
__device__ __forceinline__ Run find_run(const DecodeParams& p, int index) {
  const RunCut& cut = SAMPLED ? p.plan.sampled_cut : p.plan.exact_cut;
  const int lane = threadIdx.x & 31, units = p.num_units();
  int64_t keys = 0, run_kv = 1, best_cost = INT64_MAX, wave_kv = 1;
  int kv_len = 0, part_shift = 0;  // of row first + lane; 0 keys if it is not there
  // Turns over all rows: the first adds up their keys. Then one for each number of CTAs to choose from, if there is a
  // choice, for the time it takes (heuristics.h). The last finds the run.
  const int choices = cut.other_quarters > 0 ? 2 : 0;
#pragma unroll 1
  for (int turn = 0; turn <= choices + 1; ++turn) {
    const bool finds = turn > choices;
    if (finds && choices > 0) {
      wave_kv = run_kv;
    } else if (turn > 0) {
      const int64_t quarters = 4 * keys * units, ctas = cut.wanted_ctas * int64_t{turn == 2 ? cut.other_quarters : 4};
      wave_kv = quarters + ctas < INT64_C(1) << 32
                    ? ceil_div_int(static_cast<int>(quarters), static_cast<int>(ctas))  // the other takes longer
                    : ceil_div(quarters, ctas);
    }
    int runs_before = 0, longest = 0;  // runs of the rows before `first`
#pragma unroll 1
    for (int first = 0; first < p.batch; first += 32) {
      if (turn == 0 || p.batch > 32) {
        kv_len = 0, part_shift = __ffs(kMinPartKv) - 1;
        if (first + lane < p.batch) {
          const RowShape shape = row_shape_of(p, first + lane);
          if (shape.sampled() == SAMPLED) {
            kv_len = SAMPLED ? shape.kv_len : max(shape.kv_len, 1), part_shift = __ffs(shape.tile_kv) - 1;
          }
        }
      }
      if (turn == 0) {
        keys += kv_len;
        continue;
      }
      const int parts = round_up(run_parts_of(wave_kv, part_shift), cut.run_multiple);
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
      // There are no such rows: other kernels wait for this one to be gone. By a vote, so that the compiler sees that
      // all lanes agree.
      if (__ballot_sync(0xffffffffu, keys > 0) == 0) break;
    } else if (!finds) {
      for (int offset = 16; offset > 0; offset >>= 1) {
        longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, offset));
      }
      const int64_t rounds = ceil_div_int(runs_before * units, cut.ctas_at_once);
      const int64_t cost = rounds * (longest + cut.start_kv);
      if (cost < best_cost) run_kv = wave_kv, best_cost = cost;
    }
  }
  return {0, 0, 0};
}

// What a CTA works on: parts of a row in one pass, or tiles of another. KV heads and head blocks are fastest, so that
// concurrent CTAs read neighbouring memory, but for exact rows whose runs are known.
template <bool SAMPLED = true>
struct Work {
  RowUnit unit;
  int first_part, last_part;

  // Where the cut is known, or follows from the length of the only row, as little code as can be: what runs once has to
  // be fetched first.
  __device__ __forceinline__ explicit Work(const DecodeParams& p) {
    const RunCut& cut = SAMPLED ? p.plan.sampled_cut : p.plan.exact_cut;
    const int num_units = p.num_units();
    int index = blockIdx.x / num_units, number = blockIdx.x - index * num_units;  // of the unit
    Run run = {0, index * cut.run_parts, cut.run_parts};
    if (!SAMPLED && cut.row_runs > 0) {  // runs of a row are neighbours, so that they can be a cluster
      index = blockIdx.x / cut.row_runs;
      run.first_part = (blockIdx.x - index * cut.row_runs) * cut.run_parts;
      run.batch_index = index / num_units, number = index - run.batch_index * num_units;
    } else if (cut.row_runs > 0) {
      run.batch_index = index / cut.row_runs;
      run.first_part = (index - run.batch_index * cut.row_runs) * cut.run_parts;
    } else if (p.batch > 1) {
      run = find_run<SAMPLED>(p, index);
      if (!SAMPLED && run.num_parts == 0) {  // the next kernel waits for this one to be gone
        unit.row.kind = RowKind::kOnePass;
        return;
      }
    }
    unit = RowUnit::make(p, run.batch_index, number);
    // A row without keys has a tile too, whose output is written.
    const int num_parts = SAMPLED ? unit.row.num_tiles : max(unit.row.num_tiles, 1);
    if (cut.row_runs == 0 && p.batch == 1) {
      run.num_parts = round_up(max(ceil_div_int(num_parts * num_units, cut.wanted_ctas), 1), cut.run_multiple);
      run.first_part = index * run.num_parts;
    }
    first_part = run.first_part;
    last_part = min(run.first_part + run.num_parts, num_parts);
  }
  // `kind`: of the rows that the kernel is for.
  __device__ __forceinline__ bool exists(RowKind kind) const { return unit.row.kind == kind && first_part < last_part; }
  __device__ __forceinline__ int first_key() const { return first_part * unit.row.tile_kv; }
  __device__ __forceinline__ int num_keys() const {
    const int64_t most = static_cast<int64_t>(last_part - first_part) * unit.row.tile_kv;
    return static_cast<int>(min(most, static_cast<int64_t>(unit.row.kv_len - first_key())));
  }
};

}  // namespace santa::cuda
