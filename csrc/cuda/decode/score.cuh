// Raw scores: products of the group's query heads with keys in shared memory, by one warp. Keys are the M of m16n8k16
// and up to 8 query heads its N: a KV head serves them with one read.
#pragma once

#include "cuda/decode/load.cuh"

namespace santa::cuda {

// q as B fragments of HEAD_DIM / 16 matrix products, a pair of them in a word of four. CODES: in the feature order in
// which lanes read float8 keys, 8 neighbours at a time; a dot product may be summed in any order, q and k only have to
// agree on it. Lane (g, t) has head g.
template <typename T, int HEAD_DIM, bool CODES = false>
struct QueryFragments {
  uint4 chunk[HEAD_DIM / 32];

  // Of the query vectors first to first + count - 1 of a KV head.
  __device__ __forceinline__ void load(const DecodeParams& p, int batch_index, int kv_head, int first, int num_heads,
                                       int lane) {
    const int head = lane >> 2, t = lane & 3;
    const bool aligned = p.aligned;
    const T* row = static_cast<const T*>(p.q) + p.query_offset(batch_index, kv_head, first + min(head, num_heads - 1));
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 32; ++j) {
      chunk[j] = {0, 0, 0, 0};
      if (head >= num_heads) continue;
      if constexpr (CODES) {
        chunk[j] = load_global_8(row + (4 * j + t) * 8, aligned);
      } else {
        const T* pair = row + 32 * j + 2 * t;
        chunk[j] = {load_global_2(pair, aligned), load_global_2(pair + 8, aligned), load_global_2(pair + 16, aligned),
                    load_global_2(pair + 24, aligned)};
      }
    }
  }
};

// Where in a slot is what a lane names first in products with keys. What follows are the chunks of the same rows, two
// of them further on each time.
template <int HEAD_DIM>
__device__ __forceinline__ uint32_t key_place(int lane) {
  return chunk_offset<HEAD_DIM>(lane & 15, lane >> 4);
}

// Raw scores of 16 keys x 8 heads, the first of which is at `place` (key_place). Lane (g, t) gets keys g (0, 1) and
// g + 8 (2, 3), heads 2 t and 2 t + 1.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void score_slot(float (&scores)[4], uint32_t place,
                                           const QueryFragments<T, HEAD_DIM>& query) {
  float odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // two sums: a product need not wait for the one before
  scores[0] = scores[1] = scores[2] = scores[3] = 0.0f;
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 32; ++j) {
    const uint4 a = ldmatrix_x4(chunk_at<128>(place, 4 * j)), b = ldmatrix_x4(chunk_at<128>(place, 4 * j + 2));
    Float16Traits<T>::mma(scores, {a.x, a.y, a.z, a.w}, query.chunk[j].x, query.chunk[j].y);
    Float16Traits<T>::mma(odd, {b.x, b.y, b.z, b.w}, query.chunk[j].z, query.chunk[j].w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] += odd[i];
}

// p.score_scale, which only float8 keys have to look up.
template <typename K>
__device__ __forceinline__ float score_scale_of(const DecodeParams& p, int kv_head) {
  return std::is_same_v<K, Float8> ? p.score_scale(kv_head) : p.scale_log2;
}

// ---- keys in float8: codes stay codes in shared memory and become float16 on their way into the matrix product
//
// float16 has every number of float8. q is float16, or bfloat16 that is brought there by a power of two per head: what
// is lost are bits below 2^-38 of the head's largest element. The inverse goes into the scale of the head's scores.

// Brings q to float16, in place. Returns 1 / (what it was multiplied with), for the lane's head, lane / 4.
template <int HEAD_DIM>
__device__ __forceinline__ float to_float16(QueryFragments<__half, HEAD_DIM, true>&) {
  return 1.0f;
}

template <int HEAD_DIM>
__device__ __forceinline__ float to_float16(QueryFragments<__nv_bfloat16, HEAD_DIM, true>& query) {
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
    const float2 pair = Float16Traits<__nv_bfloat16>::unpack(word);
    word = Float16Traits<__half>::pack(pair.x * factor, pair.y * factor);
  });
  return __uint_as_float((exponent - 14u) << 23);
}

// key_place of codes, of which a lane reads 8 bytes itself. MATRICES: how they lie in the slot (load.cuh).
template <int HEAD_DIM, bool MATRICES>
__device__ __forceinline__ uint32_t code_key_place(int lane) {
  const int g = lane >> 2, t = lane & 3;
  return code_offset<HEAD_DIM, MATRICES>(g, t >> 1) + (t & 1) * 8;
}

// Raw scores of 16 keys x 8 heads, in the order of score_slot, times kHalvesScale and what to_float16 multiplied with.
// `place`: code_key_place from a multiple of 16 rows on.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void score_codes(float (&scores)[4], uint32_t place,
                                            const QueryFragments<T, HEAD_DIM, true>& query) {
  uint32_t low_nans = 0, high_nans = 0;
  scores[0] = scores[1] = scores[2] = scores[3] = 0.0f;
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 32; ++j) {
    const uint32_t pair = chunk_at<code_span(HEAD_DIM)>(place, 2 * j);
    const uint2 low = load_shared_8(pair), high = load_shared_8(pair + 8 * HEAD_DIM);
    uint2 low_halves = halves_of_codes(low.x), high_halves = halves_of_codes(high.x);
    Float16Traits<__half>::mma(scores, {low_halves.x, high_halves.x, low_halves.y, high_halves.y}, query.chunk[j].x,
                               query.chunk[j].y);
    low_halves = halves_of_codes(low.y), high_halves = halves_of_codes(high.y);
    low_nans |= nan_codes(low.x) | nan_codes(low.y), high_nans |= nan_codes(high.x) | nan_codes(high.y);
    if (j + 1 == HEAD_DIM / 32) {
      if (low_nans != 0) low_halves.y = 0x7fff7fffu;
      if (high_nans != 0) high_halves.y = 0x7fff7fffu;
    }
    Float16Traits<__half>::mma(scores, {low_halves.x, high_halves.x, low_halves.y, high_halves.y}, query.chunk[j].z,
                               query.chunk[j].w);
  }
}

}  // namespace santa::cuda
