#include "cuda/prefill/score.cuh"

namespace santa::cuda {
template void launch_block_scores<__half, 128>(const SampleSelectParams&, int, cudaStream_t);
}  // namespace santa::cuda
