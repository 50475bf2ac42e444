// Stage 4, one CTA per (batch row, KV head): adds up the partial results in a fixed order and writes the outputs.
#pragma once

#include "core/mixture.h"
#include "core/softmax_state.h"
#include "cuda/common/ptx.cuh"
#include "cuda/decode/plan.cuh"
#include "params.h"

namespace santa::cuda {

template <int NUM_THREADS>
struct CombineShared {
  float4 partial[NUM_THREADS];
  int rows[NUM_THREADS / 32];
};

// Exact rows: the partial results of the tiles, weighted with exp2(tile_max - lse). Sampled rows: those of the runs.
// Not inlined: few CTAs get here, and the loops of stage 1 need the registers.
template <typename T, int NUM_THREADS>
__device__ __noinline__ void combine_group(const DecodeParams& p, int batch_index, int kv_head,
                                           CombineShared<NUM_THREADS>& shared) {
  const RowShape row = row_shape_of(p, batch_index);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group_size = p.gqa_group_size, head_dim = p.head_dim;
  const int64_t group = p.group_index(batch_index, kv_head);
  const int64_t stats = p.stats_offset(group);
  const int64_t first_head = static_cast<int64_t>(batch_index) * p.num_qo_heads + kv_head * group_size;
  float* row_lse = p.row_lse + group * group_size;
  const float nan = __int_as_float(0x7fffffff);

  if (!row.sampled) {
    for (int h = warp; h < group_size; h += NUM_THREADS / 32) {
      const float lse = lse_of_tiles(p, group, h, 0, row.num_tiles);
      if (lane == 0) {
        row_lse[h] = lse;
        p.lse[first_head + h] = row.valid ? lse * kLn2 : nan;
      }
    }
    __syncthreads();
  }

  // Columns of four dimensions; threads beyond the columns share out the partial results.
  const int step = row.sampled ? tiles_per_run(row.num_tiles) : 1;
  const int columns = group_size * head_dim / 4, slots = columns < NUM_THREADS ? NUM_THREADS / columns : 1;
  for (int base = 0; base < columns; base += NUM_THREADS) {
    const int slot = slots > 1 ? threadIdx.x / columns : 0;
    const int column = slots > 1 ? threadIdx.x % columns : base + threadIdx.x;
    const bool active = slot < slots && column < columns;
    const int h = active ? column * 4 / head_dim : 0;
    const float lse = row_lse[h];
    const int32_t* tile_rows = p.tile_rows + p.stream_offset(group, p.num_streams() == 1 ? 0 : h);
    float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
    if (active) {
#pragma unroll 4
      for (int tile = slot * step; tile < row.num_tiles; tile += slots * step) {
        if (row.sampled && tile_rows[tile] == 0) continue;
        const int64_t index = stats + static_cast<int64_t>(tile) * group_size;
        const float weight = row.sampled ? 1.0f : exp2_below(p.tile_max[index + h], lse);
        const float4 value = *reinterpret_cast<const float4*>(p.o_accum + index * head_dim + column * 4);
        acc.x += weight * value.x, acc.y += weight * value.y, acc.z += weight * value.z, acc.w += weight * value.w;
      }
    }
    if (slots > 1) {
      shared.partial[threadIdx.x] = acc;
      __syncthreads();
      for (int s = 1; s < slots && threadIdx.x < columns; ++s) {
        const float4 value = shared.partial[s * columns + threadIdx.x];
        acc.x += value.x, acc.y += value.y, acc.z += value.z, acc.w += value.w;
      }
    }
    if (active && slot == 0) {
      // No keys: zeros. A range outside the cache, a NaN or an infinite score: undefined, so NaN.
      const bool defined = row.valid && (row.kv_len == 0 || is_finite(lse));
      if (!defined) acc = {nan, nan, nan, nan};
      const uint2 packed = {Half<T>::pack(acc.x, acc.y), Half<T>::pack(acc.z, acc.w)};
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + first_head * head_dim + column * 4) = packed;
    }
  }

  if (p.rows_read == nullptr) return;
  int rows = 0;
  if (row.sampled) {
    const uint32_t* mask = p.read_mask + p.mask_offset(group);
    for (int i = threadIdx.x; i < row.num_tiles * kMaskWords; i += NUM_THREADS) rows += __popc(mask[i]);
  } else if (threadIdx.x == 0) {
    rows = row.kv_len;
  }
  for (int offset = 16; offset > 0; offset >>= 1) rows += __shfl_xor_sync(0xffffffffu, rows, offset);
  if (lane == 0) shared.rows[warp] = rows;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < NUM_THREADS / 32; ++w) rows += shared.rows[w];
    p.rows_read[group] = row.valid ? rows : -1;
  }
}

}  // namespace santa::cuda
