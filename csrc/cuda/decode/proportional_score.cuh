// Proportional rows, stage 1: the scores of all keys to the workspace, and of every tile and query head the softmax
// state. V is not touched.
//
// A CTA walks a run of tiles of one row and KV head (and block of up to 8 query heads). Its warps take the tiles in
// turn, each for itself: slots that it fills, on into its next tile, are scored by a Scorer (one_pass.cuh), 128 keys at
// a time, of which a lane then has 4.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/decode/one_pass.cuh"

namespace santa::cuda {

// The softmax of a lane's keys, for up to 8 heads.
struct LaneSoftmax {
  float max[2][4], sum[2][4];

  __device__ __forceinline__ LaneSoftmax() {
#pragma unroll
    for (int i = 0; i < 8; ++i) max[i / 4][i % 4] = -INFINITY, sum[i / 4][i % 4] = 0.0f;
  }

  // Of head i of four: the lane's keys, whose scores are e[...][i]. NaN is passed over by the maximum, not by the sum.
  __device__ __forceinline__ void add(int quad, int i, const float (&e)[4][4]) {
    const float before = max[quad][i];
    const float now = fmaxf(before, fmaxf(fmaxf(e[0][i], e[1][i]), fmaxf(e[2][i], e[3][i]))), below = finite_max(now);
    sum[quad][i] =
        sum[quad][i] * exp2_approx(before - below) + ((exp2_approx(e[0][i] - below) + exp2_approx(e[1][i] - below)) +
                                                      (exp2_approx(e[2][i] - below) + exp2_approx(e[3][i] - below)));
    max[quad][i] = now;
  }
};

// From the scores of up to 128 keys in shared memory, `first_key` and on, to the workspace and to what the lane has of
// their tile.
__device__ __forceinline__ void take_scores(const DecodeParams& p, const RowUnit& unit, const TileScores& scores,
                                            int64_t first_key, LaneSoftmax& state, int lane) {
  const int num_heads = unit.heads.count, num_quads = scores.pitch / 4;
  float* const out = p.scores + unit.group * p.scores_per_row + first_key * p.group_pitch + unit.heads.first;
  // What a last quad has beyond the heads of a group goes where the pitch has room for it.
  const bool by_quads =
      ((p.group_pitch | unit.heads.first) & 3) == 0 && (num_heads % 4 == 0 || num_heads == p.group_size);
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) {
    if (quad >= num_quads) break;
    float e[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = 32 * j + lane;  // so that a warp writes neighbouring scores
      const float4 four = reinterpret_cast<const float4*>(scores.scores + score_place(key) * scores.pitch)[quad];
      e[j][0] = four.x, e[j][1] = four.y, e[j][2] = four.z, e[j][3] = four.w;
      if (key >= scores.num_keys) {
        e[j][0] = e[j][1] = e[j][2] = e[j][3] = -INFINITY;
      } else if (by_quads) {  // for the gather, which should still find them in the L2
        store_global(out + key * p.group_pitch + quad * 4, e[j], evict_last_policy());
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (quad * 4 + i < num_heads) out[key * p.group_pitch + quad * 4 + i] = e[j][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) state.add(quad, i, e);
  }
}

__device__ __forceinline__ float choose_of_four(const float (&values)[4], int i) {
  const bool odd = (i & 1) != 0;
  return (i & 2) != 0 ? (odd ? values[3] : values[2]) : (odd ? values[1] : values[0]);
}

// The lanes' states to that of their tile.
__device__ __forceinline__ void write_tile(const DecodeParams& p, const RowUnit& unit, int tile,
                                           const LaneSoftmax& state, int lane) {
  const int own_head = (lane >> 4) * 2 + (lane >> 3 & 1);  // of four, where reduce_four leaves it
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) {
    if (quad * 4 >= unit.heads.count) break;
    float max[4], sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      max[i] = warp_max(state.max[quad][i]);
      sums[i] = state.sum[quad][i] * exp2_below(state.max[quad][i], max[i]);
    }
    const float sum = reduce_four(sums, lane, [](float a, float b) { return a + b; });
    const int head = quad * 4 + own_head;
    if ((lane & 7) == 0 && head < unit.heads.count) {
      const int64_t index =
          p.stats_offset(unit.group) + static_cast<int64_t>(tile) * p.group_size + unit.heads.first + head;
      p.tile_max[index] = choose_of_four(max, own_head), p.tile_sum[index] = sum;
    }
  }
}

