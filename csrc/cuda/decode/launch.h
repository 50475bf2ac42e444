// Launchers of the decode kernels: a stage each, on the given stream. No Torch, no allocation, no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include "cuda/decode/heuristics.h"
#include "params.h"

namespace santa::cuda {

// Stages that depend on head_dim and on dtypes: T of q, K of keys, T or Float8, V of values. With keys in Float8 only
// the last stage is told V, the others look at p.v_dtype. One explicit instantiation per file in instantiations/.
template <typename T, typename K, int HEAD_DIM>
void launch_tiles(const DecodeParams& p, cudaStream_t stream);
template <typename T, typename K, int HEAD_DIM>
void launch_persistent(const DecodeParams& p, cudaStream_t stream);
template <typename V, int HEAD_DIM>
void launch_gather(const DecodeParams& p, cudaStream_t stream);

// Fills p.persistent for a device, before the workspace is placed; `warps`: heuristics.h.
void configure_persistent(DecodeParams& p, int device_index, const ScoreWarps& warps);
void configure_decode(DecodeParams& p, int device_index);

// From scores and softmax states of sampled rows, whose values are in p.dtype, to the output; of rows that are not
// sampled, from their tiles' outputs.
void launch_value_stages(const DecodeParams& p, cudaStream_t stream);

// All stages, in order.
void launch_decode(const DecodeParams& p, cudaStream_t stream);

}  // namespace santa::cuda
