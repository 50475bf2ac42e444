// santa::decode_proposal, its variants, and what fills proposal keys: checks, allocation and parameters for all
// backends.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "api/decode.h"
#include "proposal_params.h"

namespace santa::api {

inline bool are_multiples(int64_t of, std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [of](int64_t value) { return value % of == 0; });
}

// Proposal keys, on their way from an operator.
struct ProposalArguments {
  Tensor codes, scales, center, channel_scale;
};

// `whose`: what they are to be on the device of.
inline void check_statistics(const char* name, const Tensor& tensor, int64_t batch, bool shared, int64_t num_kv_heads,
                             int64_t head_dim, const Tensor& like, const char* whose) {
  check_dtype(name, tensor, ScalarType::Float, "");
  check_rank(name, tensor, 3, "[batch or 1, num_kv_heads, head_dim]");
  if (tensor.size(0) != 1 && (shared || tensor.size(0) != batch)) {
    fail(name, " has shape ", shape_of(tensor), "; dimension 0 (batch) is ", tensor.size(0), " and needs to be 1",
         shared ? ": rows share pages, so they share " : ", or ", shared ? name : std::to_string(batch).c_str());
  }
  check_size(name, tensor, 1, num_kv_heads, "num_kv_heads");
  check_size(name, tensor, 2, head_dim, "head_dim");
  check_same_device(name, tensor, like, whose);
  check_contiguous(name, tensor);
}

inline void check_proposal(const ProposalArguments& a, int64_t batch, bool paged, bool hnd, int64_t head_dim,
                           const Tensor& like, const char* whose) {
  const char* shape = paged ? (hnd ? "[num_pages, num_kv_heads, page_size, head_dim / 2] (HND)"
                                   : "[num_pages, page_size, num_kv_heads, head_dim / 2] (NHD)")
                            : (hnd ? "[batch, num_kv_heads, max_kv_len, head_dim / 2] (HND)"
                                   : "[batch, max_kv_len, num_kv_heads, head_dim / 2] (NHD)");
  check_dtype("codes", a.codes, ScalarType::Byte, "");
  check_rank("codes", a.codes, 4, shape);
  check_size("codes", a.codes, 3, head_dim / 2, "head_dim / 2");
  check_same_device("codes", a.codes, like, whose);
  check_last_dim_contiguous("codes", a.codes);
  check_dtype("scales", a.scales, ScalarType::Half, "");
  check_rank("scales", a.scales, 3, "those of codes without the last");
  for (int dim = 0; dim < 3; ++dim) check_size("scales", a.scales, dim, a.codes.size(dim), "as in codes");
  check_same_device("scales", a.scales, like, whose);
  const int64_t num_kv_heads = a.codes.size(hnd ? 1 : 2);
  check_statistics("center", a.center, batch, paged, num_kv_heads, head_dim, like, whose);
  check_statistics("channel_scale", a.channel_scale, batch, paged, num_kv_heads, head_dim, like, whose);
  check_size("channel_scale", a.channel_scale, 0, a.center.size(0), "as in center");
}

inline void check_decode_proposal(const DecodeArguments& a, const ProposalArguments& proposal) {
  check_decode(a);
  check_proposal(proposal, a.q.size(0), a.paged, a.hnd(), a.head_dim(), a.q, "q");
  for (int dim = 0; dim < 3; ++dim) {
    check_size("codes", proposal.codes, dim, a.k.size(dim), a.paged ? "as in k_cache" : "as in k");
  }
  const auto sampler = static_cast<Sampler>(a.sampler);
  if (sampler != Sampler::kGrouped) {
    fail("sampler is '", name_of(sampler), "' with proposal keys, which need 'grouped'");
  }
  if (budget_of(a) != Budget::kStreaming) {
    fail("budget is '", a.budget == static_cast<int64_t>(Budget::kUniform) ? "uniform" : "proportional",
         "' with proposal keys, which need 'streaming'");
  }
  for (const auto& [name, tensor] : {std::pair{a.paged ? "k_cache" : "k", &a.k}, {a.paged ? "v_cache" : "v", &a.v}}) {
    if (tensor->is_cpu() || rows_are_aligned(*tensor)) continue;
    fail(name, " has rows that do not start on 16-byte boundaries; on CUDA, proposal keys need them to: pass ", name,
         ".contiguous(), or slices at multiples of 16 bytes");
  }
  const char* shard = a.whole_lens ? "whole_lens" : a.shard_starts ? "shard_starts" : a.levels ? "levels" : nullptr;
  if (shard != nullptr) {
    fail(shard, " is given with proposal keys, which are not for rows that are parts of longer ones");
  }
}

template <typename Backend>
DecodeOutputs decode_proposal(const DecodeArguments& a, const ProposalArguments& proposal, const DecodeOutputs* given) {
  check_decode_proposal(a, proposal);
  if (given != nullptr) check_outputs(a, *given);
  const DecodeOutputs outputs = given != nullptr ? *given : empty_outputs(a);
  if (a.q.size(0) == 0) return outputs;

  ProposalParams p{};
  p.decode = decode_params(a, outputs);
  plan_proposal_call(p.decode);
  const Tensor &codes = proposal.codes, &scales = proposal.scales;
  p.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  p.scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  p.stride_codes_batch = codes.stride(0), p.stride_codes_token = codes.stride(a.token_axis());
  p.stride_codes_head = codes.stride(a.head_axis());
  p.stride_scales_batch = scales.stride(0), p.stride_scales_token = scales.stride(a.token_axis());
  p.stride_scales_head = scales.stride(a.head_axis());
  p.center = proposal.center.const_data_ptr<float>();
  p.channel_scale = proposal.channel_scale.const_data_ptr<float>();
  p.shared_statistics = proposal.center.size(0) == 1;
  p.codes_aligned = are_multiples(
      16, {reinterpret_cast<int64_t>(p.codes), p.stride_codes_batch, p.stride_codes_token, p.stride_codes_head});
  p.scales_side_by_side = p.stride_scales_token == 1 && are_multiples(16, {reinterpret_cast<int64_t>(p.scales)}) &&
                          are_multiples(8, {p.stride_scales_batch, p.stride_scales_head}) &&
                          (!a.paged || scales.size(a.token_axis()) % 8 == 0);
  run_backend<Backend>(p, a.q, place_proposal_workspace);
  return outputs;
}

