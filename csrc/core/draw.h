// Drawing in one pass: each tile of a row is drawn from when its keys have been scored, and nobody waits for the rest
// of the row. Everything that decides what is drawn and how it is weighed is here, once, for host and device.
//
// Tile t of a row with n keys gives query head h the share a_h of its S draws:
//
//   streaming   a_h = min(1, max(exp2(lse of the tile - level_h), tile keys / (4 n)))
//   uniform     a_h = tile keys / n
//
// `level` is a pilot's estimate of the row's log-sum-exp: the estimate is unbiased whatever it is worth, as shares
// depend on scores alone. The floor keeps a level that is far too high from starving the row. Key n of the tile expects
//
//   grouped     m_n = sum over the heads h of a block  S a_h softmax_t(s_h)_n      draws, one at most
//   systematic  m_n = S a_h softmax_t(s_h)_n                                       draws, for each head by itself
//
// in whole units of 2^-unit_bits, so that a boundary between two keys is rounded once and inclusion probabilities are
// exact. Thresholds are systematic: one per draw, all at the same random offset into their unit.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/mixture.h"
#include "core/philox.h"
#include "core/samplers.h"
#include "core/softmax_state.h"
#include "core/tiling.h"

namespace santa {

// ---- pilot: keys whose scores stand for the row's

constexpr int kPilotFirst = 16;    // attention sinks
constexpr int kPilotLast = 48;     // and what is recent weigh 1 each,
constexpr int kPilotSpaced = 192;  // others stand for the rest between them
constexpr int kPilotKeys = kPilotFirst + kPilotSpaced + kPilotLast;

SANTA_HD int pilot_size(int kv_len) { return kv_len < kPilotKeys ? kv_len : kPilotKeys; }

// Position of pilot key i. Spaced keys come in runs of `run` neighbours (a divisor of kPilotSpaced), for caches that
// hold neighbouring keys side by side. All positions are different; a row of up to kPilotKeys keys is its own pilot.
SANTA_HD int pilot_position(int i, int kv_len, int run) {
  if (kv_len <= kPilotKeys || i < kPilotFirst) return i;
  if (i >= kPilotFirst + kPilotSpaced) return kv_len - kPilotKeys + i;
  const int spaced = i - kPilotFirst, runs = kPilotSpaced / run;
  const int64_t between = kv_len - kPilotFirst - kPilotLast;
  const int64_t first = ((2 * (spaced / run) + 1) * between - kPilotSpaced) / (2 * runs);
  return kPilotFirst + static_cast<int>(first) + spaced % run;
}

// log2 of the number of keys that pilot key i stands for. `spaced`: spaced_log2_weight, the same for all that are
// spaced.
SANTA_HD float spaced_log2_weight(int kv_len) {
  return log2f(static_cast<float>(kv_len - kPilotFirst - kPilotLast) / kPilotSpaced);
}
SANTA_HD float pilot_log2_weight(int i, int kv_len, float spaced) {
  return kv_len <= kPilotKeys || i < kPilotFirst || i >= kPilotFirst + kPilotSpaced ? 0.0f : spaced;
}

// ---- shares and units

SANTA_HD float streaming_share(SoftmaxState tile, float level, int tile_keys, int kv_len) {
  const float floor = approximate_quotient(0.25f * static_cast<float>(tile_keys), static_cast<float>(kv_len));
  return fminf(1.0f, fmaxf(tile.sum * exp2f(tile.max - level), floor));  // fmaxf passes over the NaN of two infinities
}

SANTA_HD float uniform_share(int tile_keys, int kv_len) {
  return static_cast<float>(tile_keys) / static_cast<float>(kv_len);
}

// Draws per unit of exp2(score - tile max), of one head. A head whose sum is not finite takes no part: its output is
// NaN, its neighbours' are not.
SANTA_HD float draw_rate(int num_samples, float share, SoftmaxState tile) {
  if (!is_finite(tile.sum) || !(tile.sum > 0.0f)) return 0.0f;
  return approximate_quotient(static_cast<float>(num_samples) * share, tile.sum);
}

// A tile of 128 keys adds up to 2^31 units at most, and an offset still fits 32 bits.
constexpr int kGroupedUnitBits = 24;

SANTA_HD int unit_bits_of(Sampler sampler, int num_samples) {
  if (sampler == Sampler::kGrouped) return kGroupedUnitBits;
  int bits = kGroupedUnitBits;
  while (bits > 0 && (static_cast<int64_t>(num_samples) << bits) > (int64_t{1} << 31) - 2 * kDrawTileKv) --bits;
  return bits;
}

// A key with any mass has one unit at least: one that could never be drawn would bias the estimate. 0 of zero and NaN.
SANTA_HD uint32_t draw_units(float expected, float most, int unit_bits) {
  if (!(expected > 0.0f)) return 0;
  const uint32_t units = static_cast<uint32_t>(fminf(expected, most) * static_cast<float>(1u << unit_bits) + 0.5f);
  return units > 0 ? units : 1;
}

// grouped: one draw at most.
SANTA_HD uint32_t inclusion_units(float expected) {
  const uint32_t units = draw_units(expected, 1.0f, kGroupedUnitBits), most = 1u << kGroupedUnitBits;
  return units < most ? units : most;
}

// Draws of a key that covers [below, below + units) of its tile's units.
SANTA_HD uint32_t draws_between(uint32_t below, uint32_t units, uint32_t offset, int unit_bits) {
  return ((below + units + offset) >> unit_bits) - ((below + offset) >> unit_bits);
}

// ---- the random offset of a tile, in [0, 2^unit_bits)
//
// streaming: a number for each tile. uniform: what a tile expects is known beforehand, so one number and one line of
// thresholds serve the whole row, and the draws of all tiles add up to `num_draws`, the row's.
SANTA_HD uint32_t tile_offset(Budget budget, RandomStream stream, int64_t first_key, int tile_kv, int kv_len,
                              int64_t num_draws, int unit_bits) {
  const bool streaming = budget == Budget::kStreaming;
#if defined(__CUDA_ARCH__)
  const uint32_t tile = static_cast<uint32_t>(first_key) >> (__ffs(tile_kv) - 1);  // a power of two
#else
  const uint32_t tile = static_cast<uint32_t>(first_key) / static_cast<uint32_t>(tile_kv);
#endif
  uint32_t bits = static_cast<uint32_t>(stream.bits(streaming ? tile : 0u, 0) >> 32);
  if (!streaming) {
    const uint64_t before = static_cast<uint64_t>(num_draws) * static_cast<uint64_t>(first_key) % kv_len;
    bits += static_cast<uint32_t>((before << 32) / static_cast<uint64_t>(kv_len));
  }
  return unit_bits == 0 ? 0 : bits >> (32 - unit_bits);
}

// ---- weights

// What exp2(score) is measured against in a tile: large enough to keep sums finite, and the same for nearly all tiles
// of a row, so that their sums add up without rescaling.
SANTA_HD float tile_reference(Budget budget, float level, float tile_max) {
  return budget == Budget::kStreaming && is_finite(level) ? fmaxf(level, tile_max) : tile_max;
}

// grouped: Horvitz-Thompson, exp2(score - reference) / P(the key is drawn).
SANTA_HD float inclusion_weight(float score, float reference, uint32_t units, int unit_bits = kGroupedUnitBits) {
  return exp2_below(score, reference) * (static_cast<float>(1u << unit_bits) / static_cast<float>(units));
}

// systematic: what each draw of a head stands for, its share of the tile's mass. `tile_units`: of all its keys.
SANTA_HD float draw_scale(SoftmaxState tile, float reference, uint32_t tile_units, int unit_bits) {
  return tile.sum * exp2_below(tile.max, reference) *
         (static_cast<float>(1u << unit_bits) / static_cast<float>(tile_units));
}

}  // namespace santa
