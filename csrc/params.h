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

// One batch row, as every stage sees it: the keys that any of its tokens attends to.
struct RowShape {
  int kv_start;
  int kv_len;
  int span_len, span_first;  // keys of the whole row, of which these are [span_first, span_first + kv_len)
  int position;              // of its random stream
  bool valid;  // false: the range given is not inside the cache; nothing of it is read and the outputs are NaN
  RowKind kind;
  int tile_kv;    // in one pass: of a part
  int num_tiles;  // in one pass: parts
  int draw_kv;    // in one pass: of a tile

  // Where the keys of the last token end. (Some may be elsewhere; then there is no window.)
  SANTA_HD int end() const { return span_len - span_first; }

  SANTA_HD bool one_pass() const { return kind == RowKind::kOnePass; }
  SANTA_HD bool proportional() const { return kind == RowKind::kProportional; }
  SANTA_HD bool sampled() const { return kind != RowKind::kExact; }
};

// How rows of one kind are dealt out to CTAs, in runs of neighbouring parts, or tiles, of a row; CUDA:
// cuda/decode/heuristics.h.
struct RunCut {
  int ctas_at_once;    // that live on the device
  int wanted_ctas;     // that rows are cut for,
  int other_quarters;  // or so many quarters of them, if decode/runs.cuh finds that better; 0: there is no choice
  int start_kv;        // keys that take as long as the start of a CTA
  int row_runs;        // runs of a row, if all rows are known to be equal, else 0: decode/runs.cuh works it out
  int run_parts;       // of these runs
  int run_multiple;    // of these, what runs are rounded up to; a power of two
  int64_t max_runs;    // bound of the runs of all rows, per KV head and head block
};

// Which kinds of row a call has to expect, and how its kernels are set up. Lengths are on the device: all that the host
// knows is their bound and, if neither lengths nor starts are given, that every row has max_kv_len. Decided once, by
// plan_call; nothing here changes a bit of the result.
struct CallPlan {
  bool exact, one_pass, proportional;
  int longest_exact;  // bound of the length of exact rows
  bool equal_rows;    // all rows are `row`, but for their positions, if those are given
  RowShape row;
  int max_parts;  // of a row in one pass; tiles of a proportional one

  // CUDA; cuda/decode/heuristics.h.
  int num_warps;     // that score, per CTA
  int num_slots;     // of a warp's ring
  bool whole_parts;  // with proposal keys, whether a warp takes whole parts
  bool row_pairs;    // whether an exact row's two CTAs are a cluster and merge its tiles themselves
  RunCut sampled_cut, exact_cut;
};

// Of a number from 1 to 1024: a query up to 1023 times it, shifted by kInverseBits, is their quotient.
constexpr int kInverseBits = 20;
inline uint32_t inverse_of(int divisor) { return static_cast<uint32_t>(ceil_div(1 << kInverseBits, divisor)); }

constexpr int kMaskWords = kMaxTileKv / 32;  // one bit per key of a tile

struct DecodeParams {
  // Inputs.
  const void* q;             // [batch, q_len, num_qo_heads, head_dim], last dimension contiguous
  const void* k;             // [batch, cache_kv_len, num_kv_heads, head_dim] through the strides below, or pages of it
  const void* v;             // the same shape, its own strides
  const int32_t* kv_lens;    // [batch], or null: every row has cache_kv_len keys
  const int32_t* kv_starts;  // [batch], or null: every row starts at position 0
  const int64_t* row_seeds;  // [batch], or null: 0 for every row
  const int32_t* positions;  // [batch], or null: kv_len. Part of the identity of a row's random stream
  const float* k_scale;      // [num_kv_heads] through its stride, or null: 1. Float8 K alone: key = k * k_scale
  const float* v_scale;      // the same for V

  // Outputs.
  void* out;           // [batch, q_len, num_qo_heads, head_dim], contiguous, q's dtype
  float* lse;          // [batch, q_len, num_qo_heads], natural logarithm
  int32_t* rows_read;  // [batch, num_kv_heads], or null: not asked for

  int64_t stride_q_batch, stride_q_token, stride_q_head;
  int64_t stride_k_batch, stride_k_token, stride_k_head;  // batch: of a page, where there are pages
  int64_t stride_v_batch, stride_v_token, stride_v_head;
  int stride_k_scale, stride_v_scale;  // 0: one scale for the tensor, 1: one per KV head

