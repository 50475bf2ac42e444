// What both backends of sample_select receive: plain data, no Torch. Pointers are device pointers on CUDA. Strides are
// in elements.
#pragma once

#include <cstdint>

#include "core/block_selection.h"
#include "params.h"
#include "workspace.h"

namespace santa {

enum class Selection : int { kPaper = 0, kJoint = 1 };

constexpr int kNumSelectStats = 6;

struct SampleSelectParams {
  const void* q;  // [batch, num_qo_heads, q_len, head_dim], last dimension contiguous
  const void* k;  // [batch, num_kv_heads, kv_len, head_dim], last dimension contiguous

  int32_t* kv_cnt;  // [batch, num_qo_heads, nq]
  int32_t* kv_idx;  // [batch, num_qo_heads, nq, nk]
  float* stats;     // [batch, num_qo_heads, kNumSelectStats]

  int64_t stride_q_batch, stride_q_head, stride_q_token;
  int64_t stride_k_batch, stride_k_head, stride_k_token;

  Dtype dtype;
  int batch;
  int num_qo_heads;
  int num_kv_heads;
  int gqa_group_size;
  int head_dim;
  int q_len, kv_len;
  int nq, nk;      // blocks
  int offset;      // nk - nq
  int num_chunks;  // sampled query blocks
  bool aligned;    // rows of q and k start on 16-byte boundaries

  float scale_log2;  // sm_scale * log2(e): scores are kept in base 2
  double alpha_c, alpha_s;
  double min_mass;
  int sink_blocks, window_blocks;  // at most nk
  bool gqa_union;
  Selection selection;

  // Workspace of the CUDA kernels. The heads are done in passes of heads_per_pass, whole groups each, so that it stays
  // below kMaxSelectWorkspace (or is that of one group). Shapes are per head of a pass. Without passes there is none.
  int heads_per_pass;
  int first_head;        // of the pass, among batch * num_qo_heads
  float* block_lse;      // [num_chunks, nk, 128], base 2: of the sampled rows on each key block up to the diagonal
  float* row_lse;        // [num_chunks, 128], base 2; -inf for rows past q_len
  uint64_t* row_total;   // [num_chunks, 128], in mass units: 2^40, but for rounding
  uint64_t* block_mass;  // [num_chunks, nk]: of the sampled block's rows on each key block; 0 past the diagonal
  int32_t* broken;       // [num_chunks]: a row has no softmax
  uint64_t* gains;       // [2, nk]: mass of each column, of each slash
  int32_t* added;        // [2, nk]: blocks that each would add; joint selection and repair alone
  uint8_t* chosen;       // [2, nk]: flags of columns, of slashes
  uint64_t* retained;    // [num_chunks, 128]: the kept part of row_total
  float* share;          // [num_chunks, 128]: retained / row_total

  // The diagonal block of a sampled query block, and how many of its rows exist. Only the last one can be ragged.
  SANTA_HD int diagonal(int chunk) const { return sampled_block(chunk, num_chunks, nq) + offset; }
  SANTA_HD int rows(int chunk) const {
    const int left = q_len - sampled_block(chunk, num_chunks, nq) * kSelectBlock;
    return left < kSelectBlock ? left : kSelectBlock;
  }
  SANTA_HD int num_rows() const { return (num_chunks - 1) * kSelectBlock + rows(num_chunks - 1); }
  SANTA_HD bool keeps_everything() const { return min_mass >= 1.0; }
  SANTA_HD bool repairs() const { return min_mass > 0.0 && min_mass < 1.0; }
  SANTA_HD double joint_alpha() const { return alpha_c > alpha_s ? alpha_c : alpha_s; }
};

constexpr int64_t kMaxSelectWorkspace = int64_t{512} << 20;

// heads_per_pass of p, the inputs of which are set.
inline int select_heads_per_pass(const SampleSelectParams& p) {
  const int64_t rows = static_cast<int64_t>(p.num_chunks) * kSelectBlock, nk = p.nk;
  const int64_t bytes_per_head = rows * nk * 4 + rows * 24 + p.num_chunks * (nk * 8 + 4) + 2 * nk * (8 + 4 + 1);
  const int64_t groups = kMaxSelectWorkspace / (bytes_per_head * p.gqa_group_size);
  const int64_t all_groups = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  return static_cast<int>((groups < 1 ? 1 : groups < all_groups ? groups : all_groups) * p.gqa_group_size);
}

// Fills the workspace fields of p, the rest of which is set, and returns the bytes needed at `base`.
inline int64_t place_select_workspace(SampleSelectParams& p, void* base) {
  const int64_t rows = static_cast<int64_t>(p.num_chunks) * kSelectBlock, nk = p.nk, heads = p.heads_per_pass;
  Workspace workspace(base);
  workspace.take(p.block_lse, heads * rows * nk);
  workspace.take(p.row_lse, heads * rows);
  workspace.take(p.row_total, heads * rows);
  workspace.take(p.block_mass, heads * p.num_chunks * nk);
  workspace.take(p.broken, heads * p.num_chunks);
  workspace.take(p.gains, heads * 2 * nk);
  workspace.take(p.added, heads * 2 * nk);
  workspace.take(p.chosen, heads * 2 * nk);
  workspace.take(p.retained, heads * rows);
  workspace.take(p.share, heads * rows);
  return workspace.used();
}

}  // namespace santa
