// Sampled rows in one pass. A CTA walks a run of parts of one row and KV head (and block of up to 8 query heads). Its
// score warps each stream the keys of a tile through a ring of shared-memory slots that they fill themselves, draw from
// the tile, and go on to another, while the slots are filling; a gather warp reads the values that were drawn, tile by
// tile in order, and adds them up. No CTA waits for another, no score warp for another but for the pilot.
//
// How scores come about is a Scorer: KeyScorer below, FeatureScorer in bernoulli/. It says what a slot is, fills it and
// turns it into scores.
#pragma once

#include "core/draw.h"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/gather.cuh"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/score.cuh"

namespace santa::cuda {

constexpr int kPilotGroups = kPilotKeys / 16;

struct OnePassShared {
  uint64_t full[kMaxScoreWarps][2];
  uint64_t empty[kMaxScoreWarps][2];
  SoftmaxState pilot[kPilotGroups][kHeadBlock];
  RowUnit unit;  // here rather than in the registers of every warp
};
static_assert(sizeof(OnePassShared) <= kSharedBytes, "heuristics.h has to know of it");

// The pilot's states, 16 keys at a time. `logits`: of pilot keys 16 group + g and 8 more, heads 2 t and the next, in the
// order of score_slot.
__device__ __forceinline__ void put_pilot(OnePassShared& shared, int group, const float (&logits)[4], int kv_len,
                                          int lane) {
  const int low = group * 16 + (lane >> 2), high = low + 8, size = pilot_size(kv_len);
  if (group * 16 >= size) return;
  const float low_weight = low < size ? pilot_log2_weight(low, kv_len) : -INFINITY;
  const float high_weight = high < size ? pilot_log2_weight(high, kv_len) : -INFINITY;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float first = logits[j] + low_weight, second = logits[2 + j] + high_weight;
    const float max = max_over_keys(fmaxf(first, second)), below = finite_max(max);
    float sum = exp2_approx(first - below) + exp2_approx(second - below);
    for (int offset = 4; offset < 32; offset <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane < 4) shared.pilot[group][2 * lane + j] = {max, sum};
  }
}

// What the pilot estimates the row's log-sum-exp to be, of head lane % 8: the same in every CTA, whatever the number of
// warps.
__device__ __forceinline__ float pilot_level(const OnePassShared& shared, int num_groups, int lane) {
  SoftmaxState state = empty_softmax_state();
  for (int group = lane >> 3; group < num_groups; group += 4) state = merge(state, shared.pilot[group][lane & 7]);
  for (int offset = 8; offset < 32; offset <<= 1) {
    state = merge(state, {__shfl_xor_sync(0xffffffffu, state.max, offset),
                          __shfl_xor_sync(0xffffffffu, state.sum, offset)});
  }
  return log2_sum(state);
}

// Scores of keys that lie in rows. T of q, K of keys: T or Float8.
template <typename T, typename K, int HEAD_DIM>
struct KeyScorer {
  static constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  static constexpr int kSlotKeys = 32;  // two matrix products at a time: a product need not wait for the one before
  static constexpr int kSlotBytes = kFloat8 ? kSlotKeys * HEAD_DIM : 2 * slot_bytes(HEAD_DIM);
  static constexpr int kOnceBytes = 0;
  static constexpr int kPilotSlots = kPilotKeys / kSlotKeys;

  const DecodeParams& p;
  KvRows<K> keys;
  float scale[2];  // of the lane's heads, 2 t and the next
  QueryFragments<T, HEAD_DIM, kFloat8> query;

  __device__ __forceinline__ KeyScorer(const DecodeParams& p, const RowUnit& unit, unsigned char*)
      : p(p), keys(key_rows<K>(p, unit.batch_index, unit.kv_head, unit.row.kv_start)) {}

