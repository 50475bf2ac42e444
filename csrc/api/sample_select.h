// santa::sample_select: checks, allocation and parameters, written once for both backends.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "api/checks.h"
#include "api/decode.h"
#include "select_params.h"

namespace santa::api {

struct SampleSelectArguments {
  const Tensor& q;
  const Tensor& k;
  double alpha_c, alpha_s;
  int64_t num_chunks, sink_blocks, window_blocks;
  std::optional<double> sm_scale;
  int64_t gqa, selection;
  double min_mass;
};

inline void check_sample_select(const SampleSelectArguments& a) {
  check_rank("q", a.q, 4, "[batch, num_qo_heads, q_len, head_dim]");
  check_rank("k", a.k, 4, "[batch, num_kv_heads, kv_len, head_dim]");
  const ScalarType dtype = a.q.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!half && !(a.q.is_cpu() && dtype == ScalarType::Float)) {
    fail("q is ", name_of(dtype), "; it needs to be bfloat16 or float16", a.q.is_cpu() ? " or float32" : " on CUDA");
  }
  check_dtype("k", a.k, dtype, ", q's dtype");
  check_same_device("k", a.k, a.q);

  const int64_t head_dim = a.q.size(3), q_len = a.q.size(2), kv_len = a.k.size(2);
  if (head_dim != 64 && head_dim != 128) fail("q has head_dim ", head_dim, "; it needs to be 64 or 128");
  check_size("k", a.k, 0, a.q.size(0), "batch");
  check_size("k", a.k, 3, head_dim, "head_dim");
  if (a.q.size(0) > kMaxBatch) fail("q has batch ", a.q.size(0), "; it needs to be at most ", kMaxBatch);
  const int64_t num_qo_heads = a.q.size(1), num_kv_heads = a.k.size(1);
  if (num_qo_heads < 1) fail("q has shape ", shape_of(a.q), "; it needs at least one head");
  if (num_kv_heads < 1 || num_qo_heads % num_kv_heads != 0 || num_qo_heads / num_kv_heads > kMaxGroupSize) {
    fail("k has ", num_kv_heads, " KV heads; num_qo_heads (", num_qo_heads, ") needs to be a multiple of it, at most ",
         kMaxGroupSize, " times");
  }
  if (q_len < 1) fail("q has q_len ", q_len, "; it needs to be at least 1");
  if (kv_len > kMaxKvLen - kSelectBlock) {
    fail("k has kv_len ", kv_len, "; it needs to be at most ", kMaxKvLen - kSelectBlock);
  }
  if (kv_len < q_len || (kv_len - q_len) % kSelectBlock != 0) {
    fail("k has kv_len ", kv_len, "; it needs to be q_len (", q_len, ") plus a multiple of ", kSelectBlock,
         ": the queries are the end of the keys, and blocks have ", kSelectBlock, " tokens; k has shape ",
         shape_of(a.k), ", [batch, num_kv_heads, kv_len, head_dim]");
  }
  check_last_dim_contiguous("q", a.q);
  check_last_dim_contiguous("k", a.k);

  if (std::isnan(a.alpha_c)) fail("alpha_c is nan; it needs to be a number");
  if (std::isnan(a.alpha_s)) fail("alpha_s is nan; it needs to be a number");
  check_range("num_chunks", a.num_chunks, 0, 65535);
  check_range("sink_blocks", a.sink_blocks, 0, kMaxKvLen);
  check_range("window_blocks", a.window_blocks, 1, kMaxKvLen);  // the diagonal block is never left out
  if (a.sm_scale && !(std::abs(*a.sm_scale) <= kMaxScale)) {
    fail("sm_scale is ", *a.sm_scale, "; it needs to be finite and at most ", kMaxScale, " in magnitude");
  }
  check_range("gqa", a.gqa, 0, 1);
  check_range("selection", a.selection, 0, 1);
  if (!(a.min_mass >= 0.0 && a.min_mass <= 1.0)) fail("min_mass is ", a.min_mass, "; it needs to be in [0, 1]");
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> sample_select_op(Tensor q, Tensor k, double alpha_c, double alpha_s,
                                                    int64_t num_chunks, int64_t sink_blocks, int64_t window_blocks,
                                                    std::optional<double> sm_scale, int64_t gqa, int64_t selection,
                                                    double min_mass) {
  check_sample_select(
      {q, k, alpha_c, alpha_s, num_chunks, sink_blocks, window_blocks, sm_scale, gqa, selection, min_mass});
  const int64_t batch = q.size(0), num_qo_heads = q.size(1), head_dim = q.size(3);
  const int64_t nq = ceil_div(q.size(2), kSelectBlock), nk = ceil_div(k.size(2), kSelectBlock);

  Tensor kv_cnt = empty<3>({batch, num_qo_heads, nq}, ScalarType::Int, q);
  Tensor kv_idx = empty<4>({batch, num_qo_heads, nq, nk}, ScalarType::Int, q);
  Tensor stats = empty<3>({batch, num_qo_heads, kNumSelectStats}, ScalarType::Float, q);
  if (batch == 0) return {kv_cnt, kv_idx, stats};

  SampleSelectParams p{};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.kv_cnt = static_cast<int32_t*>(kv_cnt.mutable_data_ptr());
  p.kv_idx = static_cast<int32_t*>(kv_idx.mutable_data_ptr());
  p.stats = static_cast<float*>(stats.mutable_data_ptr());
  p.stride_q_batch = q.stride(0), p.stride_q_head = q.stride(1), p.stride_q_token = q.stride(2);
  p.stride_k_batch = k.stride(0), p.stride_k_head = k.stride(1), p.stride_k_token = k.stride(2);
  p.dtype = dtype_of(q);
  p.batch = static_cast<int>(batch);
  p.num_qo_heads = static_cast<int>(num_qo_heads);
  p.num_kv_heads = static_cast<int>(k.size(1));
  p.gqa_group_size = p.num_qo_heads / p.num_kv_heads;
  p.head_dim = static_cast<int>(head_dim);
  p.q_len = static_cast<int>(q.size(2)), p.kv_len = static_cast<int>(k.size(2));
  p.nq = static_cast<int>(nq), p.nk = static_cast<int>(nk), p.offset = p.nk - p.nq;
  p.num_chunks = num_sampled_blocks(num_chunks, p.nq);
  p.aligned = rows_are_aligned(q) && rows_are_aligned(k);
  const double scale = sm_scale ? *sm_scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
  p.scale_log2 = static_cast<float>(scale * static_cast<double>(kLog2E));
  p.alpha_c = alpha_c, p.alpha_s = alpha_s, p.min_mass = min_mass;
  p.sink_blocks = static_cast<int>(std::min(sink_blocks, nk));
  p.window_blocks = static_cast<int>(std::min(window_blocks, nk));
  p.gqa_union = gqa == 1;
  p.selection = static_cast<Selection>(selection);

  run_backend<Backend>(p, q, place_select_workspace);
  return {kv_cnt, kv_idx, stats};
}

}  // namespace santa::api
