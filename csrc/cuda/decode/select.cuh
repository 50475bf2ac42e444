// Drawing the rows of one tile, by one warp: level 2 of the CDF, thresholds, counts. Shared by stage 3 and the test
// operator.
#pragma once

#include "core/samplers.h"
#include "core/tiling.h"
#include "cuda/common/reduce.cuh"
#include "params.h"

namespace santa::cuda {

// A lane holds four keys that are neighbours of every 128: a step. Sums over those four are its own, and the scans over
// lanes of all steps run side by side.
constexpr int kStepKeys = 128;
constexpr int kSteps = kMaxTileKv / kStepKeys;
constexpr int kKeysPerLane = 4 * kSteps;

SANTA_HD int first_key_of(int step, int lane) { return step * kStepKeys + 4 * lane; }

struct SelectShared {
  alignas(16) uint32_t cumulative[kMaxTileKv];  // running sums of the row weights
  alignas(16) uint32_t counts[kMaxTileKv];      // draws per row
  uint32_t drawn[kMaskWords];                   // rows with draws, as bits
  uint16_t rows[kMaxTileKv];                    // the same in order
};

// Fills shared.cumulative and clears what draw_tile adds to; returns the sum of the weights.
__device__ __forceinline__ uint32_t accumulate_weights(const uint32_t (&weights)[kKeysPerLane], int num_steps,
                                                       SelectShared& shared, int lane) {
  uint32_t own[kKeysPerLane], scan[kSteps];  // the lane's running sums of each step, their scans over lanes
#pragma unroll
  for (int i = 0; i < kKeysPerLane; ++i) own[i] = i % 4 == 0 ? weights[i] : own[i - 1] + weights[i];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) scan[s] = own[4 * s + 3];
#pragma unroll
  for (int distance = 1; distance < 32; distance <<= 1) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t below = __shfl_up_sync(0xffffffffu, scan[s], distance);
      if (lane >= distance) scan[s] += below;
    }
  }
  uint32_t sum = 0;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= num_steps) break;
    const uint32_t before = sum + scan[s] - own[4 * s + 3];
    const int key = first_key_of(s, lane);
    *reinterpret_cast<uint4*>(&shared.cumulative[key]) = {before + own[4 * s], before + own[4 * s + 1],
                                                          before + own[4 * s + 2], before + own[4 * s + 3]};
    *reinterpret_cast<uint4*>(&shared.counts[key]) = {0, 0, 0, 0};
    sum += __shfl_sync(0xffffffffu, scan[s], 31);
  }
  if (lane < kMaskWords) shared.drawn[lane] = 0;
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
    const int row = row_at(shared.cumulative, num_rows, positions.position(threshold, weight_sum));
    atomicAdd(&shared.counts[row], 1u);
    atomicOr(&shared.drawn[row >> 5], 1u << (row & 31));
  }
  __syncwarp();
}

// Lists the rows with draws in shared.rows and returns their number. `on_mask(word, bits)` sees the rows as bits.
template <typename OnMask>
__device__ __forceinline__ int list_rows(SelectShared& shared, int lane, const OnMask& on_mask) {
  static_assert(kMaskWords <= 32, "a lane for each word");
  uint32_t bits = lane < kMaskWords ? shared.drawn[lane] : 0;
  if (bits != 0) on_mask(lane, bits);
  const int end = inclusive_scan(__popc(bits));
#pragma unroll 1
  for (int i = end - __popc(bits); bits != 0; bits &= bits - 1) {
    shared.rows[i++] = static_cast<uint16_t>(lane * 32 + __ffs(bits) - 1);
  }
  __syncwarp();
  return __shfl_sync(0xffffffffu, end, 31);
}

}  // namespace santa::cuda
