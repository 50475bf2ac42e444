// The last stage: one CTA per query vector adds up the row's tiles, or its parts, in a fixed order and writes the
// output. Or, where a CTA of the tile kernel had all tiles of an exact row, one of its warps, in the same order.
#pragma once

#include "core/mixture.h"
#include "core/proposal.h"
#include "core/softmax_state.h"
#include "cuda/common/ptx.cuh"
#include "cuda/decode/draw.cuh"
#include "params.h"

namespace santa::cuda {

constexpr int kCombineThreads = 256;

constexpr int kCombineAhead = 4;  // tiles of a thread whose values are on their way before their weights are known

// Sums over a warp, the same in all lanes. They are rounded here, not as the code around them suits the compiler: all
// kernels agree. What lanes have is in units of 2^max, the sum in those of the largest max, which max becomes.
__device__ __forceinline__ float factor_of_warp(float& max) {
  const float own = max;
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
  return exp2_below(own, max);
}
__device__ __forceinline__ float sum_of_warp(float value, float factor) {
  value = __fmul_rn(value, factor);
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ SoftmaxState merge_rounded(SoftmaxState a, SoftmaxState b) {
  const float max = fmaxf(a.max, b.max);
  return {max, __fadd_rn(a.sum * exp2_below(a.max, max), b.sum * exp2_below(b.max, max))};
}

// Log-sum-exp of a query vector's tiles, base 2, by a warp: lanes take tiles in turn, then merge. The order depends on
// the number of tiles alone. `first_stats`: of its first tile. own_max becomes the maximum of tile threadIdx.x % 32.
__device__ __forceinline__ float lse_of_tiles(const DecodeParams& p, int64_t first_stats, int num_tiles,
                                              float& own_max) {
  SoftmaxState state = empty_softmax_state();
  own_max = -INFINITY;
  // A loop: code that runs once has to be fetched first.
#pragma unroll 1
  for (int tile = threadIdx.x & 31; tile < num_tiles; tile += 32) {
    const int64_t index = first_stats + static_cast<int64_t>(tile) * p.group_size;
    const float max = p.tile_max[index];
    state = merge_rounded(state, {max, p.tile_sum[index]});
    if (tile < 32) own_max = max;
  }
  const float factor = factor_of_warp(state.max);
  return log2_sum({state.max, sum_of_warp(state.sum, factor)});
}

__device__ __forceinline__ void add_weighted(float4& sum, float weight, float4 value) {
  if (weight == 0.0f) return;
  sum.x += weight * value.x, sum.y += weight * value.y, sum.z += weight * value.z, sum.w += weight * value.w;
}
__device__ __forceinline__ void add(float4& sum, float4 value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}

// The output of dimensions 4 lane to 4 lane + 3 of a query vector; the first lane writes its lse.
template <typename T>
__device__ __forceinline__ void write_output(const DecodeParams& p, const RowShape& row, int64_t head_index,
                                             int kv_head, int h, float lse, float4 sum, int lane) {
  const Epilogue epilogue = epilogue_of(p, row, kv_head, h, lse);
  const uint2 packed = {Float16Traits<T>::pack(epilogue.output(sum.x), epilogue.output(sum.y)),
                        Float16Traits<T>::pack(epilogue.output(sum.z), epilogue.output(sum.w))};
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + head_index * p.head_dim + lane * 4) = packed;
  if (lane == 0) p.lse[head_index] = epilogue.lse;
}

// An exact row's query vector h, by a warp. Not inline: its registers are not those of what comes before.
template <typename T, int HEAD_DIM>
__device__ __noinline__ void combine_exact_head(const DecodeParams* params, const RowUnit* row_unit, int h) {
  const DecodeParams& p = *params;
  const RowUnit& unit = *row_unit;
  constexpr int kLanes = HEAD_DIM / 4, kSlots = kCombineThreads / kLanes;  // those of combine_row
  constexpr int kAhead = kSlots < 8 ? kSlots : 8;                          // tiles whose values are on their way
  const int64_t stats = p.stats_offset(unit.group) + h;
  const int num_tiles = unit.row.num_tiles;
  const auto value_of = [&](int tile, int lane) {
    const int64_t index = stats + static_cast<int64_t>(tile) * p.group_size;
    return *reinterpret_cast<const float4*>(p.o_accum + index * HEAD_DIM + lane * 4);
  };
  float own_max, lse = 0.0f;
  const auto add_tile = [&](float4& own, int tile, float4 value) {
    const float max = tile < 32 ? __shfl_sync(0xffffffffu, own_max, tile)
                                : p.tile_max[stats + static_cast<int64_t>(tile) * p.group_size];
    add_weighted(own, exp2_below(max, lse), value);
  };
#pragma unroll 1
  for (int first_lane = 0; first_lane < kLanes; first_lane += 32) {
    const int lane = min(first_lane + static_cast<int>(threadIdx.x & 31), kLanes - 1);
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int slot = 0; slot < kSlots; slot += kAhead) {
      float4 ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (slot + i < num_tiles) ahead[i] = value_of(slot + i, lane);
      }
      if (first_lane == 0 && slot == 0) lse = lse_of_tiles(p, stats, num_tiles, own_max);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        float4 own = {0.0f, 0.0f, 0.0f, 0.0f};
        if (slot + i < num_tiles) add_tile(own, slot + i, ahead[i]);
#pragma unroll 1
        for (int tile = slot + i + kSlots; tile < num_tiles; tile += kSlots) add_tile(own, tile, value_of(tile, lane));
        add(sum, own);
      }
    }
    if (first_lane + (threadIdx.x & 31) < kLanes) {
      write_output<T>(p, unit.row, p.output_index(unit.batch_index, unit.kv_head, h), unit.kv_head, h, lse, sum, lane);
    }
  }
}

