// CUDA implementations of the schemas in ops.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "api/bernoulli.h"
#include "api/decode.h"
#include "api/proposal.h"
#include "api/sample_select.h"
#include "api/select.h"
#include "cuda/bernoulli/launch.h"
#include "cuda/common/launch.h"
#include "cuda/decode/launch.h"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/select.cuh"
#include "cuda/prefill/launch.h"
#include "cuda/proposal/launch.h"

namespace santa::cuda {
namespace {

cudaStream_t current_stream(int device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct DecodeBackend {
  static void plan(DecodeParams& p, int device_index) { plan_decode(p, device_index); }
  static void run(const DecodeParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_decode(p, current_stream(device_index));
  }
};

// One warp per (row, tile), with the device functions that stage 3 draws with.
__global__ void __launch_bounds__(32) select_kernel(const __grid_constant__ SelectParams p) {
  __shared__ SelectShared shared;
  const int tile = blockIdx.x, row = blockIdx.y, lane = threadIdx.x;
  const int64_t* tile_mass = p.tile_mass + static_cast<int64_t>(row) * p.tiles;
  uint32_t start = 0, total = 0;
  for (int t = 0; t < p.tiles; ++t) {
    if (t < tile) start += static_cast<uint32_t>(tile_mass[t]);
    total += static_cast<uint32_t>(tile_mass[t]);
  }
  const int64_t base = (static_cast<int64_t>(row) * p.tiles + tile) * p.tile_kv;
  const int num_steps = ceil_div_int(p.tile_kv, kStepKeys);
  uint32_t weights[kKeysPerLane];
  for (int i = 0; i < kKeysPerLane; ++i) {
    const int n = first_key_of(i / 4, lane) + i % 4;
    weights[i] = n < p.tile_kv ? p.row_weights[base + n] : 0;
  }
  const Draws draws = Draws::make(p.sampler, RandomStream::make(p.seed, p.row_seeds[row], 0, 0), 0, p.num_draws, total);
  const uint32_t weight_sum = accumulate_weights(weights, num_steps, shared, lane);
  if (weight_sum > 0) {
    const uint32_t mass = static_cast<uint32_t>(tile_mass[tile]), end = start + mass;
    const uint32_t first = draws.sorted() ? draws.count_below(start) : 0;
    const uint32_t last = draws.sorted() ? draws.count_below(end) : draws.num_draws;
    draw_tile(draws, first, last, start, mass, weight_sum, p.tile_kv, shared, lane);
  }
  for (int n = lane; n < p.tile_kv; n += 32) p.counts[base + n] = static_cast<int32_t>(shared.counts[n]);
}

struct SelectBackend {
  static void run(const SelectParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    SANTA_LAUNCH(select_kernel, dim3(p.tiles, p.rows), 32, 0, current_stream(device_index), p);
    check_launch("select_kernel");
  }
};

// One warp per (row, tile), with the device function that score warps draw with.
__global__ void __launch_bounds__(32) draw_kernel(const __grid_constant__ DrawParams p) {
  const int tile = blockIdx.x, row = blockIdx.y, lane = threadIdx.x;
  const int64_t first = (static_cast<int64_t>(row) * p.tiles + tile) * kDrawTileKv + 4 * lane;
  uint32_t units[4], counts[4], total;
  for (int j = 0; j < 4; ++j) units[j] = static_cast<uint32_t>(p.units[first + j]);
  count_tile_draws(counts, total, units, p.offset(row, tile), p.unit_bits, lane);
  for (int j = 0; j < 4; ++j) p.counts[first + j] = static_cast<int32_t>(counts[j]);
}

struct DrawBackend {
  static void run(const DrawParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    SANTA_LAUNCH(draw_kernel, dim3(p.tiles, p.rows), 32, 0, current_stream(device_index), p);
    check_launch("draw_kernel");
  }
};

struct SampleSelectBackend {
  static void plan(SampleSelectParams& p, int) { p.heads_per_pass = select_heads_per_pass(p); }
  static void run(const SampleSelectParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_sample_select(p, current_stream(device_index));
  }
};

struct BernoulliBackend {
  static void plan(BernoulliParams& p, int device_index) { plan_decode_bernoulli(p, device_index); }
  static void run(const BernoulliParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_decode_bernoulli(p, current_stream(device_index));
  }
  static void run_ternary(const BernoulliParams& p, int32_t* counts, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_ternary_counts(p, counts, current_stream(device_index));
  }
  static void run_append(const AppendParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_append(p, current_stream(device_index));
  }
};

struct ProposalBackend {
  static void plan(ProposalParams& p, int device_index) { plan_decode_proposal(p, device_index); }
  static void run(const ProposalParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_decode_proposal(p, current_stream(device_index));
  }
  static void run_append(const AppendProposalParams& p, int device_index) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    launch_append_proposal(p, current_stream(device_index));
  }
};

void force_plan(int64_t num_warps, int64_t num_slots, int64_t wanted_ctas) {
  forced_plan() = {static_cast<int>(num_warps), static_cast<int>(num_slots), static_cast<int>(wanted_ctas)};
}

}  // namespace
}  // namespace santa::cuda

STABLE_TORCH_LIBRARY_IMPL(santa, CUDA, m) {
  santa::api::register_decode<santa::cuda::DecodeBackend>(m);
  santa::api::register_decode_proposal<santa::cuda::ProposalBackend>(m);
  m.impl("append_proposal_keys", TORCH_BOX(&santa::api::append_proposal_keys_op<santa::cuda::ProposalBackend>));
  m.impl("decode_bernoulli", TORCH_BOX(&santa::api::decode_bernoulli_op<santa::cuda::BernoulliBackend>));
  m.impl("append_k_features", TORCH_BOX(&santa::api::append_k_features_op<santa::cuda::BernoulliBackend>));
  m.impl("append_k_features_paged", TORCH_BOX(&santa::api::append_k_features_paged_op<santa::cuda::BernoulliBackend>));
  m.impl("_ternary_counts", TORCH_BOX(&santa::api::ternary_counts_op<santa::cuda::BernoulliBackend>));
  m.impl("sample_select", TORCH_BOX(&santa::api::sample_select_op<santa::cuda::SampleSelectBackend>));
  m.impl("_select", TORCH_BOX(&santa::api::select_op<santa::cuda::SelectBackend>));
  m.impl("_draw", TORCH_BOX(&santa::api::draw_op<santa::cuda::DrawBackend>));
}

STABLE_TORCH_LIBRARY_IMPL(santa, CompositeExplicitAutograd, m) {
  m.impl("_force_plan", TORCH_BOX(&santa::cuda::force_plan));
}
