// Bernoulli scores, stage 2: one CTA per 512 keys and KV head (and block of 8 query heads, for larger groups).
//
// A thread owns 8 neighbouring keys: 16 bytes of each feature, of which a warp reads 512 contiguous ones. It copies
// listed features into its own places of a ring in shared memory with cp.async, several stages ahead, and synchronises
// with nobody until its sums are complete. Features that are not listed cost nothing. A score is a sum of keys times
// small integers, in float32, in the order of the features and of a head's own features alone.
//
// For rows that are not sampled in one pass: exact and proportional ones. Of proportional ones also the softmax states
// of the tiles. The scores lie as stage 1 of exact scores leaves them (decode/proportional_score.cuh), and the value
// stages are the same.
#pragma once

#include "bernoulli_params.h"
#include "core/softmax_state.h"
#include "cuda/bernoulli/features.cuh"
#include "cuda/bernoulli/launch.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"

namespace santa::cuda {

constexpr int kScoreThreads = 64;
constexpr int kScoreKeys = kScoreThreads * kThreadKeys;  // of a CTA: one tile, or two or four smaller ones
constexpr int kScoreFeatures = 4;
constexpr int kScoreStages = 4;
static_assert(kScoreKeys == kMaxTileKv, "a tile has to lie in one CTA");

template <int HEADS>
struct ScoreShared {
  static constexpr int kUnits = 2 * HEADS;   // of 16 bytes: a thread's scores [kThreadKeys, HEADS]
  static constexpr int kPitch = kUnits + 1;  // odd: threads of a quarter warp write to different banks
  union {
    uint4 ring[kScoreStages][kScoreFeatures][kScoreThreads];
    float4 scores[kScoreThreads * kPitch];
  };
  alignas(16) float weights[kMaxHeadDim][HEADS];
  alignas(8) int16_t features[kMaxHeadDim];
  SoftmaxState states[kScoreThreads / 32][HEADS];
};

// acc[h] += weight[h] * key for the heads that drew the feature: what a head did not draw can't reach it, NaN included.
template <typename T, int HEADS>
__device__ __forceinline__ void add_feature(float (&acc)[HEADS][kThreadKeys], uint4 packed,
                                            const float (&weights)[HEADS]) {
  const float2 pairs[4] = {Float16Traits<T>::unpack(packed.x), Float16Traits<T>::unpack(packed.y),
                           Float16Traits<T>::unpack(packed.z), Float16Traits<T>::unpack(packed.w)};
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const float weight = weights[h];
    if (weight != 0.0f) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        acc[h][2 * j] += weight * pairs[j].x;
        acc[h][2 * j + 1] += weight * pairs[j].y;
      }
    }
  }
}

// The softmax states of the CTA's tiles, from each thread's own scores.
template <int HEADS>
__device__ __forceinline__ void reduce_tiles(const BernoulliParams& p, const RowShape& row, int64_t group,
                                             int64_t first_key, int first_head, int num_heads,
                                             const float (&scores)[HEADS][kThreadKeys], ScoreShared<HEADS>& shared) {
  const DecodeParams& d = p.decode;
  const int warp = warp_index(), lane = threadIdx.x & 31, tile_threads = row.tile_kv / kThreadKeys;
  const bool whole = tile_threads == kScoreThreads;  // else a tile is a warp or half of one
  SoftmaxState states[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    float max = scores[h][0], sum = 0.0f;
#pragma unroll
    for (int j = 1; j < kThreadKeys; ++j) max = fmaxf(max, scores[h][j]);
    max = fmaxf(max, -INFINITY);  // NaN if all are: the maximum passes over them
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) sum += exp2_below(scores[h][j], max);
    states[h] = {max, sum};
    for (int offset = 1; offset < min(tile_threads, 32); offset <<= 1) {
      states[h] = merge(states[h], {__shfl_xor_sync(0xffffffffu, states[h].max, offset),
                                    __shfl_xor_sync(0xffffffffu, states[h].sum, offset)});
    }
    if (whole && lane == 0) shared.states[warp][h] = states[h];
  }
  if (whole) __syncthreads();
  const int64_t tile = first_key / row.tile_kv + threadIdx.x / tile_threads;
  if (threadIdx.x % tile_threads != 0 || tile >= row.num_tiles) return;
  const int64_t stats = d.stats_offset(group) + tile * d.group_size + first_head;
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const SoftmaxState state = whole ? merge(shared.states[0][h], shared.states[1][h]) : states[h];
    if (h < num_heads) {
      d.tile_max[stats + h] = state.max;
      d.tile_sum[stats + h] = state.sum;
    }
  }
}

