#include "cuda/prefill/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "core/tiling.h"
#include "cuda/common/launch.h"
#include "cuda/prefill/choose.cuh"
#include "cuda/prefill/expand.cuh"

namespace santa::cuda {
namespace {

void launch_block_scores_of(const SampleSelectParams& p, int num_heads, cudaStream_t stream) {
  const bool bfloat16 = p.dtype == Dtype::kBFloat16;
  if (p.head_dim == 64) {
    bfloat16 ? launch_block_scores<__nv_bfloat16, 64>(p, num_heads, stream)
             : launch_block_scores<__half, 64>(p, num_heads, stream);
  } else {
    bfloat16 ? launch_block_scores<__nv_bfloat16, 128>(p, num_heads, stream)
             : launch_block_scores<__half, 128>(p, num_heads, stream);
  }
}

void launch_pass(const SampleSelectParams& p, int num_heads, cudaStream_t stream) {
  launch_block_scores_of(p, num_heads, stream);
  const unsigned chunks = static_cast<unsigned>(num_heads) * p.num_chunks;
  SANTA_LAUNCH(mass_kernel, chunks, kMassThreads, 0, stream, p);
  check_launch("mass_kernel");
  SANTA_LAUNCH(cover_kernel, 2 * num_heads, kCoverThreads, 0, stream, p);
  check_launch("cover_kernel");
  if (p.selection == Selection::kJoint) {
    SANTA_LAUNCH(joint_kernel, num_heads, kChooseThreads, 0, stream, p);
    check_launch("joint_kernel");
  }
  if (p.repairs()) {
    SANTA_LAUNCH(repair_kernel, num_heads, kChooseThreads, 0, stream, p);
    check_launch("repair_kernel");
  }
  if (p.gqa_union && p.gqa_group_size > 1) {
    SANTA_LAUNCH(union_kernel, num_heads / p.gqa_group_size, kCoverThreads, 0, stream, p);
    check_launch("union_kernel");
  }
  const int64_t lists = static_cast<int64_t>(num_heads) * p.nq;
  const auto expand_ctas = static_cast<unsigned>(ceil_div(lists, kExpandWarps));
  SANTA_LAUNCH(expand_kernel, expand_ctas, kExpandWarps * 32, 0, stream, p, num_heads);
  check_launch("expand_kernel");
  SANTA_LAUNCH(retained_kernel, chunks, kMassThreads, 0, stream, p);
  check_launch("retained_kernel");
  SANTA_LAUNCH(stats_kernel, num_heads, kStatsThreads, 0, stream, p);
  check_launch("stats_kernel");
}

}  // namespace

void launch_sample_select(SampleSelectParams p, cudaStream_t stream) {
  const int all_heads = p.batch * p.num_qo_heads;
  for (p.first_head = 0; p.first_head < all_heads; p.first_head += p.heads_per_pass) {
    launch_pass(p, std::min(p.heads_per_pass, all_heads - p.first_head), stream);
  }
}

}  // namespace santa::cuda
