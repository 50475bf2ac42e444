// Exact rows, by tiles: a CTA does a tile of keys for one KV head (and block of 8 query heads, for larger groups) at a
// time: attention over the tile, its unnormalised output and softmax state. `combine` merges the tiles.
//
// Every warp walks its own keys, 16 at a time, through a ring of shared-memory slots that it fills itself with cp.async
// and synchronises with nobody. Keys are the M of m16n8k16 and the heads of the group its N: a KV head serves up to 8
// query heads with one read. V^T is the M of a second product and the transposed probabilities its N.
//
// Rows in float8 are copied as they are, to the end of their slot. The warp expands them to q's dtype in place before
// it reads them, and all else is the same.
#pragma once

#include "core/softmax_state.h"
#include "cuda/common/reduce.cuh"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/score.cuh"
#include "params.h"

namespace santa::cuda {

constexpr int kRingSlots = 3;

template <int HEAD_DIM>
struct TileShared {
  static constexpr int kRowPitch = slot_row_pitch(HEAD_DIM);
  static constexpr int kWarps = HEAD_DIM <= 128 ? 8 : 4;  // what shared memory holds on every architecture
  static constexpr int kThreads = kWarps * 32;

  struct alignas(16) Slot {
    uint16_t rows[kSlotRows][kRowPitch];
  };
  // A warp's ring; after its last slot was read, the warp's output [kHeadBlock][HEAD_DIM] in float32.
  Slot ring[kWarps][kRingSlots];
  float max[kWarps][kHeadBlock];
  float sum[kWarps][kHeadBlock];
  float factor[kWarps][kHeadBlock];  // of sums, to those of the tile
};

// CTAs of a multiprocessor that registers have to have room for, as many as its shared memory holds: two with the 228
// KB of sm_90 and sm_100; elsewhere one of the larger rings.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int min_tile_ctas(int head_dim) { return head_dim <= 64 ? 2 : 1; }
#else
constexpr int min_tile_ctas(int) { return 2; }
#endif

// What a CTA works on.
template <typename K>
struct TileWork {
  int64_t group;      // batch row x KV head
  int first_head;     // within the group
  int num_heads;      // of this CTA, up to 8
  int64_t first_key;  // of the tile
  int num_keys;       // of the tile
  float score_scale;  // beside float8 keys
  KvRows<K> keys;
  KvRows<K> values;  // beside float8 keys: of what p.v_dtype says

  int end;  // RowShape::end

  // The logit of a key of the tile for query vector first_head + head.
  __device__ __forceinline__ float logit(const DecodeParams& p, float product, int key, int head) const {
    const float logit = logit_of(product, std::is_same_v<K, Float8> ? score_scale : p.scale_log2);
    return changes_logits(p) ? attended_logit(p, visible_keys(p, end, first_head + head), first_key + key, logit)
                             : logit;
  }

