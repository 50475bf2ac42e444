#include "cuda/decode/launch.h"

#include "cuda/common/launch.h"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/plan.cuh"

namespace santa::cuda {
namespace {

template <typename T, int HEAD_DIM>
void launch_stages(const DecodeParams& p, cudaStream_t stream) {
  if (p.any_persistent()) launch_persistent<T, HEAD_DIM>(p, stream);
  if (!p.any_exact() && !p.any_staged()) return;
  if (p.max_tiles > 0) launch_tiles<T, HEAD_DIM>(p, stream);
  if (p.max_tiles > 0 && p.any_staged()) {
    plan_kernel<<<dim3(p.num_kv_heads, p.batch), kPlanThreads, 0, stream>>>(p);
    check_launch("plan_kernel");
    launch_gather<T, HEAD_DIM>(p, stream);
  }
  combine_kernel<T><<<dim3(p.num_qo_heads, p.batch), kCombineThreads, 0, stream>>>(p);
  check_launch("combine_kernel");
}

template <typename T>
void dispatch_head_dim(const DecodeParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return launch_stages<T, 64>(p, stream);
    case 96:
      return launch_stages<T, 96>(p, stream);
    case 128:
      return launch_stages<T, 128>(p, stream);
    case 192:
      return launch_stages<T, 192>(p, stream);
    case 256:
      return launch_stages<T, 256>(p, stream);
    default:
      throw std::runtime_error("santa on CUDA: no kernel for this head_dim");  // the argument check is stricter
  }
}

}  // namespace

void configure_decode(DecodeParams& p, int device_index) {
  DeviceLimits device{};
  check(cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, device_index),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index),
        "cudaDeviceGetAttribute");
  p.persistent = plan_persistent(p, device);
}

void launch_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kBFloat16) {
    dispatch_head_dim<__nv_bfloat16>(p, stream);
  } else {
    dispatch_head_dim<__half>(p, stream);
  }
}

}  // namespace santa::cuda
