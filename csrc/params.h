// What both backends receive: plain data, no Torch. Pointers are device pointers on CUDA. Strides are in elements.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/samplers.h"
#include "core/tiling.h"

namespace santa {

enum class Dtype : int { kBFloat16, kFloat16, kFloat32, kFloat8E4M3 };

constexpr int kPersistentHeads = 8;  // query heads of a KV head that the persistent CUDA kernel takes, at most

// How the persistent CUDA kernel is set up; decided per device, from its shared memory and multiprocessors.
struct PersistentPlan {
  int64_t max_kv_len;  // the longest row it takes; -1: none
  int num_ctas;
  int blocks_per_row;  // if the host knows that all rows have as many; else 0
  int num_score_warps;
  int num_buffers;   // of scores
  int buffer_bytes;  // of one of them
  int plane_pitch;   // keys from one pair of heads to the next in a buffer
};

enum class KvLayout : int { kNHD = 0, kHND = 1 };

constexpr int kMaskWords = kMaxTileKv / 32;  // one bit per key of a tile

struct DecodeParams {
  // Inputs.
  const void* q;             // [batch, num_qo_heads, head_dim], last dimension contiguous
  const void* k;             // [batch, max_kv_len, num_kv_heads, head_dim] through the strides below
  const void* v;             // the same shape, its own strides
  const int32_t* kv_lens;    // [batch], or null: every row has max_kv_len keys
  const int32_t* kv_starts;  // [batch], or null: every row starts at position 0
  const int64_t* row_seeds;  // [batch], or null: 0 for every row
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
  bool aligned;  // q, k and v rows all start on 16-byte boundaries

  float scale_log2;  // sm_scale * log2(e): scores are kept in base 2
  Sampler sampler;
  Budget budget;
  int num_samples;  // S per query head; 0 = exact
  int64_t min_sampled_len;
  int64_t seed;
  PersistentPlan persistent;

  // Workspace, in the order in which it is written. Shapes are per batch row and KV head; `tiles` is max_tiles,
  // `streams` is 1 for the grouped sampler and gqa_group_size for the others.
  int max_tiles;
  int64_t scores_per_row;  // elements of `scores` per (batch, KV head)
  int group_pitch;         // gqa_group_size, rounded up to even when above 1: a key's scores stay float2-aligned
  float* scores;           // [max_tiles * tile, group_pitch], base 2; sampled rows only
  float* tile_max;         // [tiles, gqa_group_size]
  float* tile_sum;         // [tiles, gqa_group_size]: sum of exp2(score - tile_max)
  float* row_lse;          // [gqa_group_size], base 2
  float* segment_lse;      // [tiles, gqa_group_size], base 2; one entry per segment
  uint32_t* tile_start;    // [streams, tiles], within the segment
  uint32_t* tile_mass;     // [streams, tiles]
  uint32_t* tile_draw;     // [streams, tiles]: first draw of a sorted sampler that can fall into the tile
  Draws* segment_draws;    // [streams, tiles]; one entry per segment
  int32_t* tile_rows;      // [streams, tiles]: V rows drawn in the tile
  uint32_t* read_mask;     // [tiles, kMaskWords]: V rows read by any stream; null unless rows_read is asked for
  float* o_accum;          // [tiles, gqa_group_size, head_dim]; undefined where the stream's tile_rows is 0

  // Workspace of the persistent kernel, whose tiles are blocks of a row. What CTAs tell each other by is in no known
  // state when the kernel starts: a block's state is there once its two words agree under the seal, a number that no
  // other call of the process has, and as the kernel ends no words agree, for the replay of a CUDA graph.
  int max_blocks;
  uint64_t seal;
  uint64_t* block_state;  // [max_blocks, gqa_group_size, 2]: max and sum as two floats; the same bits ^ seal
  uint32_t* finished;     // [1]: blocks of the (batch row, KV head) that are; zero before any state is there

  // Which kinds of row the host has to expect. Lengths are on the device; all that is known here is their bound and, if
  // neither lengths nor starts are given, that every row has max_kv_len.
  bool lengths_known() const { return kv_lens == nullptr && kv_starts == nullptr; }
  bool any_staged() const { return num_samples > 0 && max_kv_len > persistent.max_kv_len; }
  bool any_persistent() const {
    return num_samples > 0 && min_sampled_len <= persistent.max_kv_len && !(lengths_known() && any_staged());
  }
  bool any_exact() const { return num_samples == 0 || max_kv_len == 0 || !lengths_known(); }
  int64_t longest_exact() const {
    return num_samples == 0 || min_sampled_len > max_kv_len ? max_kv_len : min_sampled_len;
  }

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
};

// One batch row, as every stage sees it.
struct RowShape {
  int64_t kv_start;
  int kv_len;
  bool valid;       // false: the range given is not inside the cache; nothing of it is read and the outputs are NaN
  bool sampled;     // false: the exact path
  bool persistent;  // sampled, by the persistent kernel: tiles are blocks
  int tile_kv;
  int num_tiles;
  int tiles_per_block;

  SANTA_HD SegmentPlan segments(int num_samples, Budget budget) const {
    return plan_segments(num_tiles, tiles_per_block, num_samples, budget == Budget::kUniform);
  }
};

SANTA_HD RowShape row_shape_of(const DecodeParams& p, int batch_index) {
  const int64_t start = p.kv_starts != nullptr ? p.kv_starts[batch_index] : 0;
  int64_t length = p.kv_lens != nullptr ? p.kv_lens[batch_index] : p.max_kv_len - start;
  const bool valid = start >= 0 && length >= 0 && start + length <= p.max_kv_len;
  if (!valid) length = 0;
  const bool sampled = p.num_samples > 0 && length > 0 && length >= p.min_sampled_len;
  const bool persistent = sampled && length <= p.persistent.max_kv_len;
  const int block_kv = block_kv_of(length);
  const int tile_kv = persistent ? block_kv : sampled ? tile_kv_of(length) : exact_tile_kv_of(length);
  return {start,
          static_cast<int>(length),
          valid,
          sampled,
          persistent,
          tile_kv,
          ceil_div_int(static_cast<int>(length), tile_kv),
          sampled ? block_kv / tile_kv : 1};
}

}  // namespace santa