  // Where rows are paged, of keys `first` and on, a lane's each, up to the last that is there: their pages, which are
  // looked up before the copies before theirs are waited for, and their addresses.
  __device__ __forceinline__ int64_t own_key(int first, int lane) const {
    return first_key + min(first + lane, num_keys - 1);
  }
  __device__ __forceinline__ int32_t look_up(int first, int lane) const {
    return unlikely(keys.paged()) && first < num_keys ? keys.page_of(own_key(first, lane)) : 0;
  }
  template <typename E>
  __device__ __forceinline__ const E* own_row(const KvRows<E>& rows, int32_t page, int first, int lane) const {
    return unlikely(rows.paged()) ? rows.row_in(page, own_key(first, lane)) : rows.base;
  }
};

// Keys of a tile, `first` and on, to a slot.
template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void load_keys(uint32_t slot, const DecodeParams& p, const TileWork<K>& work, int32_t page,
                                          int first, uint64_t policy, int lane) {
  const K* const own = work.own_row(work.keys, page, first, lane);
  if constexpr (std::is_same_v<K, Float8>) {
    load_codes<HEAD_DIM>(slot, work.keys, own, work.first_key + first, work.num_keys - first, p.aligned, policy, lane);
  } else {
    load_slot<T, HEAD_DIM>(slot, work.keys, own, work.first_key + first, work.num_keys - first, p.aligned, policy,
                           lane);
  }
}

// Slots alternate between K and V of the same 16 keys. o[m] holds dimensions 16 m + g and + 8 of heads 2 t
// and 2 t + 1, relative to the running maximum of each head, which all lanes agree on.
template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void attend_tile(const DecodeParams& p, const TileWork<K>& work,
                                            const QueryFragments<T, HEAD_DIM>& query, TileShared<HEAD_DIM>& shared,
                                            uint64_t policy) {
  const int warp = warp_index(), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  constexpr int kWarps = TileShared<HEAD_DIM>::kWarps;
  const int num_slots = 2 * ceil_div_int(work.num_keys, kSlotRows * kWarps);
  const auto key_of = [&](int i) { return ((i >> 1) * kWarps + warp) * kSlotRows; };  // within the tile
  const uint32_t ring = shared_address(&shared.ring[threadIdx.x >> 5][0]);  // not from `warp`: slot_after says why
  constexpr uint32_t kSlotBytes = sizeof(typename TileShared<HEAD_DIM>::Slot);
  constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  const auto is_coded = [&](int i) { return kFloat8 && ((i & 1) == 0 || p.v_dtype == Dtype::kFloat8E4M3); };
  int32_t page = 0, next_page = work.look_up(key_of(0), lane);
  const auto load = [&](int i, uint32_t slot) {
    if (i < num_slots) {
      const int first = key_of(i), there = work.num_keys - first;
      KvRows<K> view = work.keys;
      if ((i & 1) == 0) {
        page = next_page;
      } else {
        view.base = work.values.base, view.stride_token = work.values.stride_token;
        view.stride_page = work.values.stride_page;
      }
      if constexpr (kFloat8) {
        if (is_coded(i)) {
          const K* const own = work.own_row(view, page, first, lane);
          load_codes<HEAD_DIM>(slot, view, own, work.first_key + first, there, p.aligned, policy, lane);
        }
      }
      if (!is_coded(i)) {
        const KvRows<T> elements = {reinterpret_cast<const T*>(view.base),
                                    view.stride_token,
                                    view.pages,
                                    view.stride_page,
                                    view.page_shift,
                                    view.first_position};
        const T* const own = work.own_row(elements, page, first, lane);
        load_slot<T, HEAD_DIM>(slot, elements, own, work.first_key + first, there, p.aligned, policy, lane);
      }
      if ((i & 1) == 0) next_page = work.look_up(key_of(i + 2), lane);
    }
    cp_async_commit();
  };
  float o[HEAD_DIM / 16][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  uint32_t p_fragment[2] = {0, 0};  // probabilities as B operand: keys x heads

  uint32_t slot = ring, next_slot = ring;
  // The first turns only fill the ring: code that is there twice has to be fetched twice.
#pragma unroll 1
  for (int i = 1 - kRingSlots; i < num_slots; ++i) {
    if (i >= 0) {
      cp_async_wait<kRingSlots - 2>();
      __syncwarp();
    }
    load(i + kRingSlots - 1, next_slot);
    next_slot = slot_after<kSlotBytes, kRingSlots>(next_slot, ring);
    if (i < 0) continue;
    const uint32_t address = slot;
    slot = slot_after<kSlotBytes, kRingSlots>(slot, ring);
    if (is_coded(i)) expand_codes<T, HEAD_DIM>(address, lane);

    if ((i & 1) == 0) {
      float scores[4];
      score_slot<T, HEAD_DIM>(scores, address, query, lane);
      float weights[4];
      bool rescale = false;
      float factor[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& low = scores[j];
        float& high = scores[2 + j];
        const int key = key_of(i) + g;
        low = key < work.num_keys ? work.logit(p, low, key, 2 * t + j) : -INFINITY;
        high = key + 8 < work.num_keys ? work.logit(p, high, key + 8, 2 * t + j) : -INFINITY;
        const float new_max = max_over_keys(fmaxf(max[j], fmaxf(low, high))), below = finite_max(new_max);
        factor[j] = exp2_approx(max[j] - below);
        rescale |= factor[j] != 1.0f;
        max[j] = new_max;
        weights[j] = exp2_approx(low - below);
        weights[2 + j] = exp2_approx(high - below);
        sum[j] = sum[j] * factor[j] + weights[j] + weights[2 + j];
      }
      if (__any_sync(0xffffffffu, rescale)) {
#pragma unroll
        for (int m = 0; m < HEAD_DIM / 16; ++m) {
          o[m][0] *= factor[0], o[m][2] *= factor[0];
          o[m][1] *= factor[1], o[m][3] *= factor[1];
        }
      }
      p_fragment[0] = transpose_8x8(Float16Traits<T>::pack(weights[0], weights[1]));
      p_fragment[1] = transpose_8x8(Float16Traits<T>::pack(weights[2], weights[3]));
    } else {
      const int row = (lane & 7) + ((lane >> 4) << 3), chunk = (lane >> 3) & 1;
#pragma unroll
      for (int m = 0; m < HEAD_DIM / 16; ++m) {
        const uint4 a = ldmatrix_x4_transposed(address + chunk_offset<HEAD_DIM>(row, 2 * m + chunk));
        Float16Traits<T>::mma(o[m], {a.x, a.y, a.z, a.w}, p_fragment[0], p_fragment[1]);
      }
    }
  }

  static_assert(kHeadBlock * HEAD_DIM * sizeof(float) <= sizeof(shared.ring[0]), "a warp's output must fit its ring");
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int offset = 4; offset < 32; offset <<= 1) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
    if (g == 0) {
      shared.max[warp][2 * t + j] = max[j];
      shared.sum[warp][2 * t + j] = sum[j];
    }
    auto* own = reinterpret_cast<float (*)[HEAD_DIM]>(&shared.ring[warp][0]);
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      own[2 * t + j][16 * m + g] = o[m][j];
      own[2 * t + j][16 * m + g + 8] = o[m][2 + j];
    }
  }
}

