// Host/device markers: `core/` compiles as plain C++17 and as CUDA, and gives the same bits in both.
#pragma once

#if defined(__CUDACC__)
#define SANTA_HD __host__ __device__ __forceinline__
#else
#define SANTA_HD inline
#endif

namespace santa {

// A condition that hardly ever holds. A hint, no more: what must be out of the way is a function out of line.
SANTA_HD bool unlikely(bool condition) { return __builtin_expect(condition, 0); }

}  // namespace santa
