// Bernoulli scores, stage 1: one CTA per batch row and KV head draws the counts of its query heads, a warp each, and
// lists the features that any of them reads.
#pragma once

#include "bernoulli_params.h"
#include "core/bernoulli.h"
#include "cuda/common/ptx.cuh"

namespace santa::cuda {

constexpr int kDrawWarps = 8;
constexpr int kDrawThreads = kDrawWarps * 32;

__device__ __forceinline__ uint64_t warp_inclusive_sum(uint64_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint64_t below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Counts of one query head, by one warp: lane l draws features 4 l to 4 l + 3, and those 128 above. `read`: features
// that are drawn.
template <typename T>
__device__ __forceinline__ void draw_head(const BernoulliParams& p, int batch_index, int kv_head, int h, int position,
                                          int16_t* counts, uint32_t* read, int lane) {
  const DecodeParams& d = p.decode;
  const int64_t group = d.group_index(batch_index, kv_head);
  const int qo_head = kv_head * d.group_size + h, num_chunks = d.head_dim / 4;
  const T* q = static_cast<const T*>(d.q) + batch_index * d.stride_q_batch + qo_head * d.stride_q_head;
  constexpr int kSteps = kMaxHeadDim / 128;

  float x[kSteps][4], max = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = step * 32 + lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[step][i] = chunk < num_chunks ? Float16Traits<T>::to_float(q[4 * chunk + i]) : 0.0f;
      max = larger_magnitude(max, x[step][i]);
    }
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    max = larger_magnitude(max, __shfl_xor_sync(0xffffffffu, max, offset));
  }
  if (lane == 0) p.scales[group * d.group_size + h] = d.scale_log2 * draw_scale_of(max, p.num_draws);

  const int64_t row_seed = d.row_seeds != nullptr ? d.row_seeds[batch_index] : 0;
  const auto stream =
      ScoreStream::make(d.seed, row_seed, position, p.score_sampler == ScoreSampler::kShared ? kv_head : qo_head);
  const uint32_t offset = systematic_offset(stream);
  uint64_t total = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = step * 32 + lane;
    uint64_t weights[4];
    int drawn[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = draw_weight_of(x[step][i], max);
    if (p.score_sampler == ScoreSampler::kSystematic) {
      const uint64_t own = weights[0] + weights[1] + weights[2] + weights[3];
      const uint64_t inclusive = warp_inclusive_sum(own, lane);
      uint64_t sum = total + inclusive - own;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        drawn[i] = systematic_count(sum, sum + weights[i], p.num_draws, offset);
        sum += weights[i];
      }
      total += __shfl_sync(0xffffffffu, inclusive, 31);
    } else if (chunk < num_chunks) {
      count_draws(stream, static_cast<uint32_t>(chunk), p.num_draws, weights, drawn);
    }
    if (chunk < num_chunks) {
      int16_t signed_counts[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        signed_counts[i] = static_cast<int16_t>(x[step][i] < 0.0f ? -drawn[i] : drawn[i]);
        if (drawn[i] != 0) atomicOr(read + 4 * chunk + i, 1u);
      }
      reinterpret_cast<short4*>(counts)[chunk] = {signed_counts[0], signed_counts[1], signed_counts[2],
                                                  signed_counts[3]};
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kDrawThreads, 2) draw_kernel(const __grid_constant__ BernoulliParams p) {
  __shared__ uint32_t read[kMaxHeadDim];
  __shared__ uint8_t listed[kMaxHeadDim];
  __shared__ int num_listed;
  launch_dependents();
  const DecodeParams& d = p.decode;
  const int kv_head = blockIdx.x, batch_index = blockIdx.y, warp = warp_index(), lane = threadIdx.x & 31;
  const RowShape row = row_shape_of(d, batch_index);
  const int64_t group = d.group_index(batch_index, kv_head);
  int16_t* const counts = p.counts + p.counts_offset(group);

  for (int i = threadIdx.x; i < kMaxHeadDim; i += kDrawThreads) read[i] = 0;
  __syncthreads();
  for (int h = warp; h < d.group_size; h += kDrawWarps) {
    draw_head<T>(p, batch_index, kv_head, h, row.position, counts + h * d.head_dim, read, lane);
  }
  __syncthreads();

  if (warp == 0) {
    int count = 0;
    for (int base = 0; base < d.head_dim; base += 32) {  // head_dim is a multiple of 32
      const bool wanted = row.kv_len > 0 && read[base + lane] != 0;
      const uint32_t bits = __ballot_sync(0xffffffffu, wanted);
      if (wanted) {
        const int slot = count + __popc(bits & ((1u << lane) - 1u));
        listed[slot] = static_cast<uint8_t>(base + lane);
        p.features[group * d.head_dim + slot] = static_cast<uint8_t>(base + lane);
      }
      count += __popc(bits);
    }
    if (lane == 0) {
      num_listed = count;
      p.features_read[group] = row.valid ? count : -1;
    }
  }
  __syncthreads();

  if (row.one_pass()) {
    for (int slot = num_listed + threadIdx.x; slot < d.head_dim; slot += kDrawThreads) {
      p.features[group * d.head_dim + slot] = 0;
    }
    for (int block = 0; block < d.num_head_blocks(); ++block) {
      const HeadBlock heads = head_block_of(d, block);
      uint16_t* weights = p.half_weights + p.half_weights_offset(group, block);
      for (int h = warp; h < kHeadBlock; h += kDrawWarps) {
        for (int slot = lane; slot < d.head_dim; slot += 32) {
          const bool there = h < heads.count && slot < num_listed;
          const T weight =
              Float16Traits<T>::from_float(there ? counts[(heads.first + h) * d.head_dim + listed[slot]] : 0.0f);
          weights[h * d.head_dim + slot] = *reinterpret_cast<const uint16_t*>(&weight);
        }
      }
    }
    return;
  }

  // Counts as the weights that stage 2 adds with: exact, since float32 has all integers of 24 bits.
  const int score_heads = score_heads_of(d.group_size);
  for (int block = 0; block < p.num_blocks; ++block) {
    float* weights = p.weights + p.weights_offset(group, block);
    for (int item = threadIdx.x; item < num_listed * score_heads; item += kDrawThreads) {
      const int h = block * score_heads + item % score_heads, feature = listed[item / score_heads];
      weights[item] = h < d.group_size ? counts[static_cast<int64_t>(h) * d.head_dim + feature] : 0.0f;
    }
  }
}

}  // namespace santa::cuda
