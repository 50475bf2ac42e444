// Launchers of the decode kernels, on the given stream. No Torch, no allocation, no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace santa::cuda {

// One explicit instantiation per file in instantiations/.
template <typename T, int HEAD_DIM>
void launch_decode_kernel(const DecodeParams& p, cudaStream_t stream);

// Dispatches on dtype and head_dim.
void launch_decode(const DecodeParams& p, cudaStream_t stream);

}  // namespace santa::cuda
