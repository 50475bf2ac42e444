// Rows of K, V and q: 16 bytes at a time where they are aligned, element by element where they are not.
#pragma once

#include <cstdint>

#include "core/float8.h"
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

// Two neighbours.
template <typename T>
__device__ __forceinline__ uint32_t load_global_2(const T* source, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const uint32_t*>(source));
  const auto* elements = reinterpret_cast<const uint16_t*>(source);
  return static_cast<uint32_t>(elements[0]) | static_cast<uint32_t>(elements[1]) << 16;
}

// Eight codes of float8, likewise.
__device__ __forceinline__ uint2 load_global_8(const Float8* source, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const uint2*>(source));
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) words[i / 4] |= static_cast<uint32_t>(source[i].code) << (8 * (i % 4));
  return {words[0], words[1]};
}

}  // namespace santa::cuda