constexpr int score_ctas_per_sm(int heads) { return heads > 4 ? 6 : 8; }

template <typename T, int HEADS>
__global__ void __launch_bounds__(kScoreThreads, score_ctas_per_sm(HEADS))
    score_features_kernel(const __grid_constant__ BernoulliParams p, int num_chunks) {
  __shared__ ScoreShared<HEADS> shared;
  const DecodeParams& d = p.decode;

  // Head blocks fastest, which read the same keys; then chunks, whose features are adjacent in memory; then KV heads.
  const int block = blockIdx.x % p.num_blocks;
  const int chunk = blockIdx.x / p.num_blocks % num_chunks;
  const int kv_head = blockIdx.x / p.num_blocks / num_chunks;
  const int batch_index = blockIdx.y;
  const RowShape row = row_shape_of(d, batch_index);
  const int64_t first_key = static_cast<int64_t>(chunk) * kScoreKeys;
  if (row.one_pass() || first_key >= row.kv_len) return;

  const int64_t group = d.group_index(batch_index, kv_head);
  const int first_head = block * HEADS, num_heads = min(HEADS, d.group_size - first_head);
  const int num_features = p.features_read[group];
  const int num_stages = (num_features + kScoreFeatures - 1) / kScoreFeatures;
  const float* weights = p.weights + p.weights_offset(group, block);
  for (int i = threadIdx.x; i < num_features; i += kScoreThreads) {
    shared.features[i] = p.features[group * d.head_dim + i];
  }
  for (int i = threadIdx.x; i < num_stages * kScoreFeatures * HEADS; i += kScoreThreads) {
    (&shared.weights[0][0])[i] = i < num_features * HEADS ? weights[i] : 0.0f;
  }
  __syncthreads();

  const int64_t key = first_key + threadIdx.x * kThreadKeys;
  const int num_keys = static_cast<int>(max(int64_t{0}, min(int64_t{kThreadKeys}, row.kv_len - key)));
  const T* source = static_cast<const T*>(d.k) + batch_index * d.stride_k_batch + kv_head * d.stride_k_head +
                    row.kv_start + (num_keys > 0 ? key : 0);
  const bool aligned = p.aligned_keys && row.kv_start % kThreadKeys == 0;
  const uint64_t policy = p.num_blocks == 1 ? evict_first_policy() : evict_normal_policy();
  const uint32_t places = shared_address(&shared.ring[0][0][threadIdx.x]);
  constexpr uint32_t kPlaceBytes = kScoreThreads * 16, kStageBytes = kScoreFeatures * kPlaceBytes;
  // What a last stage lacks stays what it is in the ring: its weights are 0.
  const bool whole = aligned && first_key + kScoreKeys <= row.kv_len;
  const auto load_stage = [&](int stage, uint32_t place) {
    if (stage < num_stages) {
      const short4 listed = *reinterpret_cast<const short4*>(shared.features + stage * kScoreFeatures);
      const int features[kScoreFeatures] = {listed.x, listed.y, listed.z, listed.w};
      const int count = num_features - stage * kScoreFeatures;
      if (whole) {
#pragma unroll
        for (int u = 0; u < kScoreFeatures; ++u) {
          if (u < count) cp_async_whole_16(place + u * kPlaceBytes, source + features[u] * p.stride_k_feature, policy);
        }
      } else {
#pragma unroll
        for (int u = 0; u < kScoreFeatures; ++u) {
          if (u < count) {
            load_some_keys(place + u * kPlaceBytes, source + features[u] * p.stride_k_feature, num_keys, aligned,
                           policy);
          }
        }
      }
    }
    cp_async_commit();
  };

  float acc[HEADS][kThreadKeys] = {};
#pragma unroll
  for (int stage = 0; stage < kScoreStages - 1; ++stage) load_stage(stage, places + stage * kStageBytes);
  uint32_t slot = places, next_slot = places + (kScoreStages - 1) * kStageBytes;
#pragma unroll 1
  for (int stage = 0; stage < num_stages; ++stage) {
    cp_async_wait<kScoreStages - 2>();
    load_stage(stage + kScoreStages - 1, next_slot);
    next_slot = slot_after<kStageBytes, kScoreStages>(next_slot, places);
#pragma unroll
    for (int u = 0; u < kScoreFeatures; ++u) {
      add_feature<T, HEADS>(acc, load_shared_16(slot + u * kPlaceBytes), shared.weights[stage * kScoreFeatures + u]);
    }
    slot = slot_after<kStageBytes, kScoreStages>(slot, places);
  }
  cp_async_wait<0>();
  __syncthreads();  // the scores take the ring's place

#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const float scale = h < num_heads ? p.scales[group * d.group_size + first_head + h] : 0.0f;
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) acc[h][j] = j < num_keys ? acc[h][j] * scale : -INFINITY;
  }
  float* own = reinterpret_cast<float*>(shared.scores + threadIdx.x * ScoreShared<HEADS>::kPitch);
