#include "cuda/bernoulli/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/bernoulli/append.cuh"
#include "cuda/bernoulli/attend.cuh"
#include "cuda/bernoulli/draw.cuh"
#include "cuda/bernoulli/heuristics.h"
#include "cuda/common/launch.h"
#include "cuda/decode/launch.h"

namespace santa::cuda {
namespace {

template <typename T>
void launch_stages(const BernoulliParams& p, cudaStream_t stream) {
  const DecodeParams& d = p.decode;
  SANTA_LAUNCH(draw_kernel<T>, dim3(d.num_kv_heads, d.batch), kDrawThreads, 0, stream, p);
  check_launch("draw_kernel");
  if (d.plan.one_pass) {
    with_head_dim(d.head_dim, [&](auto head_dim) { launch_one_pass_bernoulli<T, head_dim()>(p, stream); });
  }
  if (d.plan.proportional || (d.plan.exact && d.plan.longest_exact > 0)) launch_score_features<T>(p, stream);
  if (d.plan.exact) {
    const int head_blocks = (d.group_size + kAttendHeads - 1) / kAttendHeads;
    const int tiles =
        std::max(1, max_exact_tiles(d.plan.longest_exact));  // rows without keys have their output written too
    const dim3 grid(static_cast<unsigned>(tiles) * d.num_kv_heads * head_blocks, d.batch);
    SANTA_LAUNCH(attend_scores_kernel<T>, grid, kAttendThreads, 0, stream, p, head_blocks);
    check_launch("attend_scores_kernel");
  }
  if (d.plan.proportional) launch_value_stages(d, stream);
  launch_combine(d, stream);
}

// For tests: the counts as they are.
__global__ void __launch_bounds__(256) widen_counts_kernel(const int16_t* counts, int32_t* out, int64_t total) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < total) out[i] = counts[i];
}

}  // namespace

void plan_decode_bernoulli(BernoulliParams& p, int device_index) {
  if (p.decode.plan.one_pass) plan_one_pass(p.decode, device_limits_of(device_index), feature_score_needs(p.decode));
}

void launch_decode_bernoulli(const BernoulliParams& p, cudaStream_t stream) {
  if (p.decode.dtype == Dtype::kBFloat16) {
    launch_stages<__nv_bfloat16>(p, stream);
  } else {
    launch_stages<__half>(p, stream);
  }
}

void launch_ternary_counts(const BernoulliParams& p, int32_t* counts, cudaStream_t stream) {
  const DecodeParams& d = p.decode;
  const dim3 grid(d.num_kv_heads, d.batch);
  if (d.dtype == Dtype::kBFloat16) {
    SANTA_LAUNCH(draw_kernel<__nv_bfloat16>, grid, kDrawThreads, 0, stream, p);
  } else {
    SANTA_LAUNCH(draw_kernel<__half>, grid, kDrawThreads, 0, stream, p);
  }
  check_launch("draw_kernel");
  const int64_t total = static_cast<int64_t>(d.batch) * d.num_qo_heads * d.head_dim;
  const auto ctas = static_cast<unsigned>(ceil_div(total, 256));
  SANTA_LAUNCH(widen_counts_kernel, ctas, 256, 0, stream, p.counts, counts, total);
  check_launch("widen_counts_kernel");
}

void launch_append(const AppendParams& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.num_rows, kAppendTile) * ceil_div(p.head_dim, kAppendTile);
  const dim3 grid(static_cast<unsigned>(tiles), p.num_kv_heads, p.batch);
  SANTA_LAUNCH(append_kernel, grid, dim3(kAppendTile, kAppendRows), 0, stream, p);
  check_launch("append_kernel");
}

}  // namespace santa::cuda
