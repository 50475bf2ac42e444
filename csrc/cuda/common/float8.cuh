// float8_e4m3fn codes, four to a word, to the types that kernels compute in.
#pragma once

#include "core/float8.h"
#include "cuda/common/ptx.cuh"

namespace santa::cuda {

// Where there is no instruction, the code's bits are moved to where float16 has its own: exponent bias 7 read as bias
// 15, the number times 2^-8, exactly, subnormals included. NaN has to be looked for (nan_codes).
constexpr float kHalvesScale = kConvertsFloat8 ? 1.0f : 0.00390625f;

// Four codes to four float16 numbers, in order, times kHalvesScale.
__device__ __forceinline__ uint2 halves_of_codes(uint32_t codes) {
  if constexpr (kConvertsFloat8) {
    return convert_float8(codes);
  } else {
    const uint32_t low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);  // codes in upper bytes
    return {(low & 0x80008000u) | ((low >> 1) & 0x3f803f80u), (high & 0x80008000u) | ((high >> 1) & 0x3f803f80u)};
  }
}

// The upper bit of every code that is NaN and that halves_of_codes does not show as such.
__device__ __forceinline__ uint32_t nan_codes(uint32_t codes) {
  return kConvertsFloat8 ? 0 : ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

// halves_of_codes, with NaN where a code is NaN.
__device__ __forceinline__ uint2 halves_and_nans_of_codes(uint32_t codes) {
  uint2 halves = halves_of_codes(codes);
  if (const uint32_t nans = nan_codes(codes); nans != 0) {
    halves.x |= (nans >> 7 & 1) * 0x7fffu | (nans >> 15 & 1) * 0x7fff0000u;
    halves.y |= (nans >> 23 & 1) * 0x7fffu | (nans >> 31) * 0x7fff0000u;
  }
  return halves;
}

// Four codes to the numbers they are.
__device__ __forceinline__ float4 floats_of_codes(uint32_t codes) {
  const uint2 halves = halves_of_codes(codes);
  const float2 low = Float16Traits<__half>::unpack(halves.x), high = Float16Traits<__half>::unpack(halves.y);
  float values[4] = {low.x, low.y, high.x, high.y};
  if (!kConvertsFloat8) {
    const uint32_t nans = nan_codes(codes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = (nans >> (8 * i + 7) & 1) != 0 ? __int_as_float(0x7fffffff) : values[i] * (1.0f / kHalvesScale);
    }
  }
  return {values[0], values[1], values[2], values[3]};
}

}  // namespace santa::cuda
