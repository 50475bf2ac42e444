#include "cpu/one_pass.h"

#include <algorithm>
#include <vector>

#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

// The levels of a group's heads: what its pilot says of their log-sum-exp, base 2.
void pilot_levels(const DecodeParams& p, GroupIndex at, const RowShape& row, const ScoreKeys& score_keys, int run,
                  float* levels) {
  const int size = pilot_size(row.kv_len);
  std::vector<float> scores(static_cast<size_t>(p.group_size) * kPilotKeys);
  for (int i = 0, count; i < size; i += count) {  // neighbours are scored together
    const int first = pilot_position(i, row.kv_len, run);
    for (count = 1; i + count < size && pilot_position(i + count, row.kv_len, run) == first + count;) ++count;
    score_keys(at, row, first, count, scores.data() + i, kPilotKeys);
  }
  float exponentials[kPilotKeys];
  const float spaced = spaced_log2_weight(row.kv_len);
  for (int h = 0; h < p.group_size; ++h) {
    float* weighted = scores.data() + h * kPilotKeys;
    for (int i = 0; i < size; ++i) weighted[i] += pilot_log2_weight(i, row.kv_len, spaced);
    const float max = max_block(weighted, size);
    levels[h] = log2_sum({max, exp2_block(weighted, max, exponentials, size)});
  }
}

// One set of rows for all heads of a block. Returns how many.
int gather_grouped(const DecodeParams& p, GroupIndex at, const RowShape& row, const ScoredTile& tile, int block_index,
                   PartSums& sums) {
  const HeadBlock block = head_block_of(p, block_index);
  uint32_t units[kDrawTileKv];
  for (int n = 0; n < tile.count; ++n) {
    float expected = 0.0f;
    for (int h = block.first; h < block.first + block.count; ++h) {
      // A head that takes no part can have NaN here.
      if (tile.rates[h] > 0.0f) expected += tile.rates[h] * tile.exponential(h, n);
    }
    units[n] = inclusion_units(expected);
  }
  int32_t counts[kDrawTileKv];
  const int64_t num_draws = static_cast<int64_t>(p.num_samples) * block.count;
  const RandomStream stream = stream_of(p, at, row, block_index, p.num_head_blocks());
  draw_counts(units, tile.count, tile.offset(p, row, stream, num_draws, kGroupedUnitBits), kGroupedUnitBits, counts);

  int rows = 0;
  float value[kLargestHeadDim], weights[kHeadBlock];
  for (int n = 0; n < tile.count; ++n) {
    if (counts[n] == 0) continue;
    ++rows;
    widen_values(p, at, row, tile.first + n, 1, value);
    for (int j = 0; j < block.count; ++j) {
      const int h = block.first + j;
      weights[j] = inclusion_weight(tile.score_of(h, n), tile.references[h], units[n]) * tile.factors[h];
    }
    accumulate_block(weights, 1, block.count, value, 1, p.head_dim, sums.n + block.first * p.head_dim);
  }
  return rows;
}

// Rows of its own for each head of a block: their values are added up and multiplied once. Returns how many are
// different.
int gather_systematic(const DecodeParams& p, GroupIndex at, const RowShape& row, const ScoredTile& tile,
                      int block_index, PartSums& sums) {
  const HeadBlock block = head_block_of(p, block_index);
  const int unit_bits = unit_bits_of(p.sampler, p.num_samples);
  int32_t counts[kHeadBlock][kDrawTileKv];
  float scales[kHeadBlock];
  for (int j = 0; j < block.count; ++j) {
    const int h = block.first + j;
    uint32_t units[kDrawTileKv], tile_units = 0;
    for (int n = 0; n < tile.count; ++n) {
      units[n] = draw_units(tile.rates[h] * tile.exponential(h, n), static_cast<float>(p.num_samples), unit_bits);
      tile_units += units[n];
    }
    const RandomStream stream = stream_of(p, at, row, h, p.group_size);
    draw_counts(units, tile.count, tile.offset(p, row, stream, p.num_samples, unit_bits), unit_bits, counts[j]);
    scales[j] = draw_scale(tile.states[h], tile.references[h], tile_units, unit_bits) * tile.factors[h];
  }

  int rows = 0;
  float value[kLargestHeadDim];
  std::vector<float> drawn(static_cast<size_t>(block.count) * p.head_dim, 0.0f);
  for (int n = 0; n < tile.count; ++n) {
    bool read = false;
    for (int j = 0; j < block.count; ++j) read |= counts[j][n] > 0;
    if (!read) continue;
    ++rows;
    widen_values(p, at, row, tile.first + n, 1, value);
    for (int j = 0; j < block.count; ++j) {
      if (counts[j][n] > 0) add_block(value, counts[j][n], p.head_dim, drawn.data() + j * p.head_dim);
    }
  }
  for (int j = 0; j < block.count && rows > 0; ++j) {
    const bool any = std::any_of(counts[j], counts[j] + tile.count, [](int32_t count) { return count > 0; });
    float* n = sums.n + (block.first + j) * p.head_dim;
    for (int d = 0; d < p.head_dim && any; ++d) n[d] += scales[j] * drawn[j * p.head_dim + d];
  }
  return rows;
}

