// Drawing the rows of one tile: level 2 of the CDF, thresholds, counts. Shared by stage 3 and the test operator.
#pragma once

#include "core/samplers.h"
#include "core/tiling.h"

namespace santa::cuda {

constexpr int kSelectThreads = 128;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kKeysPerThread = kMaxTileKv / kSelectThreads;

struct SelectShared {
  uint32_t cumulative[kMaxTileKv];  // running sums of the row weights
  int32_t counts[kMaxTileKv];       // draws per row
  uint32_t warp_total[kSelectWarps];
};

// Exclusive prefix of one number per thread over the CTA, and the total. Two barriers; shared.warp_total is free after.
__device__ __forceinline__ uint32_t exclusive_scan(uint32_t value, uint32_t* warp_total, uint32_t& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint32_t inclusive = value;
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == 31) warp_total[warp] = inclusive;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) before += warp_total[w];
    total += warp_total[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

// Thread i holds the weights of rows kKeysPerThread * i and following (0 past the tile's end). Afterwards, behind a
// barrier, shared.cumulative and shared.counts are complete. Integer atomics: the counts do not depend on their order.
__device__ __forceinline__ uint32_t draw_tile(const Draws& draws, uint64_t tile_start, uint64_t tile_mass,
                                              const uint32_t (&weights)[kKeysPerThread], int num_rows,
                                              SelectShared& shared) {
  uint32_t own = 0, weight_sum;
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) own += weights[i];
  uint32_t running = exclusive_scan(own, shared.warp_total, weight_sum);
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    const int row = threadIdx.x * kKeysPerThread + i;
    running += weights[i];
    shared.cumulative[row] = running;
    shared.counts[row] = 0;
  }
  __syncthreads();
  if (weight_sum > 0) {
    const uint64_t tile_end = tile_start + tile_mass;
    const uint32_t first = draws.sorted() ? draws.count_below(tile_start) : 0;
    const uint32_t last = draws.sorted() ? draws.count_below(tile_end) : draws.num_draws;
    for (uint32_t m = first + threadIdx.x; m < last; m += kSelectThreads) {
      const uint64_t threshold = draws.threshold(m);
      if (threshold < tile_start || threshold >= tile_end) continue;
      const uint32_t position = position_in_tile(threshold - tile_start, tile_mass, weight_sum);
      atomicAdd(&shared.counts[row_at(shared.cumulative, num_rows, position)], 1);
    }
  }
  __syncthreads();
  return weight_sum;
}

}  // namespace santa::cuda
