// One pass, by a score warp: from the scores of its tile to the draws, which it hands to the CTA's gather warps.
#pragma once

#include "core/draw.h"
#include "cuda/common/ptx.cuh"
#include "cuda/decode/heuristics.h"
#include "params.h"

namespace santa::cuda {

// What a CTA works on: query heads of one KV head of one row.
struct RowUnit {
  RowShape row;
  int batch_index, kv_head, block;
  HeadBlock heads;
  int64_t group;

  __device__ __forceinline__ static RowUnit make(const DecodeParams& p, int batch_index, int unit) {
    const int blocks = p.num_head_blocks(), kv_head = blocks == 1 ? unit : unit / blocks,
              block = unit - kv_head * blocks;
    return {row_shape_of(p, batch_index),       batch_index, kv_head, block, head_block_of(p, block),
            p.group_index(batch_index, kv_head)};
  }
};

// The draws of a tile, or up to kChunkDraws of them. Their weights follow, [kChunkDraws, pitch] with the pitch of
// scores, one of each head of the block.
struct alignas(16) DrawChunk {
  float reference[kHeadBlock];                 // what weights are relative to
  float factor[1 + kGatherWarps][kHeadBlock];  // of the weights: the score warp's own, those of the gather warps
  SoftmaxState tile[kHeadBlock];
  uint64_t row[kChunkDraws];  // of V: its address. Keys ascend
  uint8_t key[kChunkDraws];   // within the tile
  uint16_t count;
  uint16_t is_last;  // of the tile

  __device__ __forceinline__ float* weights() { return reinterpret_cast<float*>(this + 1); }
};
static_assert(sizeof(DrawChunk) == kChunkHeadBytes, "heuristics.h has to know of it");

// Chunks of one score warp on their way to the gather warps: written in turn, read in turn. Whoever has written or read
// arrives, every lane: racecheck follows no chains.
struct DrawQueue {
  uint32_t full, empty, chunks;  // addresses in shared memory: barriers [kQueueChunks] of 8 bytes, and the chunks
  int chunk_bytes;

  __device__ __forceinline__ uint32_t full_barrier(int buffer) const { return full + buffer * 8; }
  __device__ __forceinline__ uint32_t empty_barrier(int buffer) const { return empty + buffer * 8; }
  __device__ __forceinline__ DrawChunk& chunk(int buffer) const {
    return *static_cast<DrawChunk*>(__cvta_shared_to_generic(chunks + buffer * chunk_bytes));
  }

