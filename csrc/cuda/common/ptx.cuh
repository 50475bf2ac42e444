// The PTX instructions the kernels are built from (sm_80 and later), one function each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// The dynamic shared memory of a kernel, as `name`.
#define SANTA_DYNAMIC_SHARED(name) extern __shared__ __align__(512) unsigned char name[]

namespace santa::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A value whose origin the compiler can't see: what is added to it stays an offset, which loads and copies hold,
// instead of being computed anew from all its terms.
template <typename Value>
__device__ __forceinline__ Value opaque(Value value) {
  if constexpr (sizeof(Value) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

// The number of the warp in its CTA, from lane 0, so that the compiler sees that all lanes agree on it: what follows
// from it then needs no care for lanes that have gone another way, which costs two instructions for every shuffle.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }

// The pointer of another lane.
template <typename T>
__device__ __forceinline__ const T* shuffle(const T* pointer, int lane) {
  return reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(pointer), lane));
}

// L2 policies: read once, first to be evicted; the usual one; to be read again soon. They are what createpolicy with a
// fraction of 1 makes on sm_80 to sm_120, written out so that they stay in uniform registers: from createpolicy every
// copy would fetch its own.
__device__ __forceinline__ uint64_t evict_first_policy() { return 0x12F0000000000000ull; }
__device__ __forceinline__ uint64_t evict_normal_policy() { return 0x16F0000000000000ull; }
__device__ __forceinline__ uint64_t evict_last_policy() { return 0x14F0000000000000ull; }

// 16 bytes from global to shared memory, asynchronously. With `valid` false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void cp_async_whole_16(uint32_t shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "l"(policy)
               : "memory");
}

// If `there`, without a branch around it.
__device__ __forceinline__ void cp_async_whole_16_if(bool there, uint32_t shared, const void* global, uint64_t policy) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %3, 0; @p cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;}" ::"r"(
          shared),
      "l"(global), "l"(policy), "r"(static_cast<uint32_t>(there))
      : "memory");
}

// The same for the first `bytes` of 16; zeros take the place of the others, which are not read.
__device__ __forceinline__ void cp_async_up_to_16(uint32_t shared, const void* global, int bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
               "r"(bytes), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are in flight.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The same for a number that is not known to the compiler, 1 to 7.
__device__ __forceinline__ void cp_async_wait_but(int pending) {
  if (pending <= 1) {
    cp_async_wait<1>();
  } else if (pending >= 7) {
    cp_async_wait<7>();
  } else if (pending <= 3) {
    pending == 2 ? cp_async_wait<2>() : cp_async_wait<3>();
  } else {
    pending == 4 ? cp_async_wait<4>() : pending == 5 ? cp_async_wait<5>() : cp_async_wait<6>();
  }
}

// The slot after `slot` in a ring. Slots are known by their addresses, which start from one that is not the same in all
// lanes to the compiler (threadIdx.x, not warp_index()): of a uniform number of a slot it would make a uniform register
// that is added to the lane's, and ptxas 13.0 makes copies to such a sum that are no instructions, if that register is
// UR16 or higher. tools/check_kernels.py looks for them.
template <int SLOT_BYTES, int NUM_SLOTS>
__device__ __forceinline__ uint32_t slot_after(uint32_t slot, uint32_t ring) {
  return slot + SLOT_BYTES == ring + NUM_SLOTS * SLOT_BYTES ? ring : slot + SLOT_BYTES;
}

// The one before.
template <int SLOT_BYTES, int NUM_SLOTS>
__device__ __forceinline__ uint32_t slot_before(uint32_t slot, uint32_t ring) {
  return (slot == ring ? ring + NUM_SLOTS * SLOT_BYTES : slot) - SLOT_BYTES;
}

__device__ __forceinline__ void store_shared_pair(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

// The same if `there`, without a branch around it.
__device__ __forceinline__ void store_shared_pair_if(bool there, uint32_t address, float first, float second) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.shared.v2.f32 [%0], {%1, %2};}" ::"r"(address), "f"(first),
               "f"(second), "r"(static_cast<uint32_t>(there))
               : "memory");
}

// Starts a line of 128 bytes on its way to the L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// WORDS floats to global memory, with an L2 policy.
template <int WORDS>
__device__ __forceinline__ void store_global(float* to, const float (&values)[WORDS], uint64_t policy) {
  static_assert(WORDS == 2 || WORDS % 4 == 0);
  if constexpr (WORDS == 2) {
    asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(values[0]), "f"(values[1]),
                 "l"(policy)
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to + i), "f"(values[i]),
                   "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3]), "l"(policy)
                   : "memory");
    }
  }
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float load_shared_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ uint16_t load_shared_2(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_1(uint32_t address, uint8_t value) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(value)) : "memory");
}

__device__ __forceinline__ void store_shared_2(uint32_t address, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements; of one each, rows are where 8 lanes point to.
__device__ __forceinline__ uint4 ldmatrix_x4(uint32_t address) {
  uint4 value;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}

// The same, transposed on the way to registers.
__device__ __forceinline__ uint4 ldmatrix_x4_transposed(uint32_t address) {
  uint4 value;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Transposes an 8x8 matrix of 16-bit elements held across the warp in fragment layout.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t fragment) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// Lets the next kernel of the stream be set up, if it was launched to be (launch_after in launch.h), and waits for the
// end of the one before.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The number of the CTA in its cluster, and a barrier of all threads of the cluster: what they have written to memory
// before it they all see.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Barriers in shared memory on which some warps arrive and others wait. Arriving releases, waiting acquires.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

// Whether the phase of this parity has ended; the first phase has parity 0, the one before it has ended.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#endif
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (done == 0);
}

// A barrier of the last two warps of a CTA alone.
__device__ __forceinline__ void gather_warps_barrier() { asm volatile("barrier.sync 2, 64;" ::: "memory"); }

// One of whole warps: of `threads` threads, those that know it by the same number, from 1 on.
__device__ __forceinline__ void team_barrier(int number, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// One of all, which may be met in different places.
__device__ __forceinline__ void cta_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }

// Matrix product of m16n8k32 in integers: bytes without a sign times bytes with one, added to the sums.
__device__ __forceinline__ void mma_u8_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, results below 2^-126 flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Whether there is an instruction for float8, as from sm_89 on: four codes to four float16 numbers, in order.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
constexpr bool kConvertsFloat8 = true;
__device__ __forceinline__ uint2 convert_float8(uint32_t codes) {
  uint2 halves;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(codes));
  return halves;
}
#else
constexpr bool kConvertsFloat8 = false;
__device__ __forceinline__ uint2 convert_float8(uint32_t) { return {}; }
#endif

// The two 16-bit types: matrix multiply-accumulate (m16n8k16, float32 accumulators) and conversions.
template <typename T>
struct Float16Traits;

template <>
struct Float16Traits<__nv_bfloat16> {
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&packed);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t packed) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
  }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float value) { return __float2bfloat16_rn(value); }
  static __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
};

template <>
struct Float16Traits<__half> {
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 packed = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&packed);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t packed) {
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  }
  static __device__ __forceinline__ __half from_float(float value) { return __float2half_rn(value); }
  static __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
};

}  // namespace santa::cuda
