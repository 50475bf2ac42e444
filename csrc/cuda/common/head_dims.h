// From a head_dim to the kernels that are compiled for it.
#pragma once

#include <stdexcept>
#include <type_traits>

namespace santa::cuda {

// Calls function(std::integral_constant<int, head_dim>).
template <typename Function>
void with_head_dim(int head_dim, const Function& function) {
  switch (head_dim) {
    case 64:
      return function(std::integral_constant<int, 64>{});
    case 96:
      return function(std::integral_constant<int, 96>{});
    case 128:
      return function(std::integral_constant<int, 128>{});
    case 192:
      return function(std::integral_constant<int, 192>{});
    case 256:
      return function(std::integral_constant<int, 256>{});
    default:
      throw std::runtime_error("santa on CUDA: no kernel for this head_dim");  // the argument check is stricter
  }
}

}  // namespace santa::cuda
