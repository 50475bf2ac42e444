// The set-up of the persistent CUDA kernels for any device: what would hang or corrupt if it were wrong.
#include "cuda/decode/heuristics.h"

#include <cstdio>
#include <cstdlib>

#include "cuda/bernoulli/heuristics.h"

using namespace santa;
using santa::cuda::DeviceLimits;

namespace {

int failures = 0;

void check(bool holds, const char* what, const DecodeParams& p, const DeviceLimits& device) {
  if (holds) return;
  ++failures;
  std::printf("%s: %d multiprocessors, %d bytes, head_dim %d, group %d, sampler %d, max_kv_len %d, k_dtype %d\n", what,
              device.num_sms, device.shared_bytes, p.head_dim, p.gqa_group_size, static_cast<int>(p.sampler),
              p.max_kv_len, static_cast<int>(p.k_dtype));
}

}  // namespace

int main() {
  int persistent = 0;
  for (int num_sms = 1; num_sms <= 200; num_sms = num_sms < 20 ? num_sms + 1 : num_sms + 7) {
    for (const int shared_bytes : {99 * 1024, 163 * 1024, 227 * 1024}) {
      const DeviceLimits device{num_sms, shared_bytes};
      for (const int head_dim : {64, 96, 128, 192, 256}) {
        for (int group = 1; group <= 8; ++group) {
          for (const Sampler sampler : {Sampler::kGrouped, Sampler::kSystematic}) {
            enum Keys { kHalfKeys, kCodedKeys, kFeatures };
            for (const Keys keys : {kHalfKeys, kCodedKeys, kFeatures}) {
              int warps = -1;
              const int32_t any_lengths = 0;
              for (int i = 0; i < 20; ++i) {
                const int max_kv_lens[] = {1, 512, 7240, 8192, 16384, 24577, 28672, 32768, 131072, 4 << 20};
                const int max_kv_len = max_kv_lens[i / 2];
                DecodeParams p{};
                p.k_dtype = keys == kCodedKeys ? Dtype::kFloat8E4M3 : Dtype::kBFloat16, p.head_dim = head_dim,
                p.gqa_group_size = group, p.sampler = sampler, p.max_kv_len = max_kv_len;
                p.batch = 3, p.num_kv_heads = 2, p.num_samples = 128;
                if (i % 2 == 1) p.kv_lens = &any_lengths;  // known on the device alone
                const cuda::ScoreWarps score_warps =
                    keys == kFeatures ? cuda::feature_score_warps(p) : cuda::key_score_warps(p);
                p.persistent = cuda::plan_persistent(p, device, score_warps);
                const PersistentPlan& plan = p.persistent;
                if (plan.max_kv_len < 0) continue;
                ++persistent;
                check(cuda::persistent_shared_bytes(p, score_warps) <= shared_bytes, "more shared memory than there is",
                      p, device);
                check(plan.num_ctas >= 1 && plan.num_ctas <= num_sms, "CTAs that cannot all be resident", p, device);
                // A row with more blocks than buffers waits for itself.
                const int64_t longest = plan.max_kv_len < max_kv_len ? plan.max_kv_len : max_kv_len;
                for (int64_t kv_len = 1; kv_len <= longest; kv_len += kv_len < 24600 ? 241 : 65521) {
                  check(ceil_div(kv_len, block_kv_of(kv_len)) <= int64_t{plan.num_buffers} * plan.num_ctas,
                        "a row that waits for itself", p, device);
                  check(block_kv_of(kv_len) + 8 <= plan.plane_pitch, "a block larger than its buffer", p, device);
                }
                check(ceil_div(longest, block_kv_of(longest)) <= int64_t{plan.num_buffers} * plan.num_ctas,
                      "the longest row waits for itself", p, device);
                if (group > 4) check(2 * plan.plane_pitch * 8 >= 32768, "outputs over scores in use", p, device);
                check(plan.buffer_bytes >= (group > 4 ? 65536 : 32768), "outputs larger than the buffer", p, device);
                // Sums over score warps, and the path, must not depend on the length of the cache.
                check(warps == -1 || warps == plan.num_score_warps, "score warps depend on max_kv_len", p, device);
                warps = plan.num_score_warps;
              }
            }
          }
        }
      }
    }
  }
  BernoulliParams bernoulli{};
  const auto may_be = [&](Dtype dtype, int num_draws, int64_t stride_k_feature) {
    bernoulli.decode.dtype = dtype, bernoulli.num_draws = num_draws, bernoulli.stride_k_feature = stride_k_feature;
    return cuda::may_be_persistent(bernoulli);
  };
  const int64_t beyond = int64_t{1} << 31;
  if (!may_be(Dtype::kBFloat16, 256, beyond - 1) || may_be(Dtype::kBFloat16, 257, 4096) ||
      !may_be(Dtype::kFloat16, 2048, 4096) || may_be(Dtype::kFloat16, 2049, 4096) ||
      may_be(Dtype::kFloat16, 1, beyond)) {
    ++failures;
    std::printf("counts that are not whole, or features that are out of reach\n");
  }
  if (persistent < 1000) {
    ++failures;
    std::printf("only %d set-ups were persistent\n", persistent);
  }
  std::printf("%d set-ups, %d failures\n", persistent, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
