// The instructions of csrc/cuda/common/ptx.cuh on the host, under the same names. Addresses in shared memory are
// offsets, of arrays that a kernel declares from kDeclaredShared on.
#pragma once

#include "emulator.h"

#define SANTA_DYNAMIC_SHARED(name) unsigned char* const name = emulator::shared_memory

namespace santa::cuda {

using emulator::at;
using emulator::shared_address;
template <typename T>
T load_shared(uint32_t address) {
  T value;
  std::memcpy(&value, at(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
void store_shared(uint32_t address, T value) {
  std::memcpy(at(address, sizeof(T)), &value, sizeof(T));
}

template <typename Value>
Value opaque(Value value) {
  return value;
}
inline int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
template <typename T>
const T* shuffle(const T* pointer, int lane) {
  return __shfl_sync(0xffffffffu, pointer, lane);
}

inline uint64_t evict_first_policy() { return 0; }
inline uint64_t evict_normal_policy() { return 0; }
inline uint64_t evict_last_policy() { return 0; }
inline void prefetch_l2(const void*) {}

// ---- copies: what is read is read at once, what is written lands when its group is waited for

inline void copy_up_to_16(uint32_t shared, const void* global, int bytes) {
  emulator::require(bytes == 0 || reinterpret_cast<uint64_t>(global) % 16 == 0, "a copy from a misaligned address");
  at(shared, 16);
  for (const uint32_t barrier : emulator::block.barriers) {
    emulator::require(barrier + 8 <= shared || barrier >= shared + 16, "a copy over a barrier");
  }
  emulator::Copy copy{shared, {}};
  if (bytes > 0) std::memcpy(copy.bytes.data(), global, bytes);
  emulator::self().open_copies.push_back(copy);
}
inline void cp_async_16(uint32_t shared, const void* global, bool valid, uint64_t) {
  copy_up_to_16(shared, global, valid ? 16 : 0);
}
inline void cp_async_whole_16(uint32_t shared, const void* global, uint64_t) { copy_up_to_16(shared, global, 16); }
inline void cp_async_whole_16_if(bool there, uint32_t shared, const void* global, uint64_t) {
  if (there) copy_up_to_16(shared, global, 16);
}
inline void cp_async_up_to_16(uint32_t shared, const void* global, int bytes, uint64_t) {
  copy_up_to_16(shared, global, bytes);
}
inline void cp_async_commit() {
  emulator::Thread& self = emulator::self();
  self.copy_groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}
inline void cp_async_wait_but(int pending) {
  auto& groups = emulator::self().copy_groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(at(copy.to, 16), copy.bytes.data(), 16);
  }
}
template <int PENDING>
void cp_async_wait() {
  cp_async_wait_but(PENDING);
}

template <int SLOT_BYTES, int NUM_SLOTS>
uint32_t slot_after(uint32_t slot, uint32_t ring) {
  return slot + SLOT_BYTES == ring + NUM_SLOTS * SLOT_BYTES ? ring : slot + SLOT_BYTES;
}
template <int SLOT_BYTES, int NUM_SLOTS>
uint32_t slot_before(uint32_t slot, uint32_t ring) {
  return (slot == ring ? ring + NUM_SLOTS * SLOT_BYTES : slot) - SLOT_BYTES;
}

// ---- loads and stores

inline void store_shared_pair(uint32_t address, float first, float second) {
  store_shared(address, float2{first, second});
}
inline void store_shared_pair_if(bool there, uint32_t address, float first, float second) {
  if (there) store_shared_pair(address, first, second);
}
template <int WORDS>
void store_global(float* to, const float (&values)[WORDS], uint64_t) {
  std::memcpy(to, values, sizeof(values));
}
inline uint4 load_shared_16(uint32_t address) { return load_shared<uint4>(address); }
inline uint2 load_shared_8(uint32_t address) { return load_shared<uint2>(address); }
inline float load_shared_float(uint32_t address) { return load_shared<float>(address); }
inline void store_shared_float(uint32_t address, float value) { store_shared(address, value); }
inline uint16_t load_shared_2(uint32_t address) { return load_shared<uint16_t>(address); }
inline void store_shared_1(uint32_t address, uint8_t value) { store_shared(address, value); }
inline void store_shared_2(uint32_t address, uint16_t value) { store_shared(address, value); }
inline void store_shared_16(uint32_t address, uint4 value) { store_shared(address, value); }

// ---- matrices

// Element [row, column] of an 8x8 matrix of 16 bits whose rows are where eight lanes point to: a lane's two.
inline uint4 load_matrices(uint32_t address, bool transposed) {
  uint64_t rows[32];
  std::memcpy(rows, emulator::exchange(address), sizeof(rows));
  const int lane = emulator::lane();
  uint32_t words[4];
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t word = 0;
    for (int i = 0; i < 2; ++i) {
      const int outer = lane >> 2, inner = 2 * (lane & 3) + i;
      const int row = transposed ? inner : outer, column = transposed ? outer : inner;
      const auto source = static_cast<uint32_t>(rows[matrix * 8 + row]);
      at(source, 16);
      word |= static_cast<uint32_t>(load_shared<uint16_t>(source + column * 2)) << (16 * i);
    }
    words[matrix] = word;
  }
  __syncwarp();
  return {words[0], words[1], words[2], words[3]};
}
inline uint4 ldmatrix_x4(uint32_t address) { return load_matrices(address, false); }
inline uint4 ldmatrix_x4_transposed(uint32_t address) { return load_matrices(address, true); }

inline uint32_t transpose_8x8(uint32_t fragment) {
  const uint64_t* const words = emulator::exchange(fragment);
  const int lane = emulator::lane();
  uint32_t word = 0;
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * (lane & 3) + i, column = lane >> 2;
    const auto source = static_cast<uint32_t>(words[row * 4 + column / 2]);
    word |= (source >> (16 * (column & 1)) & 0xffffu) << (16 * i);
  }
  return word;
}

// Words of A and B of a matrix product, of all lanes.
inline const emulator::Words* fragments(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  return emulator::exchange_words({a[0], a[1], a[2], a[3], b0, b1});
}

// m16n8k32 of bytes, to integers: as Float16Traits::mma, four elements to a word.
inline void mma_u8_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::Words* const words = fragments(a, b0, b1);
  const int g = emulator::lane() >> 2, t = emulator::lane() & 3;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 32; ++k) {
      const int half = k / 16, lane = k % 16 / 4, shift = 8 * (k % 4);
      const auto x = static_cast<uint8_t>(words[g * 4 + lane][2 * half + (i >> 1)] >> shift);
      const auto y = static_cast<int8_t>(words[(2 * t + (i & 1)) * 4 + lane][4 + half] >> shift);
      d[i] += static_cast<int>(x) * y;
    }
  }
}