// See DecodeOperator. Keys come before what all decode operators have in common, but for q, k and v.
template <typename Backend>
struct ProposalOperator {
  static constexpr uint64_t kMoreArguments = 4;

  static DecodeOutputs run(ArgumentStack& stack, bool paged, const DecodeOutputs* given) {
    std::optional<ProposalArguments> proposal;
    const DecodeArguments arguments = next_decode_arguments(stack, paged, [&] {
      proposal =
          ProposalArguments{stack.next<Tensor>(), stack.next<Tensor>(), stack.next<Tensor>(), stack.next<Tensor>()};
    });
    return decode_proposal<Backend>(arguments, *proposal, given);
  }
};

template <typename Backend, typename Library>
void register_decode_proposal(Library& library) {
  using Operator = ProposalOperator<Backend>;
  library.impl("decode_proposal", &boxed_decode<Operator, false, false>);
  library.impl("decode_proposal_out", &boxed_decode<Operator, false, true>);
  library.impl("decode_proposal_paged", &boxed_decode<Operator, true, false>);
  library.impl("decode_proposal_paged_out", &boxed_decode<Operator, true, true>);
}

inline Dtype check_k_new(const Tensor& k_new) {
  check_rank("k_new", k_new, 4, "[batch, n, num_kv_heads, head_dim]");
  const ScalarType dtype = k_new.scalar_type();
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half && dtype != ScalarType::Float &&
      dtype != ScalarType::Float8_e4m3fn) {
    fail("k_new is ", name_of(dtype), "; it needs to be bfloat16, float16, float32 or float8_e4m3fn");
  }
  check_head_dim("k_new", k_new.size(3), "");
  check_last_dim_contiguous("k_new", k_new);
  for (int dim = 0; dim < 4; ++dim) {
    if (k_new.size(dim) > kMaxKvLen) fail("k_new has shape ", shape_of(k_new), "; its sizes need to be below 2^31");
  }
  return dtype_of(k_new);
}

template <typename Backend>
void append_proposal_keys_op(Tensor codes, Tensor scales, Tensor center, Tensor channel_scale, Tensor k_new,
                             Tensor positions, bool by_slot, int64_t kv_layout) {
  check_range("kv_layout", kv_layout, 0, 1);
  const bool hnd = kv_layout == static_cast<int64_t>(KvLayout::kHND);
  AppendProposalParams p{};
  p.dtype = check_k_new(k_new);
  check_proposal({codes, scales, center, channel_scale}, k_new.size(0), by_slot, hnd, k_new.size(3), k_new, "k_new");
  const int token_axis = hnd ? 2 : 1, head_axis = hnd ? 1 : 2;
  check_size("k_new", k_new, 2, codes.size(head_axis), "num_kv_heads of codes");
  if (!by_slot) check_size("k_new", k_new, 0, codes.size(0), "batch of codes");
  const char* name = by_slot ? "slots" : "positions";
  p.wide_positions = positions.scalar_type() == ScalarType::Long;
  if (!p.wide_positions && positions.scalar_type() != ScalarType::Int) {
    fail(name, " is ", name_of(positions.scalar_type()), "; it needs to be int32 or int64");
  }
  check_rank(name, positions, 2, "[batch, n]");
  check_size(name, positions, 0, k_new.size(0), "batch");
  check_size(name, positions, 1, k_new.size(1), "n of k_new");
  check_same_device(name, positions, k_new, "k_new");
  check_contiguous(name, positions);

  p.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  p.scales = static_cast<uint16_t*>(scales.mutable_data_ptr());
  p.center = center.const_data_ptr<float>(), p.channel_scale = channel_scale.const_data_ptr<float>();
  p.k_new = k_new.const_data_ptr(), p.positions = positions.const_data_ptr();
  p.shared_statistics = center.size(0) == 1, p.by_slot = by_slot;
  p.batch = static_cast<int>(k_new.size(0)), p.num_keys = static_cast<int>(k_new.size(1));
  p.num_kv_heads = static_cast<int>(k_new.size(2)), p.head_dim = static_cast<int>(k_new.size(3));
  p.page_size = codes.size(token_axis);
  p.limit = by_slot ? codes.size(0) * p.page_size : p.page_size;
  p.stride_codes_batch = codes.stride(0), p.stride_codes_token = codes.stride(token_axis);
  p.stride_codes_head = codes.stride(head_axis);
  p.stride_scales_batch = scales.stride(0), p.stride_scales_token = scales.stride(token_axis);
  p.stride_scales_head = scales.stride(head_axis);
  p.stride_new_batch = k_new.stride(0), p.stride_new_token = k_new.stride(1), p.stride_new_head = k_new.stride(2);
  p.codes_aligned = are_multiples(
      8, {reinterpret_cast<int64_t>(p.codes), p.stride_codes_batch, p.stride_codes_token, p.stride_codes_head});
  p.aligned = rows_are_aligned(k_new);
  if (p.batch == 0 || p.num_keys == 0 || p.num_kv_heads == 0) return;
  Backend::run_append(p, k_new.is_cpu() ? -1 : k_new.get_device_index());
}

}  // namespace santa::api
