// Definitions of the templated launchers; included by the instantiations alone.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/launch.h"
#include "cuda/decode/one_pass.cuh"
#include "cuda/decode/proportional_gather.cuh"
#include "cuda/decode/proportional_score.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

// Exact rows. Beside sampled ones they need not wait for the kernel before but to end (tile.cuh).
template <typename T, typename K, int HEAD_DIM>
void launch_tiles(const DecodeParams& p, cudaStream_t stream) {
  auto* const kernel = tile_kernel<T, K, HEAD_DIM>;
  constexpr int kThreads = tile_warps(HEAD_DIM) * 32;
  constexpr int kBytes = tile_shared_bytes(HEAD_DIM);
  const dim3 grid(static_cast<unsigned>(p.plan.exact_cut.max_runs * p.num_units()));
  if (p.plan.one_pass || p.plan.proportional) {
    share_multiprocessor(kernel, kBytes);
    launch_after(kernel, grid, kThreads, kBytes, stream, "tile_kernel", p);
  } else {
    allow_shared_memory(kernel, kBytes);
    if (p.plan.row_pairs) {
      launch_pairs(kernel, grid, kThreads, kBytes, stream, "tile_kernel", p);
    } else {
      SANTA_LAUNCH(kernel, grid, kThreads, kBytes, stream, p);
      check_launch("tile_kernel");
    }
  }
}

// The pilot and the one-pass kernel, with their parameters, which contain p. A pilot that is not the first kernel waits
// for the one before it.
template <typename Params>
void launch_one_pass_kernels(void (*pilot)(Params), void (*one_pass)(Params), const Params& argument,
                             const DecodeParams& p, int pilot_bytes, int shared_bytes, int threads, cudaStream_t stream,
                             bool is_first = true) {
  const bool needs_pilot = p.budget == Budget::kStreaming && !p.has_levels;
  if (needs_pilot) {
    share_multiprocessor(pilot, pilot_bytes);
    const dim3 pilot_grid(p.num_units(), p.batch);
    if (is_first) {
      SANTA_LAUNCH(pilot, pilot_grid, kPilotWarps * 32, pilot_bytes, stream, argument);
      check_launch("pilot_kernel");
    } else {
      launch_after(pilot, pilot_grid, kPilotWarps * 32, pilot_bytes, stream, "pilot_kernel", argument);
    }
  }
  share_multiprocessor(one_pass, shared_bytes);
  const dim3 grid(static_cast<unsigned>(p.plan.sampled_cut.max_runs * p.num_units()));
  if (needs_pilot) {
    launch_after(one_pass, grid, threads, shared_bytes, stream, "one_pass_kernel", argument);
  } else {
    SANTA_LAUNCH(one_pass, grid, threads, shared_bytes, stream, argument);
    check_launch("one_pass_kernel");
  }
}

template <typename T, typename K, int HEAD_DIM>
void launch_one_pass(const DecodeParams& p, cudaStream_t stream) {
  const ScoreNeeds needs = key_score_needs(p);
  launch_one_pass_kernels(pilot_kernel<T, K, HEAD_DIM>, one_pass_kernel<T, K, HEAD_DIM>, p, p,
                          pilot_shared_bytes(needs), one_pass_shared_bytes(p, needs), one_pass_threads(p), stream);
}

template <typename T, typename K, int HEAD_DIM>
void launch_scores(const DecodeParams& p, cudaStream_t stream) {
  auto* const kernel = proportional_score_kernel<T, K, HEAD_DIM>;
  const int bytes = proportional_shared_bytes(p, key_score_needs(p));
  share_multiprocessor(kernel, bytes);
  const dim3 grid(static_cast<unsigned>(p.plan.sampled_cut.max_runs * p.num_units()));
  SANTA_LAUNCH(kernel, grid, p.plan.num_warps * 32, bytes, stream, p);
  check_launch("proportional_score_kernel");
}

template <typename V, int HEAD_DIM>
void launch_proportional_gather(const DecodeParams& p, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(max_num_tiles(p.max_kv_len)) * p.num_kv_heads * p.num_streams();
  const dim3 grid(static_cast<unsigned>(ceil_div(items, kSelectWarps)), p.batch);
  auto* const kernel = p.sampler == Sampler::kGrouped ? proportional_gather_kernel<V, HEAD_DIM, true>
                                                      : proportional_gather_kernel<V, HEAD_DIM, false>;
  launch_after(kernel, grid, kSelectThreads, 0, stream, "proportional_gather_kernel", p);
}

}  // namespace santa::cuda