  // Of chunk n: the buffer it takes, and the parity of this use of the buffer, by which barriers are waited for.
  static __device__ __forceinline__ int buffer(uint32_t n) { return n % kQueueChunks; }
  static __device__ __forceinline__ uint32_t parity(uint32_t n) { return n / kQueueChunks & 1; }
};

// What to subtract before exp2: scores of -inf weigh 0 even if there is nothing larger.
__device__ __forceinline__ float finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ float max_over_keys(float value) {
  for (int offset = 4; offset < 32; offset <<= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Where the scores of a key lie, so that the writers, 8 neighbouring keys, and the readers, 4 neighbours a lane, are
// free of bank conflicts at a pitch of 4 floats.
__device__ __forceinline__ int score_place(int key) { return key ^ ((key >> 3) & 3); }

// Scores of a tile, as matrix products have them.
struct TileScores {
  float* scores;  // [kDrawTileKv, pitch] in shared memory, keys at their score_place
  int pitch;
  int num_keys;  // that are there; others may hold anything

  // Of keys first + g and first + g + 8, heads 2 t and the next: the order of score_slot. `first` is a multiple of 16.
  __device__ __forceinline__ void put(int first, const float (&logits)[4], int lane) {
    const int place = score_place(first + (lane >> 2)), head = 2 * (lane & 3);
    const uint32_t address = shared_address(scores + place * pitch + head);
    store_shared_pair_if(head < pitch, address, logits[0], logits[1]);
    store_shared_pair_if(head < pitch, address + ((place ^ 1) + 8 - place) * pitch * 4, logits[2], logits[3]);
  }
};

// Caps and hides logits, where there are caps or query vectors that do not see all keys. A lane changes what it reads
// in draw_tile.
static __device__ __noinline__ void change_scores(const DecodeParams* p, const RowUnit* unit, float* scores, int pitch,
                                                  int num_keys, int first_key) {
  // Most tiles are seen by all.
  const int all_see = unit->row.end() - (p->q_len - 1);
  const bool hides = first_key + num_keys > all_see || (p->window_left >= 0 && first_key < p->q_len - 1);
  if (!(p->soft_cap > 0.0f) && !hides) return;
  const int lane = threadIdx.x & 31;
  __syncwarp();  // all scores are there
  for (int h = 0; h < unit->heads.count; ++h) {
    const KeyRange visible = visible_keys(*p, unit->row.end(), unit->heads.first + h);
    for (int key = 4 * lane; key < min(4 * lane + 4, num_keys); ++key) {
      float& score = scores[score_place(key) * pitch + h];
      score = attended_logit(*p, visible, first_key + key, score);
    }
  }
}

// Combines each of 4 values over the lanes: value i ends up in the lanes with i = 2 (lane / 16) + lane / 8 % 2.
template <typename Combine>
__device__ __forceinline__ float reduce_four(const float (&values)[4], int lane, const Combine& combine) {
  const bool high = (lane & 16) != 0, odd = (lane & 8) != 0;
  const float first =
      combine(high ? values[2] : values[0], __shfl_xor_sync(0xffffffffu, high ? values[0] : values[2], 16));
  const float second =
      combine(high ? values[3] : values[1], __shfl_xor_sync(0xffffffffu, high ? values[1] : values[3], 16));
  float result = combine(odd ? second : first, __shfl_xor_sync(0xffffffffu, odd ? first : second, 8));
  for (int offset = 4; offset > 0; offset >>= 1) {
    result = combine(result, __shfl_xor_sync(0xffffffffu, result, offset));
  }
  return result;
}
__device__ __forceinline__ int lane_of_four(int i) { return (i & 2) << 3 | (i & 1) << 3; }

// A head that is undefined takes no part in what its block draws. e: exponentials of the lane's keys, for four heads;
// sum: of one head's over the warp, where reduce_four leaves it.
template <int KEYS>
__device__ __forceinline__ void drop_undefined_heads(float (&e)[KEYS][4], float sum) {
  if (!__any_sync(0xffffffffu, !is_finite(sum))) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (is_finite(__shfl_sync(0xffffffffu, sum, lane_of_four(i)))) continue;
#pragma unroll
    for (int j = 0; j < KEYS; ++j) e[j][i] = 0.0f;
  }
}

// How often each of a lane's 4 keys, 4 lane + j, is drawn, by whole warps. `total`: units of all keys.
__device__ __forceinline__ void count_tile_draws(uint32_t (&counts)[4], uint32_t& total, const uint32_t (&units)[4],
                                                 uint32_t offset, int unit_bits, int lane) {
  const uint32_t own = (units[0] + units[1]) + (units[2] + units[3]);
  uint32_t end = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance <<= 1) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, end, distance);
    if (lane >= distance) end += below;
  }
  total = __shfl_sync(0xffffffffu, end, 31);
  uint32_t below = end - own;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    counts[j] = draws_between(below, units[j], offset, unit_bits);
    below += units[j];
  }
}

// V by bytes.
__device__ __forceinline__ KvRows<char> value_bytes(const DecodeParams& p, const RowUnit& unit) {
  const int element_bytes = p.v_dtype == Dtype::kFloat8E4M3 ? 1 : 2;
  return make_kv_rows<char>(p, p.v, unit.batch_index, unit.kv_head, unit.row.kv_start, p.stride_v_batch * element_bytes,
                            p.stride_v_token * element_bytes, p.stride_v_head * element_bytes);
}

