// Exact rows, by tiles: attention over the keys of a tile for one KV head (and head block), its unnormalised output and
// softmax state. A CTA walks a run of tiles of a row; `combine` merges the tiles of the row, unless it had them all.
//
// Every warp walks its own keys, step by step, through a ring of shared-memory slots that it fills itself with
// cp.async, on into the next tile, and synchronises with nobody until its tile ends. Keys are the M of m16n8k16 and the
// heads of the block its N: a KV head serves up to 8 query heads with one read. V^T is the M of a second product and
// the transposed probabilities its N.
//
// Rows in float8 stay codes in shared memory and become float16 on their way into the products.
#pragma once

#include "core/softmax_state.h"
#include "cuda/common/reduce.cuh"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/runs.cuh"
#include "cuda/decode/score.cuh"
#include "params.h"

namespace santa::cuda {

// What follows are the rings of the warps. The slot of a warp's last values, read, has its output of the tile,
// [kHeadBlock][HEAD_DIM] in float32.
template <int HEAD_DIM>
struct TileShared {
  static constexpr int kWarps = tile_warps(HEAD_DIM);

  float max[kWarps][kHeadBlock];
  float sum[kWarps][kHeadBlock];
  float factor[kWarps][kHeadBlock];  // of sums, to those of the tile
  RowUnit unit;                      // for functions and, beside float8 keys, where registers are few

  __device__ __forceinline__ unsigned char* ring(int warp) {
    return reinterpret_cast<unsigned char*>(this) + kTileHeadBytes + warp * kTileSlots * slot_bytes(HEAD_DIM);
  }
};

// CTAs of a multiprocessor that registers have to have room for, as many as its shared memory holds: two with the 228
// KB of sm_90 and sm_100; elsewhere one of the larger rings.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int min_tile_ctas(int head_dim) { return head_dim <= 64 ? 2 : 1; }
#else
constexpr int min_tile_ctas(int) { return 2; }
#endif

// The keys and values of a run, on their way to the ring of a warp: of each step some keys, and then their values.
template <typename T, typename K, int HEAD_DIM>
struct TileLoader {
  static constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  static constexpr int kStepKeys = kFloat8 ? 2 * kSlotRows : kSlotRows;  // of a warp
  static constexpr int kCtaKeys = tile_warps(HEAD_DIM) * kStepKeys;

  const DecodeParams& p;
  KvRows<K> keys;
  const void* values;  // `base` of those
  int first_key, num_keys, lane;
  int ahead;                    // keys of the run that are copied next
  int slot_index = 0;           // of the step
  int32_t page = 0, next_page;  // of key `lane` of the step, where rows are paged; looked up long before it is needed

  __device__ __forceinline__ TileLoader(const DecodeParams& p, const Work<false>& work, int warp, int lane)
      : p(p),
        keys(key_rows<K>(p, work.unit.batch_index, work.unit.kv_head, work.unit.row.kv_start)),
        first_key(work.first_key()),
        num_keys(work.num_keys()),
        lane(lane),
        ahead(warp * kStepKeys) {
    const int batch_index = work.unit.batch_index, kv_head = work.unit.kv_head, start = work.unit.row.kv_start;
    if (codes()) {
      values = value_rows<Float8>(p, batch_index, kv_head, start).base;
    } else {
      values = value_rows<T>(p, batch_index, kv_head, start).base;
    }
    next_page = look_up();
  }

  // Whether there is a step in which the warp takes the keys `first` and on, if they are there. All warps take as many
  // steps, of a row without keys one.
  __device__ __forceinline__ bool has_step(int first) const { return (first & -kCtaKeys) < max(num_keys, 1); }
  // Of a step: keys, and values; beside float8 keys values of 16 bits take two.
  __device__ __forceinline__ int step_slots() const { return kFloat8 && !codes() ? 3 : 2; }
  // Whether values are in float8.
  __device__ __forceinline__ bool codes() const { return kFloat8 && p.v_dtype == Dtype::kFloat8E4M3; }

