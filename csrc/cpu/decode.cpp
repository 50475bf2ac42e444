// The decode operator on the CPU, stage by stage as on the GPU: score -> plan -> select and gather -> combine. Every
// stage is parallel over independent items and writes disjoint memory, so the result does not depend on the threads.
#include "cpu/decode.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/kv_view.h"
#include "core/mixture.h"
#include "core/softmax_state.h"
#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

constexpr int kBlockKv = 32;  // keys widened to float32 at a time: 32 x 256 floats stay in the L1 cache

TileIndex tile_index_of(const DecodeParams& p, int64_t item) {
  const int64_t group = item / p.max_tiles;
  return {static_cast<int>(group / p.num_kv_heads), static_cast<int>(group % p.num_kv_heads),
          static_cast<int>(item % p.max_tiles)};
}

// Rows of K or V as bytes, whatever the dtype.
StridedKvView<char> byte_view(const void* data, Dtype dtype, TileIndex at, int64_t kv_start, int64_t stride_batch,
                              int64_t stride_token, int64_t stride_head) {
  const int64_t size = element_size(dtype);
  return make_strided_view<char>(data, at.batch_index, at.kv_head, kv_start, stride_batch * size, stride_token * size,
                                 stride_head * size);
}

StridedKvView<char> k_view(const DecodeParams& p, TileIndex at, int64_t kv_start) {
  return byte_view(p.k, p.k_dtype, at, kv_start, p.stride_k_batch, p.stride_k_token, p.stride_k_head);
}

StridedKvView<char> v_view(const DecodeParams& p, TileIndex at, int64_t kv_start) {
  return byte_view(p.v, p.v_dtype, at, kv_start, p.stride_v_batch, p.stride_v_token, p.stride_v_head);
}

void widen_rows(const StridedKvView<char>& view, Dtype dtype, int64_t first, int count, int head_dim, float* block) {
  for (int n = 0; n < count; ++n) widen(view.row(first + n), dtype, block + n * head_dim, head_dim);
}

void store(const DecodeParams& p, int64_t offset, float value) {
  if (p.dtype == Dtype::kFloat32) {
    static_cast<float*>(p.out)[offset] = value;
  } else if (p.dtype == Dtype::kBFloat16) {
    static_cast<torch::headeronly::BFloat16*>(p.out)[offset] = value;
  } else {
    static_cast<torch::headeronly::Half*>(p.out)[offset] = value;
  }
}

// Exact scores: see ScoreKeys.
void score_exactly(const DecodeParams& p, TileIndex at, const RowShape& row, int64_t first, int count, float* scores,
                   int64_t stride) {
  const int group_size = p.gqa_group_size, head_dim = p.head_dim;
  std::vector<float> q(static_cast<size_t>(group_size) * head_dim), block(kBlockKv * head_dim);
  for (int h = 0; h < group_size; ++h) widen_query(p, at, h, q.data() + h * head_dim);
  const auto keys = k_view(p, at, row.kv_start);
  const float score_scale = p.score_scale(at.kv_head);
  for (int n = 0; n < count; n += kBlockKv) {
    const int block_keys = std::min(kBlockKv, count - n);
    widen_rows(keys, p.k_dtype, first + n, block_keys, head_dim, block.data());
    score_block(q.data(), group_size, block.data(), block_keys, head_dim, score_scale, scores + n, stride);
  }
}

// Scores of one tile, [group, tile_kv], and its softmax states; on exact rows also the tile's weighted sum of V.
void score_tile(const DecodeParams& p, TileIndex at, const RowShape& row, const ScoreKeys& score_keys) {
  const int group_size = p.gqa_group_size, head_dim = p.head_dim, tile_kv = row.tile_kv;
  const int64_t first = static_cast<int64_t>(at.tile) * tile_kv;
  const int count = static_cast<int>(std::min<int64_t>(tile_kv, row.kv_len - first));
  const int64_t group = p.group_index(at.batch_index, at.kv_head);
  const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(at.tile) * group_size;

  std::vector<float> local;
  float* scores;
  if (row.sampled) {
    scores = p.scores + group * p.scores_per_row + first * group_size;
  } else {
    local.resize(static_cast<size_t>(group_size) * tile_kv);
    scores = local.data();
  }
  score_keys(at, row, first, count, scores, tile_kv);

  std::vector<float> weights(static_cast<size_t>(group_size) * tile_kv);
  for (int h = 0; h < group_size; ++h) {
    const float max = max_block(scores + h * tile_kv, count);
    p.tile_max[stats + h] = max;
    p.tile_sum[stats + h] = exp2_block(scores + h * tile_kv, max, weights.data() + h * tile_kv, count);
  }
  if (row.sampled) return;

  float* o_accum = p.o_accum + stats * head_dim;
  std::fill_n(o_accum, static_cast<int64_t>(group_size) * head_dim, 0.0f);
  const auto values = v_view(p, at, row.kv_start);
  std::vector<float> block(static_cast<size_t>(kBlockKv) * head_dim);
  for (int n = 0; n < count; n += kBlockKv) {
    const int block_keys = std::min(kBlockKv, count - n);
    widen_rows(values, p.v_dtype, first + n, block_keys, head_dim, block.data());
    accumulate_block(weights.data() + n, tile_kv, group_size, block.data(), block_keys, head_dim, o_accum);
  }
}

