// One pass, by a score warp: from the scores of its tile to the draws, which it hands to the CTA's gather warp.
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
    const int blocks = p.num_head_blocks(), kv_head = unit / blocks, block = unit % blocks;
    return {row_shape_of(p, batch_index),  batch_index, kv_head, block, head_block_of(p, block),
            p.group_index(batch_index, kv_head)};
  }
};

// The draws of a tile, or up to kChunkDraws of them.
struct alignas(16) DrawChunk {
  float4 weight[kChunkDraws][2];  // of each head of the block
  float reference[kHeadBlock];    // what weights are relative to; the gather warp turns them into factors
  SoftmaxState tile[kHeadBlock];
  uint8_t key[kChunkDraws];  // within the tile, ascending
  uint16_t count;
  uint16_t is_last;  // of the tile
};
static_assert(sizeof(DrawChunk) <= kChunkBytes, "heuristics.h has to know of it");

// Chunks of one score warp on their way to the gather warp: written in turn, read in turn. Whoever has written or read
// arrives, every lane: racecheck follows no chains.
struct DrawQueue {
  uint64_t* full;   // [2]
  uint64_t* empty;  // [2]
  DrawChunk* chunks;

  // Of chunk n: the buffer it takes, and the parity of this use of the buffer, by which barriers are waited for.
  static __device__ __forceinline__ int buffer(uint32_t n) { return n & 1; }
  static __device__ __forceinline__ uint32_t parity(uint32_t n) { return n >> 1 & 1; }
};

// Where the scores of a key lie, so that the writers, 8 neighbouring keys, and the readers, 4 neighbours a lane, are free
// of bank conflicts at a pitch of 4 floats.
__device__ __forceinline__ int score_place(int key) { return key ^ ((key >> 3) & 3); }

