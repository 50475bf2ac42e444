// santa::decode: checks, allocation and parameters, written once for both backends.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "api/checks.h"
#include "core/softmax_state.h"
#include "params.h"
#include "workspace.h"

namespace santa::api {

constexpr int64_t kMaxNumSamples = int64_t{1} << 20;
constexpr int64_t kMaxGroupSize = 1024;  // with kMaxNumSamples: draws per stream stay below 2^31
constexpr int64_t kMaxBatch = 65535;
constexpr double kMaxScale = 1e30;  // float32, with room for log2(e)
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

// The arguments that santa::decode and santa::decode_bernoulli share, and the scales of the first. Filled by name.
struct DecodeArguments {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& kv_lens;
  const std::optional<Tensor>& kv_starts;
  int64_t num_samples;
  int64_t sampler;
  std::optional<int64_t> budget;
  int64_t kv_layout;
  std::optional<double> sm_scale;
  int64_t seed;
  const std::optional<Tensor>& row_seeds;
  const std::optional<Tensor>& positions;
  std::optional<int64_t> min_sampled_len;
  std::optional<Tensor> k_scale;
  std::optional<Tensor> v_scale;
  const std::optional<Tensor>& rows_read;

  bool hnd() const { return kv_layout == static_cast<int64_t>(KvLayout::kHND); }
  int head_axis() const { return hnd() ? 1 : 2; }
  int token_axis() const { return hnd() ? 2 : 1; }
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

// The query of one decode step has no dimension for its length; attention elsewhere in torch has.
inline void check_query_rank(const Tensor& q) {
  const char* shape = "[batch, num_qo_heads, head_dim]";
  if (q.dim() != 4) return check_rank("q", q, 3, shape);
  const int axis = q.size(2) == 1 ? 2 : q.size(1) == 1 ? 1 : 0;
  if (axis == 0) fail("q has shape ", shape_of(q), "; it needs 3 dimensions, ", shape, ": a decode step has one query");
  fail("q has shape ", shape_of(q), "; it needs 3 dimensions, ", shape, ": pass q.squeeze(", axis, ")");
}

inline void check_query_dtype(const Tensor& q) {
  const ScalarType dtype = q.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!half && !(q.is_cpu() && dtype == ScalarType::Float)) {
    fail("q is ", name_of(dtype), "; it needs to be bfloat16 or float16", q.is_cpu() ? " or float32" : " on CUDA");
  }
}

inline void check_head_dim(const Tensor& q) {
  const int64_t head_dim = q.size(2);
  if (head_dim != 64 && head_dim != 96 && head_dim != 128 && head_dim != 192 && head_dim != 256) {
    fail("q has head_dim ", head_dim,
         "; it needs to be one of 64, 96, 128, 192, 256 (santa.decode pads narrower ones)");
  }
}

inline bool heads_fit(int64_t num_qo_heads, int64_t num_kv_heads) {
  return num_kv_heads >= 1 && num_qo_heads % num_kv_heads == 0 && num_qo_heads / num_kv_heads <= kMaxGroupSize;
}

// The batch and heads of q against the KV heads of `name`; `where` says where the latter were looked for.
inline void check_heads(const Tensor& q, const char* name, int64_t num_kv_heads, const std::string& where = "") {
  const int64_t batch = q.size(0), num_qo_heads = q.size(1);
  if (batch > kMaxBatch) fail("q has batch ", batch, "; it needs to be at most ", kMaxBatch);
  if (num_qo_heads < 1) fail("q has shape ", shape_of(q), "; it needs at least one head");
  if (!heads_fit(num_qo_heads, num_kv_heads)) {
    fail(name, " has ", num_kv_heads, " KV heads; num_qo_heads (", num_qo_heads,
         ") needs to be a multiple of it, at most ", kMaxGroupSize, " times", where);
  }
}

// Where kv_layout has the heads of k, and whether they fit in the other layout, which a caller may have meant.
inline std::string where_heads_are(const DecodeArguments& a) {
  const char* layout = a.hnd() ? "HND" : "NHD";
  const char* other = a.hnd() ? "NHD" : "HND";
  std::string text = "; k has shape " + shape_of(a.k) + ", and kv_layout '" + layout + "' has its heads in dimension " +
                     std::to_string(a.head_axis());
  if (heads_fit(a.q.size(1), a.k.size(a.token_axis()))) {
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
}

inline void check_decode(const DecodeArguments& a) {
  check_range("kv_layout", a.kv_layout, 0, 1);
  const char* kv_shape = a.hnd() ? "[batch, num_kv_heads, max_kv_len, head_dim] (HND)"
                                 : "[batch, max_kv_len, num_kv_heads, head_dim] (NHD)";
  check_query_rank(a.q);
  check_rank("k", a.k, 4, kv_shape);
  check_rank("v", a.v, 4, kv_shape);

  check_query_dtype(a.q);
  check_cache_dtypes(a.q, a.k, a.v);
  check_same_device("k", a.k, a.q);
  check_same_device("v", a.v, a.q);

  check_head_dim(a.q);
  check_size("k", a.k, 0, a.q.size(0), "batch");
  check_size("k", a.k, 3, a.q.size(2), "head_dim");
  for (int dim = 0; dim < 4; ++dim) check_size("v", a.v, dim, a.k.size(dim), "as in k");
  const int64_t num_kv_heads = a.k.size(a.head_axis());
  check_heads(a.q, "k", num_kv_heads, where_heads_are(a));
  if (a.k.size(a.token_axis()) > kMaxKvLen) {
    fail("k has max_kv_len ", a.k.size(a.token_axis()), "; it needs to be at most ", kMaxKvLen);
  }
  check_last_dim_contiguous("q", a.q);
  check_last_dim_contiguous("k", a.k);
  check_last_dim_contiguous("v", a.v);
  check_options(a, num_kv_heads);
  if (a.k_scale) check_scale("k_scale", *a.k_scale, "k", a.k, a.q, num_kv_heads);
  if (a.v_scale) check_scale("v_scale", *a.v_scale, "v", a.v, a.q, num_kv_heads);
}

// Of a dtype that the checks let through.
inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Float8_e4m3fn:
      return Dtype::kFloat8E4M3;
    default:
      return Dtype::kFloat32;
  }
}