// The warps' sums to those of the tile, in warp order; by all threads. Hands (head of the block, dimension, sums of
// this dimension and the next, state of the head) to take.
template <int HEAD_DIM, typename Take>
__device__ __forceinline__ void merge_warps(TileShared<HEAD_DIM>& shared, int num_heads, const Take& take) {
  constexpr int kWarps = TileShared<HEAD_DIM>::kWarps, kPairs = HEAD_DIM / 2;
  __syncthreads();  // all warps have left what they have
  if (threadIdx.x < kWarps * kHeadBlock) {
    const int w = threadIdx.x / kHeadBlock, head = threadIdx.x % kHeadBlock;
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) max = fmaxf(max, shared.max[i][head]);
    shared.factor[w][head] = exp2_below(shared.max[w][head], max);
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < num_heads * kPairs; item += TileShared<HEAD_DIM>::kThreads) {
    const int head = item / kPairs, d = item % kPairs * 2;
    SoftmaxState state = empty_softmax_state();
    float2 values = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = shared.factor[w][head];
      const float2 own =
          *reinterpret_cast<const float2*>(reinterpret_cast<const float*>(&shared.ring[w][0]) + head * HEAD_DIM + d);
      state.max = fmaxf(state.max, shared.max[w][head]);
      state.sum += shared.sum[w][head] * factor;  // NaN stays
      if (factor == 0.0f) continue;
      values.x += own.x * factor, values.y += own.y * factor;
    }
    take(head, d, values, state);
  }
}