  __device__ __forceinline__ void load_query(const RowUnit& unit, int lane) {
    const int64_t head = static_cast<int64_t>(unit.kv_head) * p.gqa_group_size + unit.heads.first;
    query.load(static_cast<const T*>(p.q) + unit.batch_index * p.stride_q_batch + head * p.stride_q_head,
               p.stride_q_head, unit.heads.count, p.aligned, lane);
    scale[0] = scale[1] = score_scale_of<K>(p, unit.kv_head);
    if constexpr (kFloat8) {
      const float inverse = to_float16<HEAD_DIM>(query) / kHalvesScale;
      scale[0] *= __shfl_sync(0xffffffffu, inverse, (lane & 3) * 8);
      scale[1] *= __shfl_sync(0xffffffffu, inverse, (lane & 3) * 8 + 4);
    }
  }

  static __device__ __forceinline__ int num_slots(int num_keys) { return ceil_div_int(num_keys, kSlotKeys); }

  // Starts the copy of slot `index` of the tile whose first key is `first`.
  __device__ __forceinline__ void load(uint32_t slot, int first, int num_keys, int index, uint64_t policy,
                                       int lane) const {
    const int begin = index * kSlotKeys;
    load_rows<K, HEAD_DIM, kSlotKeys>(slot, keys.row(first + begin), keys.stride_token, num_keys - begin, p.aligned,
                                      policy, lane);
  }

  __device__ __forceinline__ void begin(int, int) {}

  // Hands the logits of the slot to put(first key within the slot, logits in the order of score_slot).
  template <typename Put>
  __device__ __forceinline__ void score(uint32_t slot, int, int lane, const Put& put) const {
#pragma unroll
    for (int first = 0; first < kSlotKeys; first += 16) {
      float products[4];
      if constexpr (kFloat8) {
        score_codes<T, HEAD_DIM>(products, slot + first * HEAD_DIM, query, lane);
      } else {
        score_slot<T, HEAD_DIM>(products, slot + first / 16 * slot_bytes(HEAD_DIM), query, lane);
      }
      put(first, {logit_of(products[0], scale[0]), logit_of(products[1], scale[1]), logit_of(products[2], scale[0]),
                  logit_of(products[3], scale[1])});
    }
  }

  __device__ __forceinline__ void finish(TileScores&, int) const {}

  // Pilot keys [group kSlotKeys, ...) to a slot, and their logits to the pilot's states.
  __device__ __forceinline__ void load_pilot(uint32_t slot, int group, int kv_len, uint64_t policy, int lane) const {
    const int first = group * kSlotKeys;
    load_some_rows<K, HEAD_DIM, kSlotKeys>(
        slot, [&](int row) { return keys.row(pilot_position(first + row, kv_len, 1)); }, pilot_size(kv_len) - first,
        p.aligned, policy, lane);
  }
};

