// What both backends receive: plain data, no Torch. Pointers are device pointers on CUDA. Strides are in elements.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/kv_rows.h"
#include "core/macros.h"
#include "core/mixture.h"
#include "core/philox.h"
#include "core/samplers.h"
#include "core/softmax_state.h"
#include "core/tiling.h"

namespace santa {

enum class Dtype : int { kBFloat16, kFloat16, kFloat32, kFloat8E4M3 };

enum class KvLayout : int { kNHD = 0, kHND = 1 };

// How a row is computed. exact: every value row is read. one pass: streaming and uniform budgets, each tile is scored,
// drawn from and gathered in one go. proportional: score, plan, gather, in kernels of their own.
enum class RowKind : int { kExact, kOnePass, kProportional };

// Which kinds of row a call has to expect, and how its kernels are set up. Lengths are on the device: all that the host
// knows is their bound and, if neither lengths nor starts are given, that every row has max_kv_len. Decided once, by
// plan_call; nothing here changes a bit of the result.
struct CallPlan {
  bool exact, one_pass, proportional;
  int longest_exact;  // bound of the length of exact rows
  int max_parts;      // of a row in one pass

  // CUDA, one pass; cuda/decode/heuristics.h.
  int num_warps;     // that score, per CTA
  int num_slots;     // of a warp's ring
  int ctas_at_once;  // that live on the device
  int wanted_ctas;   // that rows are cut for,
  int most_waves;    // or this many times as many, if decode/runs.cuh finds that better
  int row_runs;      // runs of a row, if all rows are known to be equal, else 0: decode/runs.cuh works it out
  int run_parts;     // of these runs
};

constexpr int kMaskWords = kMaxTileKv / 32;  // one bit per key of a tile

struct DecodeParams {
  // Inputs.
  const void* q;             // [batch, num_qo_heads, head_dim], last dimension contiguous
  const void* k;             // [batch, max_kv_len, num_kv_heads, head_dim] through the strides below
  const void* v;             // the same shape, its own strides
  const int32_t* kv_lens;    // [batch], or null: every row has max_kv_len keys
  const int32_t* kv_starts;  // [batch], or null: every row starts at position 0
  const int64_t* row_seeds;  // [batch], or null: 0 for every row
  const int32_t* positions;  // [batch], or null: kv_len. Part of the identity of a row's random stream
  const float* k_scale;      // [num_kv_heads] through its stride, or null: 1. Float8 K alone: key = k * k_scale
  const float* v_scale;      // the same for V

  // Outputs.
  void* out;           // [batch, num_qo_heads, head_dim], contiguous, q's dtype
  float* lse;          // [batch, num_qo_heads], natural logarithm
  int32_t* rows_read;  // [batch, num_kv_heads], or null: not asked for

  int64_t stride_q_batch, stride_q_head;
  int64_t stride_k_batch, stride_k_token, stride_k_head;
  int64_t stride_v_batch, stride_v_token, stride_v_head;
  int stride_k_scale, stride_v_scale;  // 0: one scale for the tensor, 1: one per KV head

  Dtype dtype;             // of q and out
  Dtype k_dtype, v_dtype;  // dtype or kFloat8E4M3; V is float8 only if K is
  int batch;
  int num_qo_heads;
  int num_kv_heads;
  int gqa_group_size;
  int head_dim;
  int max_kv_len;
  bool aligned;      // q, k and v rows all start on 16-byte boundaries
  bool by_features;  // k is feature-major: Bernoulli scores

  float scale_log2;  // sm_scale * log2(e): scores are kept in base 2
  Sampler sampler;
  Budget budget;
  int num_samples;  // S per query head; 0 = exact
  int64_t min_sampled_len;
  int64_t seed;
  CallPlan plan;