  Dtype dtype;             // of q and out
  Dtype k_dtype, v_dtype;  // dtype or kFloat8E4M3; V is float8 only if K is
  int batch;
  int num_qo_heads;
  int num_kv_heads;
  int first_kv_head;            // of those of the whole model: part of the identity of random streams
  int q_len;                    // new tokens of a row, the last of its keys; each sees those up to its own
  int head_group;               // query heads that share a KV head
  uint32_t head_group_inverse;  // inverse_of(head_group)
  int group_size;  // q_len head_group: query vectors that share a KV head, token by token. To all that follows they
                   // are heads
  int head_dim;
  int cache_kv_len;      // keys that a row can have
  int max_kv_len;        // of which it attends to so many at most
  bool aligned;          // q, k and v rows all start on 16-byte boundaries
  bool by_features;      // k is feature-major: Bernoulli scores
  int proposal_tile_kv;  // of rows in one pass, where proposal keys draw them; else 0
  int most_part_kv = kMaxPartKv;
  // What there is of the members at the end.
  bool paged, has_lists, has_shards, has_sinks;

  float scale_log2;  // sm_scale * log2(e): scores are kept in base 2
  float soft_cap;    // of logits, base 2; 0: none
  float soft_cap_inverse;
  int window_left;  // keys that a token sees beside its own, the latest; -1: all
  Sampler sampler;
  Budget budget;
  int num_samples;  // S per query head; 0 = exact
  int64_t min_sampled_len;
  int64_t seed;
  CallPlan plan;

  // Workspace, per (batch row, KV head). `tiles` is max_tiles, an upper bound of the row's tiles, or parts in one pass;
  // `streams` is 1 for the grouped sampler and group_size for the others.
  int max_tiles;
  float* o_accum;      // [tiles, group_size, head_dim]; proportional: undefined where the stream's tile_rows is 0
  float* tile_max;     // [tiles, group_size], base 2: what o_accum and tile_sum are relative to
  float* tile_sum;     // [tiles, group_size]: sum of exp2(score - tile_max)
  int32_t* tile_rows;  // one pass: [head blocks, tiles]; proportional: [streams, tiles]: V rows drawn in the tile

  // Streaming rows' pilot, an estimate of their log-sum-exp: [batch, q_len, num_qo_heads], an input or in the
  // workspace, times level_scale in base 2.
  float* level;
  float level_scale;
  bool has_levels;  // it is an input

  // Of proportional rows, and the scores of exact rows with Bernoulli scores.
  int64_t scores_per_row;  // elements of `scores` per (batch, KV head)
  int group_pitch;         // group_size, rounded up to even when above 1: a key's scores stay float2-aligned
  float* scores;           // [max_tiles * tile, group_pitch], base 2
  float* row_lse;          // [group_size], base 2
  uint32_t* tile_start;    // [streams, tiles]: level 1 of the CDF
  uint32_t* tile_mass;     // [streams, tiles]
  uint32_t* tile_draw;     // [streams, tiles]: first draw of a sorted sampler that can fall into the tile
  Draws* draws;            // [streams]
  uint32_t* read_mask;     // [tiles, kMaskWords]: V rows read by any stream; null unless rows_read is asked for

  // Seldom there, so at the end: what all kernels read lies together, and is fetched by fewer lines.

  // Of a paged cache. Row b has the pages page_table[b stride_page_table], ... or, with has_lists,
  // page_table[kv_indptr[b]] to page_table[kv_indptr[b + 1] - 1].
  const int32_t* page_table;
  const int32_t* kv_indptr;          // [batch + 1]
  const int32_t* kv_last_page_lens;  // [batch], beside kv_indptr: keys of the last page
  int64_t stride_page_table;
  uint32_t num_indices;  // entries of page_table, beside kv_indptr
  int page_shift;        // log2 of the keys of a page
  int64_t num_pages;     // of the cache; only the CPU looks whether a row's pages are among them

  // Rows that are part of longer ones, as context parallelism has them.
  const int32_t* whole_lens;    // [batch]: keys of the whole row
  const int32_t* shard_starts;  // [batch]: position in it of the first key that is here

  const float* sinks;  // [num_qo_heads]: a logit without a value beside those of the keys

  // The scales of a float8 cache multiply sums instead of elements: scores once, outputs once.
  SANTA_HD float score_scale(int kv_head) const {
    return k_scale == nullptr ? scale_log2 : scale_log2 * k_scale[kv_head * stride_k_scale];
  }
  SANTA_HD float output_scale(int kv_head) const {
    return v_scale == nullptr ? 1.0f : v_scale[kv_head * stride_v_scale];
  }

