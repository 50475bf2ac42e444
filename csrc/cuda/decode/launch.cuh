// Definition of the templated launcher; included by the instantiations alone.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/decode/decode.cuh"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/launch.h"

namespace santa::cuda {

template <typename T, int HEAD_DIM>
void launch_decode_kernel(const DecodeParams& p, cudaStream_t stream) {
  const int64_t groups = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  check(cudaMemsetAsync(p.counters, 0, groups * kNumCounters * sizeof(uint32_t), stream), "cudaMemsetAsync");

  DecodeGrid grid{};
  grid.head_blocks = static_cast<int>(ceil_div(p.gqa_group_size, kHeadBlock));
  const int tiles = p.max_tiles > 0 ? p.max_tiles : 1;  // an empty cache still has outputs
  grid.tile_ctas = tiles * p.num_kv_heads * grid.head_blocks;
  if (p.num_samples > 0) {
    const int max_runs = tiles < 64 ? tiles : 64;
    grid.gathers_per_group = static_cast<int>(ceil_div(max_runs * p.num_streams(), kDecodeWarps));
    grid.gather_ctas = grid.gathers_per_group * p.num_kv_heads;
  }
  grid.lag = gather_lag(p.batch, grid.tile_ctas);
  const int64_t ctas = static_cast<int64_t>(p.batch) * (grid.tile_ctas + grid.gather_ctas);
  if (ctas > 0x7fffffff) throw std::runtime_error("santa: batch x tiles x heads is too large for one launch");

  constexpr int kSharedBytes = sizeof(DecodeShared<HEAD_DIM>);
  allow_shared_memory(decode_kernel<T, HEAD_DIM>, kSharedBytes);
  decode_kernel<T, HEAD_DIM><<<static_cast<unsigned>(ctas), kDecodeThreads, kSharedBytes, stream>>>(p, grid);
  check_launch("decode_kernel");
}

}  // namespace santa::cuda
