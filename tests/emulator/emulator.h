// CUDA kernels on the host, one thread block after the other: threads are coroutines that give way wherever they wait
// for each other. What follows is as much of CUDA C++ as the kernels of csrc/cuda use; the instructions that they are
// built from are in cuda/common/ptx.cuh beside this file, which takes the place of the one in csrc.
//
// Results are those of a GPU up to the rounding of exp2 and of sums in matrix products. Copies to shared memory land
// when they are waited for and no sooner, and threads run in an order that can be chosen, so a wait or a barrier that
// is missing shows. Races within a warp, memory ordering and speed do not: these need a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#undef __device__
#undef __global__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __global__ static
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("emulator: ") + what);
}

struct Dim {
  unsigned x, y, z;
};

// Waits for `count` threads; the last one opens it for all.
class Barrier {
 public:
  void wait(int count);

 private:
  int arrived_ = 0;
  unsigned phase_ = 0;
};

struct Copy {
  uint32_t to;
  std::array<unsigned char, 16> bytes;
};

struct Thread {
  ucontext_t context;  // where it starts; from then on it is where `place` says, since swapcontext asks the kernel
  jmp_buf place;
  bool started = false;
  Dim index;
  bool done = false;
  std::vector<Copy> open_copies;              // of the group that is not committed yet
  std::deque<std::vector<Copy>> copy_groups;  // that have not been waited for

  void resume() {
    if (started) _longjmp(place, 1);
    started = true;
    setcontext(&context);
  }
};

// What a warp exchanges: two buffers in turn, since no thread can be two exchanges ahead of another.
using Words = std::array<uint32_t, 6>;  // of a lane: the operands of a matrix product
struct Warp {
  uint64_t values[2][32];
  Words words[2][32];
  int arrived = 0;
  unsigned phase = 0;
};

constexpr int kWarpThreads = 32, kSharedBytes = 228 * 1024, kStackBytes = 96 * 1024;
// What is not initialised is not zero either.
constexpr int kJunk = 0xA5;

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier all, pair, teams[16];
  int current = 0, stride = 1;  // of threads, in the order x, y
  Dim index{}, size{}, grid{};
  std::vector<uint32_t> barriers;  // addresses in shared memory, of 8 bytes each
  ucontext_t caller;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  uint64_t idle = 0;  // turns since a thread got on
};

// Dynamic shared memory. What kernels declare is among the static variables of this library, which the linker puts
// between __bss_start and _end; its addresses go from kDeclaredShared on.
alignas(1024) inline unsigned char shared_memory[kSharedBytes];
constexpr uint32_t kDeclaredShared = 1 << 20;
extern "C" __attribute__((visibility("hidden"))) unsigned char __bss_start[], _end[];
inline unsigned char* declared_shared() { return __bss_start - reinterpret_cast<uint64_t>(__bss_start) % 1024; }

inline std::vector<std::unique_ptr<unsigned char[]>> stacks;
inline Block block;
inline int shared_bytes_asked;  // by the kernel that runs
inline int64_t num_launches = 0;
// Which thread comes after which: any odd number, or the order of their indices.
inline int order = 1;

// The next thread that is not done.
inline void yield() {
  const int count = static_cast<int>(block.threads.size()), from = block.current;
  if (++block.idle > uint64_t{1} << 26) block.error = "emulator: all threads wait for each other";
  int next = from;
  do {
    next = (next + block.stride) % count;
  } while (block.threads[next].done && next != from);
  if (!block.error.empty() || (next == from && block.threads[from].done)) {
    setcontext(&block.caller);
  } else if (next != from && _setjmp(block.threads[from].place) == 0) {
    block.current = next;
    block.threads[next].resume();
  }
}

inline void Barrier::wait(int count) {
  const unsigned phase = phase_;
  block.idle = 0;
  if (++arrived_ == count) {
    arrived_ = 0, ++phase_;
  } else {
    while (phase_ == phase) yield();
  }
}

inline void run_thread() {
  try {
    (*block.kernel)();
    for (const auto& group : block.threads[block.current].copy_groups) {
      require(group.empty(), "a thread ended before a copy that it had started");
    }
  } catch (const std::exception& error) {
    block.error = error.what();
  }
  block.threads[block.current].done = true;
  yield();
}

