#include "cpu/proportional.h"

#include <algorithm>
#include <array>
#include <vector>

#include "core/mixture.h"
#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

// One tile of a row, and where its results lie.
struct Tile {
  GroupIndex at;
  int index;
  int64_t first;  // key
  int count;      // of keys
  int64_t group, stats;
  float* scores;  // [group_size, tile_kv]

  Tile(const DecodeParams& p, GroupIndex at, int index, const RowShape& row)
      : at(at),
        index(index),
        first(static_cast<int64_t>(index) * row.tile_kv),
        count(static_cast<int>(std::min<int64_t>(row.tile_kv, row.kv_len - first))),
        group(p.group_index(at.batch_index, at.kv_head)),
        stats(p.stats_offset(group) + static_cast<int64_t>(index) * p.group_size),
        scores(p.scores + group * p.scores_per_row + first * p.group_size) {}
};

void score_tile(const DecodeParams& p, const Tile& tile, const RowShape& row, const ScoreKeys& score_keys) {
  score_keys(tile.at, row, tile.first, tile.count, tile.scores, row.tile_kv);
  std::vector<float> exponentials(row.tile_kv);
  for (int h = 0; h < p.group_size; ++h) {
    const float* scores = tile.scores + h * row.tile_kv;
    const float max = max_block(scores, tile.count);
    p.tile_max[tile.stats + h] = max;
    p.tile_sum[tile.stats + h] = exp2_block(scores, max, exponentials.data(), tile.count);
  }
}

// A tile's share of the mass that a stream samples.
float share_of(const DecodeParams& p, int64_t stats, int stream, const float* row_lse) {
  const auto head_share = [&](int h) {
    const float factor = tile_factor(p.tile_max[stats + h], row_lse[h]);
    return factor > 0.0f ? factor * p.tile_sum[stats + h] : 0.0f;
  };
  if (p.sampler != Sampler::kGrouped) return head_share(stream);
  float share = 0.0f;
  for (int h = 0; h < p.group_size; ++h) share += head_share(h);
  return share / static_cast<float>(p.group_size);
}

// Level 1 of the CDF of every stream, and its draws.
void plan_row(const DecodeParams& p, int64_t group, const RowShape& row) {
  const GroupIndex at = group_at(p, group);
  const bool grouped = p.sampler == Sampler::kGrouped;
  float* row_lse = p.row_lse + group * p.group_size;
  for (int h = 0; h < p.group_size; ++h) row_lse[h] = lse_of_tiles(p, group, h, row.num_tiles);

  for (int stream = 0; stream < p.num_streams(); ++stream) {
    const int64_t offset = p.stream_offset(group, stream);
    uint32_t start = 0;
    for (int tile = 0; tile < row.num_tiles; ++tile) {
      const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * p.group_size;
      p.tile_start[offset + tile] = start;
      p.tile_mass[offset + tile] = tile_mass_of(share_of(p, stats, stream, row_lse));
      start += p.tile_mass[offset + tile];
    }
    const RandomStream random = stream_of(p, at, row, stream, p.num_streams());
    const auto num_draws = static_cast<uint32_t>(p.num_samples * (grouped ? p.group_size : 1));
    const Draws draws = Draws::make(p.sampler, random, /*segment=*/0, num_draws, start);
    p.draws[group * p.num_streams() + stream] = draws;
    for (int tile = 0; tile < row.num_tiles && draws.sorted(); ++tile) {
      p.tile_draw[offset + tile] = draws.count_below(p.tile_start[offset + tile]);
    }
  }
}

