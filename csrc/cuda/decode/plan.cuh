// Proportional rows, stage 2: one CTA per (batch row, KV head) turns the tiles' softmax states into level 1 of the CDF:
// the log-sum-exp of the row, each tile's integer interval, and the first draw that can fall into it.
#pragma once

#include "core/mixture.h"
#include "core/softmax_state.h"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/decode/combine.cuh"
#include "params.h"

namespace santa::cuda {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;

// The tile's share of the row, for a stream.
__device__ __forceinline__ float tile_share(const DecodeParams& p, int64_t group, int stream, int tile,
                                            const float* row_lse) {
  const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * p.group_size;
  const bool grouped = p.sampler == Sampler::kGrouped;
  const int first = grouped ? 0 : stream, last = grouped ? p.group_size : stream + 1;
  float share = 0.0f;
  for (int h = first; h < last; ++h) {
    const float factor = tile_factor(p.tile_max[stats + h], row_lse[h]);
    if (factor > 0.0f) share += factor * p.tile_sum[stats + h];
  }
  return share / static_cast<float>(last - first);
}

// Four CTAs on a multiprocessor: told of none, ptxas takes fewer registers than it needs, and spills.
__global__ void __launch_bounds__(kPlanThreads, 4) plan_kernel(const __grid_constant__ DecodeParams p) {
  const int kv_head = blockIdx.x, batch_index = blockIdx.y;
  const RowShape row = row_shape_of(p, batch_index);
  wait_for_previous();  // all do: the next kernel waits for this one alone
  if (!row.proportional()) return;
  const int64_t group = p.group_index(batch_index, kv_head);
  const int warp = warp_index(), lane = threadIdx.x & 31, group_size = p.group_size;
  float* row_lse = p.row_lse + group * group_size;

  for (int h = warp; h < group_size; h += kPlanWarps) {
    float own_max;
    const float lse = lse_of_tiles(p, p.stats_offset(group) + h, row.num_tiles, own_max);
    if (lane == 0) row_lse[h] = lse;
  }
  if (p.read_mask != nullptr) {
    uint32_t* mask = p.read_mask + p.mask_offset(group);
    for (int i = threadIdx.x; i < row.num_tiles * kMaskWords; i += kPlanThreads) mask[i] = 0;
  }
  __syncthreads();

  const bool grouped = p.sampler == Sampler::kGrouped;
  for (int stream = warp; stream < p.num_streams(); stream += kPlanWarps) {
    const int64_t offset = p.stream_offset(group, stream);
    uint32_t total = 0;
    for (int base = 0; base < row.num_tiles; base += 32) {
      const int tile = base + lane;
      const uint32_t mass = tile < row.num_tiles ? tile_mass_of(tile_share(p, group, stream, tile, row_lse)) : 0;
      const uint32_t end = inclusive_scan(mass);
      if (tile < row.num_tiles) {
        p.tile_start[offset + tile] = total + end - mass;
        p.tile_mass[offset + tile] = mass;
      }
      total += __shfl_sync(0xffffffffu, end, 31);
    }
    const auto random = random_stream(p, batch_index, row, kv_head, stream, p.num_streams());
    const Draws draws = Draws::make(p.sampler, random, 0, num_draws_of(p), total);
    if (lane == 0) p.draws[group * p.num_streams() + stream] = draws;
    if (draws.sorted()) {
      for (int tile = lane; tile < row.num_tiles; tile += 32) {
        p.tile_draw[offset + tile] = draws.count_below(p.tile_start[offset + tile]);
      }
    }
  }
}

}  // namespace santa::cuda
