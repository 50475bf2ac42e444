// Proposal keys on the CPU (core/proposal.h): rows in one pass are scored by their codes, and what is drawn of a tile
// is scored again from the keys themselves. All else is decode.cpp and one_pass.cpp.
#include "cpu/proposal.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/decode.h"
#include "cpu/one_pass.h"
#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

// The query vectors of all groups as the codes are scored with them.
struct QueryCodes {
  std::vector<int16_t> codes;          // [batch, num_kv_heads, group_size, head_dim]
  std::vector<ProposalQuery> queries;  // [batch, num_kv_heads, group_size]
};

float center_product(const float* q, const float* center, int head_dim) {
  float lanes[kCenterLanes];
  for (int lane = 0; lane < kCenterLanes; ++lane) {
    lanes[lane] = lane_sum(lane, head_dim, [&](float sum, int d) { return std::fma(q[d], center[d], sum); });
  }
  for (int apart = kCenterLanes / 2; apart > 0; apart /= 2) {
    for (int lane = 0; lane < apart; ++lane) lanes[lane] += lanes[lane + apart];
  }
  return lanes[0];
}

QueryCodes encode_queries(const ProposalParams& p, const std::vector<float>& queries) {
  const DecodeParams& d = p.decode;
  QueryCodes encoded{std::vector<int16_t>(queries.size()), std::vector<ProposalQuery>(queries.size() / d.head_dim)};
  std::vector<float> scaled(d.head_dim);
  for (size_t i = 0; i < encoded.queries.size(); ++i) {
    const GroupIndex at = group_at(d, static_cast<int64_t>(i) / d.group_size);
    const int64_t statistics = p.statistics_offset(at.batch_index, at.kv_head);
    const float* q = queries.data() + i * d.head_dim;
    float largest = 0.0f;
    for (int feature = 0; feature < d.head_dim; ++feature) {
      scaled[feature] = q[feature] * p.channel_scale[statistics + feature];
      largest = larger_magnitude(largest, scaled[feature]);
    }
    const float scale = query_scale_of(largest), inverse = inverse_scale_of(scale);
    const float score_scale = d.score_scale(at.kv_head);
    for (int feature = 0; feature < d.head_dim; ++feature) {
      encoded.codes[i * d.head_dim + feature] = static_cast<int16_t>(query_code_of(scaled[feature], inverse));
    }
    encoded.queries[i] = {score_scale * scale, score_scale * center_product(q, p.center + statistics, d.head_dim)};
  }
  return encoded;
}

// Logits of the proposal: see ScoreKeys.
void score_codes(const ProposalParams& p, const QueryCodes& encoded, GroupIndex at, const RowShape& row, int64_t first,
                 int count, float* scores, int64_t stride) {
  const DecodeParams& d = p.decode;
  const int64_t head = d.group_index(at.batch_index, at.kv_head) * d.group_size;
  const auto codes = p.code_rows(at.batch_index, at.kv_head, row.kv_start);
  const auto scales = p.scale_rows(at.batch_index, at.kv_head, row.kv_start);
  std::vector<int32_t> products(d.group_size);
  for (int n = 0; n < count; ++n) {
    code_products(encoded.codes.data() + head * d.head_dim, d.group_size, codes.row(first + n), d.head_dim,
                  products.data());
    const float scale = float_of_float16(*scales.row(first + n));
    for (int h = 0; h < d.group_size; ++h) scores[h * stride + n] = encoded.queries[head + h].logit(products[h], scale);
  }
}

// Draws one set of keys for all heads of a block from a tile that was scored, and adds both to the sums. Returns how
// many.
int propose(const ProposalParams& p, GroupIndex at, const RowShape& row, ScoredTile& tile, int block_index,
            const ScoreKeys& exact_keys, PartSums& sums) {
  const DecodeParams& d = p.decode;
  const HeadBlock block = head_block_of(d, block_index);
  const float floor = floor_draws(d.num_samples, block.count, row.span_len);
  uint32_t units[kMostProposalTileKv];
  for (int n = 0; n < tile.count; ++n) {
    float expected = 0.0f;
    for (int h = block.first; h < block.first + block.count; ++h) {
      // A head that takes no part can have NaN here.
      if (tile.rates[h] > 0.0f) expected += tile.rates[h] * tile.exponential(h, n);
    }
    units[n] = proposal_units(expected + floor);
  }
  int32_t counts[kMostProposalTileKv];
  const RandomStream stream = stream_of(d, at, row, block_index, d.num_head_blocks());
  draw_counts(units, tile.count, tile.offset(d, row, stream, 0, kProposalUnitBits), kProposalUnitBits, counts);

  // What is drawn comes first in `exact` and `drawn`.
  int drawn[kMostProposalTileKv], rows = 0;
  std::vector<float> exact(static_cast<size_t>(d.group_size) * kMostProposalTileKv);
  for (int n = 0; n < tile.count; ++n) {
    if (counts[n] == 0) continue;
    exact_keys(at, row, tile.first + n, 1, exact.data() + rows, kMostProposalTileKv);
    drawn[rows++] = n;
  }
  // An exact logit can be far above all of the proposal's.
  for (int h = block.first; h < block.first + block.count; ++h) {
    sums.add_tile(h, tile.states[h],
                  fmaxf(tile.references[h], max_block(exact.data() + h * kMostProposalTileKv, rows)));
  }

  float value[kLargestHeadDim], weights[kHeadBlock];
  for (int i = 0; i < rows; ++i) {
    const int n = drawn[i];
    for (int j = 0; j < block.count; ++j) {
      const int h = block.first + j;
      weights[j] = inclusion_weight(exact[h * kMostProposalTileKv + i], sums.reference[h], units[n], kProposalUnitBits);
      sums.drawn[h] += weights[j];
      sums.z[h] += weights[j] - inclusion_weight(tile.score_of(h, n), sums.reference[h], units[n], kProposalUnitBits);
    }
    widen_values(d, at, row, tile.first + n, 1, value);
    accumulate_block(weights, 1, block.count, value, 1, d.head_dim, sums.n + block.first * d.head_dim);
  }
  return rows;
}

