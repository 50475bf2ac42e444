// Launchers of the decode kernels, on the given stream. No Torch, no allocation, no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include "cuda/decode/heuristics.h"
#include "params.h"

namespace santa::cuda {

// Kernels that depend on head_dim and on dtypes: T of q, K of keys, T or Float8, V of values. One explicit
// instantiation per file in instantiations/.
template <typename T, typename K, int HEAD_DIM>
void launch_tiles(const DecodeParams& p, cudaStream_t stream);
template <typename T, typename K, int HEAD_DIM>
void launch_one_pass(const DecodeParams& p, cudaStream_t stream);
template <typename T, typename K, int HEAD_DIM>
void launch_scores(const DecodeParams& p, cudaStream_t stream);
template <typename V, int HEAD_DIM>
void launch_proportional_gather(const DecodeParams& p, cudaStream_t stream);

DeviceLimits device_limits_of(int device_index);

// Fills what of the plan depends on the device, before the workspace is placed.
void plan_decode(DecodeParams& p, int device_index);

// The kernels that the plan names, in order.
void launch_decode(const DecodeParams& p, cudaStream_t stream);

// From scores and softmax states of proportional rows, whose values are in p.dtype, to o_accum.
void launch_value_stages(const DecodeParams& p, cudaStream_t stream);

// From tiles and parts to the output.
void launch_combine(const DecodeParams& p, cudaStream_t stream);

}  // namespace santa::cuda