struct DecodeOutputs {
  Tensor out;
  Tensor lse;
};

// Whether every row of a tensor, its last dimension, starts on a 16-byte boundary. Strides of dimensions of size 1 are
// arbitrary and never used.
inline bool rows_are_aligned(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0) return false;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    const int64_t bytes = tensor.stride(dim) * static_cast<int64_t>(tensor.element_size());
    if (tensor.size(dim) > 1 && bytes % 16 != 0) return false;
  }
  return true;
}

inline DecodeOutputs empty_outputs(const DecodeArguments& a) {
  const int64_t batch = a.q.size(0), num_qo_heads = a.q.size(1);
  return {empty<3>({batch, num_qo_heads, a.q.size(2)}, a.q.scalar_type(), a.q),
          empty<2>({batch, num_qo_heads}, ScalarType::Float, a.q)};
}

// All but the keys and what depends on them: k, its strides, scales and alignment.
inline DecodeParams params_beside_keys(const DecodeArguments& a, const DecodeOutputs& outputs) {
  const int64_t num_qo_heads = a.q.size(1), head_dim = a.q.size(2);
  const int64_t num_kv_heads = a.v.size(a.head_axis()), group_size = num_qo_heads / num_kv_heads;

  DecodeParams p{};
  p.q = a.q.const_data_ptr();
  p.v = a.v.const_data_ptr();
  p.kv_lens = a.kv_lens ? a.kv_lens->const_data_ptr<int32_t>() : nullptr;
  p.kv_starts = a.kv_starts ? a.kv_starts->const_data_ptr<int32_t>() : nullptr;
  p.row_seeds = a.row_seeds ? a.row_seeds->const_data_ptr<int64_t>() : nullptr;
  p.positions = a.positions ? a.positions->const_data_ptr<int32_t>() : nullptr;
  p.v_scale = a.v_scale ? a.v_scale->const_data_ptr<float>() : nullptr;
  p.stride_v_scale = a.v_scale && a.v_scale->numel() > 1 ? 1 : 0;
  p.out = outputs.out.mutable_data_ptr();
  p.lse = static_cast<float*>(outputs.lse.mutable_data_ptr());
  p.rows_read = a.rows_read ? static_cast<int32_t*>(a.rows_read->mutable_data_ptr()) : nullptr;

  p.stride_q_batch = a.q.stride(0), p.stride_q_head = a.q.stride(1);
  p.stride_v_batch = a.v.stride(0), p.stride_v_token = a.v.stride(a.token_axis());
  p.stride_v_head = a.v.stride(a.head_axis());

  p.dtype = dtype_of(a.q), p.v_dtype = dtype_of(a.v);
  p.batch = static_cast<int>(a.q.size(0));
  p.num_qo_heads = static_cast<int>(num_qo_heads);
  p.num_kv_heads = static_cast<int>(num_kv_heads);
  p.gqa_group_size = static_cast<int>(group_size);
  p.head_dim = static_cast<int>(head_dim);
  p.max_kv_len = static_cast<int>(a.v.size(a.token_axis()));

  const double sm_scale = a.sm_scale ? *a.sm_scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
  p.scale_log2 = static_cast<float>(sm_scale * static_cast<double>(kLog2E));
  p.sampler = static_cast<Sampler>(a.sampler);
  p.budget = budget_of(a);
  p.num_samples = static_cast<int>(a.num_samples);
  p.min_sampled_len = a.min_sampled_len ? *a.min_sampled_len : default_min_sampled_len(a.num_samples, group_size);
  p.seed = a.seed;

  // Known on the host: no row can be long enough to be sampled.
  if (p.min_sampled_len > p.max_kv_len) p.num_samples = 0;
  p.plan = plan_call(p);
  return p;
}

