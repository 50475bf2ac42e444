// Launchers of the Bernoulli score stage and of what fills its keys. No Torch, no allocation, no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include "bernoulli_params.h"

namespace santa::cuda {

// Scores from what was drawn; one explicit instantiation per dtype and file.
template <typename T>
void launch_score_features(const BernoulliParams& p, cudaStream_t stream);

// Sampled rows in one kernel; one explicit instantiation per dtype, head_dim and file in instantiations/.
template <typename T, int HEAD_DIM>
void launch_one_pass_bernoulli(const BernoulliParams& p, cudaStream_t stream);

// Fills what of the plan depends on the device, before the workspace is placed.
void plan_decode_bernoulli(BernoulliParams& p, int device_index);

// The kernels that the plan names, in order.
void launch_decode_bernoulli(const BernoulliParams& p, cudaStream_t stream);

// For tests: the draws alone, to counts [batch, num_qo_heads, head_dim].
void launch_ternary_counts(const BernoulliParams& p, int32_t* counts, cudaStream_t stream);

void launch_append(const AppendParams& p, cudaStream_t stream);

}  // namespace santa::cuda