// Draws the tile's rows, reads them from V, and leaves the tile's share of the estimate in o_accum.
void gather_tile(const DecodeParams& p, const Tile& tile, const RowShape& row) {
  const int group_size = p.group_size, head_dim = p.head_dim, tile_kv = row.tile_kv;
  const bool grouped = p.sampler == Sampler::kGrouped;
  const int heads_per_stream = grouped ? group_size : 1;
  const float* row_lse = p.row_lse + tile.group * group_size;

  float* o_accum = p.o_accum + tile.stats * head_dim;
  std::fill_n(o_accum, static_cast<int64_t>(group_size) * head_dim, 0.0f);
  // [heads of the stream, tile_kv]: exp2(score - lse), of which each head has its factor.
  std::vector<float> exponentials(static_cast<size_t>(heads_per_stream) * tile_kv), factors(heads_per_stream);
  std::vector<float> shares(tile_kv), value(head_dim), weights(heads_per_stream);
  std::vector<uint32_t> cumulative(tile_kv);
  std::vector<int32_t> counts(tile_kv);
  std::array<uint32_t, kMaskWords> read{};

  for (int stream = 0; stream < p.num_streams(); ++stream) {
    const int64_t at_tile = p.stream_offset(tile.group, stream) + tile.index;
    const uint32_t tile_mass = p.tile_mass[at_tile];
    const Draws& draws = p.draws[tile.group * p.num_streams() + stream];
    uint32_t first_draw = 0, last_draw = draws.num_draws;
    if (draws.sorted()) {
      first_draw = p.tile_draw[at_tile];
      if (tile.index + 1 < row.num_tiles) last_draw = p.tile_draw[at_tile + 1];
    }
    p.tile_rows[at_tile] = 0;
    if (tile_mass == 0 || first_draw == last_draw) continue;

    // Level 2 of the CDF.
    std::fill(shares.begin(), shares.end(), 0.0f);
    float share_sum = 0.0f;
    for (int j = 0; j < heads_per_stream; ++j) {
      const int h = stream + j;
      factors[j] = tile_factor(p.tile_max[tile.stats + h], row_lse[h]);
      if (!(factors[j] > 0.0f)) continue;
      float* exponential = exponentials.data() + j * tile_kv;
      exp2_block(tile.scores + h * tile_kv, p.tile_max[tile.stats + h], exponential, tile.count);
      for (int n = 0; n < tile.count; ++n) shares[n] += factors[j] * exponential[n];
      share_sum += factors[j] * p.tile_sum[tile.stats + h];
    }
    uint32_t weight_sum = 0;
    for (int n = 0; n < tile.count; ++n) cumulative[n] = weight_sum += row_weight_of(shares[n] / share_sum);
    if (weight_sum == 0) continue;

    std::fill(counts.begin(), counts.end(), 0);
    draw_tile(draws, first_draw, last_draw, p.tile_start[at_tile], tile_mass, cumulative.data(), tile.count,
              counts.data());

    for (int n = 0; n < tile.count; ++n) {
      if (counts[n] == 0) continue;
      ++p.tile_rows[at_tile];
      read[n / 32] |= 1u << (n % 32);
      widen_values(p, tile.at, row, tile.first + n, 1, value.data());
      if (grouped) {
        const uint32_t weight = cumulative[n] - (n > 0 ? cumulative[n - 1] : 0);
        const float expected = expected_draws(draws.num_draws, tile_mass, draws.total, weight, weight_sum);
        for (int h = 0; h < group_size; ++h) {
          const bool takes_part = factors[h] > 0.0f;
          weights[h] = takes_part ? selected_weight(factors[h] * exponentials[h * tile_kv + n], expected) : 0.0f;
        }
        accumulate_block(weights.data(), 1, group_size, value.data(), 1, head_dim, o_accum);
      } else {
        add_block(value.data(), counts[n], head_dim, o_accum + stream * head_dim);
      }
    }
    if (!grouped) {
      const float scale = 1.0f / static_cast<float>(draws.num_draws);
      for (int d = 0; d < head_dim; ++d) o_accum[stream * head_dim + d] *= scale;
    }
  }
  if (p.read_mask != nullptr) {
    std::copy(read.begin(), read.end(),
              p.read_mask + p.mask_offset(tile.group) + static_cast<int64_t>(tile.index) * kMaskWords);
  }
}

}  // namespace

void draw_tile(const Draws& draws, uint32_t first, uint32_t last, uint32_t tile_start, uint32_t tile_mass,
               const uint32_t* cumulative, int num_rows, int32_t* counts) {
  const auto positions = TilePositions::make(draws.unit(), tile_start, tile_mass);
  for (uint32_t m = first; m < last; ++m) {
    const Threshold threshold = draws.threshold(m);
    if (!positions.contains(threshold)) continue;
    ++counts[row_at(cumulative, num_rows, positions.position(threshold, cumulative[num_rows - 1]))];
  }
}

void decode_proportional(const DecodeParams& p, const ScoreKeys& score_keys) {
  for_each_tile(p, RowKind::kProportional, [&](GroupIndex at, int tile, const RowShape& row) {
    score_tile(p, Tile(p, at, tile, row), row, score_keys);
  });
  for_each_group(p, [&](int64_t group, const RowShape& row) {
    if (row.proportional()) plan_row(p, group, row);
  });
  for_each_tile(p, RowKind::kProportional,
                [&](GroupIndex at, int tile, const RowShape& row) { gather_tile(p, Tile(p, at, tile, row), row); });
}

}  // namespace santa::cpu
