// What the decode operators are called with, and what is checked of it before anything is allocated.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "api/checks.h"
#include "params.h"

namespace santa::api {

constexpr int64_t kMaxNumSamples = int64_t{1} << 20;
constexpr int64_t kMaxGroupSize = 1024;  // with kMaxNumSamples: draws per stream stay below 2^31
constexpr int64_t kMaxQueryLen = 8;
constexpr int64_t kMaxPageSize = 256;
constexpr int64_t kMaxBatch = 65535;
constexpr double kMaxScale = 1e30;     // float32, with room for log2(e)
constexpr double kMinSoftCap = 1e-30;  // its inverse is a float32
constexpr int64_t kMaxKvLen = 2147483647;

template <std::size_t RANK>
Tensor empty(const std::array<int64_t, RANK>& sizes, ScalarType dtype, const Tensor& like) {
  std::array<int64_t, RANK> strides;
  int64_t stride = 1;
  for (std::size_t i = RANK; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto stable_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(RANK, sizes.data(), strides.data(), stable_dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// What the decode operators are called with. Filled by name; what an operator does not have stays as it is here.
struct DecodeArguments {
  Tensor q, k, v;
  // decode_paged alone, whose k and v are pages.
  bool paged = false;
  std::optional<Tensor> page_table = {};
  std::optional<Tensor> kv_lens;
  std::optional<Tensor> kv_indptr = {};
  std::optional<Tensor> kv_indices = {};
  std::optional<Tensor> kv_last_page_len = {};
  std::optional<int64_t> max_kv_len = {};

  std::optional<Tensor> kv_starts;
  int64_t num_samples;
  int64_t sampler;
  std::optional<int64_t> budget;
  int64_t kv_layout;
  std::optional<double> sm_scale;
  int64_t seed;
  std::optional<Tensor> row_seeds;
  std::optional<Tensor> positions;
  std::optional<int64_t> min_sampled_len;
  std::optional<Tensor> k_scale = {};
  std::optional<Tensor> v_scale = {};
  std::optional<Tensor> rows_read;
  int64_t window_left = -1;
  double logits_soft_cap = 0.0;
  std::optional<Tensor> sinks = {};
  int64_t first_kv_head = 0;
  std::optional<Tensor> whole_lens = {};
  std::optional<Tensor> shard_starts = {};
  std::optional<Tensor> levels = {};

  bool hnd() const { return kv_layout == static_cast<int64_t>(KvLayout::kHND); }
  int head_axis() const { return hnd() ? 1 : 2; }
  int token_axis() const { return hnd() ? 2 : 1; }
  const char* k_name() const { return paged ? "k_cache" : "k"; }
  const char* v_name() const { return paged ? "v_cache" : "v"; }

  // Of a q that was checked: [batch, num_qo_heads, head_dim], or [batch, q_len, num_qo_heads, head_dim].
  int64_t q_len() const { return q.dim() == 4 ? q.size(1) : 1; }
  int64_t num_qo_heads() const { return q.size(q.dim() - 2); }
  int64_t head_dim() const { return q.size(q.dim() - 1); }
};

inline const char* name_of(Sampler sampler) {
  switch (sampler) {
    case Sampler::kMultinomial:
      return "multinomial";
    case Sampler::kStratified:
      return "stratified";
    case Sampler::kSystematic:
      return "systematic";
    default:
      return "grouped";
  }
}

// Whether draws can be made tile by tile. The thresholds of the other two samplers are spread over the row's whole CDF.
inline bool can_draw_in_one_pass(Sampler sampler) {
  return sampler == Sampler::kSystematic || sampler == Sampler::kGrouped;
}

// Of arguments that were checked.
inline Budget budget_of(const DecodeArguments& a) {
  if (a.budget) return static_cast<Budget>(*a.budget);
  return can_draw_in_one_pass(static_cast<Sampler>(a.sampler)) ? Budget::kStreaming : Budget::kProportional;
}

// One new token has no dimension for their number; attention elsewhere in torch has, in another place.
inline void check_query_rank(const Tensor& q, bool several_tokens) {
  const char* shape = "[batch, num_qo_heads, head_dim]";
  if (q.dim() != 4) {
    if (q.dim() == 3) return;
    const char* both = " dimensions, [batch, num_qo_heads, head_dim], or 4, [batch, q_len, num_qo_heads, head_dim]";
    if (several_tokens) fail("q has shape ", shape_of(q), "; it needs 3", both);
    return check_rank("q", q, 3, shape);
  }
  const int64_t q_len = q.size(1);
  if (several_tokens && q_len >= 1 && q_len <= kMaxQueryLen) return;
  const int axis = q.size(2) == 1 ? 2 : q_len == 1 ? 1 : 0;
  const std::string cure = axis == 0 ? "" : ": pass q.squeeze(" + std::to_string(axis) + ")";
  if (several_tokens) {
    fail("q has shape ", shape_of(q), "; dimension 1 (q_len) is ", q_len, " and needs to be in [1, ", kMaxQueryLen, "]",
         cure);
  }
  fail("q has shape ", shape_of(q), "; it needs 3 dimensions, ", shape,
       cure.empty() ? ": a decode step has one query" : cure);
}

inline void check_query_dtype(const Tensor& q) {
  const ScalarType dtype = q.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!half && !(q.is_cpu() && dtype == ScalarType::Float)) {
    fail("q is ", name_of(dtype), "; it needs to be bfloat16 or float16", q.is_cpu() ? " or float32" : " on CUDA");
  }
}

// `more`: of the message.
inline void check_head_dim(const char* name, int64_t head_dim, const char* more) {
  if (head_dim != 64 && head_dim != 96 && head_dim != 128 && head_dim != 192 && head_dim != 256) {
    fail(name, " has head_dim ", head_dim, "; it needs to be one of 64, 96, 128, 192, 256", more);
  }
}
inline void check_head_dim(const Tensor& q) {
  check_head_dim("q", q.size(q.dim() - 1), " (santa.decode pads narrower ones)");
}

inline bool heads_fit(int64_t num_qo_heads, int64_t num_kv_heads) {
  return num_kv_heads >= 1 && num_qo_heads % num_kv_heads == 0 && num_qo_heads / num_kv_heads <= kMaxGroupSize;
}

// The batch and heads of q against the KV heads of `name`; `where` says where the latter were looked for.
template <typename Where>
void check_heads(const Tensor& q, const char* name, int64_t num_kv_heads, const Where& where) {
  const int64_t batch = q.size(0), num_qo_heads = q.size(q.dim() - 2), q_len = q.dim() == 4 ? q.size(1) : 1;
  if (batch > kMaxBatch) fail("q has batch ", batch, "; it needs to be at most ", kMaxBatch);
  if (num_qo_heads < 1) fail("q has shape ", shape_of(q), "; it needs at least one head");
  if (!heads_fit(num_qo_heads, num_kv_heads)) {
    fail(name, " has ", num_kv_heads, " KV heads; num_qo_heads (", num_qo_heads,
         ") needs to be a multiple of it, at most ", kMaxGroupSize, " times", where(),
         q.dim() == 4 && num_qo_heads == 1 ? "; q's dimension 1 has its tokens: pass q.squeeze(2) if it has the heads"
                                           : "");
  }
  if (q_len * (num_qo_heads / num_kv_heads) > kMaxGroupSize) {
    fail("q has ", q_len, " tokens of ", num_qo_heads / num_kv_heads,
         " heads per KV head; their product needs to be at most ", kMaxGroupSize);
  }
}

inline void check_heads(const Tensor& q, const char* name, int64_t num_kv_heads) {
  check_heads(q, name, num_kv_heads, [] { return std::string(); });
}

// Where kv_layout has the heads of k, and whether they fit in the other layout, which a caller may have meant.
inline std::string where_heads_are(const DecodeArguments& a) {
  const char* layout = a.hnd() ? "HND" : "NHD";
  const char* other = a.hnd() ? "NHD" : "HND";
  std::string text = std::string("; ") + a.k_name() + " has shape " + shape_of(a.k) + ", and kv_layout '" + layout +
                     "' has its heads in dimension " + std::to_string(a.head_axis());
  if (heads_fit(a.num_qo_heads(), a.k.size(a.token_axis()))) {
    text += std::string(": pass kv_layout='") + other + "' if they are in dimension " + std::to_string(a.token_axis());
  }
  return text;
}

inline void check_budget(const DecodeArguments& a) {
  check_range("sampler", a.sampler, 0, 3);
  if (!a.budget) return;
  check_range("budget", *a.budget, 0, 2);
  const auto sampler = static_cast<Sampler>(a.sampler);
  const auto budget = static_cast<Budget>(*a.budget);
  if (budget != Budget::kProportional && !can_draw_in_one_pass(sampler)) {
    fail("budget is ", budget == Budget::kUniform ? "'uniform'" : "'streaming'", " while sampler is '",
         name_of(sampler), "', which needs budget='proportional'");
  }
}

// What is said of rows, samples and scores beside the cache.
inline void check_options(const DecodeArguments& a, int64_t num_kv_heads) {
  if (a.kv_lens) check_per_row("kv_lens", *a.kv_lens, a.q, ScalarType::Int);
  if (a.kv_starts) check_per_row("kv_starts", *a.kv_starts, a.q, ScalarType::Int);
  if (a.row_seeds) check_per_row("row_seeds", *a.row_seeds, a.q, ScalarType::Long);
  if (a.positions) check_per_row("positions", *a.positions, a.q, ScalarType::Int);
  if (a.rows_read) check_rows_read(*a.rows_read, a.q, num_kv_heads);
  check_range("num_samples", a.num_samples, 0, kMaxNumSamples);
  check_budget(a);
  if (a.sm_scale && !(std::abs(*a.sm_scale) <= kMaxScale)) {
    fail("sm_scale is ", *a.sm_scale, "; it needs to be finite and at most ", kMaxScale, " in magnitude");
  }
  if (a.min_sampled_len && *a.min_sampled_len < 0) {
    fail("min_sampled_len is ", *a.min_sampled_len, "; it needs to be at least 0");
  }
  check_range("window_left", a.window_left, -1, kMaxKvLen);
  if (a.logits_soft_cap != 0.0 && !(a.logits_soft_cap >= kMinSoftCap && a.logits_soft_cap <= kMaxScale)) {
    fail("logits_soft_cap is ", a.logits_soft_cap, "; it needs to be in [", kMinSoftCap, ", ", kMaxScale,
         "], or 0 for none");
  }
  if (a.sinks) {
    check_dtype("sinks", *a.sinks, ScalarType::Float, "");
    check_rank("sinks", *a.sinks, 1, "[num_qo_heads]");
    check_size("sinks", *a.sinks, 0, a.num_qo_heads(), "num_qo_heads");
    check_same_device("sinks", *a.sinks, a.q);
    check_contiguous("sinks", *a.sinks);
  }
  check_range("first_kv_head", a.first_kv_head, 0, kMaxKvLen / kMaxGroupSize - num_kv_heads);
}

// A float32 tensor of one number for each query vector.
inline void check_per_query(const char* name, const Tensor& tensor, const Tensor& q) {
  check_dtype(name, tensor, ScalarType::Float, "");
  check_rank(name, tensor, q.dim() - 1, q.dim() == 4 ? "[batch, q_len, num_qo_heads]" : "[batch, num_qo_heads]");
  for (int64_t dim = 0; dim + 1 < q.dim(); ++dim) check_size(name, tensor, dim, q.size(dim), "as in q");
  check_same_device(name, tensor, q);
  check_contiguous(name, tensor);
}

// Rows that are parts of longer ones.
inline void check_shards(const DecodeArguments& a) {
  if (a.levels) check_per_query("levels", *a.levels, a.q);
  if (a.whole_lens) check_per_row("whole_lens", *a.whole_lens, a.q, ScalarType::Int);
  if (a.shard_starts) check_per_row("shard_starts", *a.shard_starts, a.q, ScalarType::Int);
  if (a.whole_lens.has_value() != a.shard_starts.has_value()) {
    fail(a.whole_lens ? "whole_lens is given without shard_starts" : "shard_starts is given without whole_lens",
         "; they need each other");
  }
  if (!a.whole_lens) return;
  if (a.window_left >= 0) fail("window_left is ", a.window_left, " while whole_lens is given; it needs to be -1 then");
  if (a.num_samples == 0) return;
  const Budget budget = budget_of(a);
  if (budget == Budget::kProportional) {
    fail("whole_lens is given with budget='proportional'; it needs budget='streaming' or 'uniform'");
  }
  if (budget == Budget::kStreaming && !a.levels) {
    fail("whole_lens is given without levels, which budget='streaming' needs to be the same for all shards");
  }
}

// The pilot's estimates, which only one budget asks for.
inline void check_levels(const DecodeArguments& a) {
  if (!a.levels || a.num_samples == 0) return;
  const Budget budget = budget_of(a);
  if (budget != Budget::kStreaming) {
    fail("levels is given with budget='", budget == Budget::kUniform ? "uniform" : "proportional",
         "', which has no use for them; it needs budget='streaming'");
  }
}

// How rows find their pages.
inline void check_pages(const DecodeArguments& a) {
  const int64_t page_size = a.k.size(a.token_axis());
  if (page_size < 1 || page_size > kMaxPageSize || (page_size & (page_size - 1)) != 0) {
    fail("k_cache has page_size ", page_size, " (shape ", shape_of(a.k), ", kv_layout '", a.hnd() ? "HND" : "NHD",
         "'); it needs to be a power of two from 1 to ", kMaxPageSize);
  }
  const bool any_list = a.kv_indptr || a.kv_indices || a.kv_last_page_len;
  if (a.page_table.has_value() == any_list) {
    fail(any_list ? "page_table is given beside kv_indptr, kv_indices or kv_last_page_len"
                  : "page_table is None, and so are kv_indptr, kv_indices and kv_last_page_len",
         "; one of the two is needed: page_table with kv_lens, or those three");
  }
  if (a.max_kv_len) check_range("max_kv_len", *a.max_kv_len, 0, kMaxKvLen);
  if (!any_list) {
    check_integers("page_table", *a.page_table, ScalarType::Int);
    check_rank("page_table", *a.page_table, 2, "[batch, max_pages]");
    check_size("page_table", *a.page_table, 0, a.q.size(0), "batch");
    check_same_device("page_table", *a.page_table, a.q);
    check_last_dim_contiguous("page_table", *a.page_table);
    if (!a.kv_lens) fail("kv_lens is None; page_table needs it");
    return;
  }
  const auto check_list = [&](const char* name, const std::optional<Tensor>& list, const char* shape) {
    if (!list) fail(name, " is None; kv_indptr, kv_indices and kv_last_page_len need each other");
    check_integers(name, *list, ScalarType::Int);
    check_rank(name, *list, 1, shape);
    check_same_device(name, *list, a.q);
    check_contiguous(name, *list);
  };
  check_list("kv_indptr", a.kv_indptr, "[batch + 1]");
  check_size("kv_indptr", *a.kv_indptr, 0, a.q.size(0) + 1, "batch + 1");
  check_list("kv_indices", a.kv_indices, "[number of pages of all rows]");
  if (a.kv_indices->size(0) > kMaxKvLen) {
    fail("kv_indices has ", a.kv_indices->size(0), " entries; it needs to have at most ", kMaxKvLen);
  }
  check_list("kv_last_page_len", a.kv_last_page_len, "[batch]");
  check_size("kv_last_page_len", *a.kv_last_page_len, 0, a.q.size(0), "batch");
  if (a.kv_lens) fail("kv_lens is given beside kv_indptr, which says what it would: pass None");
  if (a.kv_starts) fail("kv_starts is given beside kv_indptr, which lists the pages of a row's keys: pass None");
}

inline void check_decode(const DecodeArguments& a) {
  check_range("kv_layout", a.kv_layout, 0, 1);
  const char* kv_shape = a.paged ? (a.hnd() ? "[num_pages, num_kv_heads, page_size, head_dim] (HND)"
                                            : "[num_pages, page_size, num_kv_heads, head_dim] (NHD)")
                                 : (a.hnd() ? "[batch, num_kv_heads, max_kv_len, head_dim] (HND)"
                                            : "[batch, max_kv_len, num_kv_heads, head_dim] (NHD)");
  const char *k_name = a.k_name(), *v_name = a.v_name();
  check_query_rank(a.q, /*several_tokens=*/true);
  check_rank(k_name, a.k, 4, kv_shape);
  check_rank(v_name, a.v, 4, kv_shape);

  check_query_dtype(a.q);
  check_cache_dtypes(a.q, k_name, a.k, v_name, a.v);
  check_same_device(k_name, a.k, a.q);
  check_same_device(v_name, a.v, a.q);

  check_head_dim(a.q);
  if (!a.paged) check_size("k", a.k, 0, a.q.size(0), "batch");
  check_size(k_name, a.k, 3, a.head_dim(), "head_dim");
  for (int dim = 0; dim < 4; ++dim) check_size(v_name, a.v, dim, a.k.size(dim), a.paged ? "as in k_cache" : "as in k");
  const int64_t num_kv_heads = a.k.size(a.head_axis());
  check_heads(a.q, k_name, num_kv_heads, [&] { return where_heads_are(a); });
  if (!a.paged && a.k.size(a.token_axis()) > kMaxKvLen) {
    fail("k has max_kv_len ", a.k.size(a.token_axis()), "; it needs to be at most ", kMaxKvLen);
  }
  if (a.paged && a.k.size(0) > kMaxKvLen) {
    fail("k_cache has ", a.k.size(0), " pages; it needs to have at most ", kMaxKvLen);
  }
  check_last_dim_contiguous("q", a.q);
  check_last_dim_contiguous(k_name, a.k);
  check_last_dim_contiguous(v_name, a.v);
  if (a.paged) check_pages(a);
  check_options(a, num_kv_heads);
  check_shards(a);
  check_levels(a);
  if (a.k_scale) check_scale("k_scale", *a.k_scale, k_name, a.k, a.q, num_kv_heads);
  if (a.v_scale) check_scale("v_scale", *a.v_scale, v_name, a.v, a.q, num_kv_heads);
}

}  // namespace santa::api