template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__(kProportionalWarps * 32, 2)
    proportional_score_kernel(const __grid_constant__ DecodeParams p) {
  SANTA_DYNAMIC_SHARED(shared_bytes);
  using Scorer = KeyScorer<T, K, HEAD_DIM>;
  launch_dependents();
  const Work<> work(p);
  if (!work.exists(RowKind::kProportional)) return;
  RowUnit& unit = *reinterpret_cast<RowUnit*>(shared_bytes);
  static_assert(sizeof(RowUnit) <= kProportionalSharedBytes, "heuristics.h has to know of it");
  if (threadIdx.x == 0) unit = work.unit;

  const int warp = warp_index(), lane = threadIdx.x & 31, ring_slots = p.plan.num_slots;
  const int pitch = score_pitch_of(work.unit.heads.count), tile_kv = work.unit.row.tile_kv;
  const int first_key = work.first_key(), num_keys = work.num_keys();
  // Not from `warp`: slot_after says why.
  unsigned char* const area = shared_bytes + kProportionalSharedBytes +
                              (threadIdx.x >> 5) * proportional_warp_bytes(Scorer::kSlotBytes, ring_slots,
                                                                           score_pitch_of(head_block_of(p, 0).count));
  const uint32_t ring = shared_address(area), ring_end = ring + ring_slots * Scorer::kSlotBytes;
  float* const score_area = reinterpret_cast<float*>(area + ring_slots * Scorer::kSlotBytes);

  Scorer scorer(p, work.unit, nullptr);
  scorer.ask_query(work.unit, lane);
  RunLoader<Scorer> loader(p, scorer, first_key, num_keys, warp, tile_kv, lane);
  for (int i = 0; i < ring_slots; ++i) loader.load(ring + i * Scorer::kSlotBytes);
  __syncthreads();  // the unit is there
  scorer.take_query(unit, lane);

  uint32_t slot = ring;
#pragma unroll 1
  for (int tile = warp; tile * tile_kv < num_keys; tile += p.plan.num_warps) {
    LaneSoftmax state;
    const int tile_end = min((tile + 1) * tile_kv, num_keys);
#pragma unroll 1
    for (int first = tile * tile_kv; first < tile_end; first += kDrawTileKv) {
      TileScores scores{score_area, pitch, min(kDrawTileKv, tile_end - first)};
      const int num_slots = scorer.num_slots(scores.num_keys);
#pragma unroll 1
      for (int index = 0; index < num_slots; ++index) {
        cp_async_wait_but(ring_slots - 1);
        __syncwarp();  // the other lanes' copies are visible
        scorer.score(slot, index, lane, [&](int key, const float (&logits)[4]) {
          scores.put(index * Scorer::kSlotKeys + key, logits, lane);
        });
        __syncwarp();  // the other lanes are done with the slot: it is filled again
        loader.load(slot);
        slot = slot + Scorer::kSlotBytes == ring_end ? ring : slot + Scorer::kSlotBytes;
      }
      __syncwarp();  // all scores are there
      if (changes_logits(p)) {
        change_scores(&p, &unit, scores.scores, pitch, scores.num_keys, first_key + first);
        __syncwarp();
      }
      take_scores(p, unit, scores, first_key + first, state, lane);
      __syncwarp();  // all lanes have read the scores
    }
    write_tile(p, unit, work.first_part + tile, state, lane);
  }
  cp_async_wait<0>();
}

}  // namespace santa::cuda
