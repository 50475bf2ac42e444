// What the kinds of row have in common on the CPU: a row's queries, keys and values in float32, and its scores.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <functional>
#include <vector>

#include "params.h"

namespace santa::cpu {

// One KV head of one batch row.
struct GroupIndex {
  int batch_index, kv_head;
};

inline GroupIndex group_at(const DecodeParams& p, int64_t group) {
  return {static_cast<int>(group / p.num_kv_heads), static_cast<int>(group % p.num_kv_heads)};
}

// The scores, base 2, of keys [first, first + count) of the row for every head of the group: [group_size, stride].
using ScoreKeys =
    std::function<void(GroupIndex at, const RowShape& row, int64_t first, int count, float* scores, int64_t stride)>;

// Calls body(group, row) for every KV head of every batch row, in parallel.
template <typename Body>
void for_each_group(const DecodeParams& p, const Body& body) {
  torch::stable::parallel_for(0, static_cast<int64_t>(p.batch) * p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) body(group, row_shape_of(p, group_at(p, group).batch_index));
  });
}

// Calls body(at, tile, row) for every tile (part, in one pass) of the rows of a kind, in parallel.
template <typename Body>
void for_each_tile(const DecodeParams& p, RowKind kind, const Body& body) {
  const int64_t groups = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  torch::stable::parallel_for(0, groups * p.max_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const GroupIndex at = group_at(p, item / p.max_tiles);
      const RowShape row = row_shape_of(p, at.batch_index);
      const int tile = static_cast<int>(item % p.max_tiles);
      if (row.kind == kind && tile < row.num_tiles) body(at, tile, row);
    }
  });
}

// Log-sum-exp of query head h of the group, base 2, from the states of its row's tiles.
inline float lse_of_tiles(const DecodeParams& p, int64_t group, int h, int num_tiles) {
  SoftmaxState state = empty_softmax_state();
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * p.group_size + h;
    state = merge(state, {p.tile_max[stats], p.tile_sum[stats]});
  }
  return log2_sum(state);
}

inline RandomStream stream_of(const DecodeParams& p, GroupIndex at, const RowShape& row, int index, int streams) {
  return random_stream(p, at.batch_index, row, at.kv_head, index, streams);
}

constexpr int kLargestHeadDim = 256;
// Keys widened to float32 at a time: 32 x 256 floats stay in the L1 cache.
constexpr int kBlockKv = 32;
constexpr int kBlockElements = kBlockKv * kLargestHeadDim;

int element_size(Dtype dtype);

// Query head h of the group to q [head_dim].
void widen_query(const DecodeParams& p, GroupIndex at, int h, float* q);

// Keys or values [first, first + count) of the row to block [count, head_dim].
void widen_keys(const DecodeParams& p, GroupIndex at, const RowShape& row, int64_t first, int count, float* block);
void widen_values(const DecodeParams& p, GroupIndex at, const RowShape& row, int64_t first, int count, float* block);

// All queries in float32, [batch, num_kv_heads, group_size, head_dim].
std::vector<float> widen_queries(const DecodeParams& p);

// Exact logits, neither capped nor masked. `queries`, of widen_queries, and p have to outlive it.
ScoreKeys exact_scores(const DecodeParams& p, const std::vector<float>& queries);

// Logits as they are attended with: attended_logit. p has to outlive it.
ScoreKeys attended_scores(const DecodeParams& p, ScoreKeys score_keys);

}  // namespace santa::cpu