  __device__ __forceinline__ int64_t own_key(int first) const { return first_key + min(first + lane, num_keys - 1); }
  __device__ __forceinline__ int32_t look_up() const {
    return unlikely(keys.paged()) && ahead < num_keys ? keys.page_of(own_key(ahead)) : 0;
  }
  template <int ROWS, typename E>
  __device__ __forceinline__ void load(uint32_t slot, const KvRows<E>& rows, int32_t own_page, int first) const {
    // With several head blocks the same keys are read again by the next CTA.
    const uint64_t policy = p.num_head_blocks() == 1 ? evict_first_policy() : evict_normal_policy();
    const E* const own = unlikely(rows.paged()) ? rows.row_in(own_page, own_key(first)) : rows.base;
    const int there = num_keys - first;
    load_rows<E, HEAD_DIM, ROWS, true>(slot, rows, own, there > 0 ? first_key + first : 0, there, p.aligned, policy,
                                       lane);
  }

  // The next slot; every call is a group of copies, be it an empty one.
  __device__ __forceinline__ void load(uint32_t slot) {
    if (has_step(ahead)) {
      if (slot_index == 0) page = next_page;
      if (slot_index == 0 || !kFloat8 || codes()) {
        KvRows<K> rows = keys;
        if (slot_index > 0) {
          rows.base = static_cast<const K*>(values);
          rows.stride_token = p.stride_v_token, rows.stride_page = p.stride_v_batch;
        }
        load<kStepKeys>(slot, rows, page, ahead);
      } else {
        const KvRows<T> rows = {static_cast<const T*>(values),
                                p.stride_v_token,
                                keys.pages,
                                p.stride_v_batch,
                                keys.page_shift,
                                keys.first_position};
        const int row = (slot_index - 1) * kSlotRows;
        load<kSlotRows>(slot, rows, __shfl_sync(0xffffffffu, page, (lane + row) & 31), ahead + row);
      }
      if (++slot_index == step_slots()) {
        ahead += kCtaKeys, slot_index = 0;
      } else if (slot_index == 1) {
        ahead += kCtaKeys, next_page = look_up(), ahead -= kCtaKeys;
      }
    }
    cp_async_commit();
  }
};

// Products of a step, by one warp. Lane (g, t) has keys g and g + 8 of each 16, heads 2 t and the next.
template <typename T, typename K, int HEAD_DIM>
struct TileProducts {
  static constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  static constexpr int kGroups = kFloat8 ? 2 : 1;  // of 16 keys

  QueryFragments<T, HEAD_DIM, kFloat8> query;
  float scale[2];                      // of scores of the lane's heads
  float max[2], sum[2];                // of the tile; all lanes of a head agree on the maximum
  float o[HEAD_DIM / 16][4];           // dimensions 16 m + g (0, 1), + 8 (2, 3), of codes 16 m + 2 g and the next
  uint32_t probabilities[kGroups][2];  // B operand: keys x heads

  __device__ __forceinline__ void begin() {
    max[0] = max[1] = -INFINITY, sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) o[m][0] = o[m][1] = o[m][2] = o[m][3] = 0.0f;
  }

  __device__ __forceinline__ void load_query(const DecodeParams& p, const RowUnit& unit, int lane) {
    query.load(p, unit.batch_index, unit.kv_head, unit.heads.first, unit.heads.count, lane);
  }
  // Once it is there.
  __device__ __forceinline__ void take_query(const DecodeParams& p, int kv_head, int lane) {
    scale[0] = scale[1] = score_scale_of<K>(p, kv_head);
    if constexpr (kFloat8) {
      const float inverse = to_float16<HEAD_DIM>(query) / kHalvesScale;
      scale[0] *= __shfl_sync(0xffffffffu, inverse, (lane & 3) * 8);
      scale[1] *= __shfl_sync(0xffffffffu, inverse, (lane & 3) * 8 + 4);
    }
  }

