// Every operator schema, and nothing else. Implementations: cpu/ops_cpu.cpp and cuda/ops_cuda.cu; fakes: santa/ops.py,
// santa/proposal.py, santa/bernoulli.py and santa/select.py.
#include <torch/csrc/stable/library.h>

#include <string>

STABLE_TORCH_LIBRARY(santa, m) {
  // Options that the decode operators have in common. rows_read: int32 [batch, num_kv_heads], written in place if
  // given. window_left -1 and logits_soft_cap 0: none. whole_lens, shard_starts and levels: rows that are parts of
  // longer ones (santa/distributed.py).
  const std::string options =
      "Tensor? kv_starts=None, SymInt num_samples=256, int sampler=3, int? budget=None, int kv_layout=0, "
      "float? sm_scale=None, SymInt seed=0, Tensor? row_seeds=None, Tensor? positions=None, "
      "SymInt? min_sampled_len=None, Tensor? k_scale=None, Tensor? v_scale=None, Tensor(c!)? rows_read=None, "
      "SymInt window_left=-1, float logits_soft_cap=0.0, Tensor? sinks=None, SymInt first_kv_head=0, "
      "Tensor? whole_lens=None, Tensor? shard_starts=None, Tensor? levels=None";
  const std::string rows = "Tensor q, Tensor k, Tensor v, *, Tensor? kv_lens=None, " + options;
  const std::string pages =
      "Tensor q, Tensor k_cache, Tensor v_cache, *, Tensor? page_table=None, Tensor? kv_lens=None, "
      "Tensor? kv_indptr=None, Tensor? kv_indices=None, Tensor? kv_last_page_len=None, SymInt? max_kv_len=None, " +
      options;
  m.def(("decode(" + rows + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("decode_paged(" + pages + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("decode_out(Tensor(a!) out, Tensor(b!) lse, " + rows + ") -> ()").c_str());
  m.def(("decode_paged_out(Tensor(a!) out, Tensor(b!) lse, " + pages + ") -> ()").c_str());
  // The same with proposal keys (core/proposal.h). codes uint8 [..., head_dim / 2] and scales float16, laid out as k;
  // center and channel_scale float32 [batch or 1, num_kv_heads, head_dim].
  const std::string proposal = "Tensor codes, Tensor scales, Tensor center, Tensor channel_scale";
  const auto with_proposal = [&](std::string arguments) {
    return arguments.insert(arguments.find("*, ") + 3, proposal + ", ");
  };
  m.def(("decode_proposal(" + with_proposal(rows) + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("decode_proposal_paged(" + with_proposal(pages) + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("decode_proposal_out(Tensor(a!) out, Tensor(b!) lse, " + with_proposal(rows) + ") -> ()").c_str());
  m.def(("decode_proposal_paged_out(Tensor(a!) out, Tensor(b!) lse, " + with_proposal(pages) + ") -> ()").c_str());
  // positions: int32 or int64 [batch, n], negative for keys to leave out; by_slot: page page_size + offset.
  m.def(
      "append_proposal_keys(Tensor(a!) codes, Tensor(b!) scales, Tensor center, Tensor channel_scale, Tensor k_new, "
      "Tensor positions, *, bool by_slot=False, int kv_layout=0) -> ()");
  m.def(
      "decode_bernoulli(Tensor q, Tensor k_features, Tensor v, *, Tensor? kv_lens=None, Tensor? kv_starts=None, "
      "SymInt num_draws=4, int score_sampler=0, SymInt num_samples=256, int sampler=3, int? budget=None, "
      "int kv_layout=0, float? sm_scale=None, SymInt seed=0, Tensor? row_seeds=None, Tensor? positions=None, "
      "SymInt? min_sampled_len=None, Tensor(a!)? rows_read=None) -> (Tensor out, Tensor lse, Tensor features_read)");
  m.def("append_k_features(Tensor(a!) k_features, Tensor k_new, Tensor positions) -> ()");
  m.def("append_k_features_paged(Tensor(a!) k_pages, Tensor k_new, Tensor positions, Tensor block_table) -> ()");
  m.def(
      "sample_select(Tensor q, Tensor k, *, float alpha_c=0.95, float alpha_s=0.95, SymInt num_chunks=0, "
      "SymInt sink_blocks=1, SymInt window_blocks=2, float? sm_scale=None, int gqa=0, int selection=0, "
      "float min_mass=0.0) -> (Tensor kv_cnt, Tensor kv_idx, Tensor stats)");
  // For tests: the draws of a row under the proportional budget, given the integer CDF. tile_mass int64 [rows, tiles],
  // row_weights int32 [rows, tiles, tile_kv], row_seeds int64 [rows] -> counts int32 [rows, tiles, tile_kv].
  m.def(
      "_select(Tensor tile_mass, Tensor row_weights, Tensor row_seeds, SymInt num_draws, int sampler, SymInt seed) "
      "-> Tensor counts");
  // For tests: the draws of a row under the streaming budget. units int32 [rows, tiles, 128]: what each key expects, in
  // 2^-unit_bits draws; row_seeds int64 [rows] -> counts int32 [rows, tiles, 128].
  m.def("_draw(Tensor units, Tensor row_seeds, int unit_bits, SymInt seed) -> Tensor counts");
  // For tests: how the one-pass CUDA kernel is set up from now on, which no bit of a result depends on; 0: as the
  // heuristics say.
  m.def("_force_plan(int num_warps, int num_slots, int wanted_ctas) -> ()");
  // For tests: the draws of Bernoulli scores. q as in decode, kv_lens int32 [batch], row_seeds int64 [batch] -> counts
  // int32 [batch, num_qo_heads, head_dim].
  m.def(
      "_ternary_counts(Tensor q, Tensor kv_lens, Tensor row_seeds, SymInt num_kv_heads, SymInt num_draws, "
      "int score_sampler, SymInt seed) -> Tensor counts");
}
