#include "cpu/vector_ops.h"

#include <cmath>
#include <cstring>

#include "core/bernoulli.h"
#include "core/float8.h"
#include "core/proposal.h"

// Function multiversioning keeps the wheel portable: one build holds baseline, AVX2 and AVX-512 code.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SANTA_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SANTA_MULTIVERSION
#endif

namespace santa::cpu {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SANTA_MULTIVERSION void widen_bfloat16(const uint16_t* src, float* dst, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) dst[i] = from_bits(static_cast<uint32_t>(src[i]) << 16);
}

// float16 by arithmetic, so that it vectorises everywhere: shift exponent and mantissa into place, multiply by 2^112 to
// correct the exponent bias (exact, subnormals included), patch infinities and NaN.
SANTA_MULTIVERSION void widen_float16(const uint16_t* src, float* dst, int64_t count) {
  const float rebias = from_bits(0x77800000u);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t half = src[i], magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    uint32_t bits = to_bits(from_bits(magnitude << 13) * rebias);
    bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    dst[i] = from_bits(bits | sign);
  }
}

SANTA_MULTIVERSION void widen_float8(const uint8_t* src, float* dst, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) dst[i] = float_of_e4m3(src[i]);
}

}  // namespace

void widen(const void* src, Dtype dtype, float* dst, int64_t count) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return widen_bfloat16(static_cast<const uint16_t*>(src), dst, count);
    case Dtype::kFloat16:
      return widen_float16(static_cast<const uint16_t*>(src), dst, count);
    case Dtype::kFloat32:
      std::memcpy(dst, src, count * sizeof(float));
      return;
    case Dtype::kFloat8E4M3:
      return widen_float8(static_cast<const uint8_t*>(src), dst, count);
  }
}

SANTA_MULTIVERSION void score_block(const float* q, int num_heads, const float* k, int num_keys, int head_dim,
                                    float scale, float* scores, int64_t stride) {
  for (int n = 0; n < num_keys; ++n) {
    const float* key = k + static_cast<int64_t>(n) * head_dim;
    int h = 0;
    for (; h + 4 <= num_heads; h += 4) {  // four heads share every load of the key
      const float *q0 = q + h * head_dim, *q1 = q0 + head_dim, *q2 = q1 + head_dim, *q3 = q2 + head_dim;
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int d = 0; d < head_dim; ++d) {
        s0 += q0[d] * key[d];
        s1 += q1[d] * key[d];
        s2 += q2[d] * key[d];
        s3 += q3[d] * key[d];
      }
      scores[h * stride + n] = s0 * scale;
      scores[(h + 1) * stride + n] = s1 * scale;
      scores[(h + 2) * stride + n] = s2 * scale;
      scores[(h + 3) * stride + n] = s3 * scale;
    }
    for (; h < num_heads; ++h) {
      const float* query = q + h * head_dim;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int d = 0; d < head_dim; ++d) sum += query[d] * key[d];
      scores[h * stride + n] = sum * scale;
    }
  }
}

// 2^x for x <= 0 as 2^round(x) * 2^fraction, the second by a polynomial on [-0.5, 0.5] of relative error below 1e-7
// (coefficients of the Taylor series of 2^x, economised). Below -126 the result is 0; NaN stays NaN.
SANTA_MULTIVERSION float exp2_block(const float* x, float max, float* y, int count) {
  if (max == -INFINITY) {
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) sum += y[i] = x[i] == -INFINITY ? 0.0f : NAN;  // all -inf or NaN
    return sum;
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < count; ++i) {
    const float exponent = x[i] - max;
    const float clamped = exponent > -126.0f ? exponent : -126.0f;
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const float shifted = clamped + 12582912.0f;
    const float fraction = clamped - (shifted - 12582912.0f);
    float value = 1.535336188319500e-4f;
    value = value * fraction + 1.339887440266574e-3f;
    value = value * fraction + 9.618437357674640e-3f;
    value = value * fraction + 5.550332471162809e-2f;
    value = value * fraction + 2.402264791363012e-1f;
    value = value * fraction + 6.931472028550421e-1f;
    value = value * fraction + 1.0f;
    value *= from_bits((to_bits(shifted) - 0x4b400000u + 127u) << 23);
    value = exponent < -126.0f ? 0.0f : value;
    value = exponent != exponent ? exponent : value;
    y[i] = value;
    sum += value;
  }
  return sum;
}

SANTA_MULTIVERSION float max_block(const float* x, int count) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int i = 0; i < count; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

SANTA_MULTIVERSION void accumulate_block(const float* weights, int64_t stride, int num_heads, const float* v,
                                         int num_keys, int head_dim, float* acc) {
  for (int n = 0; n < num_keys; ++n) {
    const float* value = v + static_cast<int64_t>(n) * head_dim;
    int h = 0;
    for (; h + 4 <= num_heads; h += 4) {
      const float w0 = weights[h * stride + n], w1 = weights[(h + 1) * stride + n];
      const float w2 = weights[(h + 2) * stride + n], w3 = weights[(h + 3) * stride + n];
      float *a0 = acc + h * head_dim, *a1 = a0 + head_dim, *a2 = a1 + head_dim, *a3 = a2 + head_dim;
#pragma omp simd
      for (int d = 0; d < head_dim; ++d) {
        a0[d] += w0 * value[d];
        a1[d] += w1 * value[d];
        a2[d] += w2 * value[d];
        a3[d] += w3 * value[d];
      }
    }
    for (; h < num_heads; ++h) {
      const float w = weights[h * stride + n];
      float* a = acc + h * head_dim;
#pragma omp simd
      for (int d = 0; d < head_dim; ++d) a[d] += w * value[d];
    }
  }
}

SANTA_MULTIVERSION void code_products(const int16_t* q, int num_heads, const uint8_t* codes, int head_dim,
                                      int32_t* products) {
  int16_t key[256];
  const int half = head_dim / 2;
  for (int j = 0; j < half; ++j) {
    key[j] = static_cast<int16_t>(low_code(codes[j]));
    key[j + half] = static_cast<int16_t>(high_code(codes[j]));
  }
  for (int h = 0; h < num_heads; ++h) {
    const int16_t* query = q + h * head_dim;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int d = 0; d < head_dim; ++d) sum += query[d] * key[d];
    products[h] = sum;
  }
}

SANTA_MULTIVERSION void add_block(const float* x, int times, int count, float* acc) { add_times(x, times, count, acc); }

}  // namespace santa::cpu
