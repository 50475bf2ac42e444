#include "cuda/bernoulli/one_pass.cuh"

namespace santa::cuda {
template void launch_one_pass_bernoulli<__nv_bfloat16, 192>(const BernoulliParams&, cudaStream_t);
}  // namespace santa::cuda