  // Workspace, per (batch row, KV head). `tiles` is max_tiles, an upper bound of the row's tiles, or parts in one pass;
  // `streams` is 1 for the grouped sampler and gqa_group_size for the others.
  int max_tiles;
  float* o_accum;      // [tiles, gqa_group_size, head_dim]; proportional: undefined where the stream's tile_rows is 0
  float* tile_max;     // [tiles, gqa_group_size], base 2: what o_accum and tile_sum are relative to
  float* tile_sum;     // [tiles, gqa_group_size]: sum of exp2(score - tile_max)
  int32_t* tile_rows;  // one pass: [head blocks, tiles]; proportional: [streams, tiles]: V rows drawn in the tile

  float* level;  // [gqa_group_size], base 2: streaming rows' pilot, an estimate of their log-sum-exp

  // Of proportional rows, and the scores of exact rows with Bernoulli scores.
  int64_t scores_per_row;  // elements of `scores` per (batch, KV head)
  int group_pitch;         // gqa_group_size, rounded up to even when above 1: a key's scores stay float2-aligned
  float* scores;           // [max_tiles * tile, group_pitch], base 2
  float* row_lse;          // [gqa_group_size], base 2
  uint32_t* tile_start;    // [streams, tiles]: level 1 of the CDF
  uint32_t* tile_mass;     // [streams, tiles]
  uint32_t* tile_draw;     // [streams, tiles]: first draw of a sorted sampler that can fall into the tile
  Draws* draws;            // [streams]
  uint32_t* read_mask;     // [tiles, kMaskWords]: V rows read by any stream; null unless rows_read is asked for

  // The scales of a float8 cache multiply sums instead of elements: scores once, outputs once.
  SANTA_HD float score_scale(int kv_head) const {
    return k_scale == nullptr ? scale_log2 : scale_log2 * k_scale[kv_head * stride_k_scale];
  }
  SANTA_HD float output_scale(int kv_head) const {
    return v_scale == nullptr ? 1.0f : v_scale[kv_head * stride_v_scale];
  }

  SANTA_HD int64_t group_index(int batch_index, int kv_head) const {
    return static_cast<int64_t>(batch_index) * num_kv_heads + kv_head;
  }
  SANTA_HD int num_streams() const { return sampler == Sampler::kGrouped ? 1 : gqa_group_size; }
  SANTA_HD int64_t stats_offset(int64_t group) const { return group * max_tiles * gqa_group_size; }
  SANTA_HD int64_t stream_offset(int64_t group, int stream) const {
    return (group * num_streams() + stream) * max_tiles;
  }
  SANTA_HD int64_t mask_offset(int64_t group) const { return group * max_tiles * kMaskWords; }

  SANTA_HD int num_head_blocks() const { return num_head_blocks_of(gqa_group_size); }
  // Work that can go on side by side in a row: what its cut into parts depends on.
  SANTA_HD int num_units() const { return num_kv_heads * num_head_blocks(); }
};

// Query heads [first, first + count) of a KV head.
struct HeadBlock {
  int first, count;
};

SANTA_HD HeadBlock head_block_of(const DecodeParams& p, int index) {
  const int size = ceil_div_int(p.gqa_group_size, p.num_head_blocks());
  const int first = index * size, left = p.gqa_group_size - first;
  return {first, left < size ? left : size};
}

// One batch row, as every stage sees it.
struct RowShape {
  int64_t kv_start;
  int kv_len;
  int position;  // of its random stream
  bool valid;    // false: the range given is not inside the cache; nothing of it is read and the outputs are NaN
  RowKind kind;
  int tile_kv;    // in one pass: of a part
  int num_tiles;  // in one pass: parts
  int draw_kv;    // in one pass: of a tile

