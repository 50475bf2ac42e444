// Proportional rows, stage 3: one warp per tile, KV head and stream draws the tile's rows, reads them from V, and
// writes the tile's share of the estimate. The warps of a CTA share nothing; there are many of them per multiprocessor,
// and they hide each other's latency. Tiles without draws write a zero count and no output.
#pragma once

#include "core/kv_rows.h"
#include "core/mixture.h"
#include "cuda/common/float8.cuh"
#include "cuda/common/row_load.cuh"
#include "cuda/decode/gather.cuh"
#include "cuda/decode/select.cuh"
#include "params.h"

namespace santa::cuda {

constexpr int kSelectWarps = 4;
constexpr int kSelectThreads = kSelectWarps * 32;
constexpr int kGatherHeads = 4;  // query heads that share one pass over the selected rows: 32 accumulators per lane

// How a warp reads rows of V: 8 elements per lane, kRows rows at a time.
template <int HEAD_DIM>
struct GatherShape {
  static constexpr int kChunks = HEAD_DIM / 8;
  static constexpr int kRows = 32 / kChunks;
};

// The 8 elements of a row that a lane reads.
template <typename V>
struct ValueChunk {
  uint4 packed;

  __device__ __forceinline__ void load(const V* row, int chunk, bool aligned) {
    packed = load_global_8(row + chunk * 8, aligned);
  }
  __device__ __forceinline__ float2 pair(int i) const {
    return Float16Traits<V>::unpack(i == 0 ? packed.x : i == 1 ? packed.y : i == 2 ? packed.z : packed.w);
  }
};

template <>
struct ValueChunk<Float8> {
  uint2 codes;

  __device__ __forceinline__ void load(const Float8* row, int chunk, bool aligned) {
    codes = load_global_8(row + chunk * 8, aligned);
  }
  __device__ __forceinline__ float2 pair(int i) const {
    const float4 four = floats_of_codes(i < 2 ? codes.x : codes.y);
    return (i & 1) == 0 ? float2{four.x, four.y} : float2{four.z, four.w};
  }
};

// Adds weight[h] * v[row] for the rows of up to 32 lanes: lane i has the address of row i of the batch and its weights,
// 0 past num_rows. Accumulators are per lane; `reduce_rows` adds them up.
template <int HEAD_DIM, int HEADS, typename V>
__device__ __forceinline__ void accumulate_rows(float (&acc)[HEADS][8], const V* lane_row,
                                                const float (&lane_weight)[HEADS], int num_rows, bool aligned,
                                                int lane) {
  using Shape = GatherShape<HEAD_DIM>;
  constexpr int kInFlight = HEAD_DIM > 192 || HEADS > 4 ? 2 : 3;  // as registers allow
  const int slot = lane / Shape::kChunks, chunk = slot < Shape::kRows ? lane % Shape::kChunks : 0;
  const auto add = [&](ValueChunk<V> elements, int source) {
    const bool active = slot < Shape::kRows && source < num_rows;
    const float2 pairs[4] = {elements.pair(0), elements.pair(1), elements.pair(2), elements.pair(3)};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      const float shared_weight = __shfl_sync(0xffffffffu, lane_weight[h], source & 31);
      const float weight = active ? shared_weight : 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        acc[h][2 * j] += weight * pairs[j].x;
        acc[h][2 * j + 1] += weight * pairs[j].y;
      }
    }
  };
  // Past the end, the last row is read again, for nothing: no branch keeps the loads from being in flight together.
  if (aligned) {
#pragma unroll 1
    for (int i = 0; i < num_rows; i += Shape::kRows * kInFlight) {
      ValueChunk<V> elements[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        elements[u].load(shuffle(lane_row, min(i + u * Shape::kRows + slot, num_rows - 1)), chunk, true);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (i + u * Shape::kRows < num_rows) add(elements[u], i + u * Shape::kRows + slot);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < num_rows; i += Shape::kRows) {
      ValueChunk<V> elements;
      elements.load(shuffle(lane_row, min(i + slot, num_rows - 1)), chunk, false);
      add(elements, i + slot);
    }
  }
}

