// Scores of keys in float8, as the persistent kernel has them: codes stay codes in shared memory, and become float16 on
// their way into the matrix product.
//
// float16 has every number of float8. q is float16, or bfloat16 that is brought there by a power of two per head: what
// is lost are bits below 2^-38 of the head's largest element. The inverse goes into the scale of the head's scores.
#pragma once

#include "cuda/common/float8.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

// Byte offset of a 16-byte chunk of codes in a slot, rows without gaps. Two chunks, 32 bytes, stay together: lanes
// (g, t) of a half-warp read 8 bytes each, 32 of 4 adjacent rows, and the permutation spreads the 4 over all banks.
// Rows of 96 bytes need none.
template <int HEAD_DIM>
__device__ __forceinline__ uint32_t code_offset(int row, int chunk) {
  const int permutation = HEAD_DIM % 128 == 0 ? row & 3 : HEAD_DIM % 64 == 0 ? (row >> 1) & 1 : 0;
  return static_cast<uint32_t>(row * HEAD_DIM + (chunk ^ (permutation << 1)) * 16);
}

// Brings q to float16, in place. Returns 1 / (what it was multiplied with), for the lane's head, lane / 4.
template <int HEAD_DIM>
__device__ __forceinline__ float to_float16(QueryFragments<__half, HEAD_DIM>&) {
  return 1.0f;
}

template <int HEAD_DIM>
__device__ __forceinline__ float to_float16(QueryFragments<__nv_bfloat16, HEAD_DIM>& query) {
  __nv_bfloat162 largest = __floats2bfloat162_rn(0.0f, 0.0f);  // of the magnitudes; NaN is passed over
  const auto each_word = [&](const auto& function) {
#pragma unroll
    for (uint4& chunk : query.chunk) function(chunk.x), function(chunk.y), function(chunk.z), function(chunk.w);
  };
  each_word([&](uint32_t word) {
    word &= 0x7fff7fffu;
    largest = __hmax2(largest, *reinterpret_cast<const __nv_bfloat162*>(&word));
  });
  const uint32_t packed = *reinterpret_cast<const uint32_t*>(&largest);
  uint32_t exponent = max(packed & 0xffffu, packed >> 16) >> 7;
  exponent = max(exponent, __shfl_xor_sync(0xffffffffu, exponent, 1));
  exponent = max(exponent, __shfl_xor_sync(0xffffffffu, exponent, 2));
  // To 2^14 .. 2^15. Infinity stays what it is; from 2^-112 down the inverse would not be a normal number.
  exponent = max(exponent, 15u);
  const float factor = __uint_as_float((268u - exponent) << 23);
  each_word([&](uint32_t& word) {
    const float2 pair = Half<__nv_bfloat16>::unpack(word);
    word = Half<__half>::pack(pair.x * factor, pair.y * factor);
  });
  return __uint_as_float((exponent - 14u) << 23);
}

// Raw scores of 16 keys x 8 heads, in the order of score_slot, times kHalvesScale and what to_float16 multiplied with.
// `rows` is the address of the first key, a multiple of 16 of them from the start of the slot.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void score_codes(float (&scores)[4], uint32_t rows, const QueryFragments<T, HEAD_DIM>& query,
                                            int lane) {
  const int g = lane >> 2, t = lane & 3;
  uint32_t low_nans = 0, high_nans = 0;
  scores[0] = scores[1] = scores[2] = scores[3] = 0.0f;
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 32; ++j) {
    const uint2 low = load_shared_8(rows + code_offset<HEAD_DIM>(g, 2 * j) + t * 8);
    const uint2 high = load_shared_8(rows + code_offset<HEAD_DIM>(g + 8, 2 * j) + t * 8);
    uint2 low_halves = halves_of_codes(low.x), high_halves = halves_of_codes(high.x);
    Half<__half>::mma(scores, {low_halves.x, high_halves.x, low_halves.y, high_halves.y}, query.chunk[j].x,
                      query.chunk[j].y);
    low_halves = halves_of_codes(low.y), high_halves = halves_of_codes(high.y);
    low_nans |= nan_codes(low.x) | nan_codes(low.y), high_nans |= nan_codes(high.x) | nan_codes(high.y);
    if (j + 1 == HEAD_DIM / 32) {
      if (low_nans != 0) low_halves.y = 0x7fff7fffu;
      if (high_nans != 0) high_halves.y = 0x7fff7fffu;
    }
    Half<__half>::mma(scores, {low_halves.x, high_halves.x, low_halves.y, high_halves.y}, query.chunk[j].z,
                      query.chunk[j].w);
  }
}

}  // namespace santa::cuda
