// santa::decode and santa::decode_paged, and those that write into given tensors: allocation, parameters and the boxed
// kernels, written once for both backends.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "api/decode_checks.h"
#include "core/softmax_state.h"
#include "params.h"
#include "workspace.h"

namespace santa::api {

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
  const int64_t batch = a.q.size(0), heads = a.num_qo_heads(), head_dim = a.head_dim();
  const ScalarType dtype = a.q.scalar_type(), real = ScalarType::Float;
  if (a.q.dim() == 3) return {empty<3>({batch, heads, head_dim}, dtype, a.q), empty<2>({batch, heads}, real, a.q)};
  return {empty<4>({batch, a.q_len(), heads, head_dim}, dtype, a.q), empty<3>({batch, a.q_len(), heads}, real, a.q)};
}

// Outputs that the caller has made.
inline void check_outputs(const DecodeArguments& a, const DecodeOutputs& outputs) {
  check_dtype("out", outputs.out, a.q.scalar_type(), ", q's dtype");
  check_rank("out", outputs.out, a.q.dim(),
             a.q.dim() == 4 ? "[batch, q_len, num_qo_heads, head_dim]" : "[batch, num_qo_heads, head_dim]");
  for (int64_t dim = 0; dim < a.q.dim(); ++dim) check_size("out", outputs.out, dim, a.q.size(dim), "as in q");
  check_same_device("out", outputs.out, a.q);
  check_contiguous("out", outputs.out);
  if (outputs.out.is_cuda() && reinterpret_cast<uintptr_t>(outputs.out.const_data_ptr()) % 16 != 0) {
    fail("out starts at an address that is no multiple of 16 bytes, which it needs to be on CUDA");
  }
  check_per_query("lse", outputs.lse, a.q);
}

// Keys that a row of the cache can have.
inline int64_t cache_kv_len_of(const DecodeArguments& a) {
  const int64_t tokens = a.v.size(a.token_axis());
  if (!a.paged) return tokens;
  const int64_t pages = a.page_table ? a.page_table->size(1) : a.kv_indices->size(0);
  const int64_t bound = pages > kMaxKvLen / tokens ? kMaxKvLen : pages * tokens;
  return a.max_kv_len && *a.max_kv_len < bound ? *a.max_kv_len : bound;
}

