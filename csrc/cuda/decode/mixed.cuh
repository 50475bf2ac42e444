// Exact rows and rows in one pass by one kernel, where only the device knows which rows are which: a kernel that finds
// none of its rows takes its time too, before those behind it and of their room.
#pragma once

#include "cuda/decode/one_pass.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

// As many threads as a tile takes; those that one pass has no work for only join in its barrier.
template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__(tile_warps(HEAD_DIM) * 32, min_tile_ctas(HEAD_DIM))
    mixed_kernel(const __grid_constant__ DecodeParams p) {
  SANTA_DYNAMIC_SHARED(shared_bytes);
  launch_dependents();
  const Work work = find_work<Rows::kBoth>(p);
  if (work.exists(RowKind::kExact)) {
    attend_run<T, K, HEAD_DIM>(p, work, *reinterpret_cast<TileShared<HEAD_DIM>*>(shared_bytes));
    wait_for_previous();  // who waits for this kernel has waited for the pilot
  } else if (work.exists(RowKind::kOnePass)) {
    using Scorer = KeyScorer<T, K, HEAD_DIM>;
    const int num_warps = p.plan.num_warps + kGatherWarps;
    if (warp_index() >= num_warps) {
      cta_barrier();
      return;
    }
    Scorer scorer(p, work.unit, nullptr);
    one_pass<Scorer, T, HEAD_DIM>(p, shared_bytes, scorer, work, num_warps * 32);
  }
}

}  // namespace santa::cuda