// The one protocol of all backends: `Backend::plan(params, device_index)` settles what depends on the device, then the
// workspace is placed (`place(params, base)` returns its size, and with a base fills in the addresses), then
// `Backend::run(params, device_index)` does the work.
template <typename Backend, typename Params, typename Place>
void run_backend(Params& p, const Tensor& like, const Place& place) {
  const int device_index = like.is_cpu() ? -1 : like.get_device_index();
  Backend::plan(p, device_index);
  const Tensor workspace = empty<1>({place(p, nullptr)}, ScalarType::Byte, like);
  place(p, workspace.mutable_data_ptr());
  Backend::run(p, device_index);
}

template <typename Backend>
DecodeOutputs decode(const DecodeArguments& a) {
  check_decode(a);
  DecodeOutputs outputs = empty_outputs(a);
  if (a.q.size(0) == 0) return outputs;

  DecodeParams p = params_beside_keys(a, outputs);
  p.k = a.k.const_data_ptr();
  p.k_dtype = dtype_of(a.k);
  p.k_scale = a.k_scale ? a.k_scale->const_data_ptr<float>() : nullptr;
  p.stride_k_scale = a.k_scale && a.k_scale->numel() > 1 ? 1 : 0;
  p.stride_k_batch = a.k.stride(0), p.stride_k_token = a.k.stride(a.token_axis());
  p.stride_k_head = a.k.stride(a.head_axis());
  p.aligned = rows_are_aligned(a.q) && rows_are_aligned(a.k) && rows_are_aligned(a.v);
  run_backend<Backend>(p, a.q, place_workspace);
  return outputs;
}

template <typename Backend>
std::tuple<Tensor, Tensor> decode_op(Tensor q, Tensor k, Tensor v, std::optional<Tensor> kv_lens,
                                     std::optional<Tensor> kv_starts, int64_t num_samples, int64_t sampler,
                                     std::optional<int64_t> budget, int64_t kv_layout, std::optional<double> sm_scale,
                                     int64_t seed, std::optional<Tensor> row_seeds, std::optional<Tensor> positions,
                                     std::optional<int64_t> min_sampled_len, std::optional<Tensor> k_scale,
                                     std::optional<Tensor> v_scale, std::optional<Tensor> rows_read) {
  const DecodeOutputs outputs = decode<Backend>({.q = q,
                                                 .k = k,
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
                                                 .k_scale = k_scale,
                                                 .v_scale = v_scale,
                                                 .rows_read = rows_read});
  return {outputs.out, outputs.lse};
}

}  // namespace santa::api
