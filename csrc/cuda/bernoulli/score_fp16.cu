#include "cuda/bernoulli/score.cuh"

namespace santa::cuda {
template void launch_score_features<__half>(const BernoulliParams&, cudaStream_t);
}  // namespace santa::cuda