// Sums of the accumulators over the row slots, in slot order; valid in lanes below kChunks.
template <int HEAD_DIM>
__device__ __forceinline__ float reduce_rows(float value) {
  using Shape = GatherShape<HEAD_DIM>;
  float sum = value;
#pragma unroll
  for (int slot = 1; slot < Shape::kRows; ++slot) {
    sum += __shfl_down_sync(0xffffffffu, value, slot * Shape::kChunks);
  }
  return sum;
}

// Shares are compared with each other alone. In these units those of a tile that has next to none of the row's mass are
// no subnormal numbers, and their sum has a reciprocal.
constexpr float kShareUnits = 18446744073709551616.0f;  // 2^64

// GROUPED: the draws are those of all query heads of the KV head, else of one.
template <typename V, int HEAD_DIM, bool GROUPED>
__global__ void __launch_bounds__(kSelectThreads, GROUPED ? 4 : 7)
    proportional_gather_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int kHeads = GROUPED ? kGatherHeads : 1;
  __shared__ SelectShared all_shared[kSelectWarps];
  const int warp = warp_index(), lane = threadIdx.x & 31;
  SelectShared& shared = all_shared[warp];

  // Streams fastest, then KV heads, then tiles. There are fewer than 2^32: each has a place in the workspace.
  const uint32_t item = blockIdx.x * kSelectWarps + warp, num_streams = p.num_streams(), kv_heads = p.num_kv_heads;
  const int stream = static_cast<int>(item % num_streams), kv_head = static_cast<int>(item / num_streams % kv_heads);
  const int64_t tile = item / num_streams / kv_heads;
  const int batch_index = blockIdx.y;
  const RowShape row = row_shape_of(p, batch_index);
  wait_for_previous();  // all do: the next kernel waits for this one alone
  if (!row.proportional() || tile >= row.num_tiles) return;

  const int group_size = p.group_size;
  const int64_t group = p.group_index(batch_index, kv_head);
  const int64_t offset = p.stream_offset(group, stream);
  const Draws& draws = p.draws[group * num_streams + stream];
  const uint32_t tile_start = p.tile_start[offset + tile], tile_mass = p.tile_mass[offset + tile];
  uint32_t first_draw = 0, last_draw = draws.num_draws;
  if (draws.sorted()) {
    first_draw = p.tile_draw[offset + tile];
    if (tile + 1 < row.num_tiles) last_draw = p.tile_draw[offset + tile + 1];
  }
  if (tile_mass == 0 || first_draw == last_draw) {
    if (lane == 0) p.tile_rows[offset + tile] = 0;
    return;
  }

  const int first_head = GROUPED ? 0 : stream, last_head = GROUPED ? group_size : stream + 1;
  const int64_t stats = p.stats_offset(group) + tile * group_size;
  const int64_t first_key = tile * row.tile_kv;
  const int num_keys = static_cast<int>(min(static_cast<int64_t>(row.tile_kv), row.kv_len - first_key));
  const int num_steps = ceil_div_int(num_keys, kStepKeys), pitch = p.group_pitch;
  const float* scores = p.scores + group * p.scores_per_row + first_key * pitch;
  const float* tile_max = p.tile_max + stats;
  const float* row_lse = p.row_lse + group * group_size;

  // Level 2 of the CDF: every key's share of the tile. Four heads with one read where all of a key's are wanted and lie
  // on 16 bytes.
  float share_sum = 0.0f, shares[kKeysPerLane] = {};
  const bool by_four = GROUPED && pitch % 4 == 0;
