// Keys by features: eight neighbouring keys of one feature, 16 bytes, are what a thread loads and adds at a time.
#pragma once

#include "cuda/common/ptx.cuh"

namespace santa::cuda {

constexpr int kThreadKeys = 8;

// Up to eight keys of one feature to a place in shared memory; those past `count` become zeros and are not read.
template <typename T>
__device__ __forceinline__ void load_some_keys(uint32_t place, const T* source, int count, bool aligned,
                                               uint64_t policy) {
  if (aligned) {
    cp_async_up_to_16(place, source, count * static_cast<int>(sizeof(T)), policy);
    return;
  }
  const auto* elements = reinterpret_cast<const uint16_t*>(source);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kThreadKeys; ++i) {
    if (i < count) words[i / 2] |= static_cast<uint32_t>(elements[i]) << (16 * (i % 2));
  }
  store_shared_16(place, {words[0], words[1], words[2], words[3]});
}

// acc[h] += weight[h] * key for the heads that drew the feature: what a head did not draw can't reach it, NaN included.
template <typename T, int HEADS>
__device__ __forceinline__ void add_feature(float (&acc)[HEADS][kThreadKeys], uint4 packed,
                                            const float (&weights)[HEADS]) {
  const float2 pairs[4] = {Half<T>::unpack(packed.x), Half<T>::unpack(packed.y), Half<T>::unpack(packed.z),
                           Half<T>::unpack(packed.w)};
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const float weight = weights[h];
    if (weight != 0.0f) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        acc[h][2 * j] += weight * pairs[j].x;
        acc[h][2 * j + 1] += weight * pairs[j].y;
      }
    }
  }
}

}  // namespace santa::cuda
