// Keys by features: a thread copies eight neighbouring keys of one feature, 16 bytes, at a time.
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

}  // namespace santa::cuda
