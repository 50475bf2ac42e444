#include "cpu/rows.h"

#include <algorithm>
#include <utility>

#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

template <typename T>
void widen_rows(KvRows<T> rows, Dtype dtype, int64_t first, int count, int head_dim, float* block) {
  for (int n = 0; n < count; ++n) widen(rows.row(first + n), dtype, block + n * head_dim, head_dim);
}

// Calls body with a number of the size of an element: all that the address of a row depends on.
template <typename Body>
void with_element(Dtype dtype, const Body& body) {
  switch (element_size(dtype)) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    default:
      return body(float{});
  }
}

}  // namespace

int element_size(Dtype dtype) { return dtype == Dtype::kFloat8E4M3 ? 1 : dtype == Dtype::kFloat32 ? 4 : 2; }

void widen_query(const DecodeParams& p, GroupIndex at, int h, float* q) {
  const int64_t offset = p.query_offset(at.batch_index, at.kv_head, h);
  widen(static_cast<const char*>(p.q) + offset * element_size(p.dtype), p.dtype, q, p.head_dim);
}

void widen_keys(const DecodeParams& p, GroupIndex at, const RowShape& row, int64_t first, int count, float* block) {
  with_element(p.k_dtype, [&](auto element) {
    const auto rows = key_rows<decltype(element)>(p, at.batch_index, at.kv_head, row.kv_start);
    widen_rows(rows, p.k_dtype, first, count, p.head_dim, block);
  });
}

void widen_values(const DecodeParams& p, GroupIndex at, const RowShape& row, int64_t first, int count, float* block) {
  with_element(p.v_dtype, [&](auto element) {
    const auto rows = value_rows<decltype(element)>(p, at.batch_index, at.kv_head, row.kv_start);
    widen_rows(rows, p.v_dtype, first, count, p.head_dim, block);
  });
}

std::vector<float> widen_queries(const DecodeParams& p) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads * p.group_size;
  std::vector<float> q(static_cast<size_t>(heads) * p.head_dim);
  for (int64_t head = 0; head < heads; ++head) {
    widen_query(p, group_at(p, head / p.group_size), static_cast<int>(head % p.group_size),
                q.data() + head * p.head_dim);
  }
  return q;
}

ScoreKeys exact_scores(const DecodeParams& p, const std::vector<float>& queries) {
  return [&p, &queries](GroupIndex at, const RowShape& row, int64_t first, int count, float* scores, int64_t stride) {
    const float* q = queries.data() + p.group_index(at.batch_index, at.kv_head) * p.group_size * p.head_dim;
    float block[kBlockElements];
    for (int n = 0; n < count; n += kBlockKv) {
      const int block_keys = std::min(kBlockKv, count - n);
      widen_keys(p, at, row, first + n, block_keys, block);
      score_block(q, p.group_size, block, block_keys, p.head_dim, p.score_scale(at.kv_head), scores + n, stride);
    }
  };
}

ScoreKeys attended_scores(const DecodeParams& p, ScoreKeys score_keys) {
  return [&p, score_keys = std::move(score_keys)](GroupIndex at, const RowShape& row, int64_t first, int count,
                                                  float* scores, int64_t stride) {
    score_keys(at, row, first, count, scores, stride);
    for (int h = 0; changes_logits(p) && h < p.group_size; ++h) {
      const KeyRange visible = visible_keys(p, row.end(), h);
      for (int n = 0; n < count; ++n) {
        scores[h * stride + n] = attended_logit(p, visible, first + n, scores[h * stride + n]);
      }
    }
  };
}

}  // namespace santa::cpu
