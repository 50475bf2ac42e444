#include "cuda/decode/stages.cuh"

namespace santa::cuda {
template void launch_tiles<__nv_bfloat16, __nv_bfloat16, 128>(const DecodeParams&, cudaStream_t);
template void launch_persistent<__nv_bfloat16, __nv_bfloat16, 128>(const DecodeParams&, cudaStream_t);
template void launch_gather<__nv_bfloat16, 128>(const DecodeParams&, cudaStream_t);
}  // namespace santa::cuda
