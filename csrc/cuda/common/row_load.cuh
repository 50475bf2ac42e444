// Rows of K, V and q: 16 bytes at a time where they are aligned, element by element where they are not.
#pragma once

#include <cstdint>

#include "cuda/common/ptx.cuh"

namespace santa::cuda {

// Eight 16-bit elements at `source`, whatever its alignment.
template <typename T>
__device__ __forceinline__ uint4 load_global_8(const T* source, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const uint4*>(source));
  const auto* elements = reinterpret_cast<const uint16_t*>(source);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = static_cast<uint32_t>(elements[2 * i]) | (static_cast<uint32_t>(elements[2 * i + 1]) << 16);
  }
  return {words[0], words[1], words[2], words[3]};
}

// The same from global to shared memory: asynchronous where aligned. Zeros where not valid, and nothing is read.
template <typename T>
__device__ __forceinline__ void copy_8_to_shared(uint32_t shared, const T* source, bool valid, bool aligned,
                                                 uint64_t policy) {
  if (aligned) {
    cp_async_16(shared, source, valid, policy);
    return;
  }
  uint4 value = {0, 0, 0, 0};
  if (valid) value = load_global_8(source, false);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

}  // namespace santa::cuda