// Log-sum-exp of tiles [first, last) for query head h of the group, base 2.
float lse_of_tiles(const DecodeParams& p, int64_t group, int h, int first, int last) {
  SoftmaxState state = empty_softmax_state();
  for (int tile = first; tile < last; ++tile) {
    const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * p.gqa_group_size + h;
    state = merge(state, {p.tile_max[stats], p.tile_sum[stats]});
  }
  return log2_sum(state);
}

// Level 1 of the CDF of every segment and stream of one (batch row, KV head).
void plan_group(const DecodeParams& p, int64_t group, const RowShape& row) {
  const int group_size = p.gqa_group_size, kv_head = static_cast<int>(group % p.num_kv_heads);
  const int64_t row_seed = p.row_seeds != nullptr ? p.row_seeds[group / p.num_kv_heads] : 0;
  const SegmentPlan plan = row.segments(p.num_samples, p.budget);
  for (int h = 0; h < group_size; ++h) {
    p.row_lse[group * group_size + h] = lse_of_tiles(p, group, h, 0, row.num_tiles);
  }
  for (int segment = 0; segment < plan.num_segments; ++segment) {
    const int first = segment * plan.tiles_per_segment, last = std::min(first + plan.tiles_per_segment, row.num_tiles);
    float* segment_lse = p.segment_lse + p.stats_offset(group) + static_cast<int64_t>(segment) * group_size;
    for (int h = 0; h < group_size; ++h) segment_lse[h] = lse_of_tiles(p, group, h, first, last);

    for (int stream = 0; stream < p.num_streams(); ++stream) {
      const int64_t offset = p.stream_offset(group, stream);
      uint32_t start = 0;
      for (int tile = first; tile < last; ++tile) {
        const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * group_size;
        float share = 0.0f;
        if (p.sampler == Sampler::kGrouped) {
          for (int h = 0; h < group_size; ++h) {
            const float factor = tile_factor(p.tile_max[stats + h], segment_lse[h]);
            if (factor > 0.0f) share += factor * p.tile_sum[stats + h];
          }
          share /= static_cast<float>(group_size);
        } else {
          const float factor = tile_factor(p.tile_max[stats + stream], segment_lse[stream]);
          if (factor > 0.0f) share = factor * p.tile_sum[stats + stream];
        }
        p.tile_start[offset + tile] = start;
        p.tile_mass[offset + tile] = tile_mass_of(share);
        start += p.tile_mass[offset + tile];
      }
      const bool grouped = p.sampler == Sampler::kGrouped;
      const int head = grouped ? kv_head : kv_head * group_size + stream;
      const auto random = RandomStream::make(p.seed, row_seed, row.kv_len, head);
      const Draws draws = Draws::make(p.sampler, random, segment,
                                      static_cast<uint32_t>(plan.draws) * (grouped ? group_size : 1), start);
      p.segment_draws[offset + segment] = draws;
      for (int tile = first; tile < last && draws.sorted(); ++tile) {
        p.tile_draw[offset + tile] = draws.count_below(p.tile_start[offset + tile]);
      }
    }
  }
}