  // query / head_group, which a GPU has no instruction for.
  SANTA_HD int token_of(int query) const {
    return static_cast<int>(static_cast<uint32_t>(query) * head_group_inverse >> kInverseBits);
  }

  // Element offset of a query vector of a KV head in q, and its index in out, lse and level.
  SANTA_HD int64_t query_offset(int batch_index, int kv_head, int query) const {
    const int token = token_of(query);
    return batch_index * stride_q_batch + token * stride_q_token +
           (static_cast<int64_t>(kv_head) * head_group + query - token * head_group) * stride_q_head;
  }
  SANTA_HD int64_t output_index(int batch_index, int kv_head, int query) const {
    const int token = token_of(query);
    return (static_cast<int64_t>(batch_index) * q_len + token) * num_qo_heads + kv_head * head_group + query -
           token * head_group;
  }

  SANTA_HD int64_t group_index(int batch_index, int kv_head) const {
    return static_cast<int64_t>(batch_index) * num_kv_heads + kv_head;
  }
  SANTA_HD int num_streams() const { return sampler == Sampler::kGrouped ? 1 : group_size; }
  SANTA_HD int64_t stats_offset(int64_t group) const { return group * max_tiles * group_size; }
  SANTA_HD int64_t stream_offset(int64_t group, int stream) const {
    return (group * num_streams() + stream) * max_tiles;
  }
  SANTA_HD int64_t mask_offset(int64_t group) const { return group * max_tiles * kMaskWords; }

  SANTA_HD int num_head_blocks() const { return num_head_blocks_of(group_size); }
  // Work that can go on side by side in a row: what its cut into parts depends on.
  SANTA_HD int num_units() const { return num_kv_heads * num_head_blocks(); }
};

// Query heads [first, first + count) of a KV head.
struct HeadBlock {
  int first, count;
};

SANTA_HD HeadBlock head_block_of(const DecodeParams& p, int index) {
  if (p.group_size <= kHeadBlock) return {0, p.group_size};
  const int size = ceil_div_int(p.group_size, p.num_head_blocks());
  const int first = index * size, left = p.group_size - first;
  return {first, left < size ? left : size};
}

// Keys of a batch row: [start, start + length) of the cache, [first, first + length) of the whole row.
struct RowSpan {
  int start, length, first, whole;
  bool valid;
};

// Where a row's keys are listed page by page, where rows are parts of longer ones, and what a window leaves of them.
// Differences that must not be negative are compared without sign: then they are large.
SANTA_HD void look_closer(const DecodeParams& p, int batch_index, RowSpan& span) {
  const auto bound = static_cast<uint32_t>(p.cache_kv_len);
  if (p.has_lists) {
    const uint32_t begin = p.kv_indptr[batch_index], end = p.kv_indptr[batch_index + 1], pages = end - begin;
    const uint32_t page_size = 1u << p.page_shift, last = p.kv_last_page_lens[batch_index];
    const uint32_t length = pages == 0 ? 0 : ((pages - 1) << p.page_shift) + last;
    span.valid = begin <= end && end <= p.num_indices && pages <= (bound + page_size - 1) >> p.page_shift &&
                 length <= bound && (pages == 0 || last - 1 < page_size);
    span.whole = span.length = span.valid ? static_cast<int>(length) : 0;
  }
  if (p.has_shards) {
    const uint32_t whole = p.whole_lens[batch_index], first = p.shard_starts[batch_index], length = span.length;
    // Tiles must not straddle shards. One without keys may be anywhere.
    span.valid = span.valid && whole < 1u << 31 &&
                 (length == 0 || (length <= whole && first <= whole - length && first % kDrawTileKv == 0));
    span.first = span.valid && length > 0 ? static_cast<int>(first) : 0;
    span.whole = span.valid ? static_cast<int>(whole) : 0;
    if (!span.valid) span.length = 0;
  }
}

