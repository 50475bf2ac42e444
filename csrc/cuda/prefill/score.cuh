// Stage 1: softmax statistics of the sampled queries. A CTA takes the 128 rows of one sampled query block and head,
// kept as matrix fragments in registers, and walks a range of key blocks through a ring in shared memory. All that is
// kept of 128 x 128 scores is the log-sum-exp of each row: 4 bytes per row and key block, from which the row's softmax
// over any set of blocks follows.
//
// Four warps have 32 rows each, so that a key that is read from shared memory serves two matrix products. Fragments
// take features in the order of float8 keys (see QueryFragments in decode/score.cuh): 16-byte chunks of rows, without
// conflicts, and no transposition.
#pragma once

#include <cmath>

#include "core/tiling.h"
#include "cuda/common/launch.h"
#include "cuda/decode/tile.cuh"
#include "cuda/prefill/launch.h"

namespace santa::cuda {

constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = kScoreWarps * 32;
constexpr int kStageKeys = 64;
constexpr int kTileKeys = 32;  // whose scores fit into registers beside the queries
constexpr int kStagesPerBlock = kSelectBlock / kStageKeys;
constexpr int kStages = 3;
constexpr int kRangeBlocks = 16;  // key blocks per CTA: enough to pay for loading the queries

static_assert(kScoreWarps * kSlotRows == kStageKeys && kScoreWarps * 32 == kSelectBlock, "rows are shared out evenly");

template <int HEAD_DIM>
struct ScoreShared {
  alignas(16) uint16_t keys[kStages][kStageKeys][HEAD_DIM];
};

// Running softmax of a lane's own keys for its four rows 8 i + g of the warp's 32.
struct RowStates {
  float max[4];
  float sum[4];
};

__device__ __forceinline__ RowStates empty_states() {
  return {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {0.0f, 0.0f, 0.0f, 0.0f}};
}

// Scores of 32 rows and 32 keys: score[m][n][e] is row 16 m + 8 (e / 2) + g, key 8 n + 2 t + e % 2.
using ScoreTile = float[2][kTileKeys / 8][4];

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply(ScoreTile& score, const uint4 (&query)[2][2][HEAD_DIM / 32], uint32_t keys,
                                         int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) score[m][n][0] = score[m][n][1] = score[m][n][2] = score[m][n][3] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 32; ++j) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      const uint4 key = load_shared_16(keys + chunk_offset<HEAD_DIM>(8 * n + g, 4 * j + t));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint4 low = query[m][0][j], high = query[m][1][j];
        Float16Traits<T>::mma(score[m][n], {low.x, high.x, low.y, high.y}, key.x, key.y);
        Float16Traits<T>::mma(score[m][n], {low.z, high.z, low.w, high.w}, key.z, key.w);
      }
    }
  }
}

// Row r of the warp sees the keys up to r + last_key, on the diagonal block. Keys past kv_len are there alone, above
// the diagonal of every row that exists.
__device__ __forceinline__ void scale_and_mask(ScoreTile& score, float scale_log2, int last_key, bool on_diagonal) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[m][n][e] *= scale_log2;
    }
  }
  if (!on_diagonal) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + 2 * t + e % 2 > last_key + 16 * m + 8 * (e / 2) + g) score[m][n][e] = -INFINITY;
      }
    }
  }
}

