// Keys to codes, in place: a warp takes a key of one KV head at a time.
#pragma once

#include "core/float8.h"
#include "cuda/common/ptx.cuh"
#include "proposal_params.h"

namespace santa::cuda {

constexpr int kAppendWarps = 8;

__device__ __forceinline__ float to_float32(float value) { return value; }
__device__ __forceinline__ float to_float32(Float8 value) { return float_of_e4m3(value.code); }
template <typename T>
__device__ __forceinline__ float to_float32(T value) {
  return Float16Traits<T>::to_float(value);
}

// T of the new keys.
template <typename T>
__global__ void __launch_bounds__(kAppendWarps * 32)
    append_proposal_kernel(const __grid_constant__ AppendProposalParams p) {
  constexpr int kMostBytes = 4;  // of a lane: head_dim up to 256
  const int lane = threadIdx.x & 31, kv_head = blockIdx.y, batch_index = blockIdx.z, half = p.head_dim / 2;
  const int64_t statistics = p.statistics_offset(batch_index, kv_head);
  const float *center = p.center + statistics, *channel_scale = p.channel_scale + statistics;
  for (int key = blockIdx.x * kAppendWarps + (threadIdx.x >> 5); key < p.num_keys; key += gridDim.x * kAppendWarps) {
    const int64_t position = p.position(batch_index, key);
    if (position < 0 || position >= p.limit) continue;
    const T* row = static_cast<const T*>(p.k_new) + batch_index * p.stride_new_batch + key * p.stride_new_token +
                   kv_head * p.stride_new_head;
    // Byte b has the features b and b + half.
    float features[kMostBytes][2], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kMostBytes; ++i) {
      const int byte = i * 32 + lane;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int feature = byte + j * half;
        features[i][j] = byte < half ? centred_feature(to_float32(row[feature]), __ldg(center + feature),
                                                       __ldg(channel_scale + feature))
                                     : 0.0f;
        largest = larger_magnitude(largest, features[i][j]);
      }
    }
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
      largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
    }
    const uint16_t stored = code_scale_of(largest);
    const float scale = float_of_float16(stored);
    const auto place = p.place_of(batch_index, position);
    uint8_t* codes = p.codes + place.batch * p.stride_codes_batch + place.token * p.stride_codes_token +
                     kv_head * p.stride_codes_head;
#pragma unroll
    for (int i = 0; i < kMostBytes; ++i) {
      const int byte = i * 32 + lane;
      if (byte < half) codes[byte] = packed_codes(code_of(features[i][0], scale), code_of(features[i][1], scale));
    }
    if (lane == 0) {
      p.scales[place.batch * p.stride_scales_batch + place.token * p.stride_scales_token +
               kv_head * p.stride_scales_head] = stored;
    }
  }
}

}  // namespace santa::cuda
