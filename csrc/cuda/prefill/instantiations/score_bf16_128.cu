#include "cuda/prefill/score.cuh"

namespace santa::cuda {
template void launch_block_scores<__nv_bfloat16, 128>(const SampleSelectParams&, int, cudaStream_t);
}  // namespace santa::cuda