  SANTA_HD bool one_pass() const { return kind == RowKind::kOnePass; }
  SANTA_HD bool proportional() const { return kind == RowKind::kProportional; }
  SANTA_HD bool sampled() const { return kind != RowKind::kExact; }
};

SANTA_HD RowShape row_shape_of(const DecodeParams& p, int batch_index) {
  const int64_t start = p.kv_starts != nullptr ? p.kv_starts[batch_index] : 0;
  int64_t length = p.kv_lens != nullptr ? p.kv_lens[batch_index] : p.max_kv_len - start;
  const bool valid = start >= 0 && length >= 0 && start + length <= p.max_kv_len;
  if (!valid) length = 0;
  const int kv_len = static_cast<int>(length);
  const bool sampled = p.num_samples > 0 && kv_len > 0 && kv_len >= p.min_sampled_len;
  const RowKind kind = !sampled                            ? RowKind::kExact
                       : p.budget == Budget::kProportional ? RowKind::kProportional
                                                           : RowKind::kOnePass;
  const int tile_kv = kind == RowKind::kExact     ? exact_tile_kv_of(kv_len)
                      : kind == RowKind::kOnePass ? part_kv_of(kv_len, p.num_units())
                                                  : tile_kv_of(kv_len);
  const int position = p.positions != nullptr ? p.positions[batch_index] : kv_len;
  const int num_tiles = kind == RowKind::kOnePass ? num_parts_of(kv_len, tile_kv) : ceil_div_int(kv_len, tile_kv);
  return {start, kv_len, position, valid, kind, tile_kv, num_tiles, draw_tile_kv_of(kv_len, p.by_features)};
}

// ---- the identity of a random stream: each sampler's draws, for all stages and both backends

// `head`: the query head; for grouped proportional draws the KV head, for grouped draws in one pass the head block.
SANTA_HD RandomStream random_stream(const DecodeParams& p, int batch_index, const RowShape& row, int head) {
  return RandomStream::make(p.seed, p.row_seeds != nullptr ? p.row_seeds[batch_index] : 0, row.position, head);
}

// Draws of one stream of a proportional row.
SANTA_HD uint32_t num_draws_of(const DecodeParams& p) {
  return static_cast<uint32_t>(p.num_samples) * (p.sampler == Sampler::kGrouped ? p.gqa_group_size : 1);
}

// ---- rows of the cache

template <typename T>
SANTA_HD KvRows<T> key_rows(const DecodeParams& p, int batch_index, int kv_head, int64_t kv_start) {
  return make_kv_rows<T>(p.k, batch_index, kv_head, kv_start, p.stride_k_batch, p.stride_k_token, p.stride_k_head);
}

template <typename T>
SANTA_HD KvRows<T> value_rows(const DecodeParams& p, int batch_index, int kv_head, int64_t kv_start) {
  return make_kv_rows<T>(p.v, batch_index, kv_head, kv_start, p.stride_v_batch, p.stride_v_token, p.stride_v_head);
}

// ---- logits and outputs

// From q k to the logit in base 2, wherever a logit is made. `scale`: DecodeParams::score_scale.
SANTA_HD float logit_of(float product, float scale) { return product * scale; }

// An element of the output. `sum`: of exp2(score - lse) v. Without keys: zero. Undefined, so NaN: a range outside the
// cache, a NaN or an infinite score.
SANTA_HD float output_of(const RowShape& row, float lse, float sum, float output_scale) {
  if (row.valid && row.kv_len == 0) return 0.0f;
  return row.valid && is_finite(lse) ? sum * output_scale : NAN;
}

// The public log-sum-exp, natural logarithm.
SANTA_HD float lse_output_of(const RowShape& row, float lse) { return row.valid ? lse * kLn2 : NAN; }

// Decides what a call has to expect; num_samples is 0 if no row can be long enough to be sampled.
inline CallPlan plan_call(const DecodeParams& p) {
  CallPlan plan{};
  const bool lengths_known = p.kv_lens == nullptr && p.kv_starts == nullptr;
  const bool sampled = p.num_samples > 0 && p.max_kv_len > 0;
  plan.one_pass = sampled && p.budget != Budget::kProportional;
  plan.proportional = sampled && p.budget == Budget::kProportional;
  plan.exact = !sampled || !lengths_known;
  plan.longest_exact =
      sampled && p.min_sampled_len <= p.max_kv_len ? static_cast<int>(p.min_sampled_len) : p.max_kv_len;
  plan.max_parts = plan.one_pass ? max_num_parts(p.max_kv_len, p.num_units()) : 0;
  return plan;
}

}  // namespace santa