void sample_part(const DecodeParams& p, GroupIndex at, int part, const RowShape& row, const float* levels,
                 const ScoreKeys& score_keys) {
  const int64_t group = p.group_index(at.batch_index, at.kv_head);
  const int64_t begin = static_cast<int64_t>(part) * row.tile_kv;
  const int64_t end = std::min<int64_t>(begin + row.tile_kv, row.kv_len);
  std::vector<int32_t> rows(p.num_head_blocks(), 0);
  PartSums sums(p, group, part);
  ScoredTile tile(p.group_size);
  for (tile.first = begin; tile.first < end; tile.first += row.draw_kv) {
    tile.count = static_cast<int>(std::min<int64_t>(row.draw_kv, end - tile.first));
    tile.score(p, at, row, levels, score_keys);
    for (int h = 0; h < p.group_size; ++h) tile.factors[h] = sums.add_tile(h, tile.states[h], tile.references[h]);
    for (int block = 0; block < p.num_head_blocks(); ++block) {
      rows[block] += p.sampler == Sampler::kGrouped ? gather_grouped(p, at, row, tile, block, sums)
                                                    : gather_systematic(p, at, row, tile, block, sums);
    }
  }
  for (int block = 0; p.rows_read != nullptr && block < p.num_head_blocks(); ++block) {
    p.tile_rows[(group * p.num_head_blocks() + block) * p.max_tiles + part] = rows[block];
  }
}

}  // namespace

PartSums::PartSums(const DecodeParams& p, int64_t group, int part, float* tile_drawn)
    : group_size(p.group_size), head_dim(p.head_dim) {
  const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(part) * group_size;
  n = p.o_accum + stats * head_dim, reference = p.tile_max + stats, z = p.tile_sum + stats;
  drawn = tile_drawn != nullptr ? tile_drawn + stats : nullptr;
  std::fill_n(n, static_cast<int64_t>(group_size) * head_dim, 0.0f);
  std::fill_n(reference, group_size, -INFINITY);
  std::fill_n(z, group_size, 0.0f);
  if (drawn != nullptr) std::fill_n(drawn, group_size, 0.0f);
}

float PartSums::add_tile(int h, SoftmaxState tile, float tile_reference) {
  const float raised = fmaxf(reference[h], tile_reference);
  if (raised > reference[h]) {
    const float factor = exp2_below(reference[h], raised);
    for (int d = 0; d < head_dim; ++d) n[h * head_dim + d] *= factor;
    z[h] *= factor;
    if (drawn != nullptr) drawn[h] *= factor;
    reference[h] = raised;
  }
  z[h] += tile.sum * exp2_below(tile.max, raised);
  return exp2_below(tile_reference, raised);
}

ScoredTile::ScoredTile(int group_size)
    : scores(static_cast<size_t>(group_size) * kCapacity),
      exponentials(scores.size()),
      states(group_size),
      references(group_size),
      factors(group_size),
      rates(group_size) {}

void ScoredTile::score(const DecodeParams& p, GroupIndex at, const RowShape& row, const float* levels,
                       const ScoreKeys& score_keys) {
  score_keys(at, row, first, count, scores.data(), kCapacity);
  for (int h = 0; h < p.group_size; ++h) {
    const float* of_head = scores.data() + h * kCapacity;
    const float max = max_block(of_head, count);
    states[h] = {max, exp2_block(of_head, max, exponentials.data() + h * kCapacity, count)};
    const float share = p.budget == Budget::kStreaming ? streaming_share(states[h], levels[h], count, row.span_len)
                                                       : uniform_share(count, row.span_len);
    rates[h] = draw_rate(p.num_samples, share, states[h]);
    references[h] = tile_reference(p.budget, levels[h], max);
  }
}

void draw_counts(const uint32_t* units, int count, uint32_t offset, int unit_bits, int32_t* counts) {
  uint32_t below = 0;
  for (int n = 0; n < count; ++n) {
    counts[n] = static_cast<int32_t>(draws_between(below, units[n], offset, unit_bits));
    below += units[n];
  }
}

void for_each_part(const DecodeParams& p, const ScoreKeys& score_keys, int pilot_run, const SamplePart& sample) {
  std::vector<float> levels(static_cast<size_t>(p.batch) * p.num_kv_heads * p.group_size, 0.0f);
  if (p.has_levels) {
    for_each_group(p, [&](int64_t group, const RowShape&) {
      const GroupIndex at = group_at(p, group);
      for (int h = 0; h < p.group_size; ++h) {
        levels[group * p.group_size + h] = p.level[p.output_index(at.batch_index, at.kv_head, h)] * p.level_scale;
      }
    });
  } else if (p.budget == Budget::kStreaming) {
    for_each_group(p, [&](int64_t group, const RowShape& row) {
      if (!row.one_pass()) return;
      pilot_levels(p, group_at(p, group), row, score_keys, pilot_run, levels.data() + group * p.group_size);
    });
  }
  for_each_tile(p, RowKind::kOnePass, [&](GroupIndex at, int part, const RowShape& row) {
    const int64_t group = p.group_index(at.batch_index, at.kv_head);
    sample(at, part, row, levels.data() + group * p.group_size);
  });
}

void decode_one_pass(const DecodeParams& p, const ScoreKeys& score_keys, int pilot_run) {
  for_each_part(p, score_keys, pilot_run, [&](GroupIndex at, int part, const RowShape& row, const float* levels) {
    sample_part(p, at, part, row, levels, score_keys);
  });
}

}  // namespace santa::cpu
