// The inner loops of the CPU backend over float32 blocks, compiled for several x86-64 levels and chosen at load time.
#pragma once

#include <cstdint>

#include "params.h"

namespace santa::cpu {

// dst[i] = float(src[i]).
void widen(const void* src, Dtype dtype, float* dst, int64_t count);

// scores[h * stride + n] = scale * <q[h], k[n]> for q [num_heads, head_dim] and k [num_keys, head_dim].
void score_block(const float* q, int num_heads, const float* k, int num_keys, int head_dim, float scale, float* scores,
                 int64_t stride);

// y[i] = exp2(x[i] - max); returns the sum. NaN stays NaN.
float exp2_block(const float* x, float max, float* y, int count);

float max_block(const float* x, int count);

// acc[h] += sum_n weights[h * stride + n] * v[n] for v [num_keys, head_dim] and acc [num_heads, head_dim].
void accumulate_block(const float* weights, int64_t stride, int num_heads, const float* v, int num_keys, int head_dim,
                      float* acc);

// products[h] = <q[h], code> of one key with proposal codes (core/proposal.h): q [num_heads, head_dim], codes
// [head_dim / 2].
void code_products(const int16_t* q, int num_heads, const uint8_t* codes, int head_dim, int32_t* products);

// acc[i] += times * x[i], by additions alone: core/bernoulli.h.
void add_block(const float* x, int times, int count, float* acc);

}  // namespace santa::cpu