#pragma unroll 1
  for (int first = first_head; first < last_head; first += by_four ? 4 : 1) {
    float factor[kHeads], max[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int h = first + j;
      const bool wanted = h < last_head && (j == 0 || by_four);
      const float head_factor = wanted ? kShareUnits * tile_factor(tile_max[h], row_lse[h]) : 0.0f;
      factor[j] = head_factor > 0.0f ? head_factor : 0.0f;
      max[j] = wanted ? tile_max[h] : 0.0f;
      if (factor[j] > 0.0f) share_sum += factor[j] * p.tile_sum[stats + h];
    }
    const auto add = [&](float& share, int j, float score) {
      if (factor[j] > 0.0f) share += factor[j] * exp2_approx(score - max[j]);
    };
    // Past the end, the last key's are read again, for nothing: no branch keeps the loads from being in flight
    // together.
    const auto own = [&](int key) { return scores + min(key, num_keys - 1) * pitch + first; };
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= num_steps) break;
      const int key = first_key_of(s, lane);
      float4 read[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (by_four) {
          read[i] = *reinterpret_cast<const float4*>(own(key + i));
        } else {
          read[i].x = *own(key + i);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + i >= num_keys) continue;
        float& share = shares[4 * s + i];
        add(share, 0, read[i].x);
        if constexpr (GROUPED) {
          if (by_four) add(share, 1, read[i].y), add(share, 2, read[i].z), add(share, 3, read[i].w);
        }
      }
    }
  }
  uint32_t weights[kKeysPerLane];
  const float per_sum = 1.0f / share_sum;
#pragma unroll
  for (int i = 0; i < kKeysPerLane; ++i) weights[i] = row_weight_of(shares[i] * per_sum);
  const uint32_t weight_sum = accumulate_weights(weights, num_steps, shared, lane);
  if (weight_sum > 0) {
    draw_tile(draws, first_draw, last_draw, tile_start, tile_mass, weight_sum, num_keys, shared, lane);
  }
  uint32_t* mask = p.read_mask == nullptr ? nullptr : p.read_mask + p.mask_offset(group) + tile * kMaskWords;
  const int num_selected = list_rows(shared, lane, [&](int word, uint32_t bits) {
    if (mask != nullptr) atomicOr(mask + word, bits);
  });
  if (lane == 0) p.tile_rows[offset + tile] = num_selected;
  if (num_selected == 0) return;

  const auto values = value_rows<V>(p, batch_index, kv_head, row.kv_start);
#pragma unroll 1
  for (int head_base = first_head; head_base < last_head; head_base += kHeads) {
    float acc[kHeads][8] = {};
#pragma unroll 1
    for (int base = 0; base < num_selected; base += 32) {
      const int num_rows = min(32, num_selected - base);
      const V* lane_address = nullptr;
      float lane_weight[kHeads] = {};
      if (lane < num_rows) {
        const int lane_row = shared.rows[base + lane];
        lane_address = values.row(first_key + lane_row);
        if constexpr (GROUPED) {  // Horvitz-Thompson: p_{h,n} / P(n is drawn)
          const uint32_t below = lane_row > 0 ? shared.cumulative[lane_row - 1] : 0;
          const float expected =
              expected_draws(draws.num_draws, tile_mass, draws.total, shared.cumulative[lane_row] - below, weight_sum);
#pragma unroll
          for (int j = 0; j < kHeads; ++j) {
            const int h = head_base + j;
            if (h < last_head && is_finite(row_lse[h])) {
              lane_weight[j] = selected_weight(exp2f(scores[lane_row * pitch + h] - row_lse[h]), expected);
            }
          }
        } else {
          lane_weight[0] = static_cast<float>(shared.counts[lane_row]);
        }
      }
      accumulate_rows<HEAD_DIM>(acc, lane_address, lane_weight, num_rows, p.aligned, lane);
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int h = head_base + j;
      const float scale = GROUPED || !is_finite(row_lse[h]) ? 1.0f : 1.0f / p.num_samples;
      float sums[8];
#pragma unroll
      for (int d = 0; d < 8; ++d) sums[d] = reduce_rows<HEAD_DIM>(acc[j][d]) * scale;
      if (h < last_head && lane < GatherShape<HEAD_DIM>::kChunks) {
        store_global(p.o_accum + (stats + h) * HEAD_DIM + lane * 8, sums, evict_last_policy());
      }
    }
  }
}

}  // namespace santa::cuda
