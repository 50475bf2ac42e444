// Launchers of the kernels that select key blocks, on the given stream. No Torch, no allocation, no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include "select_params.h"

namespace santa::cuda {

// The stage that depends on dtype and head_dim; one explicit instantiation per file in instantiations/.
template <typename T, int HEAD_DIM>
void launch_block_scores(const SampleSelectParams& p, int num_heads, cudaStream_t stream);

// All stages, in order, pass by pass.
void launch_sample_select(SampleSelectParams p, cudaStream_t stream);

}  // namespace santa::cuda
