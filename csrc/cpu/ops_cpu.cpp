// CPU implementations of the schemas in ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "api/bernoulli.h"
#include "api/decode.h"
#include "api/proposal.h"
#include "api/sample_select.h"
#include "api/select.h"
#include "cpu/bernoulli.h"
#include "cpu/decode.h"
#include "cpu/one_pass.h"
#include "cpu/proposal.h"
#include "cpu/proportional.h"
#include "cpu/sample_select.h"

namespace santa::cpu {
namespace {

struct DecodeBackend {
  static void plan(DecodeParams&, int) {}
  static void run(const DecodeParams& p, int) { decode(p); }
};

struct ProposalBackend {
  static void plan(ProposalParams&, int) {}
  static void run(const ProposalParams& p, int) { decode_proposal(p); }
  static void run_append(const AppendProposalParams& p, int) { append_proposal(p); }
};

struct SelectBackend {
  static void run(const SelectParams& p, int) {
    for (int row = 0; row < p.rows; ++row) {
      uint32_t total = 0;
      for (int tile = 0; tile < p.tiles; ++tile) total += static_cast<uint32_t>(p.tile_mass[row * p.tiles + tile]);
      const Draws draws =
          Draws::make(p.sampler, RandomStream::make(p.seed, p.row_seeds[row], 0, 0), 0, p.num_draws, total);
      uint32_t start = 0;
      for (int tile = 0; tile < p.tiles; ++tile) {
        const int64_t index = static_cast<int64_t>(row) * p.tiles + tile;
        const int32_t* weights = p.row_weights + index * p.tile_kv;
        std::vector<uint32_t> cumulative(p.tile_kv);
        uint32_t sum = 0;
        for (int n = 0; n < p.tile_kv; ++n) cumulative[n] = sum += weights[n];
        std::fill_n(p.counts + index * p.tile_kv, p.tile_kv, 0);
        const auto mass = static_cast<uint32_t>(p.tile_mass[index]);
        if (sum > 0 && mass > 0) {
          const uint32_t first = draws.sorted() ? draws.count_below(start) : 0;
          const uint32_t last = draws.sorted() ? draws.count_below(start + mass) : draws.num_draws;
          draw_tile(draws, first, last, start, mass, cumulative.data(), p.tile_kv, p.counts + index * p.tile_kv);
        }
        start += mass;
      }
    }
  }
};

struct DrawBackend {
  static void run(const DrawParams& p, int) {
    for (int row = 0; row < p.rows; ++row) {
      for (int tile = 0; tile < p.tiles; ++tile) {
        const int64_t first = (static_cast<int64_t>(row) * p.tiles + tile) * kDrawTileKv;
        const std::vector<uint32_t> units(p.units + first, p.units + first + kDrawTileKv);
        draw_counts(units.data(), kDrawTileKv, p.offset(row, tile), p.unit_bits, p.counts + first);
      }
    }
  }
};

struct SampleSelectBackend {
  static void plan(SampleSelectParams& p, int) { p.heads_per_pass = 0; }  // no passes, no workspace
  static void run(const SampleSelectParams& p, int) { sample_select(p); }
};

struct BernoulliBackend {
  static void plan(BernoulliParams&, int) {}
  static void run(const BernoulliParams& p, int) { decode_bernoulli(p); }
  static void run_ternary(const BernoulliParams& p, int32_t* counts, int) {
    draw_features(p);
    const int64_t total = static_cast<int64_t>(p.decode.batch) * p.decode.num_qo_heads * p.decode.head_dim;
    for (int64_t i = 0; i < total; ++i) counts[i] = p.counts[i];
  }
  static void run_append(const AppendParams& p, int) { append(p); }
};

}  // namespace
}  // namespace santa::cpu

STABLE_TORCH_LIBRARY_IMPL(santa, CPU, m) {
  santa::api::register_decode<santa::cpu::DecodeBackend>(m);
  santa::api::register_decode_proposal<santa::cpu::ProposalBackend>(m);
  m.impl("append_proposal_keys", TORCH_BOX(&santa::api::append_proposal_keys_op<santa::cpu::ProposalBackend>));
  m.impl("decode_bernoulli", TORCH_BOX(&santa::api::decode_bernoulli_op<santa::cpu::BernoulliBackend>));
  m.impl("append_k_features", TORCH_BOX(&santa::api::append_k_features_op<santa::cpu::BernoulliBackend>));
  m.impl("append_k_features_paged", TORCH_BOX(&santa::api::append_k_features_paged_op<santa::cpu::BernoulliBackend>));
  m.impl("_ternary_counts", TORCH_BOX(&santa::api::ternary_counts_op<santa::cpu::BernoulliBackend>));
  m.impl("sample_select", TORCH_BOX(&santa::api::sample_select_op<santa::cpu::SampleSelectBackend>));
  m.impl("_select", TORCH_BOX(&santa::api::select_op<santa::cpu::SelectBackend>));
  m.impl("_draw", TORCH_BOX(&santa::api::draw_op<santa::cpu::DrawBackend>));
}