// Threads along head_dim take 4 dimensions each; the rest, `slots` of them, take the tiles in turn. The order of every
// sum depends on the number of tiles alone. PROPOSES: rows in one pass are those of proposal keys, whose parts have a
// second sum, `tile_drawn`.
template <typename T, bool PROPOSES>
__device__ __forceinline__ void combine_row(const DecodeParams& p, const float* tile_drawn) {
  __shared__ float4 partial[kCombineThreads];
  __shared__ int shared_rows[kCombineThreads];

  const int kv_head = blockIdx.x / p.group_size, h = blockIdx.x % p.group_size, batch_index = blockIdx.y;
  const RowShape row = row_shape_of(p, batch_index);
  const int64_t group = p.group_index(batch_index, kv_head), stats = p.stats_offset(group) + h;
  const int64_t head_index = p.output_index(batch_index, kv_head, h);
  const int lanes = p.head_dim / 4, slots = kCombineThreads / lanes;
  const int slot = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int first = slot < slots ? slot : row.num_tiles;
  const auto value_of = [&](int tile) {
    const int64_t index = stats + static_cast<int64_t>(tile) * p.group_size;
    return *reinterpret_cast<const float4*>(p.o_accum + index * p.head_dim + lane * 4);
  };
  const auto max_of = [&](int tile) { return p.tile_max[stats + static_cast<int64_t>(tile) * p.group_size]; };
  wait_for_previous();
  if (!row.sampled() && row.num_tiles <= 1 && p.max_tiles > 0) return;  // the tile kernel wrote it

  // Of a proportional tile without draws o_accum is undefined; elsewhere a weight of 0 has nothing to add.
  const int32_t* tile_rows = p.tile_rows + p.stream_offset(group, p.num_streams() == 1 ? 0 : h);
  const auto has_value = [&](int tile) {
    return tile < row.num_tiles && (!row.proportional() || tile_rows[tile] != 0);
  };
  float4 ahead[kCombineAhead];
  bool is_ahead[kCombineAhead];
#pragma unroll
  for (int i = 0; i < kCombineAhead; ++i) {
    is_ahead[i] = has_value(first + i * slots);
    if (is_ahead[i]) ahead[i] = value_of(first + i * slots);
  }

  // The row's log-sum-exp, by every warp for itself.
  float lse, own_max = -INFINITY;  // own_max: of tile threadIdx.x % 32
  if (row.proportional()) {
    lse = p.row_lse[group * p.group_size + h];
  } else if (PROPOSES && row.one_pass()) {
    ProposalState state = empty_proposal_state();
#pragma unroll 1
    for (int tile = threadIdx.x & 31; tile < row.num_tiles; tile += 32) {
      const int64_t index = stats + static_cast<int64_t>(tile) * p.group_size;
      const float max = p.tile_max[index];
      state = merge_proposals(state, {max, p.tile_sum[index], tile_drawn[index]});
      if (tile < 32) own_max = max;
    }
    const float factor = factor_of_warp(state.reference);
    lse = log2_guarded({state.reference, sum_of_warp(state.z, factor), sum_of_warp(state.drawn, factor)});
  } else {
    lse = lse_of_tiles(p, stats, row.num_tiles, own_max);
  }

  float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add_tile = [&](float tile_max, float4 value) {
    add_weighted(acc, row.proportional() ? 1.0f : exp2_below(tile_max, lse), value);
  };
#pragma unroll
  for (int i = 0; i < kCombineAhead; ++i) {
    const int tile = first + i * slots;
    float tile_max = __shfl_sync(0xffffffffu, own_max, tile & 31);
    if (!is_ahead[i]) continue;
    if (tile >= 32) tile_max = max_of(tile);
    add_tile(tile_max, ahead[i]);
  }
#pragma unroll 4
  for (int tile = first + kCombineAhead * slots; tile < row.num_tiles; tile += slots) {
    if (has_value(tile)) add_tile(max_of(tile), value_of(tile));
  }
  partial[threadIdx.x] = acc;

  const bool counts_rows = p.rows_read != nullptr && h == 0;
  if (counts_rows) {
    int rows = 0;
    if (row.one_pass()) {
      const int blocks = p.num_head_blocks();
      for (int i = threadIdx.x; i < row.num_tiles * blocks; i += kCombineThreads) {
        rows += p.tile_rows[(group * blocks + i % blocks) * p.max_tiles + i / blocks];
      }
    } else if (row.proportional()) {
      const uint32_t* mask = p.read_mask + p.mask_offset(group);
      for (int i = threadIdx.x; i < row.num_tiles * kMaskWords; i += kCombineThreads) rows += __popc(mask[i]);
    } else if (threadIdx.x == 0) {
      rows = row.kv_len;
    }
    shared_rows[threadIdx.x] = rows;
  }
  __syncthreads();

  if (threadIdx.x < lanes) {
    for (int s = 1; s < slots; ++s) add(acc, partial[s * lanes + threadIdx.x]);
    write_output<T>(p, row, head_index, kv_head, h, lse, acc, threadIdx.x);
  }
  if (counts_rows && threadIdx.x == 0) {
    int rows = 0;
    for (int i = 0; i < kCombineThreads; ++i) rows += shared_rows[i];
    p.rows_read[group] = row.valid ? rows : -1;
  }
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 4) combine_kernel(const __grid_constant__ DecodeParams p) {
  combine_row<T, false>(p, nullptr);
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 4)
    combine_proposal_kernel(const __grid_constant__ DecodeParams p, const float* tile_drawn) {
  combine_row<T, true>(p, tile_drawn);
}

}  // namespace santa::cuda
