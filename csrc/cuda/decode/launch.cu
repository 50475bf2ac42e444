#include "cuda/decode/launch.h"

#include <atomic>
#include <cstdint>
#include <random>

#include "core/float8.h"
#include "cuda/common/launch.h"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/plan.cuh"

namespace santa::cuda {
namespace {

void launch_plan(const DecodeParams& p, cudaStream_t stream) {
  plan_kernel<<<dim3(p.num_kv_heads, p.batch), kPlanThreads, 0, stream>>>(p);
  check_launch("plan_kernel");
}

template <typename T>
void launch_combine(const DecodeParams& p, cudaStream_t stream) {
  if (p.max_tiles == 1 && !p.any_staged()) return;  // no row has more than one tile
  combine_kernel<T><<<dim3(p.num_qo_heads, p.batch), kCombineThreads, 0, stream>>>(p);
  check_launch("combine_kernel");
}

template <typename T, typename K, int HEAD_DIM>
void launch_stages(const DecodeParams& p, cudaStream_t stream) {
  if (p.any_persistent()) launch_persistent<T, K, HEAD_DIM>(p, stream);
  if (!p.any_exact() && !p.any_staged()) return;
  if (p.max_tiles > 0) launch_tiles<T, K, HEAD_DIM>(p, stream);
  if (p.max_tiles > 0 && p.any_staged()) {
    launch_plan(p, stream);
    if (p.v_dtype == Dtype::kFloat8E4M3) {
      launch_gather<Float8, HEAD_DIM>(p, stream);
    } else {
      launch_gather<T, HEAD_DIM>(p, stream);
    }
  }
  launch_combine<T>(p, stream);
}

// A number that no other call of this process gets, and that memory from elsewhere holds with a probability of 2^-64:
// a counter that starts at random, through a permutation of the 64-bit numbers (splitmix64). Not 0, under which memory
// full of zeros would be sealed.
uint64_t next_seal() {
  static std::atomic<uint64_t> counter{std::random_device{}() * 0x100000001ull};
  uint64_t seal = counter.fetch_add(0x9E3779B97F4A7C15ull, std::memory_order_relaxed);
  seal = (seal ^ (seal >> 30)) * 0xBF58476D1CE4E5B9ull;
  seal = (seal ^ (seal >> 27)) * 0x94D049BB133111EBull;
  seal ^= seal >> 31;
  return seal != 0 ? seal : 1;
}

template <typename T>
void launch_decode_of(const DecodeParams& p, cudaStream_t stream) {
  with_head_dim(p.head_dim, [&](auto head_dim) {
    if (p.k_dtype == Dtype::kFloat8E4M3) {
      launch_stages<T, Float8, head_dim()>(p, stream);
    } else {
      launch_stages<T, T, head_dim()>(p, stream);
    }
  });
}

template <typename T>
void launch_value_stages_of(const DecodeParams& p, cudaStream_t stream) {
  if (p.max_tiles > 0 && p.any_staged()) {
    launch_plan(p, stream);
    with_head_dim(p.head_dim, [&](auto head_dim) { launch_gather<T, head_dim()>(p, stream); });
  }
  launch_combine<T>(p, stream);
}

}  // namespace

void launch_value_stages(const DecodeParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kBFloat16) {
    launch_value_stages_of<__nv_bfloat16>(p, stream);
  } else {
    launch_value_stages_of<__half>(p, stream);
  }
}

void configure_persistent(DecodeParams& p, int device_index, const ScoreWarps& warps) {
  p.seal = next_seal();
  DeviceLimits device{};
  check(cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, device_index),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index),
        "cudaDeviceGetAttribute");
  p.persistent = plan_persistent(p, device, warps);
}

void configure_decode(DecodeParams& p, int device_index) { configure_persistent(p, device_index, key_score_warps(p)); }

void launch_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kBFloat16) {
    launch_decode_of<__nv_bfloat16>(p, stream);
  } else {
    launch_decode_of<__half>(p, stream);
  }
}

}  // namespace santa::cuda
