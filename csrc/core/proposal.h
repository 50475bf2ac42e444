// Proposal keys: a copy of K in 4 bits proposes rows, and the rows drawn are scored again, exactly. Everything that
// decides what the copy is, what is drawn by it and how that is weighed is here, once, for host and device.
//
//   k'_n    = (k_n - center) (1 / channel_scale)                        features of a key, float32
//   scale_n = max|k'_n| / 7, as float16      code_n = clamp(rint(k'_n (1 / scale_n)), -8, 7)
//   s~_hn   = score_scale (q_scale_h scale_n <q_code_h, code_n> + <q_h, center>)        logits of the proposal, base 2
//
// Rows are drawn from s~ as core/draw.h has it for `grouped` under the streaming budget, its pilot included; a key
// expects a floor more. With s the exact logits and pi the probability that a key is drawn:
//
//   N_h = sum over the drawn  exp2(s_hn) / pi_n  v_n
//   Z_h = sum over all  exp2(s~_hn)  +  sum over the drawn  (exp2(s_hn) - exp2(s~_hn)) / pi_n
//
// Both are unbiased whatever the codes are worth, as no pi is 0. out = N / Z, lse = log Z: docs/proposals.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/bernoulli.h"
#include "core/draw.h"
#include "core/macros.h"
#include "core/softmax_state.h"

namespace santa {

// ---- codes of a key

constexpr int kMostCode = 7, kLeastCode = -8;
constexpr int kCodeOffset = 8;  // codes are stored as [0, 15]
constexpr float kMostFloat16 = 65504.0f;
constexpr uint16_t kFloat16Nan = 0x7e00u;

// Correctly rounded whatever the compiler's flags: codes are the same bits on every device.
SANTA_HD float rounded_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// Divisions take long, so there is one per channel, key and query vector: 1 / scale, 0 where the scale is 0 or NaN.
SANTA_HD float inverse_scale_of(float scale) { return scale > 0.0f ? rounded_quotient(1.0f, scale) : 0.0f; }

SANTA_HD float centred_feature(float k, float center, float inverse_channel_scale) {
  return (k - center) * inverse_channel_scale;
}

// x >= 0, at most kMostFloat16, rounded to the nearest float16, ties to even.
SANTA_HD uint16_t float16_bits_of(float x) {
  // Subnormal: multiples of 2^-24. What rounds up to the smallest normal number has its bits.
  if (x < 6.103515625e-5f) return static_cast<uint16_t>(rintf(x * 16777216.0f));
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13);
}

SANTA_HD float float_of_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  uint32_t bits;
  std::memcpy(&bits, &subnormal, sizeof(bits));
  if (magnitude >= 0x0400u) bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) bits = (magnitude << 13) | 0x7f800000u;
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The scale of a key, as it is stored. `largest`: of larger_magnitude over its k'. A key that is not finite is NaN, so
// that its score, and what is made of it, is NaN too.
SANTA_HD uint16_t code_scale_of(float largest) {
  if (!is_finite(largest)) return kFloat16Nan;
  return float16_bits_of(fminf(rounded_quotient(largest, static_cast<float>(kMostCode)), kMostFloat16));
}

// `inverse_scale`: of the scale as it is stored.
SANTA_HD int code_of(float feature, float inverse_scale) {
  if (!(inverse_scale > 0.0f)) return 0;
  const float code = rintf(feature * inverse_scale);
  return static_cast<int>(fminf(fmaxf(code, static_cast<float>(kLeastCode)), static_cast<float>(kMostCode)));
}

// Byte j of a key holds feature j in its low nibble and feature j + head_dim / 2 in its high one.
SANTA_HD uint8_t packed_codes(int low, int high) {
  return static_cast<uint8_t>((low + kCodeOffset) | (high + kCodeOffset) << 4);
}
SANTA_HD int low_code(uint8_t packed) { return (packed & 0x0f) - kCodeOffset; }
SANTA_HD int high_code(uint8_t packed) { return (packed >> 4) - kCodeOffset; }

