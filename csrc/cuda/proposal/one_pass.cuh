// Rows that are sampled by proposal keys: the one-pass kernels with scores of codes.
#pragma once

#include "cuda/decode/stages.cuh"
#include "cuda/proposal/code_score.cuh"
#include "cuda/proposal/launch.h"

namespace santa::cuda {

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kPilotWarps * 32) pilot_proposal_kernel(const __grid_constant__ ProposalParams p) {
  SANTA_DYNAMIC_SHARED(one_pass_bytes);
  launch_dependents();
  const RowUnit unit = RowUnit::make(p.decode, blockIdx.y, blockIdx.x);
  if (!unit.row.one_pass()) return;
  using Scorer = CodeScorer<T, HEAD_DIM>;
  unsigned char* const queries = one_pass_bytes + kPilotHeadBytes + kPilotWarps * Scorer::kPilotBytes;
  Scorer scorer(p, unit, *reinterpret_cast<const QueryCodes<HEAD_DIM>*>(queries));
  scorer.put_queries(queries, unit, warp_index(), kPilotWarps, threadIdx.x & 31);
  __syncthreads();
  find_level(p.decode, unit, scorer, one_pass_bytes);
}

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int proposal_threads(int head_dim) { return (max_code_warps(false, head_dim) + kGatherWarps) * 32; }
#else
constexpr int proposal_threads(int head_dim) { return bound_threads(max_code_warps(true, head_dim), head_dim); }
#endif

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(proposal_threads(HEAD_DIM), 2)
    one_pass_proposal_kernel(const __grid_constant__ ProposalParams p) {
  SANTA_DYNAMIC_SHARED(one_pass_bytes);
  using Scorer = CodeScorer<T, HEAD_DIM>;
  launch_dependents();
  const Work work(p.decode);
  if (!work.exists()) return;
  Scorer scorer(p, work.unit, *reinterpret_cast<const QueryCodes<HEAD_DIM>*>(one_pass_bytes + kSharedBytes));
  one_pass<Scorer, T, HEAD_DIM>(p.decode, one_pass_bytes, scorer, work);
}

template <typename T, int HEAD_DIM>
void launch_one_pass_proposal(const ProposalParams& p, cudaStream_t stream) {
  launch_one_pass_kernels(pilot_proposal_kernel<T, HEAD_DIM>, one_pass_proposal_kernel<T, HEAD_DIM>, p, p.decode,
                          code_score_needs(p.decode), stream);
}

}  // namespace santa::cuda
