#include "cuda/decode/launch.h"

#include "core/float8.h"
#include "cuda/common/launch.h"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/plan.cuh"

namespace santa::cuda {
namespace {

template <typename V>
void launch_value_stages_of(const DecodeParams& p, cudaStream_t stream) {
  launch_after(plan_kernel, dim3(p.num_kv_heads, p.batch), kPlanThreads, 0, stream, "plan_kernel", p);
  with_head_dim(p.head_dim, [&](auto head_dim) { launch_proportional_gather<V, head_dim()>(p, stream); });
}

template <typename T, typename K>
void launch_decode_of(const DecodeParams& p, cudaStream_t stream) {
  with_head_dim(p.head_dim, [&](auto head_dim) {
    if (p.plan.one_pass) launch_one_pass<T, K, head_dim()>(p, stream);
    if (p.plan.proportional) launch_scores<T, K, head_dim()>(p, stream);
    if (p.plan.exact) launch_tiles<T, K, head_dim()>(p, stream);
  });
  if (p.plan.proportional) launch_value_stages(p, stream);
  launch_combine(p, stream);
}

template <typename T>
void launch_decode_of(const DecodeParams& p, cudaStream_t stream) {
  if (p.k_dtype == Dtype::kFloat8E4M3) {
    launch_decode_of<T, Float8>(p, stream);
  } else {
    launch_decode_of<T, T>(p, stream);
  }
}

}  // namespace

void launch_value_stages(const DecodeParams& p, cudaStream_t stream) {
  if (p.v_dtype == Dtype::kFloat8E4M3) {
    launch_value_stages_of<Float8>(p, stream);
  } else if (p.v_dtype == Dtype::kBFloat16) {
    launch_value_stages_of<__nv_bfloat16>(p, stream);
  } else {
    launch_value_stages_of<__half>(p, stream);
  }
}

void launch_combine(const DecodeParams& p, cudaStream_t stream) {
  // The tile kernel wrote the output.
  const bool merged = p.max_tiles == 1 || p.plan.exact_cut.row_runs == 1 || p.plan.row_pairs;
  if (!p.plan.one_pass && !p.plan.proportional && merged) return;
  const auto launch = [&](auto* kernel) {
    share_multiprocessor(kernel, 0);
    launch_after(kernel, dim3(p.num_kv_heads * p.group_size, p.batch), kCombineThreads, 0, stream, "combine_kernel", p);
  };
  p.dtype == Dtype::kBFloat16 ? launch(combine_kernel<__nv_bfloat16>) : launch(combine_kernel<__half>);
}

DeviceLimits device_limits_of(int device_index) {
  DeviceLimits device{};
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(&value, attribute, device_index), "cudaDeviceGetAttribute");
  };
  read(device.num_sms, cudaDevAttrMultiProcessorCount);
  read(device.sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(device.cta_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.has_clusters = is_for_sm_90(combine_kernel<__half>);  // any kernel: all are compiled for the same
  return device;
}

void plan_decode(DecodeParams& p, int device_index) {
  const DeviceLimits device = device_limits_of(device_index);
  plan_one_pass(p, device, key_score_needs(p));
  plan_scores(p, device, key_score_needs(p));
  plan_tiles(p, device);
}

void launch_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kBFloat16) {
    launch_decode_of<__nv_bfloat16>(p, stream);
  } else {
    launch_decode_of<__half>(p, stream);
  }
}

}  // namespace santa::cuda
