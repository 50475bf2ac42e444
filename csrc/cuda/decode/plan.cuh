// Stage 2, sampled rows: one CTA per (batch row, KV head) turns the tiles' softmax states into level 1 of the CDF: the
// log-sum-exp of the row and of every segment, each tile's integer interval, and the first draw that can fall into it.
#pragma once

#include "core/mixture.h"
#include "core/softmax_state.h"
#include "params.h"

namespace santa::cuda {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;

// Log-sum-exp of tiles [first, last) for one head, base 2, by one warp: lanes take tiles in turn, then merge as a tree.
// The order depends on the number of tiles alone.
__device__ __forceinline__ float lse_of_tiles(const DecodeParams& p, int64_t group, int head, int first, int last) {
  SoftmaxState state = empty_softmax_state();
  for (int tile = first + static_cast<int>(threadIdx.x & 31); tile < last; tile += 32) {
    const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * p.gqa_group_size + head;
    state = merge(state, {p.tile_max[stats], p.tile_sum[stats]});
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    state = merge(state,
                  {__shfl_xor_sync(0xffffffffu, state.max, offset), __shfl_xor_sync(0xffffffffu, state.sum, offset)});
  }
  return log2_sum(state);
}

// The tile's share of its segment, for a stream.
__device__ __forceinline__ float tile_share(const DecodeParams& p, int64_t group, int stream, int tile,
                                            const float* segment_lse) {
  const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * p.gqa_group_size;
  const bool grouped = p.sampler == Sampler::kGrouped;
  const int first = grouped ? 0 : stream, last = grouped ? p.gqa_group_size : stream + 1;
  float share = 0.0f;
  for (int h = first; h < last; ++h) {
    const float factor = tile_factor(p.tile_max[stats + h], segment_lse[h]);
    if (factor > 0.0f) share += factor * p.tile_sum[stats + h];
  }
  return share / static_cast<float>(last - first);
}

__device__ __forceinline__ uint32_t inclusive_scan(uint32_t value) {
  const int lane = threadIdx.x & 31;
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ DecodeParams p) {
  const int kv_head = blockIdx.x, batch_index = blockIdx.y;
  const RowShape row = row_shape_of(p, batch_index);
  if (!row.sampled || row.persistent) return;
  const int64_t group = p.group_index(batch_index, kv_head);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group_size = p.gqa_group_size;
  const SegmentPlan plan = row.segments(p.num_samples, p.budget);
  float* segment_lse = p.segment_lse + p.stats_offset(group);

  for (int h = warp; h < group_size; h += kPlanWarps) {
    const float lse = lse_of_tiles(p, group, h, 0, row.num_tiles);
    if (lane == 0) {
      p.row_lse[group * group_size + h] = lse;
      p.lse[static_cast<int64_t>(batch_index) * p.num_qo_heads + kv_head * group_size + h] = lse * kLn2;
      if (plan.num_segments == 1) segment_lse[h] = lse;
    }
  }
  if (plan.num_segments > 1) {
    for (int item = warp; item < plan.num_segments * group_size; item += kPlanWarps) {
      const int segment = item / group_size, h = item % group_size, first = segment * plan.tiles_per_segment;
      const float lse = lse_of_tiles(p, group, h, first, min(first + plan.tiles_per_segment, row.num_tiles));
      if (lane == 0) segment_lse[item] = lse;
    }
  }
  if (p.read_mask != nullptr) {
    uint32_t* mask = p.read_mask + p.mask_offset(group);
    for (int i = threadIdx.x; i < row.num_tiles * kMaskWords; i += kPlanThreads) mask[i] = 0;
  }
  __syncthreads();

  const int num_streams = p.num_streams();
  const bool grouped = p.sampler == Sampler::kGrouped;
  const int64_t row_seed = p.row_seeds != nullptr ? p.row_seeds[batch_index] : 0;
  for (int item = warp; item < plan.num_segments * num_streams; item += kPlanWarps) {
    const int segment = item / num_streams, stream = item % num_streams;
    const int first = segment * plan.tiles_per_segment, last = min(first + plan.tiles_per_segment, row.num_tiles);
    const int64_t offset = p.stream_offset(group, stream);
    uint32_t total = 0;
    for (int base = first; base < last; base += 32) {
      const int tile = base + lane;
      const uint32_t mass =
          tile < last ? tile_mass_of(tile_share(p, group, stream, tile, segment_lse + segment * group_size)) : 0;
      const uint32_t end = inclusive_scan(mass);
      if (tile < last) {
        p.tile_start[offset + tile] = total + end - mass;
        p.tile_mass[offset + tile] = mass;
      }
      total += __shfl_sync(0xffffffffu, end, 31);
    }
    const auto random =
        RandomStream::make(p.seed, row_seed, row.kv_len, grouped ? kv_head : kv_head * group_size + stream);
    const Draws draws =
        Draws::make(p.sampler, random, segment, static_cast<uint32_t>(plan.draws) * (grouped ? group_size : 1), total);
    if (lane == 0) p.segment_draws[offset + segment] = draws;
    if (draws.sorted()) {
      for (int tile = first + lane; tile < last; tile += 32) {
        p.tile_draw[offset + tile] = draws.count_below(p.tile_start[offset + tile]);
      }
    }
  }
}

}  // namespace santa::cuda
