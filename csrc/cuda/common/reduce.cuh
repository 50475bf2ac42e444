// Sums and maxima over the threads of a warp or a CTA. Sums of integers alone: they do not depend on the order.
#pragma once

#include <cstdint>

namespace santa::cuda {

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The largest value, in each lane. There is an instruction for integers, in whose order those of floats are once the
// negative ones are turned round. No NaN; of -0 and 0 it is 0.
__device__ __forceinline__ float warp_max(float value) {
  const auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  const int max = __reduce_max_sync(0xffffffffu, ordered(static_cast<int>(__float_as_uint(value))));
  return __uint_as_float(static_cast<uint32_t>(ordered(max)));
}

// The sum over the lanes up to one's own.
template <typename Integer>
__device__ __forceinline__ Integer inclusive_scan(Integer value) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int distance = 1; distance < 32; distance <<= 1) {
    const Integer below = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// The sum over all threads, in each of them. `scratch` has THREADS / 32 entries, free again at the next barrier.
template <int THREADS>
__device__ __forceinline__ uint64_t block_sum(uint64_t value, uint64_t* scratch) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  value = warp_sum(value);
  __syncthreads();  // the last sum was read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < THREADS / 32 ? scratch[lane] : 0);
}

// A candidate and its rank; of equal ranks the lower index is the better.
struct Ranked {
  uint64_t rank;
  int index;
};

__device__ __forceinline__ Ranked better(Ranked a, Ranked b) {
  return a.rank > b.rank || (a.rank == b.rank && a.index < b.index) ? a : b;
}

__device__ __forceinline__ Ranked warp_best(Ranked value) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    value = better(
        value, {__shfl_xor_sync(0xffffffffu, value.rank, offset), __shfl_xor_sync(0xffffffffu, value.index, offset)});
  }
  return value;
}

// The best over all threads, in each of them.
template <int THREADS>
__device__ __forceinline__ Ranked block_best(Ranked value, Ranked* scratch) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  value = warp_best(value);
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_best(lane < THREADS / 32 ? scratch[lane] : Ranked{0, 0x7fffffff});
}

}  // namespace santa::cuda