// Draws the tile's rows, reads them from V, and leaves the tile's share of the estimate in o_accum.
void gather_tile(const DecodeParams& p, TileIndex at, const RowShape& row) {
  const int group_size = p.gqa_group_size, head_dim = p.head_dim, tile_kv = row.tile_kv;
  const int64_t first = static_cast<int64_t>(at.tile) * tile_kv;
  const int count = static_cast<int>(std::min<int64_t>(tile_kv, row.kv_len - first));
  const int64_t group = p.group_index(at.batch_index, at.kv_head);
  const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(at.tile) * group_size;
  const float* scores = p.scores + group * p.scores_per_row + first * group_size;
  const SegmentPlan plan = row.segments(p.num_samples, p.budget);
  const int segment = at.tile / plan.tiles_per_segment;
  const float* row_lse = p.row_lse + group * group_size;
  const float* segment_lse = p.segment_lse + p.stats_offset(group) + static_cast<int64_t>(segment) * group_size;
  const bool grouped = p.sampler == Sampler::kGrouped;
  const int heads_per_stream = grouped ? group_size : 1;

  float* o_accum = p.o_accum + stats * head_dim;
  std::fill_n(o_accum, static_cast<int64_t>(group_size) * head_dim, 0.0f);
  std::vector<float> exponentials(static_cast<size_t>(heads_per_stream) * tile_kv), shares(tile_kv), value(head_dim);
  std::vector<float> ht_weights(group_size);
  std::vector<uint32_t> cumulative(tile_kv);
  std::vector<int32_t> counts(tile_kv);
  std::array<uint32_t, kMaskWords> read{};

  for (int stream = 0; stream < p.num_streams(); ++stream) {
    const int64_t offset = p.stream_offset(group, stream);
    const uint32_t tile_mass = p.tile_mass[offset + at.tile];
    const Draws& draws = p.segment_draws[offset + segment];
    uint32_t first_draw = 0, last_draw = draws.num_draws;
    if (draws.sorted()) {
      first_draw = p.tile_draw[offset + at.tile];
      const bool last_of_segment = at.tile + 1 == std::min((segment + 1) * plan.tiles_per_segment, row.num_tiles);
      if (!last_of_segment) last_draw = p.tile_draw[offset + at.tile + 1];
    }
    int32_t& tile_rows = p.tile_rows[offset + at.tile];
    tile_rows = 0;
    if (tile_mass == 0 || first_draw == last_draw) continue;

    // Level 2 of the CDF.
    std::fill(shares.begin(), shares.end(), 0.0f);
    float share_sum = 0.0f;
    for (int j = 0; j < heads_per_stream; ++j) {
      const int h = stream + j;
      const float factor = tile_factor(p.tile_max[stats + h], segment_lse[h]);
      if (!(factor > 0.0f)) continue;
      float* exponential = exponentials.data() + j * tile_kv;
      exp2_block(scores + h * tile_kv, p.tile_max[stats + h], exponential, count);
      for (int n = 0; n < count; ++n) shares[n] += factor * exponential[n];
      share_sum += factor * p.tile_sum[stats + h];
    }
    uint32_t weight_sum = 0;
    for (int n = 0; n < count; ++n) cumulative[n] = weight_sum += row_weight_of(shares[n] / share_sum);
    if (weight_sum == 0) continue;

    std::fill(counts.begin(), counts.end(), 0);
    draw_tile(draws, first_draw, last_draw, p.tile_start[offset + at.tile], tile_mass, cumulative.data(), count,
              counts.data());

    const auto values = v_view(p, at, row.kv_start);
    for (int n = 0; n < count; ++n) {
      if (counts[n] == 0) continue;
      ++tile_rows;
      read[n / 32] |= 1u << (n % 32);
      widen(values.row(first + n), p.v_dtype, value.data(), head_dim);
      if (grouped) {
        // Horvitz-Thompson: p_{h,n} / P(n is drawn).
        const uint32_t weight = cumulative[n] - (n > 0 ? cumulative[n - 1] : 0);
        const float inclusion =
            std::min(1.0f, expected_draws(draws.num_draws, tile_mass, draws.total, weight, weight_sum));
        for (int h = 0; h < group_size; ++h) {
          const float factor = tile_factor(p.tile_max[stats + h], row_lse[h]);
          ht_weights[h] = factor > 0.0f ? factor * exponentials[h * tile_kv + n] / inclusion : 0.0f;
        }
        accumulate_block(ht_weights.data(), 1, group_size, value.data(), 1, head_dim, o_accum);
      } else {
        add_block(value.data(), counts[n], head_dim, o_accum + stream * head_dim);
      }
    }
    if (!grouped) {
      const float scale = segment_factor(segment_lse[stream], row_lse[stream]) / static_cast<float>(plan.draws);
      for (int d = 0; d < head_dim; ++d) o_accum[stream * head_dim + d] *= scale;
    }
  }
  if (p.read_mask != nullptr) {
    std::copy(read.begin(), read.end(),
              p.read_mask + p.mask_offset(group) + static_cast<int64_t>(at.tile) * kMaskWords);
  }
}