  // Of the keys `first` and on of the run; its keys from num_keys on are not there. `codes`: values are.
  __device__ __forceinline__ void take_keys(const DecodeParams& p, const RowUnit& unit, int first_key, int num_keys,
                                            uint32_t slot, int first, bool codes, int lane) {
    float scores[kGroups][4];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if constexpr (kFloat8) {
        score_codes<T, HEAD_DIM, true>(scores[i], slot + i * kSlotRows * HEAD_DIM, query, lane);
      } else {
        score_slot<T, HEAD_DIM>(scores[i], slot, query, lane);
      }
    }
    float factor[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float own_max = -INFINITY;
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        float& score = scores[i / 2][i % 2 * 2 + j];
        const int key = first + i * 8 + (lane >> 2);
        if (key < num_keys) {
          score = logit_of(score, kFloat8 ? scale[j] : p.scale_log2);
          if (changes_logits(p)) {
            const KeyRange visible = visible_keys(p, unit.row.end(), unit.heads.first + 2 * (lane & 3) + j);
            score = attended_logit(p, visible, first_key + key, score);
          }
        } else {
          score = -INFINITY;
        }
        own_max = fmaxf(own_max, score);
      }
      const float new_max = max_over_keys(fmaxf(max[j], own_max)), below = finite_max(new_max);
      factor[j] = exp2_approx(max[j] - below);
      max[j] = new_max;
      sum[j] *= factor[j];
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        float& weight = scores[i / 2][i % 2 * 2 + j];
        weight = exp2_approx(weight - below);
        sum[j] += weight;
      }
    }
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int m = 0; m < HEAD_DIM / 16; ++m) {
        o[m][0] *= factor[0], o[m][2] *= factor[0];
        o[m][1] *= factor[1], o[m][3] *= factor[1];
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      const float first_weight = scores[i / 2][i % 2 * 2], second = scores[i / 2][i % 2 * 2 + 1];
      uint32_t packed = Float16Traits<T>::pack(first_weight, second);
      if (kFloat8 && codes) packed = Float16Traits<__half>::pack(first_weight, second);
      probabilities[i / 2][i % 2] = transpose_8x8(packed);
    }
  }

  // The values of 16 keys.
  __device__ __forceinline__ void take_values(uint32_t slot, const uint32_t (&own)[2], int lane) {
    const int row = (lane & 7) + ((lane >> 4) << 3), chunk = (lane >> 3) & 1;
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      const uint4 a = ldmatrix_x4_transposed(slot + chunk_offset<HEAD_DIM>(row, 2 * m + chunk));
      Float16Traits<T>::mma(o[m], {a.x, a.y, a.z, a.w}, own[0], own[1]);
    }
  }
  // Those of 32 keys in codes. A 16-bit element of the matrices is a pair of dimensions, the two of which become rows
  // g and g + 8 of the product.
  __device__ __forceinline__ void take_codes(uint32_t slot, int lane) {
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      const uint4 pairs = ldmatrix_x4_transposed(slot + code_offset<HEAD_DIM, true>(lane, m));
      const uint2 a = halves_of_pairs(pairs.x), b = halves_of_pairs(pairs.y);
      Float16Traits<__half>::mma(o[m], {a.x, a.y, b.x, b.y}, probabilities[0][0], probabilities[0][1]);
      const uint2 c = halves_of_pairs(pairs.z), d = halves_of_pairs(pairs.w);
      Float16Traits<__half>::mma(o[m], {c.x, c.y, d.x, d.y}, probabilities[kGroups - 1][0],
                                 probabilities[kGroups - 1][1]);
    }
  }
  static __device__ __forceinline__ uint2 halves_of_pairs(uint32_t codes) {
    return halves_and_nans_of_codes(__byte_perm(codes, 0, 0x3120));
  }

  // Leaves what the warp has of the tile. `output`: a slot.
  __device__ __forceinline__ void put(TileShared<HEAD_DIM>& shared, unsigned char* output, bool codes, int warp,
                                      int lane) {
    const int g = lane >> 2, t = lane & 3;
    auto* const own = reinterpret_cast<float (*)[HEAD_DIM]>(output);
    static_assert(kHeadBlock * HEAD_DIM * sizeof(float) <= slot_bytes(HEAD_DIM));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for (int offset = 4; offset < 32; offset <<= 1) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
      if (g == 0) shared.max[warp][2 * t + j] = max[j], shared.sum[warp][2 * t + j] = sum[j];
#pragma unroll
      for (int m = 0; m < HEAD_DIM / 16; ++m) {
        if (kFloat8 && codes) {
          *reinterpret_cast<float2*>(&own[2 * t + j][16 * m + 2 * g]) = {o[m][j] * (1.0f / kHalvesScale),
                                                                         o[m][2 + j] * (1.0f / kHalvesScale)};
        } else {
          own[2 * t + j][16 * m + g] = o[m][j];
          own[2 * t + j][16 * m + g + 8] = o[m][2 + j];
        }
      }
    }
  }
};

