// The decode kernels and their launchers in the emulator, as a C function.
#include "emulator.h"

#include "cuda/decode/stages.cuh"
#include "cuda/decode/launch.cu"
#include "cuda/proposal/one_pass.cuh"
#include "cuda/proposal/launch.cu"
#include "workspace.h"

namespace {

santa::cuda::DeviceLimits device;
std::string error;

}  // namespace

// What plan_decode asks of a device.
cudaError_t emulator::device_attribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount                ? device.num_sms
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? device.sm_bytes
                                                                      : device.cta_bytes;
  return cudaSuccess;
}

// Arguments of santa.decode, by pointer and stride; tests/helpers/emulator.py has the same members.
struct Call {
  const void *q, *k, *v;
  const int32_t *kv_lens, *kv_starts, *page_table;
  const int64_t* row_seeds;
  void* out;
  float* lse;
  int32_t* rows_read;
  int64_t batch, q_len, num_kv_heads, head_group, head_dim, cache_kv_len, page_size;  // 0: not paged
  int64_t k_strides[3], v_strides[3];                                                 // batch or page, token, head
  int64_t dtype, k_dtype, v_dtype;                                                    // santa::Dtype
  int64_t sampler, budget, num_samples, min_sampled_len, seed, window_left;
  double logits_soft_cap;
  int64_t num_sms, sm_bytes, order;
  // Proposal keys, if there are any; of one set of statistics for all rows.
  const uint8_t* codes;
  const uint16_t* scales;
  const float *center, *channel_scale;
  int64_t codes_strides[3], scales_strides[3];
  int64_t shared_statistics, scales_side_by_side;
};

// Null, or what went wrong.
extern "C" const char* emulate_decode(const Call* call) {
  using namespace santa;
  error.clear();
  device = {static_cast<int>(call->num_sms), static_cast<int>(call->sm_bytes), static_cast<int>(call->sm_bytes) - 1024};
  emulator::order = static_cast<int>(call->order);
  DecodeParams p{};
  p.q = call->q, p.k = call->k, p.v = call->v, p.out = call->out, p.lse = call->lse, p.rows_read = call->rows_read;
  p.kv_lens = call->kv_lens, p.kv_starts = call->kv_starts, p.row_seeds = call->row_seeds;
  p.dtype = static_cast<Dtype>(call->dtype), p.k_dtype = static_cast<Dtype>(call->k_dtype);
  p.v_dtype = static_cast<Dtype>(call->v_dtype);
  p.batch = static_cast<int>(call->batch), p.q_len = static_cast<int>(call->q_len);
  p.num_kv_heads = static_cast<int>(call->num_kv_heads), p.head_dim = static_cast<int>(call->head_dim);
  p.head_group = static_cast<int>(call->head_group), p.head_group_inverse = inverse_of(p.head_group);
  p.num_qo_heads = p.num_kv_heads * p.head_group, p.group_size = p.q_len * p.head_group;
  p.cache_kv_len = static_cast<int>(call->cache_kv_len), p.window_left = static_cast<int>(call->window_left);
  p.max_kv_len = p.window_left < 0 ? p.cache_kv_len : std::min(p.cache_kv_len, p.window_left + p.q_len);
  p.stride_q_head = p.head_dim, p.stride_q_token = p.stride_q_head * p.num_qo_heads;
  p.stride_q_batch = p.stride_q_token * p.q_len;
  p.stride_k_batch = call->k_strides[0], p.stride_k_token = call->k_strides[1], p.stride_k_head = call->k_strides[2];
  p.stride_v_batch = call->v_strides[0], p.stride_v_token = call->v_strides[1], p.stride_v_head = call->v_strides[2];
  if (call->page_size > 0) {
    p.paged = true, p.page_table = call->page_table, p.stride_page_table = call->cache_kv_len / call->page_size;
    for (int64_t size = call->page_size; size > 1; size /= 2) ++p.page_shift;
  }
  const auto aligned = [](const void* data, int64_t bytes) {
    return (reinterpret_cast<int64_t>(data) | bytes) % 16 == 0;
  };
  const int64_t k_bytes = p.k_dtype == Dtype::kFloat8E4M3 ? 1 : 2, v_bytes = p.v_dtype == Dtype::kFloat8E4M3 ? 1 : 2;
  p.aligned = aligned(p.q, 0) && aligned(p.k, p.stride_k_token * k_bytes) && aligned(p.v, p.stride_v_token * v_bytes);
  p.scale_log2 = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)) * static_cast<double>(kLog2E));
  p.soft_cap = static_cast<float>(call->logits_soft_cap * static_cast<double>(kLog2E));
  p.soft_cap_inverse = p.soft_cap > 0.0f ? 1.0f / p.soft_cap : 0.0f;
  p.sampler = static_cast<Sampler>(call->sampler), p.budget = static_cast<Budget>(call->budget);
  p.num_samples = static_cast<int>(call->num_samples), p.min_sampled_len = call->min_sampled_len;
  p.seed = call->seed, p.level_scale = 1.0f;
  if (p.min_sampled_len > p.max_kv_len) p.num_samples = 0;
  try {
    p.plan = plan_call(p);
    const auto run = [](auto& params, auto plan, auto place, auto launch) {
      plan(params, 0);
      std::vector<float> workspace(place(params, nullptr) / sizeof(float) + 64, NAN);
      void* base = workspace.data();
      size_t space = workspace.size() * sizeof(float);
      place(params, std::align(256, 1, base, space));
      launch(params, nullptr);
    };
    if (call->codes == nullptr) {
      run(p, cuda::plan_decode, place_workspace, cuda::launch_decode);
    } else {
      ProposalParams proposal{};
      proposal.decode = p;
      plan_proposal_call(proposal.decode);
      proposal.codes = call->codes, proposal.scales = call->scales;
      proposal.center = call->center, proposal.channel_scale = call->channel_scale;
      proposal.stride_codes_batch = call->codes_strides[0], proposal.stride_codes_token = call->codes_strides[1];
      proposal.stride_codes_head = call->codes_strides[2];
      proposal.stride_scales_batch = call->scales_strides[0], proposal.stride_scales_token = call->scales_strides[1];
      proposal.stride_scales_head = call->scales_strides[2];
      proposal.shared_statistics = call->shared_statistics != 0;
      proposal.codes_aligned = aligned(call->codes, call->codes_strides[1]);
      proposal.scales_side_by_side = call->scales_side_by_side != 0;
      run(proposal, cuda::plan_decode_proposal, place_proposal_workspace, cuda::launch_decode_proposal);
    }
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.empty() ? nullptr : error.c_str();
}
