// Proposal keys (core/proposal.h) in the gather warps: rows of K that were drawn are scored again and weighed exactly,
// together with their rows of V.
#pragma once

#include <cstddef>

#include "core/proposal.h"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/lane_values.cuh"

namespace santa::cuda {

// Of the second gather warp, for the first.
struct ProposalExchange {
  float reference[kHeadBlock], z[kHeadBlock], drawn[kHeadBlock];
};

// Where scores are those of the keys themselves.
struct NoProposals {
  static constexpr bool kProposes = false, kHoldsBoth = true;
  struct Rows {};
};

// 2^x of a whole number that is not positive.
__device__ __forceinline__ float power_of_two(float x) {
  return x < -126.0f ? 0.0f : __int_as_float((127 + static_cast<int>(x)) << 23);
}

// Sums each of N values over the lanes, which are of `OFFSET` apart at first; lane l gets value l / (32 / N).
template <int N, int OFFSET = 16>
__device__ __forceinline__ float sum_over_lanes(const float (&values)[N], int lane) {
  if constexpr (N == 1) {
    float sum = values[0];
#pragma unroll
    for (int offset = OFFSET; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  } else {
    const bool high = (lane & OFFSET) != 0;
    float halves[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float kept = high ? values[i + N / 2] : values[i], sent = high ? values[i] : values[i + N / 2];
      halves[i] = kept + __shfl_xor_sync(0xffffffffu, sent, OFFSET);
    }
    return sum_over_lanes<N / 2, OFFSET / 2>(halves, lane);
  }
}

// What a gather warp adds up of its draws, relative to a whole power of two that is large enough for all of them so
// far: where it rises, sums are multiplied exactly, so that their bits do not depend on how many rows are weighed at
// once. A lane has the sums of one head of each four.
template <typename K, int HEAD_DIM, int ROWS>
struct ProposalSums {
  static constexpr bool kProposes = true;
  // Whether registers have room for rows of V beside those of K: else they are asked for when K has been scored.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr bool kHoldsBoth = HEAD_DIM <= 64;
#else
  static constexpr bool kHoldsBoth = HEAD_DIM <= 128;
#endif
  static constexpr int kElements = ValueLanes<HEAD_DIM>::kElements, kLanes = ValueLanes<HEAD_DIM>::kLanes;
  static constexpr int kLanesEach = 32 / (4 * ROWS);  // that have the score of one row and head

  struct Rows {
    LaneValues<K, kElements> keys[ROWS];
    uint32_t draw;  // of row `lane`: the address of its chunk, a multiple of 16, and its number there
  };

  const float* queries;  // in shared memory: [kHeadBlock, HEAD_DIM], q times the scale of logits
  ProposalExchange* exchange;
  float* tile_drawn;  // ProposalParams
  float reference[2], z[2], drawn[2];

  static __device__ __forceinline__ int head_of(int lane) { return lane / kLanesEach & 3; }
  static __device__ __forceinline__ int lane_of(int row, int head) { return (row * 4 + head) * kLanesEach; }

  __device__ __forceinline__ void clear() {
    reference[0] = reference[1] = -INFINITY;
    z[0] = z[1] = drawn[0] = drawn[1] = 0.0f;
  }

  // The address of a ProposedDraw.
  static __device__ __forceinline__ uint32_t address_of(uint32_t draw, const RowUnit& unit) {
    return (draw & ~15u) + chunk_bytes_of(score_pitch_of(unit.heads.count), 0) + (draw & 15u) * kProposedDrawBytes;
  }

  // Starts the rows of K of a batch on their way.
  __device__ __forceinline__ void load(const DecodeParams& p, const RowUnit& unit, Rows& batch, uint32_t draw,
                                       int lane_element) const {
    static_assert(kChunkDraws <= 16);
    batch.draw = draw;
    const uint2 own = load_shared_8(address_of(draw, unit) + offsetof(ProposedDraw, row));
    const uint64_t address = static_cast<uint64_t>(own.y) << 32 | own.x;
    const auto source = [&](int i) {
      return reinterpret_cast<const K*>(__shfl_sync(0xffffffffu, address, i)) + lane_element;
    };
    if (p.aligned) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) batch.keys[i].load(source(i));
    } else {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) batch.keys[i] = LaneValues<K, kElements>::by_elements(source(i));
    }
  }

  // The weights of the rows of a batch for four heads, in place of those of the proposal, and what they add to Z.
  template <typename Batch>
  __device__ __forceinline__ void weigh(const DecodeParams& p, const RowUnit& unit, const Batch& batch,
                                        float (&acc)[kHeadBlock][kElements], int quad, int lane) {
    // Two rows at a time, the first step of sum_over_lanes at once: registers are few.
    const bool high = (lane & 16) != 0;
    const float* const own_queries = queries + quad * 4 * HEAD_DIM + min(lane, kLanes - 1) * kElements;
    float halves[2 * ROWS];
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) {
      float first[kElements], second[kElements];
      batch.keys[i].unpack(first), batch.keys[i + ROWS / 2].unpack(second);
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        float low = 0.0f, other = 0.0f;
#pragma unroll
        for (int d = 0; d < kElements; ++d) {
          const float q = own_queries[h * HEAD_DIM + d];
          low = fmaf(q, first[d], low), other = fmaf(q, second[d], other);
        }
        if (kLanes < 32 && lane >= kLanes) low = other = 0.0f;
        halves[i * 4 + h] = (high ? other : low) + __shfl_xor_sync(0xffffffffu, high ? low : other, 16);
      }
    }
    float score = sum_over_lanes<2 * ROWS, 8>(halves, lane);

    const int row = lane / (4 * kLanesEach), head = quad * 4 + head_of(lane);
    const bool there = row < batch.count && head < unit.heads.count;
    const uint32_t draw = __shfl_sync(0xffffffffu, batch.draw, row);
    const uint32_t place = __shfl_sync(0xffffffffu, batch.weights, row) + head * 4;
    const uint2 inverse_and_key = load_shared_8(address_of(draw, unit) + offsetof(ProposedDraw, inverse));
    const float inverse = __uint_as_float(inverse_and_key.x);
    if (changes_logits(p)) {
      const KeyRange visible = visible_keys(p, unit.row.end(), unit.heads.first + head);
      score = attended_logit(p, visible, static_cast<int>(inverse_and_key.y), score);
    }
    // What the weight of the proposal is relative to.
    const float proposed = load_shared_float((draw & ~15u) + offsetof(DrawChunk, reference) + head * 4);

    float most = there ? fmaxf(proposed, score) : -INFINITY;
    for (int offset = 4 * kLanesEach; offset < 32; offset <<= 1) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    }
    const bool rises = most > reference[quad];
    if (__any_sync(0xffffffffu, rises)) {
      const float risen = rises ? ceilf(most) : reference[quad];
      const float factor = rises ? power_of_two(reference[quad] - risen) : 1.0f;
      reference[quad] = risen, z[quad] *= factor, drawn[quad] *= factor;
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const float head_factor = __shfl_sync(0xffffffffu, factor, h * kLanesEach);
#pragma unroll
        for (int d = 0; d < kElements; ++d) acc[quad * 4 + h][d] *= head_factor;
      }
    }

    const float weight = there ? exp2_below(score, reference[quad]) * inverse : 0.0f;
    const float change = there ? weight - load_shared_float(place) * exp2_below(proposed, reference[quad]) : 0.0f;
    __syncwarp();  // all lanes have read the weights of the proposal
    if (there && lane % kLanesEach == 0) store_shared_float(place, weight);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int from = lane_of(i, head_of(lane));
      const float row_change = __shfl_sync(0xffffffffu, change, from),
                  row_weight = __shfl_sync(0xffffffffu, weight, from);
      if (i < batch.count) z[quad] += row_change, drawn[quad] += row_weight;
    }
    __syncwarp();  // the weights are there
  }

  // Of head lane % 8, of one of the sums.
  static __device__ __forceinline__ float own(const float (&sums)[2], int lane) {
    const int from = (lane & 3) * kLanesEach;
    const float low = __shfl_sync(0xffffffffu, sums[0], from), high = __shfl_sync(0xffffffffu, sums[1], from);
    return (lane & 4) != 0 ? high : low;
  }

  __device__ __forceinline__ void hand_over(int lane) const {
    const float own_reference = own(reference, lane), own_z = own(z, lane), own_drawn = own(drawn, lane);
    if (lane >= kHeadBlock) return;
    exchange->reference[lane] = own_reference, exchange->z[lane] = own_z, exchange->drawn[lane] = own_drawn;
  }

  // The part's sums, of head lane % 8: those over all its keys, `proposed`, and those of both warps, whose values are
  // to be multiplied with the factors.
  __device__ __forceinline__ void finish(SoftmaxState proposed, int64_t stats, float& own_factor, float& other_factor,
                                         int lane, int num_heads, const DecodeParams& p) const {
    const int head = lane & 7;
    const float own_reference = own(reference, lane), other_reference = exchange->reference[head];
    const float total = fmaxf(proposed.max, fmaxf(own_reference, other_reference));
    own_factor = exp2_below(own_reference, total), other_factor = exp2_below(other_reference, total);
    const float part_z =
        proposed.sum * exp2_below(proposed.max, total) + own(z, lane) * own_factor + exchange->z[head] * other_factor;
    const float part_drawn = own(drawn, lane) * own_factor + exchange->drawn[head] * other_factor;
    if (lane >= num_heads) return;
    p.tile_max[stats + lane] = total;
    p.tile_sum[stats + lane] = part_z;
    tile_drawn[stats + lane] = part_drawn;
  }
};

}  // namespace santa::cuda
