// Drawing the rows of one tile, by one warp: level 2 of the CDF, thresholds, counts. Shared by stage 3 and the test
// operator.
#pragma once

#include "core/samplers.h"
#include "core/tiling.h"
#include "cuda/common/reduce.cuh"

namespace santa::cuda {

constexpr int kKeysPerLane = kMaxTileKv / 32;  // lane l holds keys l, l + 32, l + 64, ...

struct SelectShared {
  uint32_t cumulative[kMaxTileKv];  // running sums of the row weights
  uint32_t counts[kMaxTileKv];      // draws per row
  uint16_t rows[kMaxTileKv];        // rows with draws, in order
};

// Fills shared.cumulative and clears shared.counts; returns the sum of the weights.
__device__ __forceinline__ uint32_t accumulate_weights(const uint32_t (&weights)[kKeysPerLane], int num_steps,
                                                       SelectShared& shared, int lane) {
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kKeysPerLane; ++i) {
    if (i >= num_steps) break;
    const uint32_t inclusive = inclusive_scan(weights[i]);
    shared.cumulative[i * 32 + lane] = sum + inclusive;
    shared.counts[i * 32 + lane] = 0;
    sum += __shfl_sync(0xffffffffu, inclusive, 31);
  }
  __syncwarp();
  return sum;
}

// Counts the draws [first, last) that fall into the tile. Integer atomics: the counts do not depend on their order.
__device__ __forceinline__ void draw_tile(const Draws& draws, uint32_t first, uint32_t last, uint32_t tile_start,
                                          uint32_t tile_mass, uint32_t weight_sum, int num_rows, SelectShared& shared,
                                          int lane) {
  const auto positions = TilePositions::make(draws.unit(), tile_start, tile_mass);
  for (uint32_t m = first + lane; m < last; m += 32) {
    const Threshold threshold = draws.threshold(m);
    if (!positions.contains(threshold)) continue;
    atomicAdd(&shared.counts[row_at(shared.cumulative, num_rows, positions.position(threshold, weight_sum))], 1u);
  }
  __syncwarp();
}

// Lists the rows with draws in shared.rows and returns their number. `on_mask(word, bits)` sees the rows as bits.
template <typename OnMask>
__device__ __forceinline__ int list_rows(int num_steps, SelectShared& shared, int lane, const OnMask& on_mask) {
  int listed = 0;
#pragma unroll
  for (int i = 0; i < kKeysPerLane; ++i) {
    if (i >= num_steps) break;
    const bool drawn = shared.counts[i * 32 + lane] > 0;
    const uint32_t bits = __ballot_sync(0xffffffffu, drawn);
    if (drawn) shared.rows[listed + __popc(bits & ((1u << lane) - 1u))] = static_cast<uint16_t>(i * 32 + lane);
    if (lane == 0 && bits != 0) on_mask(i, bits);
    listed += __popc(bits);
  }
  __syncwarp();
  return listed;
}

}  // namespace santa::cuda