// All but the keys and what depends on them: k, its strides, scales and alignment.
inline DecodeParams params_beside_keys(const DecodeArguments& a, const DecodeOutputs& outputs) {
  const int64_t num_qo_heads = a.num_qo_heads(), head_dim = a.head_dim(), q_len = a.q_len();
  const int64_t num_kv_heads = a.v.size(a.head_axis()), head_group = num_qo_heads / num_kv_heads;
  const auto int32s = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr<int32_t>() : nullptr;
  };

  DecodeParams p{};
  p.q = a.q.const_data_ptr();
  p.v = a.v.const_data_ptr();
  p.kv_lens = int32s(a.kv_lens), p.kv_starts = int32s(a.kv_starts);
  p.row_seeds = a.row_seeds ? a.row_seeds->const_data_ptr<int64_t>() : nullptr;
  p.positions = int32s(a.positions);
  p.whole_lens = int32s(a.whole_lens), p.shard_starts = int32s(a.shard_starts);
  p.has_shards = a.whole_lens.has_value(), p.has_sinks = a.sinks.has_value();
  p.sinks = a.sinks ? a.sinks->const_data_ptr<float>() : nullptr;
  p.v_scale = a.v_scale ? a.v_scale->const_data_ptr<float>() : nullptr;
  p.stride_v_scale = a.v_scale && a.v_scale->numel() > 1 ? 1 : 0;
  p.out = outputs.out.mutable_data_ptr();
  p.lse = static_cast<float*>(outputs.lse.mutable_data_ptr());
  p.rows_read = a.rows_read ? static_cast<int32_t*>(a.rows_read->mutable_data_ptr()) : nullptr;

  p.stride_q_batch = a.q.stride(0), p.stride_q_token = a.q.stride(1), p.stride_q_head = a.q.stride(a.q.dim() - 2);
  p.stride_v_batch = a.v.stride(0), p.stride_v_token = a.v.stride(a.token_axis());
  p.stride_v_head = a.v.stride(a.head_axis());

  if (a.paged) {
    p.page_table = (a.page_table ? *a.page_table : *a.kv_indices).const_data_ptr<int32_t>();
    p.paged = true, p.has_lists = a.kv_indptr.has_value();
    p.num_indices = a.kv_indices ? static_cast<uint32_t>(a.kv_indices->size(0)) : 0;
    p.stride_page_table = a.page_table ? a.page_table->stride(0) : 0;
    p.kv_indptr = int32s(a.kv_indptr), p.kv_last_page_lens = int32s(a.kv_last_page_len);
    p.num_pages = a.v.size(0);
    for (int64_t size = a.v.size(a.token_axis()); size > 1; size /= 2) ++p.page_shift;
  }

  p.dtype = dtype_of(a.q), p.v_dtype = dtype_of(a.v);
  p.batch = static_cast<int>(a.q.size(0));
  p.num_qo_heads = static_cast<int>(num_qo_heads);
  p.num_kv_heads = static_cast<int>(num_kv_heads);
  p.first_kv_head = static_cast<int>(a.first_kv_head);
  p.q_len = static_cast<int>(q_len);
  p.head_group = static_cast<int>(head_group);
  p.head_group_inverse = inverse_of(p.head_group);
  p.group_size = static_cast<int>(q_len * head_group);
  p.head_dim = static_cast<int>(head_dim);
  const int64_t cache_kv_len = cache_kv_len_of(a);
  p.cache_kv_len = static_cast<int>(cache_kv_len);
  p.window_left = static_cast<int>(a.window_left);
  p.max_kv_len = static_cast<int>(a.window_left < 0 ? cache_kv_len : std::min(cache_kv_len, a.window_left + q_len));

  const double sm_scale = a.sm_scale ? *a.sm_scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
  p.scale_log2 = static_cast<float>(sm_scale * static_cast<double>(kLog2E));
  p.soft_cap = static_cast<float>(a.logits_soft_cap * static_cast<double>(kLog2E));
  p.soft_cap_inverse = a.logits_soft_cap > 0.0 ? 1.0f / p.soft_cap : 0.0f;
  p.sampler = static_cast<Sampler>(a.sampler);
  p.budget = budget_of(a);
  p.num_samples = static_cast<int>(a.num_samples);
  p.min_sampled_len = a.min_sampled_len ? *a.min_sampled_len : default_min_sampled_len(a.num_samples, p.group_size);
  p.seed = a.seed;

  // Known on the host: no row can be long enough to be sampled. (A part of one may be short.)
  if (p.min_sampled_len > p.max_kv_len && p.whole_lens == nullptr) p.num_samples = 0;
  p.has_levels = a.levels && p.num_samples > 0 && p.budget == Budget::kStreaming;
  p.level_scale = p.has_levels ? kLog2E : 1.0f;
  if (p.has_levels) p.level = const_cast<float*>(a.levels->const_data_ptr<float>());
  p.plan = plan_call(p);
  return p;
}

// With keys that are rows, as values are.
inline DecodeParams decode_params(const DecodeArguments& a, const DecodeOutputs& outputs) {
  DecodeParams p = params_beside_keys(a, outputs);
  p.k = a.k.const_data_ptr();
  p.k_dtype = dtype_of(a.k);
  p.k_scale = a.k_scale ? a.k_scale->const_data_ptr<float>() : nullptr;
  p.stride_k_scale = a.k_scale && a.k_scale->numel() > 1 ? 1 : 0;
  p.stride_k_batch = a.k.stride(0), p.stride_k_token = a.k.stride(a.token_axis());
  p.stride_k_head = a.k.stride(a.head_axis());
  p.aligned = rows_are_aligned(a.q) && rows_are_aligned(a.k) && rows_are_aligned(a.v);
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

// With outputs given, it is into those that it writes.
template <typename Backend>
DecodeOutputs decode(const DecodeArguments& a, const DecodeOutputs* given) {
  check_decode(a);
  if (given != nullptr) check_outputs(a, *given);
  const DecodeOutputs outputs = given != nullptr ? *given : empty_outputs(a);
  if (a.q.size(0) == 0) return outputs;

  DecodeParams p = decode_params(a, outputs);
  run_backend<Backend>(p, a.q, place_workspace);
  return outputs;
}

// Arguments on their way from an operator, in the order of its schema (ops.cpp).
class ArgumentStack {
 public:
  explicit ArgumentStack(StableIValue* first) : next_(first) {}

  template <typename T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }
  std::optional<Tensor> tensor() { return next<std::optional<Tensor>>(); }
  std::optional<int64_t> integer() { return next<std::optional<int64_t>>(); }

 private:
  StableIValue* next_;
};

