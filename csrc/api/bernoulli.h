// santa::decode_bernoulli and what fills feature-major caches: checks, allocation and parameters for both backends.
#pragma once

#include <tuple>

#include "api/decode.h"
#include "bernoulli_params.h"

namespace santa::api {

constexpr const char* kFeatureShape = "[batch, num_kv_heads, head_dim, max_kv_len]";

inline void check_score_sampling(int64_t num_draws, int64_t score_sampler) {
  check_range("num_draws", num_draws, 1, kMaxNumDraws);
  check_range("score_sampler", score_sampler, 0, 2);
}

// The one pass of CUDA multiplies keys with counts in q's dtype, whose whole numbers go so far without a gap.
inline void check_cuda_num_draws(const DecodeArguments& a, int64_t num_draws) {
  if (!a.q.is_cuda() || a.num_samples == 0 || budget_of(a) == Budget::kProportional) return;
  const int64_t most = a.q.scalar_type() == ScalarType::BFloat16 ? 256 : 2048;
  if (num_draws > most) {
    fail("num_draws is ", num_draws, "; on CUDA it needs to be at most ", most, " for ", name_of(a.q.scalar_type()),
         ", or budget='proportional'");
  }
}

// `a.k` is k_features.
inline void check_decode_bernoulli(const DecodeArguments& a, int64_t num_draws, int64_t score_sampler) {
  check_range("kv_layout", a.kv_layout, 0, 1);
  const bool hnd = a.hnd();
  check_query_rank(a.q, /*several_tokens=*/false);
  check_rank("k_features", a.k, 4, kFeatureShape);
  check_rank(
      "v", a.v, 4,
      hnd ? "[batch, num_kv_heads, max_kv_len, head_dim] (HND)" : "[batch, max_kv_len, num_kv_heads, head_dim] (NHD)");
  check_query_dtype(a.q);
  check_dtype("k_features", a.k, a.q.scalar_type(), ", q's dtype");
  check_dtype("v", a.v, a.q.scalar_type(), ", q's dtype");
  check_same_device("k_features", a.k, a.q);
  check_same_device("v", a.v, a.q);
  check_head_dim(a.q);
  check_size("k_features", a.k, 0, a.q.size(0), "batch");
  check_size("k_features", a.k, 2, a.q.size(2), "head_dim");
  check_heads(a.q, "k_features", a.k.size(1));
  check_size("v", a.v, 0, a.q.size(0), "batch");
  check_size("v", a.v, a.head_axis(), a.k.size(1),
             hnd ? "num_kv_heads of k_features, in kv_layout 'HND'" : "num_kv_heads of k_features, in kv_layout 'NHD'");
  check_size("v", a.v, a.token_axis(), a.k.size(3),
             hnd ? "max_kv_len of k_features, in kv_layout 'HND'" : "max_kv_len of k_features, in kv_layout 'NHD'");
  check_size("v", a.v, 3, a.q.size(2), "head_dim");
  if (a.k.size(3) > kMaxKvLen) {
    fail("k_features has max_kv_len ", a.k.size(3), "; it needs to be at most ", kMaxKvLen);
  }
  check_last_dim_contiguous("q", a.q);
  check_last_dim_contiguous("k_features", a.k);
  check_last_dim_contiguous("v", a.v);
  check_options(a, a.k.size(1));
  check_score_sampling(num_draws, score_sampler);
  check_cuda_num_draws(a, num_draws);
}

struct BernoulliOutputs {
  DecodeOutputs decode;
  Tensor features_read;
};

template <typename Backend>
BernoulliOutputs decode_bernoulli(const DecodeArguments& a, int64_t num_draws, int64_t score_sampler) {
  check_decode_bernoulli(a, num_draws, score_sampler);
  const int64_t batch = a.q.size(0), num_kv_heads = a.k.size(1);
  BernoulliOutputs outputs{empty_outputs(a), empty<2>({batch, num_kv_heads}, ScalarType::Int, a.q)};
  if (batch == 0) return outputs;

  BernoulliParams p{};
  p.decode = params_beside_keys(a, outputs.decode);
  p.decode.k = a.k.const_data_ptr();
  p.decode.k_dtype = dtype_of(a.k);
  p.decode.by_features = true;
  p.decode.plan = plan_call(p.decode);  // tiles are others then
  p.decode.stride_k_batch = a.k.stride(0), p.decode.stride_k_head = a.k.stride(1);
  p.decode.stride_k_token = 1;
  p.stride_k_feature = a.k.stride(2);
  p.decode.aligned = rows_are_aligned(a.q) && rows_are_aligned(a.v);
  p.aligned_keys = rows_are_aligned(a.k);
  p.num_draws = static_cast<int>(num_draws);
  p.score_sampler = static_cast<ScoreSampler>(score_sampler);
  p.features_read = static_cast<int32_t*>(outputs.features_read.mutable_data_ptr());

  run_backend<Backend>(p, a.q, place_bernoulli_workspace);
  return outputs;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> decode_bernoulli_op(
    Tensor q, Tensor k_features, Tensor v, std::optional<Tensor> kv_lens, std::optional<Tensor> kv_starts,
    int64_t num_draws, int64_t score_sampler, int64_t num_samples, int64_t sampler, std::optional<int64_t> budget,
    int64_t kv_layout, std::optional<double> sm_scale, int64_t seed, std::optional<Tensor> row_seeds,
    std::optional<Tensor> positions, std::optional<int64_t> min_sampled_len, std::optional<Tensor> rows_read) {
  const BernoulliOutputs outputs = decode_bernoulli<Backend>({.q = q,
                                                              .k = k_features,
                                                              .v = v,
                                                              .kv_lens = kv_lens,
                                                              .kv_starts = kv_starts,
                                                              .num_samples = num_samples,
                                                              .sampler = sampler,
                                                              .budget = budget,
                                                              .kv_layout = kv_layout,
                                                              .sm_scale = sm_scale,
                                                              .seed = seed,
                                                              .row_seeds = row_seeds,
                                                              .positions = positions,
                                                              .min_sampled_len = min_sampled_len,
                                                              .k_scale = std::nullopt,
                                                              .v_scale = std::nullopt,
                                                              .rows_read = rows_read},
                                                             num_draws, score_sampler);
  return {outputs.decode.out, outputs.decode.lse, outputs.features_read};
}

// For tests: the counts of q, with the functions that the score stage draws with.
template <typename Backend>
Tensor ternary_counts_op(Tensor q, Tensor kv_lens, Tensor row_seeds, int64_t num_kv_heads, int64_t num_draws,
                         int64_t score_sampler, int64_t seed) {
  check_rank("q", q, 3, "[batch, num_qo_heads, head_dim]");
  check_query_dtype(q);
  check_head_dim(q);
  check_heads(q, "num_kv_heads", num_kv_heads);
  check_last_dim_contiguous("q", q);
  check_per_row("kv_lens", kv_lens, q, ScalarType::Int);
  check_per_row("row_seeds", row_seeds, q, ScalarType::Long);
  check_score_sampling(num_draws, score_sampler);
  const int64_t batch = q.size(0), num_qo_heads = q.size(1), head_dim = q.size(2);
  const Tensor counts = empty<3>({batch, num_qo_heads, head_dim}, ScalarType::Int, q);
  if (batch == 0) return counts;

  BernoulliParams p{};
  DecodeParams& d = p.decode;
  d.q = q.const_data_ptr();
  d.kv_lens = kv_lens.const_data_ptr<int32_t>();
  d.row_seeds = row_seeds.const_data_ptr<int64_t>();
  d.stride_q_batch = q.stride(0), d.stride_q_head = q.stride(1);
  d.dtype = d.k_dtype = d.v_dtype = dtype_of(q);
  d.batch = static_cast<int>(batch), d.num_qo_heads = static_cast<int>(num_qo_heads);
  d.num_kv_heads = static_cast<int>(num_kv_heads);
  d.group_size = static_cast<int>(num_qo_heads / num_kv_heads), d.head_dim = static_cast<int>(head_dim);
  d.q_len = 1, d.head_group = d.group_size, d.head_group_inverse = inverse_of(d.head_group), d.window_left = -1;
  d.cache_kv_len = d.max_kv_len = static_cast<int>(kMaxKvLen);
  d.seed = seed;
  p.num_draws = static_cast<int>(num_draws), p.score_sampler = static_cast<ScoreSampler>(score_sampler);

  // Only the draws' part of the workspace; no tile is scored.
  const int64_t heads = batch * num_qo_heads;
  const auto place = [&](void* base) {
    Workspace workspace(base);
    workspace.take(p.counts, heads * head_dim);
    workspace.take(p.scales, heads);
    workspace.take(p.features, batch * num_kv_heads * head_dim);
    workspace.take(p.features_read, batch * num_kv_heads);
    return workspace.used();
  };
  const Tensor workspace = empty<1>({place(nullptr)}, ScalarType::Byte, q);
  place(workspace.mutable_data_ptr());
  Backend::run_ternary(p, static_cast<int32_t*>(counts.mutable_data_ptr()), q.is_cpu() ? -1 : q.get_device_index());
  return counts;
}

// What both appends check; `name` is the argument that is written.
inline AppendParams append_params(const char* name, const Tensor& features, const Tensor& rows,
                                  const Tensor& positions) {
  check_rank("k_new", rows, 4, "[batch, n, num_kv_heads, head_dim]");
  const ScalarType dtype = features.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!half && !(features.is_cpu() && dtype == ScalarType::Float)) {
    fail(name, " is ", name_of(dtype), "; it needs to be bfloat16 or float16",
         features.is_cpu() ? " or float32" : " on CUDA");
  }
  if (rows.size(0) > kMaxBatch || rows.size(2) > kMaxBatch) {
    fail("k_new has shape ", shape_of(rows), "; batch and num_kv_heads need to be at most ", kMaxBatch);
  }
  check_dtype("k_new", rows, dtype, (std::string(", the dtype of ") + name).c_str());
  check_same_device("k_new", rows, features, name);
  check_same_device("positions", positions, features, name);
  check_size("k_new", rows, 2, features.size(1), "num_kv_heads");
  check_size("k_new", rows, 3, features.size(2), "head_dim");
  check_last_dim_contiguous(name, features);
  const bool wide = positions.scalar_type() == ScalarType::Long;
  if (!wide && positions.scalar_type() != ScalarType::Int) {
    fail("positions is ", name_of(positions.scalar_type()), "; it needs to be int32 or int64");
  }
  check_rank("positions", positions, 1, "[batch]");
  check_size("positions", positions, 0, rows.size(0), "batch");
  if (positions.size(0) > 1 && positions.stride(0) != 1) {
    fail("positions has stride ", positions.stride(0), "; it needs to be contiguous");
  }
  for (int dim = 0; dim < 4; ++dim) {
    if (rows.size(dim) > kMaxKvLen) fail("k_new has shape ", shape_of(rows), "; its sizes need to be below 2^31");
  }

  AppendParams p{};
  p.features = features.mutable_data_ptr();
  p.rows = rows.const_data_ptr();
  p.positions = positions.const_data_ptr();
  p.wide_positions = wide;
  p.element_size = dtype == ScalarType::Float ? 4 : 2;
  p.batch = static_cast<int>(rows.size(0)), p.num_rows = static_cast<int>(rows.size(1));
  p.num_kv_heads = static_cast<int>(rows.size(2)), p.head_dim = static_cast<int>(rows.size(3));
  p.stride_features_batch = features.stride(0), p.stride_features_head = features.stride(1);
  p.stride_features_feature = features.stride(2);
  p.stride_rows_batch = rows.stride(0), p.stride_rows_row = rows.stride(1);
  p.stride_rows_head = rows.stride(2), p.stride_rows_feature = rows.stride(3);
  return p;
}

template <typename Backend>
void run_append(const AppendParams& p, const Tensor& features) {
  if (p.batch == 0 || p.num_rows == 0 || p.num_kv_heads == 0 || p.head_dim == 0) return;
  Backend::run_append(p, features.is_cpu() ? -1 : features.get_device_index());
}

template <typename Backend>
void append_k_features_op(Tensor k_features, Tensor k_new, Tensor positions) {
  check_rank("k_features", k_features, 4, kFeatureShape);
  AppendParams p = append_params("k_features", k_features, k_new, positions);
  check_size("k_new", k_new, 0, k_features.size(0), "batch");
  p.max_kv_len = k_features.size(3);
  if (p.num_rows > p.max_kv_len) {
    fail("k_new has ", p.num_rows, " rows; k_features has room for ", p.max_kv_len);
  }
  run_append<Backend>(p, k_features);
}

template <typename Backend>
void append_k_features_paged_op(Tensor k_pages, Tensor k_new, Tensor positions, Tensor block_table) {
  check_rank("k_pages", k_pages, 4, "[num_pages, num_kv_heads, head_dim, page_size]");
  AppendParams p = append_params("k_pages", k_pages, k_new, positions);
  check_integers("block_table", block_table, ScalarType::Int);
  check_rank("block_table", block_table, 2, "[batch, max_pages]");
  check_size("block_table", block_table, 0, k_new.size(0), "batch");
  check_same_device("block_table", block_table, k_pages, "k_pages");
  p.block_table = block_table.const_data_ptr<int32_t>();
  p.stride_table_batch = block_table.stride(0), p.stride_table_page = block_table.stride(1);
  p.page_size = k_pages.size(3), p.num_pages = k_pages.size(0);
  if (p.page_size < 1) fail("k_pages has page_size 0; it needs to be at least 1");
  p.max_kv_len = block_table.size(1) * p.page_size;
  if (p.num_rows > p.max_kv_len) {
    fail("k_new has ", p.num_rows, " rows; block_table has room for ", p.max_kv_len);
  }
  run_append<Backend>(p, k_pages);
}

}  // namespace santa::api
