#include "cuda/decode/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

namespace santa::cuda {
namespace {

template <typename T>
void dispatch_head_dim(const DecodeParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return launch_decode_kernel<T, 64>(p, stream);
    case 96:
      return launch_decode_kernel<T, 96>(p, stream);
    case 128:
      return launch_decode_kernel<T, 128>(p, stream);
    case 192:
      return launch_decode_kernel<T, 192>(p, stream);
    case 256:
      return launch_decode_kernel<T, 256>(p, stream);
    default:
      throw std::runtime_error("santa: no kernel for this head_dim");  // the argument check is stricter
  }
}

}  // namespace

void launch_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kBFloat16) {
    dispatch_head_dim<__nv_bfloat16>(p, stream);
  } else {
    dispatch_head_dim<__half>(p, stream);
  }
}

}  // namespace santa::cuda