// All schemas have these in common; members are initialised in their order. take_more(): called behind q, k and v.
template <typename TakeMore>
DecodeArguments next_decode_arguments(ArgumentStack& stack, bool paged, const TakeMore& take_more) {
  return {.q = stack.next<Tensor>(),
          .k = stack.next<Tensor>(),
          .v = stack.next<Tensor>(),
          .paged = (take_more(), paged),
          .page_table = paged ? stack.tensor() : std::nullopt,
          .kv_lens = stack.tensor(),
          .kv_indptr = paged ? stack.tensor() : std::nullopt,
          .kv_indices = paged ? stack.tensor() : std::nullopt,
          .kv_last_page_len = paged ? stack.tensor() : std::nullopt,
          .max_kv_len = paged ? stack.integer() : std::nullopt,
          .kv_starts = stack.tensor(),
          .num_samples = stack.next<int64_t>(),
          .sampler = stack.next<int64_t>(),
          .budget = stack.integer(),
          .kv_layout = stack.next<int64_t>(),
          .sm_scale = stack.next<std::optional<double>>(),
          .seed = stack.next<int64_t>(),
          .row_seeds = stack.tensor(),
          .positions = stack.tensor(),
          .min_sampled_len = stack.integer(),
          .k_scale = stack.tensor(),
          .v_scale = stack.tensor(),
          .rows_read = stack.tensor(),
          .window_left = stack.next<int64_t>(),
          .logits_soft_cap = stack.next<double>(),
          .sinks = stack.tensor(),
          .first_kv_head = stack.next<int64_t>(),
          .whole_lens = stack.tensor(),
          .shard_starts = stack.tensor(),
          .levels = stack.tensor()};
}

// What an operator takes beside what all of them take: nothing, in this case.
template <typename Backend>
struct DecodeOperator {
  static constexpr uint64_t kMoreArguments = 0;

  static DecodeOutputs run(ArgumentStack& stack, bool paged, const DecodeOutputs* given) {
    return decode<Backend>(next_decode_arguments(stack, paged, [] {}), given);
  }
};

// The four operators: contiguous or paged, with outputs of their own or given ones. The arguments would otherwise be
// listed four times.
template <typename Operator, bool PAGED, bool GIVEN>
void boxed_decode(StableIValue* arguments, uint64_t num_arguments, uint64_t num_outputs) {
  // The schemas are in one library and the CUDA kernels in another: both have to be of the same version.
  constexpr uint64_t kExpected = (PAGED ? 29 : 24) + (GIVEN ? 2 : 0) + Operator::kMoreArguments;
  if (num_arguments != kExpected || num_outputs != (GIVEN ? 0 : 2)) {
    fail("the operator has ", static_cast<int64_t>(num_arguments), " arguments where its kernel takes ",
         static_cast<int64_t>(kExpected), ": the two libraries are not of one build; reinstall santa");
  }
  ArgumentStack stack(arguments);
  if constexpr (GIVEN) {
    const Tensor out = stack.next<Tensor>(), lse = stack.next<Tensor>();
    const DecodeOutputs given{out, lse};
    Operator::run(stack, PAGED, &given);
  } else {
    const DecodeOutputs outputs = Operator::run(stack, PAGED, nullptr);
    arguments[0] = torch::stable::detail::from(outputs.out);
    arguments[1] = torch::stable::detail::from(outputs.lse);
  }
}

template <typename Backend, typename Library>
void register_decode(Library& library) {
  using Operator = DecodeOperator<Backend>;
  library.impl("decode", &boxed_decode<Operator, false, false>);
  library.impl("decode_out", &boxed_decode<Operator, false, true>);
  library.impl("decode_paged", &boxed_decode<Operator, true, false>);
  library.impl("decode_paged_out", &boxed_decode<Operator, true, true>);
}

}  // namespace santa::api