// The tiles warp, warp + num_warps, ... of the run, which has num_keys keys from first_key on.
//
// Copies run ahead of what is scored by the slots of the ring, on into the next tile. The pilot's keys go through it as
// well, behind the first slots of the first tile: they are known before the first draw, and memory is busy meanwhile.
template <typename Scorer>
__device__ __forceinline__ void score_tiles(const DecodeParams& p, const RowUnit& unit, const RowShape& row, int num_heads,
                                            Scorer& scorer,
                                            OnePassShared& shared, unsigned char* area, int first_key, int num_keys,
                                            const DrawQueue& queue, int warp, int lane) {
  const int num_warps = p.plan.num_warps, ring_slots = p.plan.num_slots, kv_len = row.kv_len;
  const int draw_kv = row.draw_kv, first_tile = warp * draw_kv, stride = num_warps * draw_kv;
  const uint32_t ring = shared_address(area), ring_end = ring + ring_slots * Scorer::kSlotBytes;
  float* const score_area = reinterpret_cast<float*>(area + ring_slots * Scorer::kSlotBytes);
  const int pitch = score_pitch_of(num_heads);
  const bool streaming = p.budget == Budget::kStreaming;

  // What passes through the ring is numbered: `lead` slots of the first tile, the warp's part of the pilot, all others.
  const int lead = first_tile < num_keys
                       ? min(ring_slots, scorer.num_slots(min(draw_kv, num_keys - first_tile)))
                       : 0;
  const int pilot_slots = streaming && Scorer::kPilotSlots > 0 ? scorer.num_slots(pilot_size(kv_len)) : 0;
  const int num_pilots = max(pilot_slots + num_warps - 1 - warp, 0) / num_warps;
  const auto is_pilot = [&](int number) { return number >= lead && number < lead + num_pilots; };
  const auto pilot_of = [&](int number) { return warp + (number - lead) * num_warps; };

  int ahead = first_tile, ahead_index = 0;  // tile and slot that are copied next
  const auto load = [&](uint32_t slot, int number) {
    if (is_pilot(number)) {
      scorer.load_pilot(slot, pilot_of(number), kv_len, evict_normal_policy(), anew(lane));
    } else if (ahead < num_keys) {
      const int tile_keys = min(draw_kv, num_keys - ahead);
      // With several head blocks the keys are read again soon.
      const uint64_t policy = p.num_head_blocks() == 1 ? evict_first_policy() : evict_normal_policy();
      scorer.load(slot, first_key + ahead, tile_keys, ahead_index, policy, anew(lane));
      if (++ahead_index == scorer.num_slots(tile_keys)) ahead += stride, ahead_index = 0;
    }
    cp_async_commit();  // every call is a group of copies, be it an empty one
  };

  const bool grouped = p.sampler == Sampler::kGrouped;
  RandomStream stream{};  // of head lane % 8; grouped draws have one for all
  float level = 0.0f;     // of head lane % 8
  bool has_level = !streaming;
  uint32_t produced = 0, slot = ring;
  int number = -ring_slots;  // of the slot that is scored; before the first one, slots are filled only
#pragma unroll 1
  for (int tile = first_tile; tile < num_keys || !has_level; tile += stride) {
    const int tile_keys = max(min(draw_kv, num_keys - tile), 0);
    TileScores scores{score_area, pitch, tile_keys};
    scorer.begin(first_key + tile, tile_keys);
    int left = tile_keys > 0 ? scorer.num_slots(tile_keys) : 0;
    if (number <= lead) left += num_pilots;
    int index = 0;
#pragma unroll 1
    while (left > 0 || number < 0) {
      if (number >= 0) {
        cp_async_wait_but(ring_slots - 1);
        __syncwarp();  // the other lanes' copies are visible
        const bool pilot = is_pilot(number);
        scorer.score(slot, index, lane, [&](int first, const float (&logits)[4]) {
          if (pilot) {
            put_pilot(shared, pilot_of(number) * (Scorer::kSlotKeys / 16) + first / 16, logits, kv_len, lane);
          } else {
            scores.put(index * Scorer::kSlotKeys + first, logits, lane);
          }
        });
        index += pilot ? 0 : 1;
        --left;
        __syncwarp();  // the other lanes are done with the slot: it is filled again
      }
      load(slot, number + ring_slots);
      slot = slot + Scorer::kSlotBytes == ring_end ? ring : slot + Scorer::kSlotBytes;
      if (++number == 0) {
        // The first copies are on their way.
        cta_barrier();  // what the CTA shares is set up
        scorer.load_query(unit, lane);
        stream = random_stream(p, unit.batch_index, unit.row,
                               grouped ? unit.kv_head * p.num_head_blocks() + unit.block
                                       : unit.kv_head * p.gqa_group_size + unit.heads.first + (lane & 7));
      }
    }
    if (!has_level) {
      if constexpr (Scorer::kPilotSlots == 0) {
        for (int group = warp; group * 16 < pilot_size(kv_len); group += num_warps) {
          scorer.score_pilot(group, kv_len, shared, lane);
        }
      }
      score_warps_barrier(num_warps);
      level = pilot_level(shared, ceil_div_int(pilot_size(kv_len), 16), lane);
      has_level = true;
    }
    if (tile_keys == 0) break;
    scorer.finish(scores, lane);
    const uint32_t offset = tile_offset(p.budget, stream, first_key + tile, draw_kv, kv_len,
                                        static_cast<int64_t>(p.num_samples) * (grouped ? unit.heads.count : 1),
                                        unit_bits_of(p.sampler, p.num_samples));
    draw_tile(p, unit, scores, offset, level, first_key + tile, queue, produced, lane);
    __syncwarp();  // all lanes have read the scores
  }
  if (number < 0) cta_barrier();  // a warp without anything to do
  cp_async_wait<0>();
}

