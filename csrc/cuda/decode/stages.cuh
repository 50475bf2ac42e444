// Definitions of the templated launchers; included by the instantiations alone.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/launch.h"
#include "cuda/decode/one_pass.cuh"
#include "cuda/decode/proportional_gather.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

// Exact and proportional rows. Lengths that only the device knows may leave most of the tiles out: then there are no
// more CTAs than live at once, and each looks for tiles of its row.
template <typename T, typename K, int HEAD_DIM>
void launch_tiles(const DecodeParams& p, cudaStream_t stream) {
  const bool few_are_there = p.plan.exact && p.plan.one_pass;
  const int tiles = std::max(few_are_there ? max_exact_tiles(p.plan.longest_exact) : p.max_tiles, 1);
  const int items = tiles * p.num_units();
  const int ctas = few_are_there ? std::min(items, std::max(p.plan.ctas_at_once / std::max(p.batch, 1), 1)) : items;
  constexpr int kTileBytes = sizeof(TileShared<HEAD_DIM>);
  allow_shared_memory(tile_kernel<T, K, HEAD_DIM>, kTileBytes);
  tile_kernel<T, K, HEAD_DIM><<<dim3(ctas, p.batch), TileShared<HEAD_DIM>::kThreads, kTileBytes, stream>>>(p, items);
  check_launch("tile_kernel");
}

// The pilot and the one-pass kernel, with their parameters, which contain p. `beside`: a kernel for other rows has just
// been launched, which the pilot need not wait for to begin, only to end: the chain to `combine` has to hold.
template <typename Params>
void launch_one_pass_kernels(void (*pilot)(Params), void (*one_pass)(Params), const Params& argument,
                             const DecodeParams& p, const ScoreNeeds& needs, bool beside, cudaStream_t stream) {
  const bool streaming = p.budget == Budget::kStreaming;
  if (streaming) {
    const int pilot_bytes = kPilotBytes + kPilotWarps * needs.pilot + needs.once;
    share_multiprocessor(pilot, pilot_bytes);
    const dim3 grid(p.num_units(), p.batch);
    if (beside) {
      launch_after(pilot, grid, kPilotWarps * 32, pilot_bytes, stream, "pilot_kernel", argument);
    } else {
      pilot<<<grid, kPilotWarps * 32, pilot_bytes, stream>>>(argument);
      check_launch("pilot_kernel");
    }
  }
  const int shared_bytes = one_pass_shared_bytes(p, needs), threads = (p.plan.num_warps + kGatherWarps) * 32;
  share_multiprocessor(one_pass, shared_bytes);
  const dim3 grid(static_cast<unsigned>(max_runs_of(p) * p.num_units()));
  if (streaming) {
    launch_after(one_pass, grid, threads, shared_bytes, stream, "one_pass_kernel", argument);
  } else {
    one_pass<<<grid, threads, shared_bytes, stream>>>(argument);
    check_launch("one_pass_kernel");
  }
}

template <typename T, typename K, int HEAD_DIM>
void launch_one_pass(const DecodeParams& p, cudaStream_t stream) {
  launch_one_pass_kernels(pilot_kernel<T, K, HEAD_DIM>, one_pass_kernel<T, K, HEAD_DIM>, p, p, key_score_needs(p),
                          p.plan.exact, stream);
}

template <typename V, int HEAD_DIM>
void launch_proportional_gather(const DecodeParams& p, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(max_num_tiles(p.max_kv_len)) * p.num_kv_heads * p.num_streams();
  const dim3 grid(static_cast<unsigned>(ceil_div(items, kSelectWarps)), p.batch);
  launch_after(proportional_gather_kernel<V, HEAD_DIM>, grid, kSelectThreads, 0, stream, "proportional_gather_kernel",
               p);
}

}  // namespace santa::cuda