SANTA_HD RowShape row_shape_of(const DecodeParams& p, int batch_index) {
  if (p.plan.equal_rows) {
    RowShape row = p.plan.row;
    if (p.positions != nullptr) row.position = p.positions[batch_index];
    return row;
  }
  RowSpan span{};
  span.start = p.kv_starts != nullptr ? p.kv_starts[batch_index] : 0;
  const uint32_t room = static_cast<uint32_t>(p.cache_kv_len) - static_cast<uint32_t>(span.start);
  span.length = p.kv_lens != nullptr ? p.kv_lens[batch_index] : static_cast<int>(room);
  span.valid = static_cast<uint32_t>(span.start) <= static_cast<uint32_t>(p.cache_kv_len) &&
               static_cast<uint32_t>(span.length) <= room;
  if (!span.valid) span.length = 0;
  span.whole = span.length;
  if (p.has_lists || p.has_shards) look_closer(p, batch_index, span);
  const int position = p.positions != nullptr ? p.positions[batch_index] : span.whole;
  // The window of the first new token begins where no other does before it. Neither difference overflows: what is
  // subtracted is at most 2^31 - 1 and the token's own.
  if (p.window_left >= 0 && span.whole - p.window_left > p.q_len) {
    const int unseen = span.whole - p.window_left - p.q_len, ahead = unseen - span.first;
    const int skipped = ahead < 0 ? 0 : ahead < span.length ? ahead : span.length;
    span.start += skipped, span.length -= skipped;
    span.first += skipped - unseen, span.whole -= unseen;
  }
  const bool sampled = p.num_samples > 0 && span.length > 0 && span.whole >= p.min_sampled_len;
  const RowKind kind = !sampled                            ? RowKind::kExact
                       : p.budget == Budget::kProportional ? RowKind::kProportional
                                                           : RowKind::kOnePass;
  const int tile_kv = kind == RowKind::kExact     ? exact_tile_kv_of(span.length)
                      : kind == RowKind::kOnePass ? part_kv_of(span.length, p.num_units(), p.most_part_kv)
                                                  : tile_kv_of(span.length);
  return {.kv_start = span.start,
          .kv_len = span.length,
          .span_len = span.whole,
          .span_first = span.first,
          .position = position,
          .valid = span.valid,
          .kind = kind,
          .tile_kv = tile_kv,
          .num_tiles = num_parts_of(span.length, tile_kv),
          .draw_kv = p.proposal_tile_kv > 0 ? p.proposal_tile_kv : draw_tile_kv_of(span.whole, p.by_features)};
}

// Keys of the row that a query vector attends to, for rows whose last token sees those up to `end`.
struct KeyRange {
  int first, end;
};

SANTA_HD KeyRange visible_keys(const DecodeParams& p, int end, int query) {
  end -= p.q_len - 1 - p.token_of(query);
  return {p.window_left < 0 || end - 1 < p.window_left ? 0 : end - 1 - p.window_left, end};
}

// ---- the identity of a random stream: each sampler's draws, for all stages and both backends

// Streams of a KV head are numbered: its query vectors; for grouped proportional draws there is one, for grouped draws
// in one pass one for each head block.
SANTA_HD RandomStream random_stream(const DecodeParams& p, int batch_index, const RowShape& row, int kv_head, int index,
                                    int streams) {
  return RandomStream::make(p.seed, p.row_seeds != nullptr ? p.row_seeds[batch_index] : 0, row.position,
                            (p.first_kv_head + kv_head) * streams + index);
}

// Draws of one stream of a proportional row.
SANTA_HD uint32_t num_draws_of(const DecodeParams& p) {
  return static_cast<uint32_t>(p.num_samples) * (p.sampler == Sampler::kGrouped ? p.group_size : 1);
}

// ---- rows of the cache

// Of a cache that is not paged.
template <typename T>
SANTA_HD const T* first_row(const void* data, int batch_index, int kv_head, int kv_start, int64_t stride_batch,
                            int64_t stride_token, int64_t stride_head) {
  return static_cast<const T*>(data) + batch_index * stride_batch + kv_head * stride_head + kv_start * stride_token;
}

// Of one that is, with the row's list of pages.
template <typename T>
SANTA_HD KvRows<T> paged_rows(const DecodeParams& p, const void* data, const int32_t* pages, int kv_head, int kv_start,
                              int64_t stride_page, int64_t stride_token, int64_t stride_head) {
  return {
      static_cast<const T*>(data) + kv_head * stride_head, stride_token, pages, stride_page, p.page_shift, kv_start};
}

// T: of the elements, or of bytes, with strides in bytes.
template <typename T>
SANTA_HD KvRows<T> make_kv_rows(const DecodeParams& p, const void* data, int batch_index, int kv_head, int kv_start,
                                int64_t stride_batch, int64_t stride_token, int64_t stride_head) {
  if (!unlikely(p.paged)) {
    return {first_row<T>(data, batch_index, kv_head, kv_start, stride_batch, stride_token, stride_head),
            stride_token,
            nullptr,
            0,
            0,
            0};
  }
  const int64_t pages = p.has_lists ? p.kv_indptr[batch_index] : batch_index * p.stride_page_table;
  return paged_rows<T>(p, data, p.page_table + pages, kv_head, kv_start, stride_batch, stride_token, stride_head);
}