// Adds a tile's scores, scaled and masked, to the states. A maximum of -inf is replaced by 0, where exp2 is 0 and NaN
// stays NaN.
__device__ __forceinline__ void accumulate(RowStates& states, const ScoreTile& score) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = i >> 1, e = (i & 1) * 2;
    float max = states.max[i];
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) max = fmaxf(max, fmaxf(score[m][n][e], score[m][n][e + 1]));
    const float base = max == -INFINITY ? 0.0f : max;
    float sum = states.sum[i] * exp2_approx(states.max[i] - base);
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      sum += exp2_approx(score[m][n][e] - base) + exp2_approx(score[m][n][e + 1] - base);
    }
    states.max[i] = max;
    states.sum[i] = sum;
  }
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kScoreThreads, 3)
    block_scores_kernel(const __grid_constant__ SampleSelectParams p, int num_ranges) {
  SANTA_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<ScoreShared<HEAD_DIM>*>(shared_bytes);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

  // The query heads of a group are next to each other, then the chunks: they read the same keys at the same time.
  const int group_size = p.gqa_group_size;
  const int chunk = blockIdx.x / group_size % p.num_chunks;
  const int range = blockIdx.x / group_size / p.num_chunks % num_ranges;
  const int local_head = blockIdx.x / group_size / p.num_chunks / num_ranges * group_size + blockIdx.x % group_size;
  const int batch_index = (p.first_head + local_head) / p.num_qo_heads;
  const int qo_head = (p.first_head + local_head) % p.num_qo_heads;
  const int diagonal = p.diagonal(chunk), rows = p.rows(chunk);
  const int first_block = range * kRangeBlocks, end_block = min(first_block + kRangeBlocks, diagonal + 1);
  if (first_block >= end_block) return;

  const T* first_key = static_cast<const T*>(p.k) + batch_index * p.stride_k_batch +
                       qo_head / group_size * p.stride_k_head +
                       static_cast<int64_t>(first_block) * kSelectBlock * p.stride_k_token;
  const int num_keys = p.kv_len - first_block * kSelectBlock;  // from first_key on
  const uint32_t ring = shared_address(&shared.keys[0][0][0]);
  constexpr uint32_t kStageBytes = sizeof(shared.keys[0]);
  constexpr uint32_t kSlotBytes = kStageBytes / kScoreWarps;
  const int num_stages = (end_block - first_block) * kStagesPerBlock;
  const uint32_t own_ring = ring + warp * kSlotBytes;  // what the warp fills
  const auto load = [&](int stage, uint32_t slot) {
    if (stage < num_stages) {
      const KvRows<T> keys = {first_key, p.stride_k_token};
      const int first = stage * kStageKeys + warp * kSlotRows;
      load_slot<T, HEAD_DIM>(slot, keys, first, num_keys - first, p.aligned, evict_normal_policy, lane);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage, own_ring + stage * kStageBytes);

  // query[m][h]: rows 16 m + 8 h + g of the warp's. Rows past the end of the prompt are zeros and count for nothing.
  uint4 query[2][2][HEAD_DIM / 32];
  const int64_t first_row = static_cast<int64_t>(diagonal - p.offset) * kSelectBlock;
  const T* queries = static_cast<const T*>(p.q) + batch_index * p.stride_q_batch + qo_head * p.stride_q_head;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = warp * 32 + 8 * i + g;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 32; ++j) {
      query[i >> 1][i & 1][j] = {0, 0, 0, 0};
      if (row < rows) {
        query[i >> 1][i & 1][j] =
            load_global_8(queries + (first_row + row) * p.stride_q_token + (4 * j + t) * 8, p.aligned);
      }
    }
  }

  float* block_lse =
      p.block_lse + ((static_cast<int64_t>(local_head) * p.num_chunks + chunk) * p.nk + first_block) * kSelectBlock;
  const int diagonal_stage = (diagonal - first_block) * kStagesPerBlock;
  RowStates states;
  uint32_t slot = ring, next_slot = own_ring + (kStages - 1) * kStageBytes;
#pragma unroll 1
  for (int stage = 0; stage < num_stages; ++stage) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // every warp's part of the stage is there, and all are done with the one filled next
    load(stage + kStages - 1, next_slot);
    next_slot = slot_after<kStageBytes, kStages>(next_slot, own_ring);
    if (stage % kStagesPerBlock == 0) states = empty_states();
#pragma unroll 1
    for (int tile = 0; tile < kStageKeys / kTileKeys; ++tile) {
      const uint32_t tile_keys = slot + tile * (kStageBytes / kStageKeys * kTileKeys);
      const int tile_start = (stage - diagonal_stage) * kStageKeys + tile * kTileKeys;  // in the diagonal block
      ScoreTile score;
      multiply<T, HEAD_DIM>(score, query, tile_keys, lane);
      scale_and_mask(score, p.scale_log2, warp * 32 - tile_start, stage >= diagonal_stage);
      accumulate(states, score);
    }
    slot = slot_after<kStageBytes, kStages>(slot, ring);
    if (stage % kStagesPerBlock != kStagesPerBlock - 1) continue;

    // Of a row's four lanes, each writes the result of one of their four rows.
    float lse = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float max = fmaxf(states.max[i], __shfl_xor_sync(0xffffffffu, states.max[i], 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
      const float base = max == -INFINITY ? 0.0f : max;
      float sum = states.sum[i] * exp2_approx(states.max[i] - base);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (t == i) lse = base + log2f(sum);
    }
    const int row = warp * 32 + 8 * t + g;
    block_lse[stage / kStagesPerBlock * kSelectBlock + row] = row < rows ? lse : -INFINITY;
  }
}

template <typename T, int HEAD_DIM>
void launch_block_scores(const SampleSelectParams& p, int num_heads, cudaStream_t stream) {
  const int num_ranges = ceil_div_int(p.nk, kRangeBlocks);
  const int64_t num_ctas = static_cast<int64_t>(num_heads) * p.num_chunks * num_ranges;
  constexpr int kSharedBytes = sizeof(ScoreShared<HEAD_DIM>);
  auto* const kernel = block_scores_kernel<T, HEAD_DIM>;
  allow_shared_memory(kernel, kSharedBytes);
  SANTA_LAUNCH(kernel, static_cast<unsigned>(num_ctas), kScoreThreads, kSharedBytes, stream, p, num_ranges);
  check_launch("block_scores_kernel");
}

}  // namespace santa::cuda
