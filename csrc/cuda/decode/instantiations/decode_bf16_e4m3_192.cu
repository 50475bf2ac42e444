#include "cuda/decode/stages.cuh"

namespace santa::cuda {
template void launch_tiles<__nv_bfloat16, Float8, 192>(const DecodeParams&, cudaStream_t);
template void launch_one_pass<__nv_bfloat16, Float8, 192>(const DecodeParams&, cudaStream_t);
template void launch_scores<__nv_bfloat16, Float8, 192>(const DecodeParams&, cudaStream_t);
template void launch_proportional_gather<Float8, 192>(const DecodeParams&, cudaStream_t);
}  // namespace santa::cuda
