// The estimators of the proportional budget: how rows are drawn from a CDF, in integers, identically on host and
// device.
//
// A CDF has two levels. Level 1, the tiles of a row: tile t covers [start_t, start_t + mass_t) of [0, total), in units
// of 2^-31 of the row's mass. Level 2, the rows of a tile: row n covers [c_{n-1}, c_n) of [0, c_last), in
// units of 2^-30 of the tile's mass. Boundaries are integers, so each is rounded once and handed to both neighbours,
// sums do not depend on their order, and the counts of a sampler add up to its budget exactly. 32 bits are enough for
// level 1 (a tile's mass is off by half a unit, less than what float32 scores leave open) and keep every product below
// 64 bits.
//
// A sampler places R thresholds in [0, total). A row is drawn once for each threshold inside its interval.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/philox.h"

namespace santa {

enum class Sampler : int { kMultinomial = 0, kStratified = 1, kSystematic = 2, kGrouped = 3 };
enum class Budget : int { kProportional = 0, kUniform = 1, kStreaming = 2 };

constexpr float kTileMassScale = 2147483648.0f;   // 2^31
constexpr float kRowWeightScale = 1073741824.0f;  // 2^30

// A share in [0, 1] as an integer interval length. Whatever has mass keeps an interval of at least one unit: a row that
// could never be drawn would bias every estimator. Zero and NaN give 0.
SANTA_HD uint32_t tile_mass_of(float share) {
  return share > 0.0f ? static_cast<uint32_t>(fminf(share, 1.25f) * kTileMassScale) + 1 : 0;
}
SANTA_HD uint32_t row_weight_of(float share) {
  return share > 0.0f ? static_cast<uint32_t>(fminf(share, 2.0f) * kRowWeightScale) + 1 : 0;
}

// A random point of a CDF: level 1 in whole units (scaled, see Draws), and how far it lies into its unit.
struct Threshold {
  uint64_t scaled;
  float fraction;  // in [0, 1)
};

// 64 random bits to a point of [0, total).
SANTA_HD Threshold random_point(uint64_t bits, uint32_t total) {
  return {mul_high(bits, total), static_cast<float>((bits * total) >> 40) * 5.9604645e-8f};
}

// Where a few units in the last place don't matter.
SANTA_HD float approximate_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// The draws of one stream.
//
// Threshold m of a sorted sampler lies at (m total + r) / R, r a random point of [0, total). Comparing it with an
// integer boundary b takes no division: it is below b if m total + r < b R. So thresholds and boundaries are scaled by
// the unit, which is R, or 1 for multinomial sampling.
struct Draws {
  Sampler sampler;
  RandomStream stream;
  uint32_t segment;
  uint32_t num_draws;       // R, below 2^31: S for one query head, S * gqa_group_size for a grouped stream
  uint32_t total;           // of level 1
  Threshold shared_offset;  // the one random point of systematic sampling

  // `bits` are stream.bits(segment, 0): a caller that waits for the total can have them ready.
  SANTA_HD static Draws make(Sampler sampler, RandomStream stream, uint32_t segment, uint32_t num_draws, uint32_t total,
                             uint64_t bits) {
    return {sampler, stream, segment, num_draws, total, random_point(bits, total)};
  }
  SANTA_HD static Draws make(Sampler sampler, RandomStream stream, uint32_t segment, uint32_t num_draws,
                             uint32_t total) {
    return make(sampler, stream, segment, num_draws, total, stream.bits(segment, 0));
  }

  SANTA_HD bool sorted() const;
  SANTA_HD uint32_t unit() const { return sorted() ? num_draws : 1; }
  SANTA_HD Threshold threshold(uint32_t m) const;

