// Rows of values, or of drawn keys, in registers: a warp reads a row, each lane some of it.
#pragma once

#include "cuda/common/float8.cuh"
#include "cuda/common/row_load.cuh"

namespace santa::cuda {

// How a warp reads a row of values: each lane a few neighbouring elements.
template <int HEAD_DIM>
struct ValueLanes {
  static constexpr int kElements = HEAD_DIM <= 64 ? 2 : HEAD_DIM <= 128 ? 4 : 8;  // of a lane
  static constexpr int kLanes = HEAD_DIM / kElements;                             // 32, or 24
};

// Rows of a batch. More would keep more of them on their way where there are many, and cost everybody else: code that
// takes more room in the instruction cache.
constexpr int batch_rows(int head_dim) { return head_dim > 128 ? 2 : 4; }

// The elements of a row that a lane reads.
template <typename V, int ELEMENTS>
struct LaneValues {
  static constexpr int kWords = ELEMENTS * sizeof(V) < 4 ? 1 : ELEMENTS * sizeof(V) / 4;
  uint32_t words[kWords];

  // Of a row that is aligned.
  __device__ __forceinline__ void load(const V* source) {
    if constexpr (kWords == 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(source));
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else if constexpr (kWords == 2) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(source));
      words[0] = two.x, words[1] = two.y;
    } else if constexpr (ELEMENTS * sizeof(V) == 4) {
      words[0] = __ldg(reinterpret_cast<const uint32_t*>(source));
    } else {
      words[0] = __ldg(reinterpret_cast<const uint16_t*>(source));
    }
  }

  // Out of line: hardly ever needed.
  static __device__ __noinline__ LaneValues by_elements(const V* source) {
    LaneValues values;
    constexpr int kPerWord = ELEMENTS / kWords, kBits = 8 * sizeof(V);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      values.words[w] = 0;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        uint32_t bits;
        if constexpr (sizeof(V) == 1) {
          bits = source[w * kPerWord + i].code;
        } else {
          bits = reinterpret_cast<const uint16_t*>(source)[w * kPerWord + i];
        }
        values.words[w] |= bits << (kBits * i);
      }
    }
    return values;
  }

  __device__ __forceinline__ void unpack(float (&values)[ELEMENTS]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(V) == 1) {
        const float4 four = floats_of_codes(words[w]);
        values[4 * w] = four.x, values[4 * w + 1] = four.y;
        if constexpr (ELEMENTS >= 4) values[4 * w + 2] = four.z, values[4 * w + 3] = four.w;
      } else {
        const float2 two = Float16Traits<V>::unpack(words[w]);
        values[2 * w] = two.x, values[2 * w + 1] = two.y;
      }
    }
  }
};

}  // namespace santa::cuda
