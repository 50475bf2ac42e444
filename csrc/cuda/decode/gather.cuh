// Stage 3, sampled rows: one CTA per tile and KV head draws the tile's rows, reads them from V, and writes the tile's
// share of the estimate. Tiles in which nothing was drawn write a zero count and no output.
#pragma once

#include "core/kv_view.h"
#include "core/mixture.h"
#include "cuda/common/row_load.cuh"
#include "cuda/decode/select.cuh"
#include "params.h"

namespace santa::cuda {

constexpr int kGatherHeads = 4;  // query heads that share one pass over the selected rows: 32 accumulators per thread

template <int HEAD_DIM>
struct GatherShape {
  static constexpr int kChunks = HEAD_DIM / 8;             // threads per row, 16 bytes each
  static constexpr int kLanes = kSelectThreads / kChunks;  // rows read at a time
};

template <int HEAD_DIM>
struct GatherShared {
  SelectShared select;
  int32_t rows[kMaxTileKv];                 // selected rows of the stream, in order
  float weights[kGatherHeads][kMaxTileKv];  // and their weights, per head of the pass
  float partial[GatherShape<HEAD_DIM>::kLanes][kGatherHeads][HEAD_DIM];
  float scale[kGatherHeads];       // of the sums, per head of the pass
  uint32_t read[kMaxTileKv / 32];  // rows read by any stream
};

// sum over the selected rows of weights[h][i] * v[rows[i]], for up to kGatherHeads heads; times shared.scale[h] to
// `out`.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void gather_rows(const StridedKvView<T>& values, int num_rows, int num_heads, float* out,
                                            bool aligned, GatherShared<HEAD_DIM>& shared) {
  using Shape = GatherShape<HEAD_DIM>;
  const int lane = threadIdx.x / Shape::kChunks, chunk = threadIdx.x % Shape::kChunks;
  float acc[kGatherHeads][8] = {};
  if (lane < Shape::kLanes) {
#pragma unroll 2
    for (int i = lane; i < num_rows; i += Shape::kLanes) {
      const uint4 packed = load_global_8(values.row(shared.rows[i]) + chunk * 8, aligned);
      const float2 pairs[4] = {Half<T>::unpack(packed.x), Half<T>::unpack(packed.y), Half<T>::unpack(packed.z),
                               Half<T>::unpack(packed.w)};
#pragma unroll
      for (int h = 0; h < kGatherHeads; ++h) {
        const float weight = shared.weights[h][i];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc[h][2 * j] += weight * pairs[j].x;
          acc[h][2 * j + 1] += weight * pairs[j].y;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kGatherHeads; ++h) {
#pragma unroll
      for (int j = 0; j < 8; ++j) shared.partial[lane][h][chunk * 8 + j] = acc[h][j];
    }
  }
  __syncthreads();
  const int num_lanes = min(num_rows, Shape::kLanes);
  for (int item = threadIdx.x; item < num_heads * HEAD_DIM; item += kSelectThreads) {
    const int h = item / HEAD_DIM, d = item % HEAD_DIM;
    float sum = 0.0f;
    for (int l = 0; l < num_lanes; ++l) sum += shared.partial[l][h][d];
    out[item] = sum * shared.scale[h];
  }
  __syncthreads();
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kSelectThreads) gather_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<GatherShared<HEAD_DIM>*>(shared_bytes);
  const int kv_head = blockIdx.x % p.num_kv_heads, tile = blockIdx.x / p.num_kv_heads, batch_index = blockIdx.y;
  const RowShape row = row_shape_of(p, batch_index);
  if (!row.sampled || tile >= row.num_tiles) return;

  const int group_size = p.gqa_group_size;
  const int64_t group = p.group_index(batch_index, kv_head);
  const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * group_size;
  const int64_t first_key = static_cast<int64_t>(tile) * row.tile_kv;
  const int num_keys = static_cast<int>(min(static_cast<int64_t>(row.tile_kv), row.kv_len - first_key));
  const float* scores = p.scores + group * p.scores_per_row + first_key * p.group_pitch;
  const float* tile_max = p.tile_max + stats;
  const SegmentPlan plan = plan_segments(row.num_tiles, p.num_samples, p.budget == Budget::kUniform);
  const int segment = tile / plan.tiles_per_segment;
  const float* row_lse = p.row_lse + group * group_size;
  const float* segment_lse = p.segment_lse + p.stats_offset(group) + static_cast<int64_t>(segment) * group_size;
  const bool grouped = p.sampler == Sampler::kGrouped;
  const int heads_per_stream = grouped ? group_size : 1;
  auto values = make_strided_view<T>(p.v, batch_index, kv_head, row.kv_start, p.stride_v_batch, p.stride_v_token,
                                     p.stride_v_head);
  values.base = values.row(first_key);
  float* o_accum = p.o_accum + stats * HEAD_DIM;
  const int64_t row_seed = p.row_seeds != nullptr ? p.row_seeds[batch_index] : 0;

  for (int i = threadIdx.x; i < kMaxTileKv / 32; i += kSelectThreads) shared.read[i] = 0;
  bool any_output = false;

  for (int stream = 0; stream < p.num_streams(); ++stream) {
    const int64_t offset = p.stream_offset(group, stream);
    const uint64_t tile_start = p.tile_start[offset + tile], tile_mass = p.tile_mass[offset + tile];
    const uint64_t total = p.segment_total[offset + segment];
    int num_selected = 0;
    uint32_t weight_sum = 0;
    const uint32_t num_draws = static_cast<uint32_t>(plan.draws) * heads_per_stream;

    if (tile_mass > 0) {
      const auto random =
          RandomStream::make(p.seed, row_seed, row.kv_len, grouped ? kv_head : kv_head * group_size + stream);
      const Draws draws = Draws::make(p.sampler, random, segment, num_draws, total);

      float share_sum = 0.0f, shares[kKeysPerThread] = {};
      const int first_row = threadIdx.x * kKeysPerThread;
      for (int h = stream; h < stream + heads_per_stream; ++h) {
        const float factor = tile_factor(tile_max[h], segment_lse[h]);
        if (!(factor > 0.0f)) continue;
        share_sum += factor * p.tile_sum[stats + h];
#pragma unroll
        for (int i = 0; i < kKeysPerThread; ++i) {
          if (first_row + i < num_keys) {
            shares[i] += factor * exp2f(scores[(first_row + i) * p.group_pitch + h] - tile_max[h]);
          }
        }
      }
      uint32_t weights[kKeysPerThread];
#pragma unroll
      for (int i = 0; i < kKeysPerThread; ++i) weights[i] = row_weight_of(shares[i] / share_sum);
      weight_sum = draw_tile(draws, tile_start, tile_mass, weights, num_keys, shared.select);

      // The selected rows in order.
      uint32_t own = 0, selected_total;
#pragma unroll
      for (int i = 0; i < kKeysPerThread; ++i) own += shared.select.counts[first_row + i] > 0;
      uint32_t position = exclusive_scan(own, shared.select.warp_total, selected_total);
#pragma unroll
      for (int i = 0; i < kKeysPerThread; ++i) {
        if (shared.select.counts[first_row + i] > 0) {
          shared.rows[position++] = first_row + i;
          atomicOr(&shared.read[(first_row + i) / 32], 1u << ((first_row + i) % 32));
        }
      }
      num_selected = static_cast<int>(selected_total);
      __syncthreads();
    }

    if (grouped && num_selected == 0) break;  // one stream: nothing to write
    any_output |= num_selected > 0;

    for (int first_head = stream; first_head < stream + heads_per_stream; first_head += kGatherHeads) {
      const int num_heads = min(kGatherHeads, stream + heads_per_stream - first_head);
      if (threadIdx.x < num_heads) {
        const int h = first_head + threadIdx.x;
        shared.scale[threadIdx.x] =
            grouped ? 1.0f : segment_factor(segment_lse[h], row_lse[h]) / static_cast<float>(plan.draws);
      }
      for (int i = threadIdx.x; i < num_selected; i += kSelectThreads) {
        const int n = shared.rows[i];
        float inverse_inclusion = 0.0f;
        if (grouped) {
          const uint32_t weight = shared.select.cumulative[n] - (n > 0 ? shared.select.cumulative[n - 1] : 0);
          inverse_inclusion = 1.0f / fminf(1.0f, expected_draws(num_draws, tile_mass, total, weight, weight_sum));
        }
#pragma unroll
        for (int j = 0; j < kGatherHeads; ++j) {
          float weight = 0.0f;
          if (j < num_heads) {
            const int h = first_head + j;
            if (grouped) {  // Horvitz-Thompson: p_{h,n} / P(n is drawn)
              weight =
                  is_finite(row_lse[h]) ? exp2f(scores[n * p.group_pitch + h] - row_lse[h]) * inverse_inclusion : 0.0f;
            } else {
              weight = static_cast<float>(shared.select.counts[n]);
            }
          }
          shared.weights[j][i] = weight;
        }
      }
      __syncthreads();
      gather_rows<T, HEAD_DIM>(values, num_selected, num_heads, o_accum + first_head * HEAD_DIM, p.aligned, shared);
    }
  }

  if (threadIdx.x == 0) {
    int distinct = 0;
    if (any_output) {
      for (int i = 0; i < kMaxTileKv / 32; ++i) distinct += __popc(shared.read[i]);
    }
    p.tile_rows[group * p.max_tiles + tile] = distinct;
  }
}

}  // namespace santa::cuda
