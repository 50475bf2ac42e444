#include "cuda/bernoulli/persistent.cuh"

namespace santa::cuda {
template void launch_persistent_bernoulli<__half, 128>(const BernoulliParams&, cudaStream_t);
}  // namespace santa::cuda
