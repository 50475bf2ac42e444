// Keys to codes, in place. A warp takes a few keys of one KV head at a time, and a lane eight neighbouring features.
#pragma once

#include "cuda/common/float8.cuh"
#include "cuda/common/row_load.cuh"
#include "proposal_params.h"

namespace santa::cuda {

constexpr int kAppendWarps = 8;
constexpr int kAppendTurns = 4;  // of a warp: its lanes' statistics are for all of them

// Eight features of a key.
template <typename T>
__device__ __forceinline__ void load_features(float (&features)[8], const T* source, bool aligned) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four = aligned ? __ldg(reinterpret_cast<const float4*>(source + i))
                                  : float4{source[i], source[i + 1], source[i + 2], source[i + 3]};
      features[i] = four.x, features[i + 1] = four.y, features[i + 2] = four.z, features[i + 3] = four.w;
    }
  } else if constexpr (std::is_same_v<T, Float8>) {
    const uint2 codes = load_global_8(source, aligned);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = floats_of_codes(i == 0 ? codes.x : codes.y);
      features[4 * i] = four.x, features[4 * i + 1] = four.y, features[4 * i + 2] = four.z;
      features[4 * i + 3] = four.w;
    }
  } else {
    const uint4 words = load_global_8(source, aligned);
    const uint32_t own[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = Float16Traits<T>::unpack(own[i]);
      features[2 * i] = two.x, features[2 * i + 1] = two.y;
    }
  }
}

// Of the lanes that have the same key, in each of them; there are LANES of them, but for the last lanes of the warp,
// which have none.
template <int LANES>
__device__ __forceinline__ float largest_of_key(float value, int lane) {
  if constexpr ((LANES & (LANES - 1)) == 0) {
#pragma unroll
    for (int apart = LANES / 2; apart > 0; apart /= 2) {
      value = larger_magnitude(value, __shfl_xor_sync(0xffffffffu, value, apart));
    }
  } else {  // three quarters of a power of two: in thirds
    constexpr int kThird = LANES / 3;
    const int first = lane / LANES * LANES, within = lane - first;
    const float next = __shfl_sync(0xffffffffu, value, first + (within + kThird) % LANES);
    const float last = __shfl_sync(0xffffffffu, value, first + (within + 2 * kThird) % LANES);
    value = larger_magnitude(larger_magnitude(value, next), last);
#pragma unroll
    for (int apart = kThird / 2; apart > 0; apart /= 2) {
      value = larger_magnitude(value, __shfl_sync(0xffffffffu, value, first + (within ^ apart) % LANES));
    }
  }
  return value;
}

// T of the new keys.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kAppendWarps * 32)
    append_proposal_kernel(const __grid_constant__ AppendProposalParams p) {
  constexpr int kLanes = HEAD_DIM / 8, kKeys = 32 / kLanes, kHalf = kLanes / 2;  // lanes of a key; keys of a warp
  const int lane = threadIdx.x & 31, kv_head = blockIdx.y, batch_index = blockIdx.z;
  const int nth = min(lane / kLanes, kKeys - 1), feature = lane % kLanes * 8;
  const bool there = lane < kKeys * kLanes, low = lane % kLanes < kHalf;
  const int64_t statistics = p.statistics_offset(batch_index, kv_head) + feature;
  float center[8], inverse[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    center[i] = __ldg(p.center + statistics + i);
    inverse[i] = inverse_scale_of(__ldg(p.channel_scale + statistics + i));
  }
  const T* const keys =
      static_cast<const T*>(p.k_new) + batch_index * p.stride_new_batch + kv_head * p.stride_new_head + feature;
  const int stride = gridDim.x * kAppendWarps * kKeys;
#pragma unroll 1
  for (int first = (blockIdx.x * kAppendWarps + (threadIdx.x >> 5)) * kKeys; first < p.num_keys; first += stride) {
    const int key = first + nth;
    const bool is_key = there && key < p.num_keys;
    const int64_t position = p.position(batch_index, min(key, p.num_keys - 1));
    float features[8], largest = 0.0f;
    load_features(features, keys + static_cast<int64_t>(min(key, p.num_keys - 1)) * p.stride_new_token, p.aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      features[i] = centred_feature(features[i], center[i], inverse[i]);
      largest = larger_magnitude(largest, features[i]);
    }
    const uint16_t stored = code_scale_of(largest_of_key<kLanes>(largest, lane));
    const float inverse_scale = inverse_scale_of(float_of_float16(stored));
    // Eight codes, as nibbles: those of the other half of head_dim are in the lane that is half a key further on.
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      own |= static_cast<uint32_t>(code_of(features[i], inverse_scale) + kCodeOffset) << (4 * i);
    }
    const uint32_t high = __shfl_sync(0xffffffffu, own, lane + kHalf);
    if (!is_key || position < 0 || position >= p.limit) continue;
    const auto place = p.place_of(batch_index, position);
    if (low) {
      uint32_t packed[2];  // codes 2 i and 2 i + 1 of a word are 8 bits apart there
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        packed[word] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          packed[word] |= (own >> (16 * word + 4 * i) & 15u) << (8 * i);
          packed[word] |= (high >> (16 * word + 4 * i) & 15u) << (8 * i + 4);
        }
      }
      uint8_t* const codes = p.codes + place.batch * p.stride_codes_batch + place.token * p.stride_codes_token +
                             kv_head * p.stride_codes_head + feature;
      if (p.codes_aligned) {
        *reinterpret_cast<uint2*>(codes) = {packed[0], packed[1]};
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) codes[i] = static_cast<uint8_t>(packed[i / 4] >> (8 * (i % 4)));
      }
    }
    if (feature == 0) {
      p.scales[place.batch * p.stride_scales_batch + place.token * p.stride_scales_token +
               kv_head * p.stride_scales_head] = stored;
    }
  }
}

}  // namespace santa::cuda