void sample_part(const ProposalParams& p, GroupIndex at, int part, const RowShape& row, const float* levels,
                 const ScoreKeys& proposal_keys, const ScoreKeys& exact_keys) {
  const DecodeParams& d = p.decode;
  const int64_t group = d.group_index(at.batch_index, at.kv_head);
  const int64_t begin = static_cast<int64_t>(part) * row.tile_kv;
  const int64_t end = std::min<int64_t>(begin + row.tile_kv, row.kv_len);
  std::vector<int32_t> rows(d.num_head_blocks(), 0);
  PartSums sums(d, group, part, p.tile_drawn);
  ScoredTile tile(d.group_size);
  for (tile.first = begin; tile.first < end; tile.first += row.draw_kv) {
    tile.count = static_cast<int>(std::min<int64_t>(row.draw_kv, end - tile.first));
    tile.score(d, at, row, levels, proposal_keys);
    for (int block = 0; block < d.num_head_blocks(); ++block) {
      rows[block] += propose(p, at, row, tile, block, exact_keys, sums);
    }
  }
  for (int block = 0; d.rows_read != nullptr && block < d.num_head_blocks(); ++block) {
    d.tile_rows[(group * d.num_head_blocks() + block) * d.max_tiles + part] = rows[block];
  }
}

}  // namespace

void decode_proposal(const ProposalParams& p) {
  const DecodeParams& d = p.decode;
  check_rows(d);
  const std::vector<float> queries = widen_queries(d);
  const QueryCodes encoded = encode_queries(p, queries);
  const ScoreKeys exact_keys = attended_scores(d, exact_scores(d, queries));
  const ScoreKeys proposal_keys =
      attended_scores(d, [&](GroupIndex at, const RowShape& row, int64_t first, int count, float* scores,
                             int64_t stride) { score_codes(p, encoded, at, row, first, count, scores, stride); });
  const auto run = [&] {
    for_each_part(d, proposal_keys, /*pilot_run=*/1,
                  [&](GroupIndex at, int part, const RowShape& row, const float* levels) {
                    sample_part(p, at, part, row, levels, proposal_keys, exact_keys);
                  });
  };
  const auto lse = [&](int64_t group, int h, int num_parts) {
    ProposalState state = empty_proposal_state();
    for (int part = 0; part < num_parts; ++part) {
      const int64_t stats = d.stats_offset(group) + static_cast<int64_t>(part) * d.group_size + h;
      state = merge_proposals(state, {d.tile_max[stats], d.tile_sum[stats], p.tile_drawn[stats]});
    }
    return log2_guarded(state);
  };
  decode_rows(d, exact_keys, {run, lse});
}

void append_proposal(const AppendProposalParams& p) {
  for (int b = 0; b < p.batch; ++b) {
    for (int n = 0; n < p.num_keys; ++n) {
      const int64_t position = p.position(b, n);
      if (position < p.limit) continue;
      throw std::invalid_argument(std::string("santa: ") + (p.by_slot ? "slots" : "positions") + " of row " +
                                  std::to_string(b) + " has " + std::to_string(position) + "; it needs to be below " +
                                  std::to_string(p.limit) + ", or negative for a key that is left out");
    }
  }
  const int64_t groups = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> key(p.head_dim), inverse(p.head_dim);
    for (int64_t group = begin; group < end; ++group) {
      const int b = static_cast<int>(group / p.num_kv_heads), head = static_cast<int>(group % p.num_kv_heads);
      const int64_t statistics = p.statistics_offset(b, head);
      const float *center = p.center + statistics, *channel_scale = p.channel_scale + statistics;
      std::transform(channel_scale, channel_scale + p.head_dim, inverse.begin(), inverse_scale_of);
      for (int n = 0; n < p.num_keys; ++n) {
        const int64_t position = p.position(b, n);
        if (position < 0) continue;
        const int64_t offset = b * p.stride_new_batch + n * p.stride_new_token + head * p.stride_new_head;
        widen(static_cast<const char*>(p.k_new) + offset * element_size(p.dtype), p.dtype, key.data(), p.head_dim);
        float largest = 0.0f;
        for (int d = 0; d < p.head_dim; ++d) {
          key[d] = centred_feature(key[d], center[d], inverse[d]);
          largest = larger_magnitude(largest, key[d]);
        }
        const uint16_t stored = code_scale_of(largest);
        const float key_inverse = inverse_scale_of(float_of_float16(stored));
        const auto place = p.place_of(b, position);
        p.scales[place.batch * p.stride_scales_batch + place.token * p.stride_scales_token +
                 head * p.stride_scales_head] = stored;
        uint8_t* codes = p.codes + place.batch * p.stride_codes_batch + place.token * p.stride_codes_token +
                         head * p.stride_codes_head;
        for (int j = 0; j < p.head_dim / 2; ++j) {
          codes[j] = packed_codes(code_of(key[j], key_inverse), code_of(key[j + p.head_dim / 2], key_inverse));
        }
      }
    }
  });
}

}  // namespace santa::cpu
