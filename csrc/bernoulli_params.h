// What the Bernoulli score stage and the feature-major append receive: plain data, as params.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/bernoulli.h"
#include "params.h"
#include "workspace.h"

namespace santa {

constexpr int kMaxHeadDim = 256;  // features are listed by bytes

// A feature of neighbouring keys lies side by side: the pilot takes its keys in runs of one 16-byte load (draw.h).
constexpr int kFeaturePilotRun = 8;

// Query heads that a CUDA thread scores at a time: the weights of a feature are stored in blocks of as many.
SANTA_HD int score_heads_of(int group_size) {
  return group_size <= 1 ? 1 : group_size <= 2 ? 2 : group_size <= 4 ? 4 : 8;
}

struct BernoulliParams {
  // All but the keys. Its k is k_features [batch, num_kv_heads, head_dim, max_kv_len], contiguous along the sequence,
  // through stride_k_batch, stride_k_head and stride_k_feature; its `aligned` is that of q and v.
  DecodeParams decode;
  int64_t stride_k_feature;
  bool aligned_keys;  // every feature starts on a 16-byte boundary; a row then has to start at a multiple of 8
  int num_draws;      // B
  ScoreSampler score_sampler;
  int32_t* features_read;  // [batch, num_kv_heads], an output: features in the list below

  // Workspace: what was drawn, per (batch row, KV head).
  int16_t* counts;    // [group_size, head_dim], in [-B, B]
  float* scales;      // [group_size]: scale_log2 max|q| / B
  uint8_t* features;  // [head_dim]: those that any head of the group reads, ascending
  // The counts of the listed features once more, in the order in which the CUDA kernels of a row's kind multiply with
  // them; null if the call has no such rows.
  int num_blocks;          // of score_heads_of(group_size) heads
  float* weights;          // exact and proportional: [num_blocks, head_dim, score_heads]
  uint16_t* half_weights;  // one pass: [head blocks, kHeadBlock, head_dim] in q's dtype; 0 after the listed features
                           // and for heads that there are not

  SANTA_HD int64_t counts_offset(int64_t group) const { return group * decode.group_size * decode.head_dim; }
  SANTA_HD int64_t weights_offset(int64_t group, int block) const {
    return (group * num_blocks + block) * decode.head_dim * score_heads_of(decode.group_size);
  }
  SANTA_HD int64_t half_weights_offset(int64_t group, int head_block) const {
    return (group * decode.num_head_blocks() + head_block) * kHeadBlock * decode.head_dim;
  }
};

// Fills the workspace fields of p and p.decode and returns the bytes needed at `base`.
inline int64_t place_bernoulli_workspace(BernoulliParams& p, void* base) {
  DecodeParams& d = p.decode;
  const int64_t groups = static_cast<int64_t>(d.batch) * d.num_kv_heads;
  const int score_heads = score_heads_of(d.group_size);
  p.num_blocks = static_cast<int>(ceil_div(d.group_size, score_heads));
  const int64_t stages = place_workspace(d, base);
  Workspace workspace(base == nullptr ? nullptr : static_cast<char*>(base) + stages);
  workspace.take(p.counts, groups * d.group_size * d.head_dim);
  workspace.take(p.scales, groups * d.group_size);
  workspace.take(p.features, groups * d.head_dim);
  if (d.plan.exact || d.plan.proportional) {
    workspace.take(p.weights, groups * p.num_blocks * d.head_dim * score_heads);
  }
  if (d.plan.one_pass) workspace.take(p.half_weights, groups * d.num_head_blocks() * kHeadBlock * d.head_dim);
  // Where all values are read, it is from scores in memory too.
  if (d.plan.exact && !d.plan.proportional) {
    d.scores_per_row = (static_cast<int64_t>(d.plan.longest_exact) + kMaxTileKv) * d.group_pitch;
    workspace.take(d.scores, groups * d.scores_per_row);
  }
  return stages + workspace.used();
}

// Rows of keys or values to feature-major memory. `elements` are 2 or 4 bytes.
struct AppendParams {
  void* features;              // [batch, num_kv_heads, head_dim, max_kv_len]; paged: [pages, ..., page_size]
  const void* rows;            // [batch, num_rows, num_kv_heads, head_dim] through its strides
  const void* positions;       // [batch], int32 or int64: where the first row goes
  const int32_t* block_table;  // [batch, max_pages] through its strides, or null: not paged
  bool wide_positions;         // int64
  int element_size;
  int batch, num_rows, num_kv_heads, head_dim;
  int64_t max_kv_len;  // of a row; paged: max_pages page_size
  int64_t page_size, num_pages;
  int64_t stride_features_batch, stride_features_head, stride_features_feature;  // batch: page, if paged
  int64_t stride_rows_batch, stride_rows_row, stride_rows_head, stride_rows_feature;
  int64_t stride_table_batch, stride_table_page;

  SANTA_HD int64_t position(int batch_index) const {
    return wide_positions ? static_cast<const int64_t*>(positions)[batch_index]
                          : static_cast<const int32_t*>(positions)[batch_index];
  }
  // Whether all rows of a batch row have their place.
  SANTA_HD bool fits(int64_t first) const { return first >= 0 && first <= max_kv_len - num_rows; }
  // Element offset of feature 0 of a position; -1 where the block table names no page.
  SANTA_HD int64_t offset(int batch_index, int kv_head, int64_t position) const {
    int64_t base = static_cast<int64_t>(kv_head) * stride_features_head;
    if (block_table == nullptr) return base + batch_index * stride_features_batch + position;
    const int64_t page = block_table[batch_index * stride_table_batch + position / page_size * stride_table_page];
    if (page < 0 || page >= num_pages) return -1;
    return base + page * stride_features_batch + position % page_size;
  }
};

}  // namespace santa
