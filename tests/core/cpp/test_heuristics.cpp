// cuda/decode/heuristics.h: whatever the GPU and the shape, kernels get the shared memory that they ask for. Needs no
// GPU. Exits with 0 if every check holds.
#include "cuda/bernoulli/heuristics.h"
#include "cuda/decode/heuristics.h"

#include <cstdint>

#include "check.h"

using namespace santa;
using namespace santa::cuda;

namespace {

struct Gpu {
  const char* name;
  DeviceLimits limits;
};

constexpr int kKb = 1024, kReserved = 1024;  // of every CTA
const Gpu kGpus[] = {
    {"sm_80", {108, 164 * kKb, 163 * kKb, false}}, {"sm_86", {84, 100 * kKb, 99 * kKb, false}},
    {"sm_89", {142, 100 * kKb, 99 * kKb, false}},  {"sm_90", {132, 228 * kKb, 227 * kKb, true}},
    {"sm_120", {170, 100 * kKb, 99 * kKb, true}},
};

DecodeParams params_of(int batch, int64_t kv_len, int group, int head_dim, Dtype k_dtype, bool lengths_known,
                       Budget budget = Budget::kStreaming) {
  DecodeParams p{};
  static const int32_t some_lens[1] = {};
  p.batch = batch, p.max_kv_len = kv_len, p.num_kv_heads = 8, p.num_qo_heads = 8 * group, p.group_size = group;
  p.head_dim = head_dim, p.dtype = Dtype::kBFloat16, p.k_dtype = p.v_dtype = k_dtype;
  p.q_len = 1, p.head_group = group, p.head_group_inverse = inverse_of(group), p.window_left = -1,
  p.cache_kv_len = p.max_kv_len;
  p.num_samples = 128, p.min_sampled_len = 0, p.sampler = Sampler::kGrouped, p.budget = budget;
  p.kv_lens = lengths_known ? nullptr : some_lens;
  p.plan = plan_call(p);
  return p;
}

void check_plan(const Gpu& gpu, DecodeParams& p, const ScoreNeeds& needs, const char* kind) {
  plan_one_pass(p, gpu.limits, needs);
  const int bytes = one_pass_shared_bytes(p, needs), pilot = pilot_shared_bytes(needs);
  const auto where = [&](const char* what) {
    check(false, gpu.name, ", ", kind, ", group ", p.group_size, ", head_dim ", p.head_dim, ", batch ", p.batch, ": ",
          what, " (", bytes, " bytes, pilot ", pilot, ")");
  };
  if (bytes > gpu.limits.cta_bytes) where("the one-pass kernel asks for more than a CTA can have");
  if (pilot > gpu.limits.cta_bytes) where("the pilot asks for more than a CTA can have");
  const bool many = p.plan.sampled_cut.max_runs * p.num_units() > gpu.limits.num_sms;
  if (many && 2 * (bytes + kReserved) > gpu.limits.sm_bytes) where("two CTAs do not fit a multiprocessor");
  if (p.plan.num_slots < 2 || p.plan.num_slots > kMaxSlots) where("a ring of too few or too many slots");
  if (p.plan.num_warps < 1 || p.plan.num_warps > needs.max_warps) where("too few or too many score warps");
}

void check_scores(const Gpu& gpu, DecodeParams& p, const char* kind) {
  const ScoreNeeds needs = key_score_needs(p);
  plan_scores(p, gpu.limits, needs);
  const int bytes = proportional_shared_bytes(p, needs);
  const auto where = [&](const char* what) {
    check(false, gpu.name, ", ", kind, ", group ", p.group_size, ", head_dim ", p.head_dim, ", batch ", p.batch, ": ",
          what, " (", bytes, " bytes)");
  };
  if (bytes > gpu.limits.cta_bytes) where("the kernel of scores asks for more than a CTA can have");
  const bool many = p.plan.sampled_cut.max_runs * p.num_units() > gpu.limits.num_sms;
  if (many && 2 * (bytes + kReserved) > gpu.limits.sm_bytes) where("two CTAs do not fit a multiprocessor");
  if (p.plan.num_slots < 2 || p.plan.num_slots > kMaxSlots) where("a ring of too few or too many slots");
  if (p.plan.num_warps < 1 || p.plan.num_warps > kProportionalWarps) where("too few or too many warps");
  if (proportional_warp_bytes(needs.slot, p.plan.num_slots, 4) % 512 != 0) where("slots do not start at 512 bytes");
}

void test_shared_memory() {
  for (const Gpu& gpu : kGpus) {
    for (const int head_dim : {64, 96, 128, 192, 256}) {
      check(tile_shared_bytes(head_dim) <= gpu.limits.cta_bytes, gpu.name, ": the tile kernel asks for ",
            tile_shared_bytes(head_dim), " bytes at head_dim ", head_dim);
      for (const int group : {1, 4, 5, 8, 9, 16}) {
        for (const int batch : {1, 16, 300}) {
          for (const bool known : {true, false}) {
            for (const Dtype k_dtype : {Dtype::kBFloat16, Dtype::kFloat8E4M3}) {
              DecodeParams p = params_of(batch, 32768, group, head_dim, k_dtype, known);
              const char* const kind = k_dtype == Dtype::kBFloat16 ? "bfloat16" : "float8";
              check_plan(gpu, p, key_score_needs(p), kind);
              p = params_of(batch, 32768, group, head_dim, k_dtype, known, Budget::kProportional);
              check_scores(gpu, p, kind);
            }
            DecodeParams p = params_of(batch, 32768, group, head_dim, Dtype::kBFloat16, known);
            p.by_features = true;
            check_plan(gpu, p, feature_score_needs(p), "features");
          }
        }
      }
    }
  }
}

void check_runs(const DecodeParams& p, const RunCut& cut, int64_t parts) {
  const int at_once = cut.ctas_at_once;
  check(static_cast<int64_t>(cut.row_runs) * cut.run_parts >= parts, "a part belongs to no run");
  check(static_cast<int64_t>(cut.row_runs - 1) * cut.run_parts < parts, "a run has no part");
  const int64_t ctas = cut.max_runs * p.num_units(), rounds = ceil_div(ctas, at_once);
  const double mean = static_cast<double>(p.batch) * p.num_units() * parts / at_once;
  check(rounds * cut.run_parts <= 1.35 * mean + 1, p.batch, " x ", p.max_kv_len, ": ", rounds, " rounds of ",
        cut.run_parts, " parts where ", mean, " are the least");
}

// Equal rows: every part, or tile, in one run, no more CTAs than asked for but one a row, and no second wave that is
// nearly empty.
void test_equal_rows() {
  const DeviceLimits h100 = kGpus[3].limits;
  for (const int batch : {1, 2, 4, 16, 33, 37, 64, 100}) {
    for (const int64_t kv_len : {8192, 32768, 131072}) {
      DecodeParams p = params_of(batch, kv_len, 4, 128, Dtype::kBFloat16, true);
      plan_one_pass(p, h100, key_score_needs(p));
      check_runs(p, p.plan.sampled_cut, ceil_div(kv_len, part_kv_of(kv_len, p.num_units())));
      p = params_of(batch, kv_len, 4, 128, Dtype::kBFloat16, true, Budget::kProportional);
      plan_scores(p, h100, key_score_needs(p));
      check_runs(p, p.plan.sampled_cut, num_tiles_of(kv_len));
      p = params_of(batch, kv_len, 4, 128, Dtype::kBFloat16, true);
      p.num_samples = 0, p.plan = plan_call(p);
      plan_tiles(p, h100);
      check_runs(p, p.plan.exact_cut, ceil_div(kv_len, exact_tile_kv_of(kv_len)));
    }
  }
}

// Rows whose two runs are known are pairs of CTAs, where the device has clusters.
void test_pairs() {
  int pairs = 0;
  for (const Gpu& gpu : kGpus) {
    for (const int batch : {1, 4, 16, 64}) {
      for (const int64_t kv_len : {100, 512, 1000, 2048, 4096, 20000, 131072}) {
        for (const bool known : {true, false}) {
          DecodeParams p = params_of(batch, kv_len, 4, 128, Dtype::kBFloat16, known);
          p.num_samples = 0, p.plan = plan_call(p);
          plan_tiles(p, gpu.limits);
          const bool two = known && p.plan.exact_cut.row_runs == 2;
          check(p.plan.row_pairs == (two && gpu.limits.has_clusters), gpu.name, ": ", batch, " x ", kv_len);
          pairs += p.plan.row_pairs;
        }
      }
    }
  }
  check(pairs >= 4, "hardly any pairs");
}

}  // namespace

int main() {
  test_shared_memory();
  test_equal_rows();
  test_pairs();
  return exit_code();
}