template <typename T>
SANTA_HD KvRows<T> key_rows(const DecodeParams& p, int batch_index, int kv_head, int kv_start) {
  return make_kv_rows<T>(p, p.k, batch_index, kv_head, kv_start, p.stride_k_batch, p.stride_k_token, p.stride_k_head);
}

template <typename T>
SANTA_HD KvRows<T> value_rows(const DecodeParams& p, int batch_index, int kv_head, int kv_start) {
  return make_kv_rows<T>(p, p.v, batch_index, kv_head, kv_start, p.stride_v_batch, p.stride_v_token, p.stride_v_head);
}

// ---- logits and outputs

// From q k to the logit in base 2, wherever a logit is made. `scale`: DecodeParams::score_scale.
SANTA_HD float logit_of(float product, float scale) { return product * scale; }

// Whether logits are not yet what is attended with: see attended_logit.
SANTA_HD bool changes_logits(const DecodeParams& p) { return unlikely(p.soft_cap > 0.0f || p.q_len > 1); }

// The logit of key n of the row for a query vector, capped, or -inf where it does not see the key.
SANTA_HD float attended_logit(const DecodeParams& p, KeyRange visible, int64_t n, float logit) {
  if (p.soft_cap > 0.0f) {
    // cap tanh(x / cap): near 0 by its series, elsewhere as 1 - 2 / (1 + exp(2 x / cap)).
    const float ratio = logit * p.soft_cap_inverse, square = ratio * ratio;
    const float far = p.soft_cap - approximate_quotient(2.0f * p.soft_cap, 1.0f + exp2f(2.0f * kLog2E * ratio));
    const float near = logit * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15)));
    logit = square < 0.01f ? near : far;
  }
  return n >= visible.first && n < visible.end ? logit : -INFINITY;
}

// What a query vector's sums, of exp2(score - lse) v, are multiplied with, and its public log-sum-exp, to the natural
// base. Without keys the output is zero. Undefined, so NaN: a range outside the cache, a NaN or an infinite score.
struct Epilogue {
  float factor, lse;

  SANTA_HD float output(float sum) const { return factor == 0.0f ? 0.0f : sum * factor; }
};

SANTA_HD Epilogue epilogue_of(const DecodeParams& p, const RowShape& row, int kv_head, int query, float lse) {
  if (!row.valid) return {NAN, NAN};
  const KeyRange visible = visible_keys(p, row.end(), query);
  const bool has_keys = visible.end > 0 && visible.first < visible.end && visible.first < row.kv_len;
  float factor = !has_keys ? 0.0f : is_finite(lse) ? p.output_scale(kv_head) : NAN;
  if (p.has_sinks) {
    const float sink = p.sinks[kv_head * p.head_group + query - p.token_of(query) * p.head_group] * kLog2E;
    const float total = log2_sum(merge({lse, 1.0f}, {sink, 1.0f}));
    if (has_keys) factor *= exp2_below(lse, total);
    lse = total;
  }
  return {factor, lse * kLn2};
}

// Decides what a call has to expect; num_samples is 0 if no row can be long enough to be sampled.
inline CallPlan plan_call(const DecodeParams& p) {
  CallPlan plan{};
  const bool lengths_known = p.kv_lens == nullptr && p.kv_starts == nullptr && !p.has_lists && !p.has_shards;
  const bool sampled = p.num_samples > 0 && p.max_kv_len > 0;
  plan.one_pass = sampled && p.budget != Budget::kProportional;
  plan.proportional = sampled && p.budget == Budget::kProportional;
  plan.exact = !sampled || !lengths_known;
  plan.longest_exact =
      sampled && p.min_sampled_len <= p.max_kv_len ? static_cast<int>(p.min_sampled_len) : p.max_kv_len;
  plan.equal_rows = lengths_known;
  if (lengths_known) {
    DecodeParams host = p;  // without what lies on the device
    host.plan.equal_rows = false, host.positions = nullptr;
    plan.row = row_shape_of(host, 0);
  }
  plan.max_parts = plan.one_pass       ? max_num_parts(p.max_kv_len, p.num_units(), p.most_part_kv)
                   : plan.proportional ? max_num_tiles(p.max_kv_len)
                                       : 0;
  return plan;
}

}  // namespace santa
