#include "cuda/proposal/one_pass.cuh"

namespace santa::cuda {
template void launch_one_pass_proposal<__half, Float8, 96>(const ProposalParams&, cudaStream_t);
}  // namespace santa::cuda