// The address of a row of V, which is started on its way to the L2: gather warps find it there.
__device__ __forceinline__ uint64_t fetch_value(const DecodeParams& p, const KvRows<char>& values, int key) {
  const char* row = values.row(key);
  const int bytes = p.v_dtype == Dtype::kFloat8E4M3 ? p.head_dim : 2 * p.head_dim;
#pragma unroll 1
  for (int byte = 0; byte < bytes; byte += 128) prefetch_l2(row + byte);
  return reinterpret_cast<uint64_t>(row);
}

// Draws from the tile whose scores are in shared memory. Lane l owns keys 4 l to 4 l + 3; what belongs to head h alone
// is in lane h (and those 8, 16 and 24 above). Scores become exponentials and then, for systematic draws, weights in
// their place. `offset`: tile_offset, of the lane's head.
__device__ __forceinline__ void draw_tile(const DecodeParams& p, const RowUnit& unit, const TileScores& scores,
                                          uint32_t offset, float level, int first_key, const KvRows<char>& values,
                                          const DrawQueue& queue, uint32_t& produced, int lane) {
  const int num_heads = unit.heads.count, own_head = lane & 7, num_quads = scores.pitch / 4;
  const auto place_of = [&](int j) { return scores.scores + score_place(4 * lane + j) * scores.pitch; };
  const auto quad_of = [&](int j, int quad) -> float4& { return reinterpret_cast<float4*>(place_of(j))[quad]; };

  // The tile's softmax state. NaN is passed over by the maximum, not by the sum.
  SoftmaxState state = empty_softmax_state();
  __syncwarp();  // all scores are there
#pragma unroll 1
  for (int quad = 0; quad < num_quads; ++quad) {
    float e[4][4], values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 four = quad_of(j, quad);
      e[j][0] = four.x, e[j][1] = four.y, e[j][2] = four.z, e[j][3] = four.w;
    }
    if (scores.num_keys < kDrawTileKv) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (4 * lane + i / 4 >= scores.num_keys) e[i / 4][i % 4] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = fmaxf(fmaxf(e[0][i], e[1][i]), fmaxf(fmaxf(e[2][i], e[3][i]), -INFINITY));
    const float max = reduce_four(values, lane, [](float a, float b) { return fmaxf(a, b); });
    const float below = finite_max(max);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float head_below = __shfl_sync(0xffffffffu, below, lane_of_four(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) e[j][i] = exp2_approx(e[j][i] - head_below);
      values[i] = (e[0][i] + e[1][i]) + (e[2][i] + e[3][i]);
    }
    const float sum = reduce_four(values, lane, [](float a, float b) { return a + b; });
    drop_undefined_heads(e, sum);
#pragma unroll
    for (int j = 0; j < 4; ++j) quad_of(j, quad) = {e[j][0], e[j][1], e[j][2], e[j][3]};
    const SoftmaxState quad_state = {__shfl_sync(0xffffffffu, max, lane_of_four(own_head & 3)),
                                     __shfl_sync(0xffffffffu, sum, lane_of_four(own_head & 3))};
    if (own_head >> 2 == quad) state = quad_state;
  }

  // What follows from it, for the lane's head.
  const bool there = own_head < num_heads, grouped = p.sampler == Sampler::kGrouped;
  const float share = p.budget == Budget::kStreaming ? streaming_share(state, level, scores.num_keys, unit.row.span_len)
                                                     : uniform_share(scores.num_keys, unit.row.span_len);
  const float rate = there ? draw_rate(p.num_samples, share, state) : 0.0f;
  const float reference = there ? tile_reference(p.budget, level, state.max) : -INFINITY;

  // How often each key is drawn. A weight is a head's factor times what is in the key's place, and for grouped draws
  // divided by the probability of the draw: Horvitz-Thompson, inclusion_weight with the exponential at hand.
  bool drawn[4] = {false, false, false, false};
  float inverse[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  uint32_t units[4], counts[4], total;
  if (grouped) {
    float expected[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int quad = 0; quad < num_quads; ++quad) {
      float rates[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rates[i] = __shfl_sync(0xffffffffu, rate, quad * 4 + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 e = quad_of(j, quad);
        expected[j] = fmaf(rates[0], e.x, fmaf(rates[1], e.y, fmaf(rates[2], e.z, fmaf(rates[3], e.w, expected[j]))));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) units[j] = inclusion_units(expected[j]);
    count_tile_draws(counts, total, units, offset, kGroupedUnitBits, lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      drawn[j] = counts[j] != 0;
      inverse[j] = approximate_quotient(static_cast<float>(1u << kGroupedUnitBits), static_cast<float>(units[j]));
    }
  } else {
    const int unit_bits = unit_bits_of(p.sampler, p.num_samples);
#pragma unroll 1
    for (int h = 0; h < num_heads; ++h) {
      const float head_rate = __shfl_sync(0xffffffffu, rate, h);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        units[j] = draw_units(head_rate * place_of(j)[h], static_cast<float>(p.num_samples), unit_bits);
      }
      count_tile_draws(counts, total, units, __shfl_sync(0xffffffffu, offset, h), unit_bits, lane);
      const SoftmaxState tile = {__shfl_sync(0xffffffffu, state.max, h), __shfl_sync(0xffffffffu, state.sum, h)};
      const float scale = draw_scale(tile, __shfl_sync(0xffffffffu, reference, h), total, unit_bits);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        drawn[j] = drawn[j] || counts[j] != 0;
        place_of(j)[h] = counts[j] != 0 ? static_cast<float>(counts[j]) * scale : 0.0f;
      }
    }
  }
  const float factor = !grouped ? 1.0f : rate > 0.0f ? exp2_below(state.max, reference) : 0.0f;

  // Places in the list: keys ascending.
  int count = 0, place = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = __ballot_sync(0xffffffffu, drawn[j]);
    count += __popc(bits);
    place += __popc(bits & ((1u << lane) - 1u));
  }
