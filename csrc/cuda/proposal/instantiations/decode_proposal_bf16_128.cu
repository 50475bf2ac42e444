#include "cuda/proposal/one_pass.cuh"

namespace santa::cuda {
template void launch_one_pass_proposal<__nv_bfloat16, __nv_bfloat16, 128>(const ProposalParams&, cudaStream_t);
}  // namespace santa::cuda
