// The estimators: how rows are drawn from a CDF, in integers, identically on host and device.
//
// A CDF has two levels. Level 1, the tiles of a segment: tile t covers [start_t, start_t + mass_t) of [0, total), in
// units of 2^-48 of the segment's mass. Level 2, the rows of a tile: row n covers [c_{n-1}, c_n) of [0, c_last), in
// units of 2^-30 of the tile's mass. Boundaries are integers, so each is rounded once and handed to both neighbours,
// sums do not depend on their order, and the counts of a sampler add up to its budget exactly.
//
// A sampler places R thresholds in [0, total). A row is drawn once for each threshold inside its interval.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/philox.h"

namespace santa {

enum class Sampler : int { kMultinomial = 0, kStratified = 1, kSystematic = 2, kGrouped = 3 };
enum class Budget : int { kProportional = 0, kUniform = 1 };

constexpr float kTileMassScale = 281474976710656.0f;  // 2^48
constexpr float kRowWeightScale = 1073741824.0f;      // 2^30

// A share in [0, 1] as an integer interval length. Whatever has mass keeps an interval of at least one unit: a row that
// could never be drawn would bias every estimator. Zero and NaN give 0.
SANTA_HD uint64_t tile_mass_of(float share) {
  return share > 0.0f ? static_cast<uint64_t>(fminf(share, 2.0f) * kTileMassScale) + 1 : 0;
}
SANTA_HD uint32_t row_weight_of(float share) {
  return share > 0.0f ? static_cast<uint32_t>(fminf(share, 2.0f) * kRowWeightScale) + 1 : 0;
}

// The draws of one segment and stream.
struct Draws {
  Sampler sampler;
  RandomStream stream;
  uint32_t segment;
  uint32_t num_draws;            // R: S for one query head, S * gqa_group_size for a grouped stream
  uint64_t total;                // of level 1, below 2^50
  uint64_t quotient, remainder;  // of total / R
  uint64_t shared_offset;        // the one random number of systematic sampling, uniform in [0, total)

  // `bits` are stream.bits(segment, 0): a caller that waits for the total can have them ready.
  SANTA_HD static Draws make(Sampler sampler, RandomStream stream, uint32_t segment, uint32_t num_draws, uint64_t total,
                             uint64_t bits) {
    const uint64_t quotient = total / num_draws;
    return {sampler, stream, segment, num_draws, total, quotient, total - quotient * num_draws, mul_high(bits, total)};
  }
  SANTA_HD static Draws make(Sampler sampler, RandomStream stream, uint32_t segment, uint32_t num_draws,
                             uint64_t total) {
    return make(sampler, stream, segment, num_draws, total, stream.bits(segment, 0));
  }

  // Threshold m at (m + r / total) / R of the total, floored: (m total + r) / R for an offset r in [0, total). Flooring
  // changes no draw, because the boundaries a threshold is compared with are integers. The product is split so that
  // every term stays below 2^63 (m, R < 2^31).
  SANTA_HD uint64_t spaced_threshold(uint32_t m, uint64_t offset) const {
    return m * quotient + (m * remainder + offset) / num_draws;
  }

  SANTA_HD bool sorted() const;
  SANTA_HD uint64_t threshold(uint32_t m) const;

  // Number of thresholds below `position`, for sorted samplers. Threshold m lies in [m, m + 1) total / R, so the answer
  // is next to position * R / total; the loops correct the rounding of that guess and run at most a few times.
  SANTA_HD uint32_t count_below(uint64_t position) const {
    if (position >= total) return num_draws;
    const double guess = static_cast<double>(position) / static_cast<double>(total) * num_draws;
    uint32_t m = static_cast<uint32_t>(guess);
    if (m > num_draws) m = num_draws;
    while (m > 0 && threshold(m - 1) >= position) --m;
    while (m < num_draws && threshold(m) < position) ++m;
    return m;
  }
};

// One uniform number per draw, anywhere in the CDF: i.i.d. indices (SANTA).
struct MultinomialSampler {
  SANTA_HD static uint64_t threshold(const Draws& draws, uint32_t m) {
    return mul_high(draws.stream.bits(draws.segment, m), draws.total);
  }
};

// One uniform number in each of R equal strata (S2ANTA-strat).
struct StratifiedSampler {
  SANTA_HD static uint64_t threshold(const Draws& draws, uint32_t m) {
    return draws.spaced_threshold(m, mul_high(draws.stream.bits(draws.segment, m), draws.total));
  }
};

// One uniform number for all R strata (S2ANTA-sys). `grouped` places its thresholds in the same way, R = S * group of
// them, over the mean of the group's distributions.
struct SystematicSampler {
  SANTA_HD static uint64_t threshold(const Draws& draws, uint32_t m) {
    return draws.spaced_threshold(m, draws.shared_offset);
  }
};

SANTA_HD bool Draws::sorted() const { return sampler != Sampler::kMultinomial; }

SANTA_HD uint64_t Draws::threshold(uint32_t m) const {
  switch (sampler) {
    case Sampler::kMultinomial:
      return MultinomialSampler::threshold(*this, m);
    case Sampler::kStratified:
      return StratifiedSampler::threshold(*this, m);
    default:
      return SystematicSampler::threshold(*this, m);
  }
}

// Level 1 to level 2: a position inside a tile of level-1 mass `tile_mass`, as a position in [0, weight_sum). One
// multiplication and one division in float64, correctly rounded on every device.
SANTA_HD uint32_t position_in_tile(uint64_t offset_in_tile, uint64_t tile_mass, uint32_t weight_sum) {
  const double position =
      static_cast<double>(offset_in_tile) * (static_cast<double>(weight_sum) / static_cast<double>(tile_mass));
  const uint32_t floored = static_cast<uint32_t>(position);
  return floored < weight_sum ? floored : weight_sum - 1;
}

// The row whose interval holds `position`: the first one whose cumulative weight exceeds it.
SANTA_HD int row_at(const uint32_t* cumulative, int num_rows, uint32_t position) {
  int low = 0, high = num_rows - 1;
  while (low < high) {
    const int middle = (low + high) >> 1;
    if (cumulative[middle] > position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Expected number of thresholds in a row's interval: R * (tile_mass / total) * (weight / weight_sum). Systematic
// thresholds select the row at least once with probability min(1, that).
SANTA_HD float expected_draws(uint32_t num_draws, uint64_t tile_mass, uint64_t total, uint32_t weight,
                              uint32_t weight_sum) {
  return static_cast<float>(num_draws) * (static_cast<float>(tile_mass) / static_cast<float>(total)) *
         (static_cast<float>(weight) / static_cast<float>(weight_sum));
}

}  // namespace santa