// The warps' sums to those of the tile, in warp order; by all threads. Hands (head of the block, dimension, sums of
// this dimension and the next, state of the head) to take. `slot`: where the warps' outputs are in their rings.
template <int HEAD_DIM, typename Take>
__device__ __forceinline__ void merge_warps(TileShared<HEAD_DIM>& shared, uint32_t slot, int num_heads,
                                            const Take& take) {
  constexpr int kWarps = TileShared<HEAD_DIM>::kWarps, kPairs = HEAD_DIM / 2;
  if (threadIdx.x < kWarps * kHeadBlock) {
    const int w = threadIdx.x / kHeadBlock, head = threadIdx.x % kHeadBlock;
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) max = fmaxf(max, shared.max[i][head]);
    shared.factor[w][head] = exp2_below(shared.max[w][head], max);
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < num_heads * kPairs; item += kWarps * 32) {
    const int head = item / kPairs, d = item % kPairs * 2;
    SoftmaxState state = empty_softmax_state();
    float2 values = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = shared.factor[w][head];
      const float2 own =
          *reinterpret_cast<const float2*>(shared.ring(w) + slot + (head * HEAD_DIM + d) * sizeof(float));
      state.max = fmaxf(state.max, shared.max[w][head]);
      state.sum += shared.sum[w][head] * factor;  // NaN stays
      if (factor == 0.0f) continue;
      values.x += own.x * factor, values.y += own.y * factor;
    }
    take(head, d, values, state);
  }
}

// What is left of the tile whose keys end at `end`, or before if the row does. By all threads of the CTA.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void write_exact_tile(const DecodeParams& p, const RowUnit& unit, int end,
                                                 TileShared<HEAD_DIM>& shared, uint32_t slot) {
  __syncthreads();                // all warps have left what they have
  if (unit.row.num_tiles <= 1) {  // of one tile, or of no key: nothing is left to combine
    merge_warps(shared, slot, unit.heads.count, [&](int head, int d, float2 values, SoftmaxState state) {
      const Epilogue epilogue = epilogue_of(p, unit.row, unit.kv_head, unit.heads.first + head, log2_sum(state));
      const int64_t index = p.output_index(unit.batch_index, unit.kv_head, unit.heads.first + head);
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + index * HEAD_DIM + d) =
          Float16Traits<T>::pack(epilogue.output(values.x / state.sum), epilogue.output(values.y / state.sum));
      if (d == 0) p.lse[index] = epilogue.lse;
    });
    if (p.rows_read != nullptr && unit.heads.first == 0 && threadIdx.x == 0) {
      p.rows_read[unit.group] = unit.row.valid ? unit.row.kv_len : -1;
    }
    return;
  }
  const int64_t tile = num_parts_of(end, unit.row.tile_kv) - 1;
  const int64_t stats = p.stats_offset(unit.group) + tile * p.group_size + unit.heads.first;
  merge_warps(shared, slot, unit.heads.count, [&](int head, int d, float2 values, SoftmaxState state) {
    *reinterpret_cast<float2*>(p.o_accum + (stats + head) * HEAD_DIM + d) = values;
    if (d == 0) p.tile_max[stats + head] = state.max, p.tile_sum[stats + head] = state.sum;
  });
}

