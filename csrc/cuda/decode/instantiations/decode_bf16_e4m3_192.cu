#include "cuda/decode/stages.cuh"

namespace santa::cuda {
template void launch_tiles<__nv_bfloat16, Float8, 192>(const DecodeParams&, cudaStream_t);
template void launch_persistent<__nv_bfloat16, Float8, 192>(const DecodeParams&, cudaStream_t);
template void launch_gather<Float8, 192>(const DecodeParams&, cudaStream_t);
}  // namespace santa::cuda