// What to subtract before exp2: scores of -inf weigh 0 even if there is nothing larger.
__device__ __forceinline__ float finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ float max_over_keys(float value) {
  for (int offset = 4; offset < 32; offset <<= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Scores of a tile, as matrix products have them: lane (g, t) holds two heads, 2 t and the next.
struct TileScores {
  float* scores;  // [kDrawTileKv, pitch] in shared memory, keys at their score_place
  int pitch;
  int num_keys;
  float max[2] = {-INFINITY, -INFINITY};  // NaN is passed over

  __device__ __forceinline__ TileScores(float* scores, int pitch, int num_keys)
      : scores(scores), pitch(pitch), num_keys(num_keys) {}

  __device__ __forceinline__ void put(int key, int t, float first, float second) {
    if (key >= num_keys) first = second = -INFINITY;
    max[0] = fmaxf(max[0], first), max[1] = fmaxf(max[1], second);
    if (2 * t < pitch) *reinterpret_cast<float2*>(scores + score_place(key) * pitch + 2 * t) = {first, second};
  }
};

// Sums of 4 values over the lanes: that of value i in the lanes with i = 2 (lane / 16) + lane / 8 % 2.
__device__ __forceinline__ float sum_four(const float (&values)[4], int lane) {
  const bool high = (lane & 16) != 0, odd = (lane & 8) != 0;
  const float first = (high ? values[2] : values[0]) + __shfl_xor_sync(0xffffffffu, high ? values[0] : values[2], 16);
  const float second = (high ? values[3] : values[1]) + __shfl_xor_sync(0xffffffffu, high ? values[1] : values[3], 16);
  float sum = (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 8);
  for (int offset = 4; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}
__device__ __forceinline__ int sum_four_lane(int i) { return (i & 2) << 3 | (i & 1) << 3; }

__device__ __forceinline__ uint32_t warp_scan(uint32_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// How often each of a lane's 4 keys is drawn, by whole warps. `total`: units of all keys.
__device__ __forceinline__ void count_tile_draws(uint32_t (&counts)[4], uint32_t& total, const uint32_t (&units)[4],
                                            uint32_t offset, int unit_bits, int lane) {
  const uint32_t own = units[0] + units[1] + units[2] + units[3], end = warp_scan(own, lane);
  total = __shfl_sync(0xffffffffu, end, 31);
  uint32_t below = end - own;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    counts[j] = draws_between(below, units[j], offset, unit_bits);
    below += units[j];
  }
}

// Starts a row of V on its way to the L2.
__device__ __forceinline__ void prefetch_value(const DecodeParams& p, const RowUnit& unit, int key) {
  const int element_bytes = p.v_dtype == Dtype::kFloat8E4M3 ? 1 : 2;
  const auto rows = make_kv_rows<char>(p.v, unit.batch_index, unit.kv_head, unit.row.kv_start,
                                       p.stride_v_batch * element_bytes, p.stride_v_token * element_bytes,
                                       p.stride_v_head * element_bytes);
  for (int byte = 0; byte < p.head_dim * element_bytes; byte += 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(rows.row(key) + byte));
  }
}

// Draws from the tile whose scores are in shared memory. Lane l owns keys 4 l to 4 l + 3; what belongs to head h alone
// is in lane h (and those 8, 16 and 24 above). Scores become exponentials and then, for systematic draws, weights in
// their place.
__device__ __forceinline__ void draw_tile(const DecodeParams& p, const RowUnit& unit, const TileScores& scores,
                                          RandomStream stream, float level, int first_key, const DrawQueue& queue,
                                          uint32_t& produced, int lane) {
  const int num_heads = unit.heads.count, own_head = lane & 7, num_quads = scores.pitch / 4;
  const auto place_of = [&](int j) { return scores.scores + score_place(4 * lane + j) * scores.pitch; };
  const auto quad_of = [&](int j, int quad) -> float4& { return reinterpret_cast<float4*>(place_of(j))[quad]; };

  // The tile's softmax state.
  const float first_max = max_over_keys(scores.max[0]), second_max = max_over_keys(scores.max[1]);
  const float even_max = __shfl_sync(0xffffffffu, first_max, own_head >> 1);
  const float odd_max = __shfl_sync(0xffffffffu, second_max, own_head >> 1);
  SoftmaxState state = {(own_head & 1) != 0 ? odd_max : even_max, 0.0f};
  const float below = finite_max(state.max);
  __syncwarp();  // all scores are there
#pragma unroll 1
  for (int quad = 0; quad < num_quads; ++quad) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f}, head_max[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) head_max[i] = __shfl_sync(0xffffffffu, below, quad * 4 + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float4& place = quad_of(j, quad);
      const float4 e = {exp2_approx(place.x - head_max[0]), exp2_approx(place.y - head_max[1]),
                        exp2_approx(place.z - head_max[2]), exp2_approx(place.w - head_max[3])};
      sums[0] += e.x, sums[1] += e.y, sums[2] += e.z, sums[3] += e.w;
      place = e;
    }
    const float sum = __shfl_sync(0xffffffffu, sum_four(sums, lane), sum_four_lane(own_head & 3));
    if (own_head >> 2 == quad) state.sum = sum;
  }

  // What follows from it, for the lane's head.
  const bool there = own_head < num_heads, streaming = p.budget == Budget::kStreaming;
  const bool grouped = p.sampler == Sampler::kGrouped;
  const float share = streaming ? streaming_share(log2_sum(state), level, scores.num_keys, unit.row.kv_len)
                                : uniform_share(scores.num_keys, unit.row.kv_len);
  const float rate = there ? draw_rate(p.num_samples, share, state) : 0.0f;
  const float reference = there ? tile_reference(p.budget, level, state.max) : -INFINITY;
  const int unit_bits = unit_bits_of(p.sampler, p.num_samples);
  const uint32_t offset =
      streaming ? streaming_offset(stream, first_key / kDrawTileKv, unit_bits)
                : uniform_offset(stream, first_key, unit.row.kv_len,
                                 static_cast<int64_t>(p.num_samples) * (grouped ? num_heads : 1), unit_bits);

  // Draws. A weight is factor[h] times what is in the key's place, times `inverse`.
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
        const float own[4] = {e.x, e.y, e.z, e.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // a head without a rate may hold NaN
          expected[j] = fmaf(rates[i], rates[i] > 0.0f ? own[i] : 0.0f, expected[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) units[j] = inclusion_units(expected[j]);
    count_tile_draws(counts, total, units, offset, kGroupedUnitBits, lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      drawn[j] = counts[j] != 0;
      // Horvitz-Thompson: inclusion_weight, with the exponential at hand.
      inverse[j] = __fdividef(static_cast<float>(1u << kGroupedUnitBits), static_cast<float>(units[j]));
    }
  } else {
#pragma unroll 1
    for (int h = 0; h < num_heads; ++h) {
      const float head_rate = __shfl_sync(0xffffffffu, rate, h);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float expected = head_rate > 0.0f ? head_rate * place_of(j)[h] : 0.0f;
        units[j] = draw_units(expected, static_cast<float>(p.num_samples), unit_bits);
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
  const float own_factor = !there ? 0.0f : !grouped ? 1.0f : rate > 0.0f ? exp2_below(state.max, reference) : 0.0f;
  float factor[kHeadBlock];
#pragma unroll
  for (int h = 0; h < kHeadBlock; ++h) factor[h] = __shfl_sync(0xffffffffu, own_factor, h);

  // Places in the list: keys ascending.
  int count = 0, place = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = __ballot_sync(0xffffffffu, drawn[j]);
    count += __popc(bits);
    place += __popc(bits & ((1u << lane) - 1u));
    if (drawn[j]) prefetch_value(p, unit, first_key + 4 * lane + j);
  }
#pragma unroll 1
  for (int first = 0; first == 0 || first < count; first += kChunkDraws, ++produced) {
    const int buffer = DrawQueue::buffer(produced);
    DrawChunk& chunk = queue.chunks[buffer];
    mbarrier_wait(&queue.empty[buffer], DrawQueue::parity(produced) ^ 1);
    if (lane < kHeadBlock) {
      chunk.tile[lane] = state;
      chunk.reference[lane] = reference;
    }
    if (lane == 0) {
      chunk.count = static_cast<uint16_t>(min(count - first, kChunkDraws));
      chunk.is_last = count - first <= kChunkDraws ? 1 : 0;
    }
    int at = place - first;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!drawn[j]) continue;
      if (at >= 0 && at < kChunkDraws) {
        chunk.key[at] = static_cast<uint8_t>(4 * lane + j);
        const float4 low = quad_of(j, 0);
        chunk.weight[at][0] = {low.x * factor[0] * inverse[j], low.y * factor[1] * inverse[j],
                               low.z * factor[2] * inverse[j], low.w * factor[3] * inverse[j]};
        if (num_quads > 1) {
          const float4 high = quad_of(j, 1);
          chunk.weight[at][1] = {high.x * factor[4] * inverse[j], high.y * factor[5] * inverse[j],
                                 high.z * factor[6] * inverse[j], high.w * factor[7] * inverse[j]};
        }
      }
      ++at;
    }
    mbarrier_arrive(&queue.full[buffer]);
  }
}

}  // namespace santa::cuda
