#include "cuda/prefill/score.cuh"

namespace santa::cuda {
template void launch_block_scores<__half, 64>(const SampleSelectParams&, int, cudaStream_t);
}  // namespace santa::cuda
