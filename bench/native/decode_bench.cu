// The decode kernels without Python or Torch, for profilers:
//
//   decode_bench [batch] [kv_len] [num_samples] [sampler] [repeats] [budget]
//
// Prints microseconds per call beside those of a kernel that only reads K, both over buffers rotating past the L2. With
// 0 repeats it measures nothing: between cudaProfilerStart and cudaProfilerStop it runs one call of each, after one
// that warms up (profile_decode.py).
#include <cuda_bf16.h>
#include <cuda_profiler_api.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/common/launch.h"
#include "cuda/decode/launch.h"
#include "k_stream.cuh"
#include "params.h"
#include "workspace.h"

namespace {

using santa::cuda::check;

constexpr int kHeadDim = 128, kNumKvHeads = 8, kGroupSize = 4;

// Gaussian numbers from a hash of the index: any size, no state.
__global__ void fill_normal(__nv_bfloat16* data, int64_t count, float std, uint32_t seed) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const santa::PhiloxBlock bits =
        santa::philox4x32_10({{static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), seed, 0u}}, 1u, 2u);
    const float u = (bits.word[0] + 1.0f) * 2.3283064e-10f, angle = bits.word[1] * 1.4629181e-9f;
    data[i] = __float2bfloat16_rn(std * sqrtf(-2.0f * logf(u)) * cosf(angle));
  }
}

template <typename T>
T* device_array(int64_t count) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(pointer);
}

template <typename Call>
double median_us(int copies, int repeats, const Call& call) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  std::vector<double> samples;
  for (int r = 0; r < repeats + 1; ++r) {  // the first one warms up
    check(cudaEventRecord(start), "cudaEventRecord");
    for (int c = 0; c < copies; ++c) call(c);
    check(cudaEventRecord(stop), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
    if (r > 0) samples.push_back(ms * 1e3 / copies);
  }
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int fallback) { return argc > i ? std::atoi(argv[i]) : fallback; };
  const int batch = argument(1, 4), kv_len = argument(2, 32768), num_samples = argument(3, 128);
  const int sampler = argument(4, 3), repeats = argument(5, 20), budget = argument(6, 2);

  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  const int64_t kv_count = static_cast<int64_t>(batch) * kv_len * kNumKvHeads * kHeadDim;
  const int64_t k_bytes = kv_count * 2, q_count = static_cast<int64_t>(batch) * kNumKvHeads * kGroupSize * kHeadDim;
  const int copies = static_cast<int>(std::max<int64_t>(2, 4ll * device.l2CacheSize / k_bytes + 1));

  std::vector<santa::DecodeParams> calls;
  for (int c = 0; c < copies; ++c) {
    auto* q = device_array<__nv_bfloat16>(q_count);
    auto* k = device_array<__nv_bfloat16>(kv_count);
    auto* v = device_array<__nv_bfloat16>(kv_count);
    fill_normal<<<1024, 256>>>(q, q_count, 2.0f, 3 * c);
    fill_normal<<<1024, 256>>>(k, kv_count, 1.0f, 3 * c + 1);
    fill_normal<<<1024, 256>>>(v, kv_count, 1.0f, 3 * c + 2);
    santa::DecodeParams p{};
    p.q = q, p.k = k, p.v = v;
    p.out = device_array<__nv_bfloat16>(q_count);
    p.lse = device_array<float>(q_count / kHeadDim);
    p.stride_q_head = kHeadDim, p.stride_q_batch = kHeadDim * kNumKvHeads * kGroupSize;
    p.stride_k_token = p.stride_v_token = kHeadDim;  // HND
    p.stride_k_head = p.stride_v_head = static_cast<int64_t>(kv_len) * kHeadDim;
    p.stride_k_batch = p.stride_v_batch = p.stride_k_head * kNumKvHeads;
    p.dtype = p.k_dtype = p.v_dtype = santa::Dtype::kBFloat16;
    p.batch = batch, p.num_qo_heads = kNumKvHeads * kGroupSize, p.num_kv_heads = kNumKvHeads;
    p.q_len = 1, p.head_group = p.group_size = kGroupSize, p.head_group_inverse = santa::inverse_of(kGroupSize);
    p.head_dim = kHeadDim, p.cache_kv_len = p.max_kv_len = kv_len, p.window_left = -1, p.aligned = true;
    p.scale_log2 = 1.4426950f / std::sqrt(static_cast<float>(kHeadDim));
    p.sampler = static_cast<santa::Sampler>(sampler), p.budget = static_cast<santa::Budget>(budget);
    p.num_samples = num_samples, p.min_sampled_len = 0, p.seed = 0, p.level_scale = 1.0f;
    p.plan = santa::plan_call(p);
    santa::cuda::plan_decode(p, 0);
    santa::place_workspace(p, device_array<char>(santa::place_workspace(p, nullptr)));
    calls.push_back(p);
  }
  auto* sink = device_array<uint32_t>(1);

  const auto decode_once = [&](int c) { santa::cuda::launch_decode(calls[c], nullptr); };
  const auto stream_once = [&](int c) {
    check(santa::bench::launch_read_only(calls[c].k, k_bytes, sink, nullptr), "read_only");
  };
  if (repeats == 0) {
    decode_once(1);
    stream_once(1);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaProfilerStart(), "cudaProfilerStart");
    decode_once(0);
    stream_once(0);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaProfilerStop(), "cudaProfilerStop");
    return 0;
  }
  const double decode = median_us(copies, repeats, decode_once);
  const double stream = median_us(copies, repeats, stream_once);
  std::printf("%s, %d x %d, %d / %d heads, head_dim %d, bf16, S = %d, sampler %d\n", device.name, batch, kv_len,
              kNumKvHeads * kGroupSize, kNumKvHeads, kHeadDim, num_samples, sampler);
  std::printf("decode %.1f us (%.0f GB/s of K), reading K alone %.1f us (%.0f GB/s), share of the limit %.2f\n", decode,
              k_bytes / decode / 1e3, stream, k_bytes / stream / 1e3, stream / decode);
  return 0;
}
