#include "cuda/decode/launch.cuh"

namespace santa::cuda {
template void launch_decode_kernel<__nv_bfloat16, 192>(const DecodeParams&, cudaStream_t);
}  // namespace santa::cuda
