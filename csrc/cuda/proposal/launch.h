// Launchers of decode with proposal keys, and of what fills them. No Torch, no allocation, no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include "proposal_params.h"

namespace santa::cuda {

// Sampled rows; T of q, K of keys, T or Float8. One explicit instantiation per file in instantiations/.
template <typename T, typename K, int HEAD_DIM>
void launch_one_pass_proposal(const ProposalParams& p, cudaStream_t stream);

// Fills what of the plan depends on the device, before the workspace is placed.
void plan_decode_proposal(ProposalParams& p, int device_index);

// The kernels that the plan names, in order.
void launch_decode_proposal(const ProposalParams& p, cudaStream_t stream);

void launch_append_proposal(const AppendProposalParams& p, cudaStream_t stream);

}  // namespace santa::cuda
