// Sampled rows in one pass. A CTA walks a run of parts of one row and KV head (and block of up to 8 query heads). Its
// score warps each stream the keys of a tile through a ring of shared-memory slots that they fill themselves, draw from
// the tile, and go on to another, while the slots are filling; gather warps read the values that were drawn, tile by
// tile in order, and add them up. No CTA waits for another, and no score warp for another.
//
// How scores come about is a Scorer: KeyScorer below, FeatureScorer in bernoulli/. It says what a slot is, fills it and
// turns it into scores.
#pragma once

#include "core/draw.h"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/gather.cuh"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/pilot.cuh"
#include "cuda/decode/runs.cuh"
#include "cuda/decode/score.cuh"

namespace santa::cuda {

struct OnePassShared {
  uint64_t full[kMaxScoreWarps][kQueueChunks];
  uint64_t empty[kMaxScoreWarps][kQueueChunks];
  RowUnit unit;  // here rather than in the registers of every warp
  KvRows<char> values;
};
static_assert(sizeof(OnePassShared) <= kSharedBytes, "heuristics.h has to know of it");

// Scores of keys that lie in rows. T of q, K of keys: T or Float8.
template <typename T, typename K, int HEAD_DIM>
struct KeyScorer {
  static constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  static constexpr int kSlotKeys = slot_keys(HEAD_DIM);
  static constexpr int kSlotBytes = key_slot_bytes(kFloat8, HEAD_DIM), kPilotBytes = kSlotBytes, kOnceBytes = 0;

  const DecodeParams& p;
  // The lane's share of the first key of the row or, where keys are paged, the row's pages: registers are few.
  const void* origin;
  int kv_head, kv_start;
  int32_t page = 0;  // where keys are paged: of key `lane` of the slot that is copied next
  float scale[2];    // of the lane's heads, 2 t and the next
  QueryFragments<T, HEAD_DIM, kFloat8> query;

  __device__ __forceinline__ KeyScorer(const DecodeParams& p, const RowUnit& unit, unsigned char*)
      : p(p), kv_head(unit.kv_head), kv_start(unit.row.kv_start) {
    const KvRows<K> all = key_rows<K>(p, unit.batch_index, kv_head, kv_start);
    origin = p.paged ? static_cast<const void*>(all.pages) : all.base + share_offset(threadIdx.x & 31);
  }
  __device__ __forceinline__ int64_t share_offset(int lane) const {
    return LaneShare<K, HEAD_DIM, false>::offset(p.stride_k_token, lane);
  }
  __device__ __forceinline__ const K* share() const { return static_cast<const K*>(origin); }
  // Where they are paged.
  __device__ __forceinline__ KvRows<K> pages() const {
    return paged_rows<K>(p, p.k, static_cast<const int32_t*>(origin), kv_head, kv_start, p.stride_k_batch,
                         p.stride_k_token, p.stride_k_head);
  }

  // First of all, since it takes its time; beside float8 keys, where registers are few, when it is needed.
  __device__ __forceinline__ void ask_query(const RowUnit& unit, int lane) {
    if constexpr (!kFloat8) load_query(unit, lane);
  }
  __device__ __forceinline__ void take_query(const RowUnit& unit, int lane) {
    if constexpr (kFloat8) load_query(unit, lane);
    scale[0] = scale[1] = score_scale_of<K>(p, unit.kv_head);
    if constexpr (kFloat8) {
      const float inverse = to_float16<HEAD_DIM>(query) / kHalvesScale;
      scale[0] *= __shfl_sync(0xffffffffu, inverse, (lane & 3) * 8);
      scale[1] *= __shfl_sync(0xffffffffu, inverse, (lane & 3) * 8 + 4);
    }
  }

  __device__ __forceinline__ void load_query(const RowUnit& unit, int lane) {
    query.load(p, unit.batch_index, unit.kv_head, unit.heads.first, unit.heads.count, lane);
  }

  static __device__ __forceinline__ int num_slots(int num_keys) { return ceil_div_int(num_keys, kSlotKeys); }