template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void attend_run(const DecodeParams& p, const Work<false>& work,
                                           TileShared<HEAD_DIM>& shared) {
  using Loader = TileLoader<T, K, HEAD_DIM>;
  constexpr uint32_t kSlotBytes = slot_bytes(HEAD_DIM);
  const int warp = warp_index(), lane = threadIdx.x & 31;
  if (Loader::kFloat8 && threadIdx.x == 0) shared.unit = work.unit;
  const RowUnit& unit = Loader::kFloat8 ? shared.unit : work.unit;
  TileProducts<T, K, HEAD_DIM> products;
  products.load_query(p, work.unit, lane);
  Loader loader(p, work, warp, lane);
  const bool codes = loader.codes();
  unsigned char* const own = shared.ring(threadIdx.x >> 5);  // not from `warp`: slot_after says why
  const uint32_t ring = shared_address(own);
  // Of the run: the warp's keys of the step, and the end of the tile.
  int first = warp * Loader::kStepKeys, tile_end = work.unit.row.tile_kv, slot_index = 0;

  products.begin();
  uint32_t slot = ring, next_slot = ring;
  // The first turns only fill the ring: code that is there twice has to be fetched twice.
#pragma unroll 1
  for (int filling = kTileSlots - 1; loader.has_step(first);) {
    if (filling == 0) {
      cp_async_wait<kTileSlots - 2>();
      __syncwarp();
    }
    loader.load(next_slot);
    next_slot = slot_after<kSlotBytes, kTileSlots>(next_slot, ring);
    if (filling > 0) {
      if (--filling == 0) {
        products.take_query(p, work.unit.kv_head, lane);
        if (Loader::kFloat8 && changes_logits(p)) __syncthreads();  // the unit is there
      }
      continue;
    }
    const uint32_t address = slot;
    slot = slot_after<kSlotBytes, kTileSlots>(slot, ring);
    if (slot_index == 0) {
      products.take_keys(p, unit, loader.first_key, loader.num_keys, address, first, codes, lane);
      ++slot_index;
      continue;
    }
    if (codes) {
      products.take_codes(address, lane);
    } else if (slot_index == 1) {
      products.take_values(address, products.probabilities[0], lane);
    } else {
      products.take_values(address, products.probabilities[Loader::kFloat8 ? 1 : 0], lane);
    }
    if (++slot_index < loader.step_slots()) continue;
    slot_index = 0, first += Loader::kCtaKeys;
    const bool is_last = !loader.has_step(first);
    if (first < tile_end && !is_last) continue;
    __syncwarp();  // all lanes have read the slot
    products.put(shared, own + (address - ring), codes, warp, lane);
    write_exact_tile<T>(p, unit, loader.first_key + tile_end, shared, address - ring);
    if (!is_last) __syncthreads();  // all have read what the tile left in the slots, which are filled again
    products.begin();
    tile_end += unit.row.tile_kv;
  }
  if (p.plan.exact_cut.row_runs != 1 || unit.row.num_tiles <= 1) return;
  // All tiles of the row were this CTA's.
  if (!Loader::kFloat8 && threadIdx.x == 0) shared.unit = unit;
  __syncthreads();
#pragma unroll 1
  for (int head = warp; head < unit.heads.count; head += tile_warps(HEAD_DIM)) {
    combine_exact_head<T, HEAD_DIM>(&p, &shared.unit, unit.heads.first + head);
  }
  if (p.rows_read != nullptr && unit.heads.first == 0 && threadIdx.x == 0) p.rows_read[unit.group] = unit.row.kv_len;
}

// All tiles of all exact rows. Beside sampled rows it starts before their kernel has ended, and ends after it: who
// waits for this kernel has waited for both.
template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__(tile_warps(HEAD_DIM) * 32, min_tile_ctas(HEAD_DIM))
    tile_kernel(const __grid_constant__ DecodeParams p) {
  SANTA_DYNAMIC_SHARED(shared_bytes);
  static_assert(sizeof(TileShared<HEAD_DIM>) <= kTileHeadBytes, "heuristics.h has to know of it");
  launch_dependents();
  const Work<false> work(p);
  if (work.exists(RowKind::kExact)) {
    attend_run<T, K, HEAD_DIM>(p, work, *reinterpret_cast<TileShared<HEAD_DIM>*>(shared_bytes));
  }
  wait_for_previous();
}

}  // namespace santa::cuda
