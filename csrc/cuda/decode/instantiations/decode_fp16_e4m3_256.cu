#include "cuda/decode/stages.cuh"

namespace santa::cuda {
template void launch_tiles<__half, Float8, 256>(const DecodeParams&, cudaStream_t);
template void launch_one_pass<__half, Float8, 256>(const DecodeParams&, cudaStream_t);
template void launch_scores<__half, Float8, 256>(const DecodeParams&, cudaStream_t);
}  // namespace santa::cuda