  // Of slot `index` of the tile whose first key is `first`: finds its pages, long before they are needed.
  __device__ __forceinline__ void look_up(int first, int num_keys, int index, int lane) {
    if (p.paged) page = pages().page_of(first + min(index * kSlotKeys + lane, num_keys - 1));
  }

  // Starts the copy of that slot.
  template <typename Policy>
  __device__ __forceinline__ void load(uint32_t slot, int first, int num_keys, int index, const Policy& policy,
                                       int lane) const {
    const int begin = first + index * kSlotKeys, there = num_keys - index * kSlotKeys;
    if (unlikely(p.paged)) {
      const KvRows<K> rows = pages();
      load_paged_rows<K, HEAD_DIM, kSlotKeys>(slot, rows, rows.row_in(page, begin + lane), begin, there, p.aligned,
                                              policy, lane);
    } else {
      load_rows<K, HEAD_DIM, kSlotKeys>(slot, share(), p.stride_k_token, begin, there, p.aligned, policy, lane);
    }
  }

  __device__ __forceinline__ void begin(int, int) {}

  // Hands the logits of the slot to put(first key within the slot, logits in the order of score_slot).
  template <typename Put>
  __device__ __forceinline__ void score(uint32_t slot, int, int lane, const Put& put) const {
#pragma unroll
    for (int first = 0; first < kSlotKeys; first += 16) {
      float products[4];
      if constexpr (kFloat8) {
        score_codes<T, HEAD_DIM>(products, slot + first * HEAD_DIM + code_key_place<HEAD_DIM, false>(lane), query);
      } else {
        score_slot<T, HEAD_DIM>(products, slot + first / 16 * slot_bytes(HEAD_DIM) + key_place<HEAD_DIM>(lane), query);
      }
      put(first, {logit_of(products[0], scale[0]), logit_of(products[1], scale[1]), logit_of(products[2], scale[0]),
                  logit_of(products[3], scale[1])});
    }
  }

  __device__ __forceinline__ void finish(TileScores&, int) const {}

  // Hands the logits of the pilot keys [32 part, 32 part + 32) to put(group of 16 pilot keys, logits). `slot`: shared
  // memory for as many of them as a slot has.
  template <typename Put>
  __device__ __forceinline__ void score_pilot(uint32_t slot, int part, const RowUnit& unit, int lane, const Put& put) {
    ask_query(unit, lane);
    const int kv_len = unit.row.kv_len, size = pilot_size(kv_len);
    const int64_t position = pilot_position(min(part * kPilotWarpKeys + lane, size - 1), kv_len, 1);
    const K* const own_row =
        p.paged ? pages().row(position) : share() - share_offset(lane) + position * p.stride_k_token;
#pragma unroll 1
    for (int turn = 0; turn < kPilotWarpKeys / kSlotKeys; ++turn) {
      const int first = part * kPilotWarpKeys + turn * kSlotKeys;
      const auto row_of = [&](int row) { return shuffle(own_row, turn * kSlotKeys + row); };
      load_some_rows<K, HEAD_DIM, kSlotKeys>(slot, row_of, size - first, p.aligned, evict_normal_policy(), lane);
      cp_async_commit();
      if (turn == 0) take_query(unit, lane);
      cp_async_wait<0>();
      __syncwarp();
      score(slot, 0, lane, [&](int key, const float (&logits)[4]) { put((first + key) / 16, logits); });
      __syncwarp();  // the other lanes are done with the slot
    }
  }
};

// Copies the tiles warp, warp + num_warps, ... of a run, which has num_keys keys from first_key on, slot by slot: ahead
// of what is scored by the slots of a ring, on into the next tile.
template <typename Scorer>
struct RunLoader {
  const DecodeParams& p;
  Scorer& scorer;
  int first_key, num_keys, tile_kv, lane;
  int ahead, index = 0;  // first key of the tile, and the slot of it, that are copied next