// What the CTA works on. KV heads and head blocks are fastest: concurrent CTAs read neighbouring memory. With first_part at
// or past unit.row.num_tiles, or a row of another kind, there is nothing to do.
struct Work {
  RowUnit unit;
  int first_part;

  __device__ __forceinline__ explicit Work(const DecodeParams& p)
      : unit(RowUnit::make(p, blockIdx.z, blockIdx.x)), first_part(blockIdx.y * p.plan.run_parts) {}
  __device__ __forceinline__ bool exists() const { return unit.row.one_pass() && first_part < unit.row.num_tiles; }
};

// T: of q, and of values that are not float8.
template <typename Scorer, typename T, int HEAD_DIM>
__device__ __forceinline__ void one_pass(const DecodeParams& p, unsigned char* shared_bytes, Scorer& scorer,
                                         const Work& work) {
  auto& shared = *reinterpret_cast<OnePassShared*>(shared_bytes);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, num_warps = p.plan.num_warps;
  const int area_bytes = warp_bytes_of(Scorer::kSlotBytes, p.plan.num_slots, score_pitch_of(head_block_of(p, 0).count));
  unsigned char* const sums = shared_bytes + kSharedBytes + align_up(Scorer::kOnceBytes);
  unsigned char* const areas = sums + sum_bytes_of(p);
  const auto queue_of = [&](int w) {
    return DrawQueue{shared.full[w], shared.empty[w],
                     reinterpret_cast<DrawChunk*>(areas + (w + 1) * area_bytes - 2 * kChunkBytes)};
  };
  const int first_part = work.first_part, last_part = min(first_part + p.plan.run_parts, work.unit.row.num_tiles);
  if (threadIdx.x == 0) shared.unit = work.unit;
  if (threadIdx.x < num_warps * 2) {
    mbarrier_init(&shared.full[threadIdx.x >> 1][threadIdx.x & 1], 32);
    mbarrier_init(&shared.empty[threadIdx.x >> 1][threadIdx.x & 1], kGatherWarps * 32);
  }
  if (warp < num_warps) {
    const int first_key = first_part * work.unit.row.tile_kv;
    const int64_t num_keys = min(static_cast<int64_t>(last_part - first_part) * work.unit.row.tile_kv,
                                 static_cast<int64_t>(work.unit.row.kv_len - first_key));
    score_tiles(p, shared.unit, work.unit.row, work.unit.heads.count, scorer, shared, areas + warp * area_bytes, first_key,
                static_cast<int>(num_keys), queue_of(warp), warp, lane);
    return;
  }
  cta_barrier();
  auto* const neighbour = reinterpret_cast<float*>(sums);
  if (Scorer::kFloat8 && p.v_dtype == Dtype::kFloat8E4M3) {
    gather_parts<Float8, HEAD_DIM>(p, shared.unit, first_part, last_part, queue_of, neighbour, warp - num_warps, lane);
  } else {
    gather_parts<T, HEAD_DIM>(p, shared.unit, first_part, last_part, queue_of, neighbour, warp - num_warps, lane);
  }
}

template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__((kMaxScoreWarps + kGatherWarps) * 32, 2)
    one_pass_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(512) unsigned char one_pass_bytes[];
  using Scorer = KeyScorer<T, K, HEAD_DIM>;
  launch_dependents();
  const Work work(p);
  if (!work.exists()) return;
  Scorer scorer(p, work.unit, nullptr);
  one_pass<Scorer, T, HEAD_DIM>(p, one_pass_bytes, scorer, work);
}

}  // namespace santa::cuda
