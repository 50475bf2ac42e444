// CUDA implementations of the schemas in ops.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "api/decode.h"
#include "api/select.h"
#include "cuda/common/launch.h"
#include "cuda/decode/launch.h"
#include "cuda/decode/select.cuh"

namespace santa::cuda {
namespace {

cudaStream_t current_stream(int device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct DecodeBackend {
  static void run(const DecodeParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_decode(p, current_stream(device_index));
  }
};

// One CTA per (row, tile), with the device function that stage 3 draws with.
__global__ void __launch_bounds__(kSelectThreads) select_kernel(const __grid_constant__ SelectParams p) {
  __shared__ SelectShared shared;
  const int tile = blockIdx.x, row = blockIdx.y;
  const int64_t* tile_mass = p.tile_mass + static_cast<int64_t>(row) * p.tiles;
  uint64_t start = 0, total = 0;
  for (int t = 0; t < p.tiles; ++t) {
    if (t < tile) start += tile_mass[t];
    total += tile_mass[t];
  }
  const int64_t base = (static_cast<int64_t>(row) * p.tiles + tile) * p.tile_kv;
  uint32_t weights[kKeysPerThread];
  for (int i = 0; i < kKeysPerThread; ++i) {
    const int n = threadIdx.x * kKeysPerThread + i;
    weights[i] = n < p.tile_kv ? p.row_weights[base + n] : 0;
  }
  const Draws draws = Draws::make(p.sampler, RandomStream::make(p.seed, p.row_seeds[row], 0, 0), 0, p.num_draws, total);
  if (tile_mass[tile] > 0) draw_tile(draws, start, tile_mass[tile], weights, p.tile_kv, shared);
  for (int n = threadIdx.x; n < p.tile_kv; n += kSelectThreads) {
    p.counts[base + n] = tile_mass[tile] > 0 ? shared.counts[n] : 0;
  }
}

struct SelectBackend {
  static void run(const SelectParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    select_kernel<<<dim3(p.tiles, p.rows), kSelectThreads, 0, current_stream(device_index)>>>(p);
    check_launch("select_kernel");
  }
};

}  // namespace
}  // namespace santa::cuda

STABLE_TORCH_LIBRARY_IMPL(santa, CUDA, m) {
  m.impl("decode", TORCH_BOX(&santa::api::decode_op<santa::cuda::DecodeBackend>));
  m.impl("decode_rows_read", TORCH_BOX(&santa::api::decode_rows_read_op<santa::cuda::DecodeBackend>));
  m.impl("_select", TORCH_BOX(&santa::api::select_op<santa::cuda::SelectBackend>));
}
