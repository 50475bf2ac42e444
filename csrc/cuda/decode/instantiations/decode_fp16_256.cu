#include "cuda/decode/launch.cuh"

namespace santa::cuda {
template void launch_decode_kernel<__half, 256>(const DecodeParams&, cudaStream_t);
}  // namespace santa::cuda