// ---- kernels and barriers: kernels run one after the other

inline void launch_dependents() {}
inline void wait_for_previous() {}
inline int cluster_rank() { return 0; }
inline void cluster_barrier() {}

struct HostBarrier {  // in the 8 bytes of an mbarrier
  uint32_t pending;
  uint16_t count, phase;
};
inline void mbarrier_init(uint64_t* barrier, int count) {
  const HostBarrier fresh = {static_cast<uint32_t>(count), static_cast<uint16_t>(count), 0};
  std::memcpy(barrier, &fresh, sizeof(fresh));
  emulator::block.barriers.push_back(shared_address(barrier));
}
inline void mbarrier_arrive(uint32_t address) {
  auto barrier = load_shared<HostBarrier>(address);
  emulator::require(barrier.pending > 0 && barrier.pending <= barrier.count, "an arrival at a barrier that is none");
  if (--barrier.pending == 0) barrier.pending = barrier.count, barrier.phase ^= 1;
  store_shared(address, barrier);
  emulator::block.idle = 0;
}
inline bool mbarrier_test(uint32_t address, uint32_t parity) {
  return load_shared<HostBarrier>(address).phase != parity;
}
inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  while (!mbarrier_test(address, parity)) emulator::yield();
}
inline void gather_warps_barrier() { emulator::block.pair.wait(64); }
inline void team_barrier(int number, int threads) { emulator::block.teams[number].wait(threads); }
inline void cta_barrier() { __syncthreads(); }

// ---- arithmetic

inline float exp2_approx(float x) {
  const float result = std::exp2(x);
  return result < 1.17549435e-38f ? 0.0f : result;
}

constexpr bool kConvertsFloat8 = false;
inline uint2 convert_float8(uint32_t) { return {}; }

template <typename T>
struct Float16Traits {
  static T from_float(float value) {
    if constexpr (std::is_same_v<T, __half>) {
      return __float2half_rn(value);
    } else {
      return __float2bfloat16_rn(value);
    }
  }
  static float to_float(T value) {
    if constexpr (std::is_same_v<T, __half>) {
      return __half2float(value);
    } else {
      return __bfloat162float(value);
    }
  }
  static uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(emulator::bits_of(from_float(low)) | emulator::bits_of(from_float(high)) << 16);
  }
  static float element(uint64_t word, int index) {
    return to_float(emulator::value_of<T>(word >> (16 * index) & 0xffffu));
  }
  static float2 unpack(uint32_t packed) { return {element(packed, 0), element(packed, 1)}; }

  // m16n8k16: lane (g, t) has A of rows g and g + 8, B of column g, D of rows g and g + 8 and columns 2 t and 2 t + 1.
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const emulator::Words* const words = fragments(a, b0, b1);
    const int g = emulator::lane() >> 2, t = emulator::lane() & 3;
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + (i & 1);
      for (int k = 0; k < 16; ++k) {
        const int half = k / 8, lane = k % 8 / 2;
        d[i] += element(words[g * 4 + lane][2 * half + (i >> 1)], k & 1) *
                element(words[column * 4 + lane][4 + half], k & 1);
      }
    }
  }
};

}  // namespace santa::cuda