void combine_head(const DecodeParams& p, int batch_index, int qo_head, const RowShape& row) {
  const int head_dim = p.head_dim, group_size = p.gqa_group_size, h = qo_head % group_size;
  const int64_t group = p.group_index(batch_index, qo_head / group_size);
  const int64_t out = (static_cast<int64_t>(batch_index) * p.num_qo_heads + qo_head) * head_dim;
  if (row.kv_len == 0) {
    for (int d = 0; d < head_dim; ++d) store(p, out + d, 0.0f);
    p.lse[out / head_dim] = -INFINITY;
    if (p.rows_read != nullptr && h == 0) p.rows_read[group] = 0;
    return;
  }
  const float lse = row.sampled ? p.row_lse[group * group_size + h] : lse_of_tiles(p, group, h, 0, row.num_tiles);
  const int32_t* tile_rows = p.tile_rows + p.stream_offset(group, p.num_streams() == 1 ? 0 : h);
  std::vector<float> acc(head_dim, 0.0f);
  for (int tile = 0; tile < row.num_tiles; ++tile) {
    if (row.sampled && tile_rows[tile] == 0) continue;
    const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * group_size + h;
    const float weight = row.sampled ? 1.0f : exp2_below(p.tile_max[stats], lse);
    for (int d = 0; d < head_dim; ++d) acc[d] += weight * p.o_accum[stats * head_dim + d];
  }
  const float scale = p.output_scale(qo_head / group_size);
  // Not finite: a NaN or an infinite score, for which softmax is undefined.
  for (int d = 0; d < head_dim; ++d) store(p, out + d, is_finite(lse) ? acc[d] * scale : NAN);
  p.lse[out / head_dim] = lse * kLn2;
  if (p.rows_read != nullptr && h == 0) {
    const uint32_t* mask = p.read_mask + p.mask_offset(group);
    int rows = row.sampled ? 0 : row.kv_len;
    for (int i = 0; row.sampled && i < row.num_tiles * kMaskWords; ++i) {
      rows += static_cast<int>(std::bitset<32>(mask[i]).count());
    }
    p.rows_read[group] = rows;
  }
}

}  // namespace

int element_size(Dtype dtype) { return dtype == Dtype::kFloat8E4M3 ? 1 : dtype == Dtype::kFloat32 ? 4 : 2; }

void widen_query(const DecodeParams& p, TileIndex at, int h, float* q) {
  const int64_t head = static_cast<int64_t>(at.kv_head) * p.gqa_group_size + h;
  const int64_t offset = at.batch_index * p.stride_q_batch + head * p.stride_q_head;
  widen(static_cast<const char*>(p.q) + offset * element_size(p.dtype), p.dtype, q, p.head_dim);
}

void check_rows(const DecodeParams& p) {
  for (int b = 0; b < p.batch; ++b) {
    if (row_shape_of(p, b).valid) continue;
    std::string message = "santa: row " + std::to_string(b) + " has ";
    if (p.kv_lens != nullptr) message += "kv_lens " + std::to_string(p.kv_lens[b]);
    if (p.kv_lens != nullptr && p.kv_starts != nullptr) message += " and ";
    if (p.kv_starts != nullptr) message += "kv_starts " + std::to_string(p.kv_starts[b]);
    throw std::invalid_argument(message + "; kv_starts >= 0, kv_lens >= 0 and kv_starts + kv_lens <= max_kv_len (" +
                                std::to_string(p.max_kv_len) + ") are needed");
  }
}

void draw_tile(const Draws& draws, uint32_t first, uint32_t last, uint32_t tile_start, uint32_t tile_mass,
               const uint32_t* cumulative, int num_rows, int32_t* counts) {
  const auto positions = TilePositions::make(draws.unit(), tile_start, tile_mass);
  for (uint32_t m = first; m < last; ++m) {
    const Threshold threshold = draws.threshold(m);
    if (!positions.contains(threshold)) continue;
    ++counts[row_at(cumulative, num_rows, positions.position(threshold, cumulative[num_rows - 1]))];
  }
}

void decode(const DecodeParams& p) {
  check_rows(p);
  decode_with(p, [&](TileIndex at, const RowShape& row, int64_t first, int count, float* scores, int64_t stride) {
    score_exactly(p, at, row, first, count, scores, stride);
  });
}

void decode_with(const DecodeParams& p, const ScoreKeys& score_keys) {
  const int64_t groups = static_cast<int64_t>(p.batch) * p.num_kv_heads, tiles = groups * p.max_tiles;
  const auto for_each_tile = [&](auto stage, bool sampled_only) {
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const TileIndex at = tile_index_of(p, item);
        const RowShape row = row_shape_of(p, at.batch_index);
        if (at.tile < row.num_tiles && (row.sampled || !sampled_only)) stage(p, at, row);
      }
    });
  };
  const auto score = [&](const DecodeParams&, TileIndex at, const RowShape& row) {
    score_tile(p, at, row, score_keys);
  };
  for_each_tile(score, false);
  if (p.num_samples > 0) {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const RowShape row = row_shape_of(p, static_cast<int>(group / p.num_kv_heads));
        if (row.sampled) plan_group(p, group, row);
      }
    });
    for_each_tile(gather_tile, true);
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(p.batch) * p.num_qo_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int batch_index = static_cast<int>(item / p.num_qo_heads);
      combine_head(p, batch_index, static_cast<int>(item % p.num_qo_heads), row_shape_of(p, batch_index));
    }
  });
}

}  // namespace santa::cpu
