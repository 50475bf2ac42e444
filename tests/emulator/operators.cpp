// santa's operators once more, as torch.ops.santa_emulator: for tensors on the CPU, with the CUDA backend behind them.
// The other .cpp files compile its kernels, a part of csrc/cuda each: parts use the same names for different things.
#include "emulator.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace torch::stable::accelerator {

struct EmulatedDevice {
  explicit EmulatedDevice(int) {}
};

}  // namespace torch::stable::accelerator

// What ops.cpp and ops_cuda.cu register goes to santa_emulator, CUDA's to the CPU.
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(library, m) STABLE_TORCH_LIBRARY_FRAGMENT(santa_emulator, m)
#define IMPLEMENT_CUDA(m) _STABLE_TORCH_LIBRARY_IMPL(santa_emulator, CPU, m, C10_UID)
#define IMPLEMENT_CompositeExplicitAutograd(m) \
  _STABLE_TORCH_LIBRARY_IMPL(santa_emulator, CompositeExplicitAutograd, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) IMPLEMENT_##key(m)
// There is one device and one stream, and to the checks of arguments a tensor on the CPU is on CUDA.
#define is_cuda is_cpu
#define DeviceGuard EmulatedDevice
#define aoti_torch_get_current_cuda_stream emulator::current_stream

namespace emulator {

int num_sms, sm_bytes;

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount                ? num_sms
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? sm_bytes
                                                                      : sm_bytes - 1024;
  return cudaSuccess;
}

AOTITorchError current_stream(int, void**) { return AOTI_TORCH_SUCCESS; }

}  // namespace emulator

// The device from now on; threads run in steps of `order`.
extern "C" void set_device(int num_sms, int sm_bytes, int order) {
  emulator::num_sms = num_sms, emulator::sm_bytes = sm_bytes, emulator::order = order;
}

// Of kernels, so far.
extern "C" int64_t num_launches() { return emulator::num_launches; }

#include "cuda/ops_cuda.cu"
#include "ops.cpp"