// ---- logits of the proposal

constexpr int kMostQueryCode = 127;

// `largest`: of larger_magnitude over q channel_scale. NaN for a head that is not finite.
SANTA_HD float query_scale_of(float largest) {
  const float scale = rounded_quotient(largest, static_cast<float>(kMostQueryCode));
  return is_finite(scale) ? scale : NAN;
}

SANTA_HD int query_code_of(float scaled_q, float inverse_scale) {
  if (!(inverse_scale > 0.0f)) return 0;
  const float most = static_cast<float>(kMostQueryCode);
  return static_cast<int>(fminf(fmaxf(rintf(scaled_q * inverse_scale), -most), most));
}

// <q, center> in the order of a warp, which fixes its bits: lane l adds up features l, l + 32, ..., then lanes are
// added in a butterfly, 16 apart, 8, 4, 2, 1.
constexpr int kCenterLanes = 32;
template <typename Product>  // product(sum, feature) = fma(q, center, sum)
SANTA_HD float lane_sum(int lane, int head_dim, const Product& product) {
  float sum = 0.0f;
  for (int feature = lane; feature < head_dim; feature += kCenterLanes) sum = product(sum, feature);
  return sum;
}

// What all logits of a query vector have in common.
struct ProposalQuery {
  float factor;  // score_scale q_scale
  float shift;   // score_scale <q, center>

  // `product`: <q_code, code>, exact. `scale`: of the key.
  SANTA_HD float logit(int product, float scale) const {
    return fmaf(factor * scale, static_cast<float>(product), shift);
  }
};

// ---- draws

// A key that the codes underrate must not carry an unbounded weight, so a sixteenth more draws are spread evenly over
// the row: pi is at least kFloorShare R / n, for R = num_samples num_heads draws of a block of heads.
constexpr float kFloorShare = 1.0f / 16.0f;

SANTA_HD float floor_draws(int num_samples, int num_heads, int kv_len) {
  return approximate_quotient(kFloorShare * static_cast<float>(num_samples) * static_cast<float>(num_heads),
                              static_cast<float>(kv_len));
}

// A tile of kMostProposalTileKv keys adds up to 2^30 units at most.
constexpr int kProposalUnitBits = 22;

// inclusion_units of what a key expects, which is more than 0 by the floor.
SANTA_HD uint32_t proposal_units(float expected) {
  const auto units = static_cast<uint32_t>(fminf(expected, 1.0f) * static_cast<float>(1u << kProposalUnitBits) + 0.5f);
  return units > 0 ? units : 1;
}

// ---- sums

// Z of some keys, and what it is guarded with: the plain Horvitz-Thompson sum of exp2(s) / pi over those drawn. Both in
// units of exp2(reference). Z of a part can be negative.
struct ProposalState {
  float reference, z, drawn;
};

SANTA_HD ProposalState empty_proposal_state() { return {-INFINITY, 0.0f, 0.0f}; }

SANTA_HD ProposalState merge_proposals(ProposalState a, ProposalState b) {
  const float reference = fmaxf(a.reference, b.reference);
  const float factor_a = exp2_below(a.reference, reference), factor_b = exp2_below(b.reference, reference);
  return {reference, a.z * factor_a + b.z * factor_b, a.drawn * factor_a + b.drawn * factor_b};
}

// log2 of Z. Codes of any use leave Z near the plain sum; those of none can leave it negative, and then half of that
// sum is what it is taken for. So |out| is at most twice the largest |v|, whatever the codes are.
SANTA_HD float log2_guarded(ProposalState row) {
  const float least = fmaxf(0.5f * row.drawn, 1.17549435e-38f);  // finite, even if all that was drawn is too small
  return row.reference + log2f(row.z < least ? least : row.z);   // NaN is not less: it stays
}

}  // namespace santa
