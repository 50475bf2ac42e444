// csrc/cuda/common/launch.h on the host: a kernel has run when its launch returns.
#pragma once

#include "cuda/common/head_dims.h"
#include "emulator.h"

#define SANTA_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  emulator::launch(grid, threads, shared_bytes, [&] { (*kernel)(__VA_ARGS__); })

// Of the device that a test asks for. Under another name: torch may have brought the real one along.
namespace emulator {
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int device);
}
#define cudaDeviceGetAttribute emulator::device_attribute

namespace santa::cuda {

inline void check(cudaError_t status, const char* what) { emulator::require(status == cudaSuccess, what); }
inline void check_launch(const char*) {}
template <typename Kernel>
void allow_shared_memory(Kernel*, int) {}
template <typename Kernel>
void share_multiprocessor(Kernel*, int) {}
template <typename... Parameters, typename... Arguments>
void launch_after(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t, const char*,
                  const Arguments&... arguments) {
  emulator::launch(grid, threads, shared_bytes, [&] { (*kernel)(arguments...); });
}

// CTAs run one after the other: there are no clusters.
template <typename Kernel>
bool is_for_sm_90(Kernel*) {
  return false;
}
template <typename... Arguments>
void launch_pairs(const Arguments&...) {
  emulator::require(false, "a launch without clusters");
}

}  // namespace santa::cuda
