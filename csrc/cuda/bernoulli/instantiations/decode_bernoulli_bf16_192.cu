#include "cuda/bernoulli/persistent.cuh"

namespace santa::cuda {
template void launch_persistent_bernoulli<__nv_bfloat16, 192>(const BernoulliParams&, cudaStream_t);
}  // namespace santa::cuda