#pragma unroll 1
  for (int first = 0; first == 0 || first < count; first += kChunkDraws, ++produced) {
    const int buffer = DrawQueue::buffer(produced), listed = min(count - first, kChunkDraws);
    DrawChunk& chunk = queue.chunk(buffer);
    float* const weights = chunk.weights();
    mbarrier_wait(queue.empty_barrier(buffer), DrawQueue::parity(produced) ^ 1);
    if (lane < kHeadBlock) {
      chunk.tile[lane] = state;
      chunk.reference[lane] = reference;
      chunk.factor[0][lane] = factor;
    }
    if (lane == 0) {
      chunk.count = static_cast<uint16_t>(listed);
      chunk.is_last = count - first <= kChunkDraws ? 1 : 0;
    }
    int at = place - first;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (drawn[j] && at >= 0 && at < kChunkDraws) {
        chunk.key[at] = static_cast<uint8_t>(4 * lane + j);
        weights[at * scores.pitch] = inverse[j];
      }
      at += drawn[j] ? 1 : 0;
    }
    __syncwarp();
    // The weights: a lane a draw.
    if (lane < listed) {
      chunk.row[lane] = fetch_value(p, values, first_key + chunk.key[lane]);
      float* const own = weights + lane * scores.pitch;
      const float inclusion_inverse = own[0];
      const float* key_scores = scores.scores + score_place(chunk.key[lane]) * scores.pitch;
#pragma unroll 1
      for (int quad = 0; quad < num_quads; ++quad) {
        const float4 e = reinterpret_cast<const float4*>(key_scores)[quad];
        const float4 f = reinterpret_cast<const float4*>(chunk.factor[0])[quad];
        reinterpret_cast<float4*>(own)[quad] = {e.x * f.x * inclusion_inverse, e.y * f.y * inclusion_inverse,
                                                e.z * f.z * inclusion_inverse, e.w * f.w * inclusion_inverse};
      }
    }
    mbarrier_arrive(queue.full_barrier(buffer));
  }
}

}  // namespace santa::cuda