// Runs kernel() by all threads of all blocks of the grid.
inline void launch(dim3 grid, dim3 threads, int shared_bytes, const std::function<void()>& kernel) {
  const int num_threads = static_cast<int>(threads.x * threads.y);
  require(shared_bytes <= kSharedBytes, "a kernel asks for more shared memory than there is");
  require(num_threads % kWarpThreads == 0, "a block is not of whole warps");
  shared_bytes_asked = shared_bytes, ++num_launches;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    block = Block{};
    block.grid = {grid.x, grid.y, grid.z}, block.size = {threads.x, threads.y, 1};
    block.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    block.kernel = &kernel, block.stride = order % num_threads;
    std::memset(shared_memory, kJunk, sizeof(shared_memory));
    block.warps.resize(num_threads / kWarpThreads);
    block.threads.resize(num_threads);
    for (int t = 0; t < num_threads; ++t) {
      Thread& thread = block.threads[t];
      thread.index = {t % threads.x, t / threads.x, 0};
      if (static_cast<int>(stacks.size()) <= t) stacks.emplace_back(new unsigned char[kStackBytes]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks[t].get(), thread.context.uc_stack.ss_size = kStackBytes;
      makecontext(&thread.context, run_thread, 0);
    }
    volatile bool started = false;
    getcontext(&block.caller);
    if (!started) {
      started = true;
      block.threads[0].resume();
    }
    if (!block.error.empty()) throw std::runtime_error(block.error);
  }
}

inline uint32_t shared_address(const void* pointer) {
  const auto* const byte = static_cast<const unsigned char*>(pointer);
  if (byte >= shared_memory && byte < shared_memory + kSharedBytes) {
    require(byte < shared_memory + shared_bytes_asked, "an address past the shared memory that was asked for");
    return static_cast<uint32_t>(byte - shared_memory);
  }
  require(byte >= __bss_start && byte < _end, "an address that is not in shared memory");
  return kDeclaredShared + static_cast<uint32_t>(byte - declared_shared());
}
// The bytes of such an address.
inline unsigned char* at(uint32_t address, int bytes) {
  require(address % bytes == 0, "shared memory: misaligned");
  if (address >= kDeclaredShared) {
    require(address - kDeclaredShared + bytes <= _end - declared_shared(), "shared memory: out of bounds");
    return declared_shared() + (address - kDeclaredShared);
  }
  require(static_cast<int>(address) + bytes <= shared_bytes_asked, "shared memory: out of bounds");
  return shared_memory + address;
}

inline Thread& self() { return block.threads[block.current]; }
inline int lane() { return block.current % kWarpThreads; }

template <typename T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T value_of(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Waits for all threads of the warp.
inline void meet(Warp& warp) {
  const unsigned phase = warp.phase;
  block.idle = 0;
  if (++warp.arrived == kWarpThreads) {
    warp.arrived = 0, ++warp.phase;
  } else {
    while (warp.phase == phase) yield();
  }
}

// The values of all threads of the warp, by lane.
inline const uint64_t* exchange(uint64_t bits) {
  Warp& warp = block.warps[block.current / kWarpThreads];
  uint64_t* const values = warp.values[warp.phase & 1];
  values[lane()] = bits;
  meet(warp);
  return values;
}
inline const Words* exchange_words(const Words& own) {
  Warp& warp = block.warps[block.current / kWarpThreads];
  Words* const words = warp.words[warp.phase & 1];
  words[lane()] = own;
  meet(warp);
  return words;
}

}  // namespace emulator

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)

// Masks are full wherever the kernels have one.
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::value_of<T>(emulator::exchange(emulator::bits_of(value))[lane & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, emulator::lane() ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = emulator::lane();
  return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = emulator::lane();
  return __shfl_sync(mask, value, lane + distance < 32 ? lane + distance : lane);
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  const uint64_t* const votes = emulator::exchange(vote);
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<uint32_t>(votes[lane]) << lane;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
inline int __reduce_add_sync(unsigned, int value) {
  const uint64_t* const values = emulator::exchange(emulator::bits_of(value));
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += emulator::value_of<int>(values[lane]);
  return sum;
}
inline int __reduce_max_sync(unsigned, int value) {
  const uint64_t* const values = emulator::exchange(emulator::bits_of(value));
  int max = value;
  for (int lane = 0; lane < 32; ++lane) max = std::max(max, emulator::value_of<int>(values[lane]));
  return max;
}
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::exchange(0); }
inline void __syncthreads() { emulator::block.all.wait(static_cast<int>(emulator::block.threads.size())); }
inline bool __syncthreads_or(bool vote) {
  static int votes;
  __syncthreads();
  votes = 0;
  __syncthreads();
  votes |= vote;
  __syncthreads();
  return votes != 0;
}

template <typename T>
T __ldg(const T* source) {
  return *source;
}
template <typename T>
T __ldcg(const T* source) {
  return *source;
}
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address |= value;
  return old;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(value); }
inline float __uint_as_float(uint32_t bits) { return emulator::value_of<float>(bits); }
inline float __int_as_float(int bits) { return emulator::value_of<float>(static_cast<uint32_t>(bits)); }
inline long long __double_as_longlong(double value) { return emulator::value_of<long long>(emulator::bits_of(value)); }
inline uint32_t __float_as_uint(float value) { return static_cast<uint32_t>(emulator::bits_of(value)); }
inline void* __cvta_shared_to_generic(size_t address) { return emulator::at(static_cast<uint32_t>(address), 1); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? a : b;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(a) > static_cast<std::common_type_t<A, B>>(b) ? a : b;
}
