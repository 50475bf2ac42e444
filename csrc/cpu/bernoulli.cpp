// Bernoulli scores on the CPU: draws per (batch row, KV head), then scores along the sequence, a listed feature at a
// time, by integer-weighted additions. The rest is decode.cpp.
#include "cpu/bernoulli.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/decode.h"
#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

// Draws of one query head.
void draw_head(const BernoulliParams& p, int64_t group, int h, const RowShape& row, int16_t* counts, float& scale) {
  const DecodeParams& d = p.decode;
  const GroupIndex at = group_at(d, group);
  std::vector<float> q(d.head_dim);
  widen_query(d, at, h, q.data());
  float max = 0.0f;
  for (const float x : q) max = larger_magnitude(max, x);
  scale = d.scale_log2 * draw_scale_of(max, p.num_draws);

  const int64_t row_seed = d.row_seeds != nullptr ? d.row_seeds[at.batch_index] : 0;
  const bool shared = p.score_sampler == ScoreSampler::kShared;
  const int head = shared ? at.kv_head : at.kv_head * d.group_size + h;
  const auto stream = ScoreStream::make(d.seed, row_seed, row.position, head);
  const uint32_t offset = systematic_offset(stream);
  uint64_t sum = 0;
  for (int chunk = 0; chunk < d.head_dim / 4; ++chunk) {
    uint64_t weights[4];
    int drawn[4];
    for (int i = 0; i < 4; ++i) weights[i] = draw_weight_of(q[4 * chunk + i], max);
    if (p.score_sampler == ScoreSampler::kSystematic) {
      for (int i = 0; i < 4; ++i) {
        drawn[i] = systematic_count(sum, sum + weights[i], p.num_draws, offset);
        sum += weights[i];
      }
    } else {
      count_draws(stream, static_cast<uint32_t>(chunk), p.num_draws, weights, drawn);
    }
    for (int i = 0; i < 4; ++i) {
      counts[4 * chunk + i] = static_cast<int16_t>(q[4 * chunk + i] < 0.0f ? -drawn[i] : drawn[i]);
    }
  }
}

// Scores by listed features; see ScoreKeys. A head takes no part in features that others of its group drew.
void score_by_features(const BernoulliParams& p, GroupIndex at, const RowShape& row, int64_t first, int count,
                       float* scores, int64_t stride) {
  const DecodeParams& d = p.decode;
  const int64_t group = d.group_index(at.batch_index, at.kv_head), size = element_size(d.k_dtype);
  const char* keys = static_cast<const char*>(d.k) +
                     (at.batch_index * d.stride_k_batch + at.kv_head * d.stride_k_head + row.kv_start + first) * size;
  const uint8_t* features = p.features + group * d.head_dim;
  for (int h = 0; h < d.group_size; ++h) std::fill_n(scores + h * stride, count, 0.0f);
  std::vector<float> block(count);
  for (int item = 0; item < p.features_read[group]; ++item) {
    const int feature = features[item];
    widen(keys + feature * p.stride_k_feature * size, d.k_dtype, block.data(), count);
    for (int h = 0; h < d.group_size; ++h) {
      const int times = p.counts[p.counts_offset(group) + static_cast<int64_t>(h) * d.head_dim + feature];
      if (times != 0) add_block(block.data(), times, count, scores + h * stride);
    }
  }
  for (int h = 0; h < d.group_size; ++h) {
    const float scale = p.scales[group * d.group_size + h];
    for (int n = 0; n < count; ++n) scores[h * stride + n] = logit_of(scores[h * stride + n], scale);
  }
}

}  // namespace

void draw_features(const BernoulliParams& p) {
  const DecodeParams& d = p.decode;
  for_each_group(d, [&](int64_t group, const RowShape& row) {
    int16_t* counts = p.counts + p.counts_offset(group);
    for (int h = 0; h < d.group_size; ++h) {
      draw_head(p, group, h, row, counts + static_cast<int64_t>(h) * d.head_dim, p.scales[group * d.group_size + h]);
    }
    int listed = 0;
    for (int feature = 0; row.kv_len > 0 && feature < d.head_dim; ++feature) {
      bool read = false;
      for (int h = 0; h < d.group_size; ++h) read |= counts[static_cast<int64_t>(h) * d.head_dim + feature] != 0;
      if (read) p.features[group * d.head_dim + listed++] = static_cast<uint8_t>(feature);
    }
    p.features_read[group] = listed;
  });
}

void decode_bernoulli(const BernoulliParams& p) {
  check_rows(p.decode);
  draw_features(p);
  const auto score_keys = [&](GroupIndex at, const RowShape& row, int64_t first, int count, float* scores,
                              int64_t stride) { score_by_features(p, at, row, first, count, scores, stride); };
  decode_with(p.decode, score_keys, kFeaturePilotRun);
}

void append(const AppendParams& p) {
  for (int b = 0; b < p.batch; ++b) {
    const int64_t first = p.position(b);
    if (!p.fits(first)) {
      throw std::invalid_argument("santa: positions of row " + std::to_string(b) + " is " + std::to_string(first) +
                                  "; it needs to be in [0, " + std::to_string(p.max_kv_len - p.num_rows) +
                                  "] for the " + std::to_string(p.num_rows) + " rows of k_new");
    }
    for (int n = 0; p.block_table != nullptr && n < p.num_rows; ++n) {
      if (p.offset(b, 0, first + n) >= 0) continue;
      throw std::invalid_argument("santa: block_table of row " + std::to_string(b) + " has a page outside [0, " +
                                  std::to_string(p.num_pages) + ") for position " + std::to_string(first + n));
    }
  }
  const int64_t size = p.element_size, groups = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int b = static_cast<int>(group / p.num_kv_heads), head = static_cast<int>(group % p.num_kv_heads);
      for (int n = 0; n < p.num_rows; ++n) {
        char* to = static_cast<char*>(p.features) + p.offset(b, head, p.position(b) + n) * size;
        const char* from = static_cast<const char*>(p.rows) +
                           (b * p.stride_rows_batch + n * p.stride_rows_row + head * p.stride_rows_head) * size;
        for (int feature = 0; feature < p.head_dim; ++feature) {
          std::memcpy(to + feature * p.stride_features_feature * size, from + feature * p.stride_rows_feature * size,
                      size);
        }
      }
    }
  });
}

}  // namespace santa::cpu
