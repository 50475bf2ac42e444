// Rows that are sampled in one pass (core/draw.h): a part of a row goes through its tiles, and each is scored, drawn
// from and gathered before the next.
#pragma once

#include <functional>
#include <vector>

#include "core/draw.h"
#include "cpu/rows.h"

namespace santa::cpu {

// The running sums of one part: for each head N = sum of exp2(score - reference) v, estimated, and Z = sum of
// exp2(score - reference). They lie where those of an exact tile do, and `combine_head` sees no difference.
struct PartSums {
  float* n;          // [group_size, head_dim]
  float* reference;  // [group_size]
  float* z;          // [group_size]
  float* drawn;      // [group_size]: ProposalState::drawn, or null
  int group_size, head_dim;

  PartSums(const DecodeParams& p, int64_t group, int part, float* tile_drawn = nullptr);

  // Adds a tile to head h's Z and returns what entries of N that are relative to tile_reference are to be multiplied
  // with. Where the reference rises, what was added before shrinks.
  float add_tile(int h, SoftmaxState tile, float tile_reference);
};

// A tile that was scored. Arrays are [group_size], those of keys [group_size, kCapacity].
struct ScoredTile {
  static constexpr int kCapacity = kMostProposalTileKv;
  static_assert(kCapacity >= kDrawTileKv);

  int64_t first;
  int count;
  std::vector<float> scores, exponentials;  // exp2(score - max)
  std::vector<SoftmaxState> states;
  std::vector<float> references, factors;  // PartSums::add_tile
  std::vector<float> rates;                // draw_rate

  explicit ScoredTile(int group_size);

  // Of keys [first, first + count): all but the factors.
  void score(const DecodeParams& p, GroupIndex at, const RowShape& row, const float* levels,
             const ScoreKeys& score_keys);

  float score_of(int h, int n) const { return scores[h * kCapacity + n]; }
  float exponential(int h, int n) const { return exponentials[h * kCapacity + n]; }

  uint32_t offset(const DecodeParams& p, const RowShape& row, RandomStream stream, int64_t num_draws,
                  int unit_bits) const {
    return tile_offset(p.budget, stream, row.span_first + first, row.draw_kv, row.span_len, num_draws, unit_bits);
  }
};

// Calls sample(at, part, row, levels of its heads) for every part of the rows in one pass. pilot_run: pilot_position.
using SamplePart = std::function<void(GroupIndex at, int part, const RowShape& row, const float* levels)>;
void for_each_part(const DecodeParams& p, const ScoreKeys& score_keys, int pilot_run, const SamplePart& sample);

void decode_one_pass(const DecodeParams& p, const ScoreKeys& score_keys, int pilot_run);

// How often each key of a tile is drawn, in key order: counts of units [count].
void draw_counts(const uint32_t* units, int count, uint32_t offset, int unit_bits, int32_t* counts);

}  // namespace santa::cpu
