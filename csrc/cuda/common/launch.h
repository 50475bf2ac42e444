// Launch checks without Torch: every CUDA call that can fail is looked at, and failure is an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include "cuda/common/head_dims.h"

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments): a macro, so that tests/emulator can do without a GPU.
#define SANTA_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)

namespace santa::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // reported here: the next, innocent call must not find it
    throw std::runtime_error(std::string("santa on CUDA: ") + what + " failed: " + cudaGetErrorString(status));
  }
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Shared memory above the default limit of 48 KB has to be asked for, once per kernel and device; asking again is cheap
// and keeps no state here.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  if (bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  }
}

// For the kernels of rows in one pass, with as much dynamic shared memory. All of them want the multiprocessor's memory
// divided in the same way, nearly all of it shared: one that wants another division waits until those before it have
// ended. None of them has a use for the L1.
template <typename Kernel>
void share_multiprocessor(Kernel* kernel, int bytes) {
  allow_shared_memory(kernel, bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
}

// Whether what runs was compiled for sm_90 or later.
template <typename Kernel>
bool is_for_sm_90(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

// Launches a kernel in the way that `attributes`, so many of them, say.
template <typename... Parameters, typename... Arguments>
void launch_with(cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(Parameters...), dim3 grid, int threads,
                 int shared_bytes, cudaStream_t stream, const char* name, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = attributes, config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

// Launches a kernel that calls wait_for_previous() (ptx.cuh) before it needs the one before it, which may still be
// running when it starts. Only code for sm_90 and later waits; what was compiled for less must not be launched early.
template <typename... Parameters, typename... Arguments>
void launch_after(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                  const char* name, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  launch_with(&early, is_for_sm_90(kernel) ? 1 : 0, kernel, grid, threads, shared_bytes, stream, name, arguments...);
}

// Launches a kernel, compiled for sm_90 or later, whose grid, of one dimension, is clusters of two neighbouring CTAs.
template <typename... Parameters, typename... Arguments>
void launch_pairs(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                  const char* name, const Arguments&... arguments) {
  cudaLaunchAttribute pairs{};
  pairs.id = cudaLaunchAttributeClusterDimension;
  pairs.val.clusterDim.x = 2, pairs.val.clusterDim.y = pairs.val.clusterDim.z = 1;
  launch_with(&pairs, 1, kernel, grid, threads, shared_bytes, stream, name, arguments...);
}

}  // namespace santa::cuda