  // Number of thresholds below `position`, for sorted samplers. The guess is exact but for rounding (a step or two in
  // millions of draws) and, if offsets differ, for the offset; the loops correct it.
  SANTA_HD uint32_t count_below(uint32_t position) const {
    if (position >= total) return num_draws;
    const uint64_t scaled = static_cast<uint64_t>(position) * num_draws;
    const float guess = approximate_quotient(static_cast<float>(scaled) - static_cast<float>(shared_offset.scaled),
                                             static_cast<float>(total)) +
                        1.0f;
    uint32_t m = guess > 0.0f ? static_cast<uint32_t>(fminf(guess, 2147483520.0f)) : 0;
    if (m > num_draws) m = num_draws;
    while (m > 0 && threshold(m - 1).scaled >= scaled) --m;
    while (m < num_draws && threshold(m).scaled < scaled) ++m;
    return m;
  }
};

// One uniform number per draw, anywhere in the CDF: i.i.d. indices (SANTA).
struct MultinomialSampler {
  SANTA_HD static Threshold threshold(const Draws& draws, uint32_t m) {
    return random_point(draws.stream.bits(draws.segment, m), draws.total);
  }
};

// One uniform number in each of R equal strata (S2ANTA-strat).
struct StratifiedSampler {
  SANTA_HD static Threshold threshold(const Draws& draws, uint32_t m) {
    const Threshold offset = random_point(draws.stream.bits(draws.segment, m), draws.total);
    return {static_cast<uint64_t>(draws.total) * m + offset.scaled, offset.fraction};
  }
};

// One uniform number for all R strata (S2ANTA-sys). `grouped` places its thresholds in the same way, R = S * group of
// them, over the mean of the group's distributions.
struct SystematicSampler {
  SANTA_HD static Threshold threshold(const Draws& draws, uint32_t m) {
    return {static_cast<uint64_t>(draws.total) * m + draws.shared_offset.scaled, draws.shared_offset.fraction};
  }
};

SANTA_HD bool Draws::sorted() const { return sampler != Sampler::kMultinomial; }

SANTA_HD Threshold Draws::threshold(uint32_t m) const {
  switch (sampler) {
    case Sampler::kMultinomial:
      return MultinomialSampler::threshold(*this, m);
    case Sampler::kStratified:
      return StratifiedSampler::threshold(*this, m);
    default:
      return SystematicSampler::threshold(*this, m);
  }
}

// Level 1 to level 2: from thresholds to positions in [0, weight_sum) of one tile, in float64, correctly rounded on
// every device.
struct TilePositions {
  uint64_t first, width;  // the tile's interval, scaled
  double per_width;

  SANTA_HD static TilePositions make(uint32_t unit, uint32_t tile_start, uint32_t tile_mass) {
    const uint64_t width = static_cast<uint64_t>(tile_mass) * unit;
    return {static_cast<uint64_t>(tile_start) * unit, width, 1.0 / static_cast<double>(width)};
  }
  SANTA_HD bool contains(Threshold threshold) const {
    return threshold.scaled >= first && threshold.scaled - first < width;
  }
  SANTA_HD uint32_t position(Threshold threshold, uint32_t weight_sum) const {
    const double offset = static_cast<double>(threshold.scaled - first) + static_cast<double>(threshold.fraction);
    const uint32_t floored = static_cast<uint32_t>(offset * (static_cast<double>(weight_sum) * per_width));
    return floored < weight_sum ? floored : weight_sum - 1;
  }
};

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

// Expected number of thresholds in a row's interval: R * (tile_mass / total) * (weight / weight_sum).
SANTA_HD float expected_draws(uint32_t num_draws, uint32_t tile_mass, uint32_t total, uint32_t weight,
                              uint32_t weight_sum) {
  return static_cast<float>(num_draws) * (static_cast<float>(tile_mass) / static_cast<float>(total)) *
         (static_cast<float>(weight) / static_cast<float>(weight_sum));
}

// grouped: Horvitz-Thompson, p / P(the row is selected). Systematic thresholds select a row that expects so many of
// them with probability min(1, expected).
SANTA_HD float selected_weight(float p, float expected) { return p / fminf(1.0f, expected); }

}  // namespace santa
