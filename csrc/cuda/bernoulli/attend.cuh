// Bernoulli scores, exact values: one CTA per tile of a row that is not sampled, KV head and block of 8 query heads
// weighs all values of the tile with the scores of stage 2. What it leaves is what tile_kernel leaves of exact rows.
#pragma once

#include "bernoulli_params.h"
#include "core/kv_rows.h"
#include "core/mixture.h"
#include "core/softmax_state.h"
#include "cuda/common/row_load.cuh"

namespace santa::cuda {

constexpr int kAttendHeads = 8;
constexpr int kAttendThreads = 256;
constexpr int kAttendKeys = 128;  // whose weights are in shared memory at a time

struct AttendShared {
  SoftmaxState states[kAttendThreads / 32][kAttendHeads];
  RowShape row;  // here rather than in registers
  alignas(16) float weights[kAttendKeys][kAttendHeads];
  alignas(16) float partial[kAttendThreads * 8];  // of one head: [slots, head_dim]
};

template <typename T>
__global__ void __launch_bounds__(kAttendThreads, 2)
    attend_scores_kernel(const __grid_constant__ BernoulliParams p, int head_blocks) {
  __shared__ AttendShared shared;
  const DecodeParams& d = p.decode;
  const int block = blockIdx.x % head_blocks;
  const int kv_head = blockIdx.x / head_blocks % d.num_kv_heads;
  const int tile = blockIdx.x / head_blocks / d.num_kv_heads;
  const int batch_index = blockIdx.y;
  const RowShape row = row_shape_of(d, batch_index);
  if (row.sampled() || tile >= max(row.num_tiles, 1)) return;

  const int64_t group = d.group_index(batch_index, kv_head);
  const int first_head = block * kAttendHeads, num_heads = min(kAttendHeads, d.group_size - first_head);
  const int64_t first_key = static_cast<int64_t>(tile) * row.tile_kv;
  const int num_keys = static_cast<int>(min(static_cast<int64_t>(row.tile_kv), row.kv_len - first_key));
  const float* scores = d.scores + group * d.scores_per_row + first_key * d.group_pitch + first_head;
  const int warp = warp_index(), lane = threadIdx.x & 31;

  // The tile's softmax states, in every thread.
  float max[kAttendHeads];
  SoftmaxState state[kAttendHeads];
#pragma unroll
  for (int h = 0; h < kAttendHeads; ++h) {
    state[h] = empty_softmax_state();
    if (h >= num_heads) continue;
    for (int n = threadIdx.x; n < num_keys; n += kAttendThreads) {
      state[h] = merge(state[h], {scores[n * d.group_pitch + h], 1.0f});
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
      state[h] = merge(state[h], {__shfl_xor_sync(0xffffffffu, state[h].max, offset),
                                  __shfl_xor_sync(0xffffffffu, state[h].sum, offset)});
    }
    if (lane == 0) shared.states[warp][h] = state[h];
  }
  if (threadIdx.x == 0) shared.row = row;
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kAttendHeads; ++h) {
    state[h] = empty_softmax_state();
    for (int w = 0; h < num_heads && w < kAttendThreads / 32; ++w) state[h] = merge(state[h], shared.states[w][h]);
    max[h] = state[h].max;
  }

  // Threads along head_dim take 8 dimensions each; the rest split the keys.
  const int lanes = d.head_dim / 8, slots = kAttendThreads / lanes;
  const int slot = threadIdx.x / lanes, chunk = threadIdx.x % lanes;
  const T* const values = value_rows<T>(d, batch_index, kv_head, row.kv_start).base;  // never paged
  float acc[kAttendHeads][8] = {};
  for (int base = 0; base < num_keys; base += kAttendKeys) {
    const int count = min(kAttendKeys, num_keys - base);
    __syncthreads();
    for (int n = threadIdx.x; n < count; n += kAttendThreads) {
#pragma unroll
      for (int h = 0; h < kAttendHeads; ++h) {
        shared.weights[n][h] =
            h < num_heads ? exp2_below(scores[static_cast<int64_t>(base + n) * d.group_pitch + h], max[h]) : 0.0f;
      }
    }
    __syncthreads();
    for (int n = slot; slot < slots && n < count; n += slots) {
      const uint4 packed = load_global_8(values + (first_key + base + n) * d.stride_v_token + chunk * 8, d.aligned);
      const float2 pairs[4] = {Float16Traits<T>::unpack(packed.x), Float16Traits<T>::unpack(packed.y),
                               Float16Traits<T>::unpack(packed.z), Float16Traits<T>::unpack(packed.w)};
#pragma unroll
      for (int h = 0; h < kAttendHeads; ++h) {
        const float weight = shared.weights[n][h];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc[h][2 * j] += weight * pairs[j].x;
          acc[h][2 * j + 1] += weight * pairs[j].y;
        }
      }
    }
  }

  const int64_t stats = d.stats_offset(group) + static_cast<int64_t>(tile) * d.group_size + first_head;
  const int64_t out_head = static_cast<int64_t>(batch_index) * d.num_qo_heads + kv_head * d.group_size + first_head;
  const bool only_tile = shared.row.num_tiles <= 1;
#pragma unroll
  for (int h = 0; h < kAttendHeads; ++h) {
    if (h >= num_heads) break;
    __syncthreads();
    if (slot < slots) {
#pragma unroll
      for (int j = 0; j < 8; ++j) shared.partial[slot * d.head_dim + chunk * 8 + j] = acc[h][j];
    }
    __syncthreads();
    const float lse = log2_sum(state[h]);
    if (threadIdx.x < d.head_dim) {
      float value = 0.0f;
      for (int s = 0; s < slots; ++s) value += shared.partial[s * d.head_dim + threadIdx.x];
      if (only_tile) {
        value = epilogue_of(d, shared.row, kv_head, first_head + h, lse).output(value / state[h].sum);
        static_cast<T*>(d.out)[(out_head + h) * d.head_dim + threadIdx.x] = Float16Traits<T>::from_float(value);
      } else {
        d.o_accum[(stats + h) * d.head_dim + threadIdx.x] = value;
      }
    }
    if (threadIdx.x == 0) {
      if (only_tile) d.lse[out_head + h] = epilogue_of(d, shared.row, kv_head, first_head + h, lse).lse;
      if (shared.row.num_tiles > 0) {
        d.tile_max[stats + h] = state[h].max;
        d.tile_sum[stats + h] = state[h].sum;
      }
    }
  }
  if (only_tile && d.rows_read != nullptr && block == 0 && threadIdx.x == 0) {
    d.rows_read[group] = shared.row.valid ? shared.row.kv_len : -1;
  }
}

}  // namespace santa::cuda
