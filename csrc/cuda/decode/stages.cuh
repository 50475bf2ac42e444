// Definitions of the templated launchers; included by the instantiations alone.
#pragma once

#include <cstdlib>

#include "cuda/common/launch.h"
#include "cuda/decode/gather.cuh"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/launch.h"
#include "cuda/decode/persistent.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

template <typename T, typename K, int HEAD_DIM>
void launch_tiles(const DecodeParams& p, cudaStream_t stream) {
  const int head_blocks = (p.gqa_group_size + kHeadBlock - 1) / kHeadBlock;
  const dim3 grid(static_cast<unsigned>(p.max_tiles) * p.num_kv_heads * head_blocks, p.batch);
  constexpr int kSharedBytes = sizeof(TileShared<HEAD_DIM>);
  allow_shared_memory(tile_kernel<T, K, HEAD_DIM>, kSharedBytes);
  tile_kernel<T, K, HEAD_DIM><<<grid, TileShared<HEAD_DIM>::kThreads, kSharedBytes, stream>>>(p, head_blocks);
  check_launch("tile_kernel");
}

// A persistent kernel and its parameters, which contain p.
template <typename Params>
void launch_persistent_kernel(void (*kernel)(Params), Params argument, const DecodeParams& p, int shared_bytes,
                              cudaStream_t stream) {
  allow_shared_memory(kernel, shared_bytes);

  // For a tool that takes reading memory before it is written for a mistake: see DecodeParams::seal.
  static const bool clear = std::getenv("SANTA_CLEAR_WORKSPACE") != nullptr;
  if (clear) {
    const std::size_t states = static_cast<std::size_t>(p.batch) * p.num_kv_heads * p.max_blocks * p.gqa_group_size;
    check(cudaMemsetAsync(p.block_state, 0, states * 2 * sizeof(uint64_t), stream), "cudaMemsetAsync");
  }
  void* arguments[] = {&argument};
  const cudaError_t status = cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), dim3(p.persistent.num_ctas),
      dim3((kFirstScoreWarp + p.persistent.num_score_warps) * 32), arguments, shared_bytes, stream);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    (void)cudaGetLastError();
    throw std::runtime_error(
        "santa on CUDA: sampled rows need a CTA on every multiprocessor of the device at the same time, and this "
        "context has fewer (MPS or a green context); num_samples=0, the exact path, has no such need");
  }
  check(status, "persistent_kernel");
}

template <typename T, typename K, int HEAD_DIM>
void launch_persistent(const DecodeParams& p, cudaStream_t stream) {
  launch_persistent_kernel(persistent_kernel<T, K, HEAD_DIM>, p, p, persistent_shared_bytes(p, key_score_warps(p)),
                           stream);
}

template <typename V, int HEAD_DIM>
void launch_gather(const DecodeParams& p, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(p.max_tiles) * p.num_kv_heads * p.num_streams();
  const dim3 grid(static_cast<unsigned>(ceil_div(items, kGatherWarps)), p.batch);
  gather_kernel<V, HEAD_DIM><<<grid, kGatherThreads, 0, stream>>>(p);
  check_launch("gather_kernel");
}

}  // namespace santa::cuda
