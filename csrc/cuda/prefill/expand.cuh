// Stage 6: the lists of kept blocks, and the statistics.
#pragma once

#include <cmath>

#include "core/softmax_state.h"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/prefill/choose.cuh"
#include "select_params.h"

namespace santa::cuda {

constexpr int kExpandWarps = 8;
constexpr int kStatsThreads = 256;

// One warp per (head, query block).
__global__ void __launch_bounds__(kExpandWarps * 32)
    expand_kernel(const __grid_constant__ SampleSelectParams p, int num_heads) {
  const int lane = threadIdx.x & 31, nk = p.nk;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kExpandWarps + warp_index();
  if (item >= static_cast<int64_t>(num_heads) * p.nq) return;
  const int head = static_cast<int>(item / p.nq), diagonal = static_cast<int>(item % p.nq) + p.offset;
  const uint8_t* columns = p.chosen + static_cast<int64_t>(head) * 2 * nk;
  const uint8_t* slashes = columns + nk;
  const int64_t block_row = static_cast<int64_t>(p.first_head) * p.nq + item;
  int32_t* kv_idx = p.kv_idx + block_row * nk;

  int count = 0;
  for (int base = 0; base <= diagonal; base += 32) {
    const int b = base + lane;
    const bool keep = b <= diagonal && (columns[b] != 0 || slashes[diagonal - b] != 0);
    const unsigned votes = __ballot_sync(0xffffffffu, keep);
    if (keep) kv_idx[count + __popc(votes & ((1u << lane) - 1))] = b;
    count += __popc(votes);
  }
  for (int i = count + lane; i < nk; i += 32) kv_idx[i] = 0;
  if (lane == 0) p.kv_cnt[block_row] = count;
}

// One CTA per (head, chunk): the part of each row's mass that is kept.
__global__ void __launch_bounds__(kMassThreads) retained_kernel(const __grid_constant__ SampleSelectParams p) {
  __shared__ uint64_t sums[kSelectBlock];
  const int64_t index = blockIdx.x;  // head * num_chunks + chunk
  const int head = blockIdx.x / p.num_chunks, diagonal = p.diagonal(blockIdx.x % p.num_chunks), nk = p.nk;
  const uint8_t* columns = p.chosen + static_cast<int64_t>(head) * 2 * nk;
  const uint8_t* slashes = columns + nk;
  const float* lse = p.block_lse + index * nk * kSelectBlock;

  const int row = threadIdx.x % kSelectBlock, slice = threadIdx.x / kSelectBlock;
  if (slice == 0) sums[row] = 0;
  __syncthreads();
  const float row_lse = p.row_lse[index * kSelectBlock + row];
  uint64_t sum = 0;
  for (int b = slice; b <= diagonal; b += kMassSlices) {
    if (columns[b] == 0 && slashes[diagonal - b] == 0) continue;
    sum += mass_units(exp2_below(lse[static_cast<int64_t>(b) * kSelectBlock + row], row_lse));
  }
  add_shared(&sums[row], sum);
  __syncthreads();
  if (slice == 0) {
    const int64_t out = index * kSelectBlock + row;
    p.retained[out] = sums[row];
    p.share[out] = static_cast<float>(static_cast<double>(sums[row]) / static_cast<double>(p.row_total[out]));
  }
}

// Element `rank` from 0, in ascending order, of count numbers in [0, 1]: the largest number with at most `rank` below
// it, found bit by bit.
__device__ __forceinline__ float element_at(const float* values, int count, int rank, uint64_t* scratch) {
  uint32_t found = 0;
  for (int bit = 29; bit >= 0; --bit) {
    const uint32_t candidate = found | (1u << bit);
    uint64_t below = 0;
    for (int i = threadIdx.x; i < count; i += kStatsThreads) below += __float_as_uint(values[i]) < candidate;
    if (block_sum<kStatsThreads>(below, scratch) <= static_cast<uint64_t>(rank)) found = candidate;
  }
  return __uint_as_float(found);
}

// One CTA per head.
__global__ void __launch_bounds__(kStatsThreads) stats_kernel(const __grid_constant__ SampleSelectParams p) {
  __shared__ uint64_t scratch[kStatsThreads / 32];
  const int head = blockIdx.x, num_rows = p.num_rows();
  const int64_t out_head = static_cast<int64_t>(p.first_head) + head;
  const int64_t first_row = static_cast<int64_t>(head) * p.num_chunks * kSelectBlock;
  const uint8_t* chosen = p.chosen + static_cast<int64_t>(head) * 2 * p.nk;

  uint64_t blocks = 0, columns = 0, slashes = 0, retained = 0, total = 0;
  for (int a = threadIdx.x; a < p.nq; a += kStatsThreads) blocks += p.kv_cnt[out_head * p.nq + a];
  for (int i = threadIdx.x; i < p.nk; i += kStatsThreads) columns += chosen[i], slashes += chosen[p.nk + i];
  for (int row = threadIdx.x; row < num_rows; row += kStatsThreads) {
    retained += p.retained[first_row + row];
    total += p.row_total[first_row + row];
  }
  blocks = block_sum<kStatsThreads>(blocks, scratch);
  columns = block_sum<kStatsThreads>(columns, scratch);
  slashes = block_sum<kStatsThreads>(slashes, scratch);
  retained = block_sum<kStatsThreads>(retained, scratch);
  total = block_sum<kStatsThreads>(total, scratch);
  const float least = element_at(p.share + first_row, num_rows, 0, scratch);
  const float percentile = element_at(p.share + first_row, num_rows, percentile_index(num_rows), scratch);
  if (threadIdx.x != 0) return;

  const bool broken = is_broken(p, head);
  const int64_t causal_blocks =
      static_cast<int64_t>(p.nq) * (p.offset + 1) + static_cast<int64_t>(p.nq) * (p.nq - 1) / 2;
  float* stats = p.stats + out_head * kNumSelectStats;
  stats[0] = static_cast<float>(static_cast<double>(blocks) / static_cast<double>(causal_blocks));
  stats[1] = broken ? NAN : static_cast<float>(static_cast<double>(retained) / static_cast<double>(total));
  stats[2] = broken ? NAN : least;
  stats[3] = broken ? NAN : percentile;
  stats[4] = static_cast<float>(columns);
  stats[5] = static_cast<float>(slashes);
}

}  // namespace santa::cuda
