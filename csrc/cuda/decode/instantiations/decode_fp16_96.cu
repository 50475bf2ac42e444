#include "cuda/decode/stages.cuh"

namespace santa::cuda {
template void launch_tiles<__half, __half, 96>(const DecodeParams&, cudaStream_t);
template void launch_one_pass<__half, __half, 96>(const DecodeParams&, cudaStream_t);
template void launch_scores<__half, __half, 96>(const DecodeParams&, cudaStream_t);
template void launch_proportional_gather<__half, 96>(const DecodeParams&, cudaStream_t);
}  // namespace santa::cuda