// One tile of a row, for one KV head and head block. By all threads of the CTA.
template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void do_tile(const DecodeParams& p, const RowShape& row, int batch_index, int tile,
                                        int kv_head, int head_block, TileShared<HEAD_DIM>& shared) {
  TileWork<K> work;
  work.group = p.group_index(batch_index, kv_head);
  work.first_head = head_block * kHeadBlock;
  work.num_heads = min(kHeadBlock, p.group_size - work.first_head);
  work.first_key = static_cast<int64_t>(tile) * row.tile_kv;
  work.num_keys = static_cast<int>(min(static_cast<int64_t>(row.tile_kv), row.kv_len - work.first_key));
  work.score_scale = score_scale_of<K>(p, kv_head);
  work.end = row.end();
  work.keys = key_rows<K>(p, batch_index, kv_head, row.kv_start);
  work.values = value_rows<K>(p, batch_index, kv_head, row.kv_start);
  if (std::is_same_v<K, Float8> && p.v_dtype != Dtype::kFloat8E4M3) {
    work.values.base = reinterpret_cast<const K*>(value_rows<T>(p, batch_index, kv_head, row.kv_start).base);
  }
  // With several head blocks the same keys are read again by the next CTA.
  const uint64_t policy = p.num_head_blocks() == 1 ? evict_first_policy() : evict_normal_policy();

  QueryFragments<T, HEAD_DIM> query;
  query.load(p, batch_index, kv_head, work.first_head, work.num_heads, threadIdx.x & 31);

  attend_tile<T, K, HEAD_DIM>(p, work, query, shared, policy);

  if (row.num_tiles <= 1) {  // of one tile, or of no key: nothing is left to combine
    merge_warps(shared, work.num_heads, [&](int head, int d, float2 values, SoftmaxState state) {
      const Epilogue epilogue = epilogue_of(p, row, kv_head, work.first_head + head, log2_sum(state));
      const int64_t index = p.output_index(batch_index, kv_head, work.first_head + head);
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + index * HEAD_DIM + d) =
          Float16Traits<T>::pack(epilogue.output(values.x / state.sum), epilogue.output(values.y / state.sum));
      if (d == 0) p.lse[index] = epilogue.lse;
    });
    if (p.rows_read != nullptr && work.first_head == 0 && threadIdx.x == 0) {
      p.rows_read[work.group] = row.valid ? row.kv_len : -1;
    }
    return;
  }
  const int64_t stats = p.stats_offset(work.group) + static_cast<int64_t>(tile) * p.group_size + work.first_head;
  merge_warps(shared, work.num_heads, [&](int head, int d, float2 values, SoftmaxState state) {
    *reinterpret_cast<float2*>(p.o_accum + (stats + head) * HEAD_DIM + d) = values;
    if (d == 0) p.tile_max[stats + head] = state.max, p.tile_sum[stats + head] = state.sum;
  });
}

// A tile of a row, for a KV head and head block.
struct TileItem {
  RowShape row;
  int batch_index;  // p.batch: there is no such item
  int tile, kv_head, head_block;

  SANTA_HD static int count_of(const DecodeParams& p, const RowShape& row) {
    return row.sampled() ? 0 : (row.num_tiles > 1 ? row.num_tiles : 1) * p.num_units();
  }

  // Number `index` of the call, or of row blockIdx.y if there is a line of the grid for every row. By whole warps.
  static __device__ __forceinline__ TileItem find(const DecodeParams& p, int index) {
    TileItem item{};
    item.batch_index = blockIdx.y;
    if (!p.plan.equal_rows) {
      const int lane = threadIdx.x & 31;
#pragma unroll 1
      for (;; item.batch_index += 32) {
        if (item.batch_index >= p.batch) return {.batch_index = p.batch};
        const int own = item.batch_index + lane, count = own < p.batch ? count_of(p, row_shape_of(p, own)) : 0;
        const int end = inclusive_scan(count);
        const uint32_t ends_after = __ballot_sync(0xffffffffu, index < end);
        if (ends_after != 0) {
          const int owner = __ffs(ends_after) - 1;
          index -= __shfl_sync(0xffffffffu, end - count, owner);
          item.batch_index += owner;
          break;
        }
        index -= __shfl_sync(0xffffffffu, end, 31);
      }
    }
    // Head blocks and KV heads fastest: concurrent CTAs read neighbouring memory.
    const int head_blocks = p.num_head_blocks(), unit = index / head_blocks;
    item.row = row_shape_of(p, item.batch_index);
    item.head_block = index - unit * head_blocks;
    item.tile = unit / p.num_kv_heads, item.kv_head = unit - item.tile * p.num_kv_heads;
    return item;
  }
};

// All tiles of all exact rows: a CTA for each if rows are known to be equal, else each CTA in steps of the grid. Beside
// sampled rows it starts before their kernel has ended, and ends after it: who waits for this kernel has waited for
// both.
template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__(TileShared<HEAD_DIM>::kThreads, min_tile_ctas(HEAD_DIM))
    tile_kernel(const __grid_constant__ DecodeParams p) {
  SANTA_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<TileShared<HEAD_DIM>*>(shared_bytes);
  launch_dependents();
#pragma unroll 1
  for (int index = blockIdx.x;; index += gridDim.x) {
    const TileItem item = TileItem::find(p, index);
    if (item.batch_index >= p.batch) break;
    if (index != blockIdx.x) __syncthreads();  // all have read what the tile before left in shared memory
    do_tile<T, K, HEAD_DIM>(p, item.row, item.batch_index, item.tile, item.kv_head, item.head_block, shared);
    if (p.plan.equal_rows) break;
  }
  wait_for_previous();
}

}  // namespace santa::cuda