#pragma unroll
  for (int i = 0; i < kThreadKeys * HEADS; i += 4) {
    *reinterpret_cast<float4*>(own + i) = {acc[i % HEADS][i / HEADS], acc[(i + 1) % HEADS][(i + 1) / HEADS],
                                           acc[(i + 2) % HEADS][(i + 2) / HEADS],
                                           acc[(i + 3) % HEADS][(i + 3) / HEADS]};
  }
  __syncthreads();

  float* out = d.scores + group * d.scores_per_row + first_key * d.group_pitch;
  const int valid_keys = static_cast<int>(min(int64_t{kScoreKeys}, row.kv_len - first_key));
  if (d.group_pitch == HEADS && d.scores_per_row % 4 == 0) {
    // As they lie. A unit may end after the last key; scores_per_row has room.
    constexpr int kUnits = ScoreShared<HEADS>::kUnits;
    const int count = (valid_keys * HEADS + 3) / 4;
    for (int unit = threadIdx.x; unit < count; unit += kScoreThreads) {
      reinterpret_cast<float4*>(out)[unit] = shared.scores[unit / kUnits * ScoreShared<HEADS>::kPitch + unit % kUnits];
    }
  } else {
    for (int item = threadIdx.x; item < valid_keys * num_heads; item += kScoreThreads) {
      const int n = item / num_heads, h = item % num_heads;
      const auto* scores = reinterpret_cast<const float*>(shared.scores + n / kThreadKeys * ScoreShared<HEADS>::kPitch);
      out[static_cast<int64_t>(n) * d.group_pitch + first_head + h] = scores[n % kThreadKeys * HEADS + h];
    }
  }
  if (row.sampled()) reduce_tiles<HEADS>(p, row, group, first_key, first_head, num_heads, acc, shared);
}

template <typename T, int HEADS>
void launch_score_heads(const BernoulliParams& p, cudaStream_t stream) {
  const DecodeParams& d = p.decode;
  const int num_chunks =
      static_cast<int>(ceil_div(d.plan.proportional ? d.max_kv_len : d.plan.longest_exact, kScoreKeys));
  const dim3 grid(static_cast<unsigned>(num_chunks) * d.num_kv_heads * p.num_blocks, d.batch);
  share_multiprocessor(score_features_kernel<T, HEADS>, 0);
  auto* const kernel = score_features_kernel<T, HEADS>;
  SANTA_LAUNCH(kernel, grid, kScoreThreads, 0, stream, p, num_chunks);
  check_launch("score_features_kernel");
}

template <typename T>
void launch_score_features(const BernoulliParams& p, cudaStream_t stream) {
  switch (score_heads_of(p.decode.group_size)) {
    case 1:
      return launch_score_heads<T, 1>(p, stream);
    case 2:
      return launch_score_heads<T, 2>(p, stream);
    case 4:
      return launch_score_heads<T, 4>(p, stream);
    default:
      return launch_score_heads<T, 8>(p, stream);
  }
}

}  // namespace santa::cuda
