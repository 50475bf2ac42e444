// Definitions of the templated launchers; included by the instantiations alone.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/launch.h"
#include "cuda/decode/one_pass.cuh"
#include "cuda/decode/proportional_gather.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

template <typename T, typename K, int HEAD_DIM>
void launch_tiles(const DecodeParams& p, cudaStream_t stream) {
  const int head_blocks = p.num_head_blocks();
  const dim3 grid(static_cast<unsigned>(std::max(p.max_tiles, 1)) * p.num_kv_heads * head_blocks, p.batch);
  constexpr int kTileBytes = sizeof(TileShared<HEAD_DIM>);
  allow_shared_memory(tile_kernel<T, K, HEAD_DIM>, kTileBytes);
  tile_kernel<T, K, HEAD_DIM><<<grid, TileShared<HEAD_DIM>::kThreads, kTileBytes, stream>>>(p, head_blocks);
  check_launch("tile_kernel");
}

// A one-pass kernel and its parameters, which contain p.
template <typename Params>
void launch_one_pass_kernel(void (*kernel)(Params), const Params& argument, const DecodeParams& p,
                            const ScoreBytes& bytes, cudaStream_t stream) {
  const int shared_bytes = one_pass_shared_bytes(p, bytes);
  allow_shared_memory(kernel, shared_bytes);
  prefer_shared_memory(kernel);
  const unsigned runs = static_cast<unsigned>(ceil_div_int(p.plan.max_parts, p.plan.run_parts));
  kernel<<<dim3(p.num_units(), runs, p.batch), (p.plan.num_warps + kGatherWarps) * 32, shared_bytes, stream>>>(argument);
  check_launch("one_pass_kernel");
}

template <typename T, typename K, int HEAD_DIM>
void launch_one_pass(const DecodeParams& p, cudaStream_t stream) {
  launch_one_pass_kernel(one_pass_kernel<T, K, HEAD_DIM>, p, p, key_score_bytes(p), stream);
}

template <typename V, int HEAD_DIM>
void launch_proportional_gather(const DecodeParams& p, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(max_num_tiles(p.max_kv_len)) * p.num_kv_heads * p.num_streams();
  const dim3 grid(static_cast<unsigned>(ceil_div(items, kSelectWarps)), p.batch);
  launch_after(proportional_gather_kernel<V, HEAD_DIM>, grid, kSelectThreads, stream, "proportional_gather_kernel", p);
}

}  // namespace santa::cuda
