#include "cuda/proposal/launch.h"

#include <algorithm>

#include "core/float8.h"
#include "cuda/common/launch.h"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/launch.h"
#include "cuda/proposal/append.cuh"
#include "cuda/proposal/heuristics.h"

namespace santa::cuda {
namespace {

template <typename T>
void launch_stages(const ProposalParams& p, cudaStream_t stream) {
  const DecodeParams& d = p.decode;
  with_head_dim(d.head_dim, [&](auto head_dim) {
    const auto launch = [&](auto key) {
      using K = decltype(key);
      if (d.plan.one_pass) launch_one_pass_proposal<T, K, head_dim()>(p, stream);
      if (d.plan.exact) launch_tiles<T, K, head_dim()>(d, stream);
    };
    if (d.k_dtype == Dtype::kFloat8E4M3) {
      launch(Float8{});
    } else {
      launch(T{});
    }
  });
  if (!d.plan.one_pass) return launch_combine(d, stream);
  auto* const kernel = combine_proposal_kernel<T>;
  share_multiprocessor(kernel, 0);
  launch_after(kernel, dim3(d.num_kv_heads * d.group_size, d.batch), kCombineThreads, 0, stream,
               "combine_proposal_kernel", d, p.tile_drawn);
}

template <typename T>
void launch_append_of(const AppendProposalParams& p, cudaStream_t stream) {
  with_head_dim(p.head_dim, [&](auto head_dim) {
    constexpr int kCtaKeys = kAppendWarps * (256 / head_dim());
    const int64_t ctas = ceil_div(p.num_keys, kCtaKeys * (p.num_keys > kCtaKeys * kAppendTurns ? kAppendTurns : 1));
    auto* const kernel = append_proposal_kernel<T, head_dim()>;
    SANTA_LAUNCH(kernel, dim3(static_cast<unsigned>(ctas), p.num_kv_heads, p.batch), kAppendWarps * 32, 0, stream, p);
    check_launch("append_proposal_kernel");
  });
}

}  // namespace

void plan_decode_proposal(ProposalParams& p, int device_index) {
  const DeviceLimits device = device_limits_of(device_index);
  plan_one_pass_proposal(p.decode, device);
  plan_tiles(p.decode, device);
}

void launch_decode_proposal(const ProposalParams& p, cudaStream_t stream) {
  if (p.decode.dtype == Dtype::kBFloat16) {
    launch_stages<__nv_bfloat16>(p, stream);
  } else {
    launch_stages<__half>(p, stream);
  }
}

void launch_append_proposal(const AppendProposalParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return launch_append_of<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16:
      return launch_append_of<__half>(p, stream);
    case Dtype::kFloat32:
      return launch_append_of<float>(p, stream);
    case Dtype::kFloat8E4M3:
      return launch_append_of<Float8>(p, stream);
  }
}

}  // namespace santa::cuda