  __device__ __forceinline__ RunLoader(const DecodeParams& p, Scorer& scorer, int first_key, int num_keys, int warp,
                                       int tile_kv, int lane)
      : p(p),
        scorer(scorer),
        first_key(first_key),
        num_keys(num_keys),
        tile_kv(tile_kv),
        lane(lane),
        ahead(warp * tile_kv) {
    look_up();
  }
  __device__ __forceinline__ void look_up() {
    if (ahead < num_keys) scorer.look_up(first_key + ahead, min(tile_kv, num_keys - ahead), index, lane);
  }
  __device__ __forceinline__ void load(uint32_t slot) {
    if (ahead < num_keys) {
      const int tile_keys = min(tile_kv, num_keys - ahead);
      scorer.load(slot, first_key + ahead, tile_keys, index, [&] { return kv_policy(p); }, lane);
      if (++index == scorer.num_slots(tile_keys)) ahead += p.plan.num_warps * tile_kv, index = 0;
      look_up();
    }
    cp_async_commit();  // every call is a group of copies, be it an empty one
  }
};

// The tiles warp, warp + num_warps, ... of the run, which has num_keys keys from first_key on.
template <typename Scorer>
__device__ __forceinline__ void score_tiles(const DecodeParams& p, const RowUnit& unit, const RowShape& row, int pitch,
                                            Scorer& scorer, unsigned char* area, int first_key, int num_keys,
                                            const KvRows<char>& values, const DrawQueue& queue, int warp, int lane) {
  const int ring_slots = p.plan.num_slots;
  const int draw_kv = row.draw_kv, stride = p.plan.num_warps * draw_kv;
  const uint32_t ring = shared_address(area), ring_end = ring + ring_slots * Scorer::kSlotBytes;
  float* const score_area = reinterpret_cast<float*>(area + ring_slots * Scorer::kSlotBytes);

  RunLoader<Scorer> loader(p, scorer, first_key, num_keys, warp, draw_kv, lane);
  const bool grouped = p.sampler == Sampler::kGrouped;
  RandomStream stream{};  // of head lane % 8; grouped draws have one for all
  float level = 0.0f;     // of head lane % 8
  uint32_t produced = 0, slot = ring;
  int filling = ring_slots;  // slots to be filled before the first one is scored
  bool has_level = false;
#pragma unroll 1
  for (int tile = warp * draw_kv; tile < num_keys || filling > 0; tile += stride) {
    const int tile_keys = max(min(draw_kv, num_keys - tile), 0);
    TileScores scores{score_area, pitch, tile_keys};
    scorer.begin(first_key + tile, tile_keys);
    const int num_slots = tile_keys > 0 ? scorer.num_slots(tile_keys) : 0;
    int index = 0;
#pragma unroll 1
    while (index < num_slots || filling > 0) {
      if (filling == 0) {
        cp_async_wait_but(ring_slots - 1);
        __syncwarp();  // the other lanes' copies are visible
        scorer.score(slot, index, lane, [&](int first, const float (&logits)[4]) {
          scores.put(index * Scorer::kSlotKeys + first, logits, lane);
        });
        ++index;
        __syncwarp();  // the other lanes are done with the slot: it is filled again
      }
      loader.load(slot);
      slot = slot + Scorer::kSlotBytes == ring_end ? ring : slot + Scorer::kSlotBytes;
      if (filling > 0 && --filling == 0) {
        // The first copies are on their way.
        cta_barrier();  // what the CTA shares is set up
        scorer.take_query(unit, lane);
        stream = random_stream(p, unit.batch_index, unit.row, unit.kv_head,
                               grouped ? unit.block : unit.heads.first + (lane & 7),
                               grouped ? p.num_head_blocks() : p.group_size);
      }
    }
    if (tile_keys == 0) break;
    if (!has_level && p.budget == Budget::kStreaming) {
      wait_for_previous();  // the pilot
      const int query = unit.heads.first + min(lane & 7, unit.heads.count - 1);
      level = __ldcg(p.level + p.output_index(unit.batch_index, unit.kv_head, query)) * p.level_scale;
      has_level = true;
    }
    scorer.finish(scores, lane);
    if (changes_logits(p)) change_scores(&p, &unit, scores.scores, pitch, tile_keys, first_key + tile);
    // Of the row from shared memory: registers are few.
    const uint32_t offset = tile_offset(
        p.budget, stream, unit.row.span_first + first_key + tile, unit.row.draw_kv, unit.row.span_len,
        static_cast<int64_t>(p.num_samples) * (grouped ? unit.heads.count : 1), unit_bits_of(p.sampler, p.num_samples));
    draw_tile(p, unit, scores, offset, level, first_key + tile, values, queue, produced, lane);
    __syncwarp();  // all lanes have read the scores
  }
  cp_async_wait<0>();
}

// T: of q, and of values that are not float8.
template <typename Scorer, typename T, int HEAD_DIM>
__device__ __forceinline__ void one_pass(const DecodeParams& p, unsigned char* shared_bytes, Scorer& scorer,
                                         const Work<>& work) {
  auto& shared = *reinterpret_cast<OnePassShared*>(shared_bytes);
  const int warp = warp_index(), lane = threadIdx.x & 31, num_warps = p.plan.num_warps;
  const int pitch = score_pitch_of(head_block_of(p, 0).count);
  const int area_bytes = warp_bytes_of(Scorer::kSlotBytes, p.plan.num_slots, pitch),
            chunk_bytes = chunk_bytes_of(pitch);
  unsigned char* const sums = shared_bytes + kSharedBytes + align_up(Scorer::kOnceBytes);
  unsigned char* const areas = sums + sum_bytes_of(p);
  const auto queue_of = [&](int w) {
    return DrawQueue{shared_address(shared.full[w]), shared_address(shared.empty[w]),
                     shared_address(areas + (w + 1) * area_bytes - kQueueChunks * chunk_bytes), chunk_bytes};
  };
  const int first_part = work.first_part, last_part = work.last_part;
  if (threadIdx.x == 0) shared.unit = work.unit;
  if (threadIdx.x == blockDim.x - 1) shared.values = value_bytes(p, work.unit);
  if (threadIdx.x < num_warps * kQueueChunks) {
    mbarrier_init(&shared.full[0][0] + threadIdx.x, 32);
    mbarrier_init(&shared.empty[0][0] + threadIdx.x, kGatherWarps * 32);
  }
  if (warp < num_warps) {
    scorer.ask_query(work.unit, lane);
    // Slots must not start from `warp`: slot_after says why.
    score_tiles(p, shared.unit, work.unit.row, score_pitch_of(work.unit.heads.count), scorer,
                areas + (threadIdx.x >> 5) * area_bytes, work.first_key(), work.num_keys(), shared.values,
                queue_of(warp), warp, lane);
    return;
  }
  cta_barrier();
  auto* const neighbour = reinterpret_cast<float*>(sums);
  constexpr int kRows = batch_rows(HEAD_DIM);
  if (Scorer::kFloat8 && p.v_dtype == Dtype::kFloat8E4M3) {
    gather_parts<Float8, HEAD_DIM, kRows>(p, shared.unit, first_part, last_part, queue_of, neighbour, warp - num_warps,
                                          lane);
  } else {
    gather_parts<T, HEAD_DIM, kRows>(p, shared.unit, first_part, last_part, queue_of, neighbour, warp - num_warps,
                                     lane);
  }
}

template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__(kPilotWarps * 32) pilot_kernel(const __grid_constant__ DecodeParams p) {
  SANTA_DYNAMIC_SHARED(one_pass_bytes);
  launch_dependents();
  const RowUnit unit = RowUnit::make(p, blockIdx.y, blockIdx.x);
  if (!unit.row.one_pass()) return;
  KeyScorer<T, K, HEAD_DIM> scorer(p, unit, nullptr);
  find_level(p, unit, scorer, one_pass_bytes);
}

template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__(bound_threads(max_key_warps(std::is_same_v<K, Float8>, HEAD_DIM), HEAD_DIM), 2)
    one_pass_kernel(const __grid_constant__ DecodeParams p) {
  SANTA_DYNAMIC_SHARED(one_pass_bytes);
  using Scorer = KeyScorer<T, K, HEAD_DIM>;
  launch_dependents();
  const Work<> work(p);
  if (!work.exists(RowKind::kOnePass)) return;
  Scorer scorer(p, work.unit, nullptr);
  one_pass<Scorer, T, HEAD_DIM>(p, one_pass_bytes, scorer, work);
}

}  // namespace santa::cuda
