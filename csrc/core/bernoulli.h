// Bernoulli scores (arXiv 2605.01910, "Bernoulli qK^T sampling"): q_h is replaced by a random ternary vector, so that a
// score reads only some features of a key and adds or subtracts them.
//
//     t_i = sign(q_i) Bernoulli(p_i),   p_i = |q_i| / max|q|,   E[max|q| t_i] = q_i
//
// The mean of B draws is an integer vector over B: counts_i in [-B, B], and max|q| / B <counts, k> is an unbiased
// estimate of <q, k>. How the draws hang together is the sampler's business; the marginal means are the same for all.
//
// A probability is an integer, weight_i = p_i 2^32 rounded once, and a uniform number is 32 random bits: p_i = 1 is
// always drawn, p_i = 0 never, and counts are the same bits on every device. A weight is off by half a unit, less than
// 2^-33 of max|q|. Its quotient is taken in float64, correctly rounded on every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/philox.h"

namespace santa {

enum class ScoreSampler : int { kIndependent = 0, kSystematic = 1, kShared = 2 };

constexpr int kMaxNumDraws = 4096;  // B: counts fit 16 bits, and counts times a 16-bit key are exact in float32

// max|q| of a head: NaN where an element is NaN, so that what comes of it is NaN too.
SANTA_HD float larger_magnitude(float max, float x) {
  const float magnitude = fabsf(x);
  return magnitude > max || magnitude != magnitude ? magnitude : max;
}

// p 2^32 for one feature; 0 where q has no usable maximum (all of it is 0, or something is not finite).
SANTA_HD uint64_t draw_weight_of(float x, float max) {
  if (!(max > 0.0f) || max - max != 0.0f) return 0;
  return static_cast<uint64_t>(static_cast<double>(fabsf(x)) / static_cast<double>(max) * 4294967296.0 + 0.5);
}

// The factor of <counts, k>: 0 for a head that is zero, NaN for one that is not finite.
SANTA_HD float draw_scale_of(float max, int num_draws) {
  const float scale = max / static_cast<float>(num_draws);
  return scale - scale == 0.0f ? scale : NAN;
}

// The random numbers of a head's scores: a pure function of (seed, row seed, position, head, draw, feature). The top
// bit of the head word is set, which that of a value draw never is. `head` is the query head, and for the shared
// sampler the KV head.
struct ScoreStream {
  RandomStream stream;

  SANTA_HD static ScoreStream make(int64_t seed, int64_t row_seed, int64_t position, int head) {
    return {RandomStream::make(seed, row_seed, position, static_cast<int>(static_cast<uint32_t>(head) | 0x80000000u))};
  }

  // Uniform numbers of 32 bits for features 4 chunk to 4 chunk + 3 of a draw.
  SANTA_HD PhiloxBlock words(uint32_t draw, uint32_t chunk) const {
    return philox4x32_10({{draw, chunk, 0u, 0u}}, stream.key_0, stream.key_1);
  }
};

// Independent and shared: how many of the B uniform numbers of each feature fall below its weight. The shared sampler
// uses the same numbers for all heads of a KV head: the features that any head of the group reads are then those whose
// largest weight was drawn, and not a union of sets that know nothing of each other.
SANTA_HD void count_draws(const ScoreStream& stream, uint32_t chunk, int num_draws, const uint64_t (&weights)[4],
                          int (&counts)[4]) {
  counts[0] = counts[1] = counts[2] = counts[3] = 0;
  for (int draw = 0; draw < num_draws; ++draw) {
    const PhiloxBlock block = stream.words(static_cast<uint32_t>(draw), chunk);
    for (int i = 0; i < 4; ++i) counts[i] += block.word[i] < weights[i] ? 1 : 0;
  }
}

// Systematic: B p_i laid end to end, C_i their running sum; one uniform number u per head. counts_i =
// floor(C_i + u) - floor(C_{i-1} + u): B p_i rounded up or down, and a sum that is fixed to within 1. `end` and `begin`
// are running sums of weights (below 2^40), so C is exact in 64 bits.
SANTA_HD uint32_t systematic_offset(const ScoreStream& stream) { return stream.words(0, 0).word[0]; }

SANTA_HD int systematic_count(uint64_t begin, uint64_t end, int num_draws, uint32_t offset) {
  const auto floor_of = [&](uint64_t sum) { return (sum * static_cast<uint64_t>(num_draws) + offset) >> 32; };
  return static_cast<int>(floor_of(end) - floor_of(begin));
}

// acc[i] += times * x[i] without a multiplication: by adding x, doubled as often as `times` has bits. Scores (x a
// feature of consecutive keys) and the values of counting samplers (x a drawn row) are sums of this alone.
template <typename Number>
inline void add_times(const Number* x, int times, int count, Number* acc) {
  if (times == 1) {
    for (int i = 0; i < count; ++i) acc[i] = acc[i] + x[i];
    return;
  }
  if (times == -1) {
    for (int i = 0; i < count; ++i) acc[i] = acc[i] - x[i];
    return;
  }
  constexpr int kBlock = 64;
  Number power[kBlock], term[kBlock];
  for (int first = 0; first < count; first += kBlock) {
    const int block = count - first < kBlock ? count - first : kBlock;
    for (int i = 0; i < block; ++i) power[i] = x[first + i], term[i] = Number();
    for (unsigned bits = times < 0 ? 0u - static_cast<unsigned>(times) : static_cast<unsigned>(times); bits != 0;) {
      if ((bits & 1u) != 0) {
        for (int i = 0; i < block; ++i) term[i] = term[i] + power[i];
      }
      bits >>= 1;
      if (bits == 0) break;
      for (int i = 0; i < block; ++i) power[i] = power[i] + power[i];
    }
    if (times < 0) {
      for (int i = 0; i < block; ++i) acc[first + i] = acc[first + i] - term[i];
    } else {
      for (int i = 0; i < block; ++i) acc[first + i] = acc[first + i] + term[i];
    }
  }
}

}  // namespace santa
