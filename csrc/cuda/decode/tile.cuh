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

// The keys and values of a run, on their way to the ring of a warp. A step has one slot of keys, and one of values or,
// where those have 16 bits beside codes, two.
template <typename K, typename V, int HEAD_DIM>
struct TileLoader {
  static constexpr bool kFloat8 = std::is_same_v<K, Float8>, kAlike = std::is_same_v<K, V>;
  static constexpr int kStepKeys = kFloat8 ? 2 * kSlotRows : kSlotRows;  // of a warp
  static constexpr int kCtaKeys = tile_warps(HEAD_DIM) * kStepKeys;
  static constexpr int kStepSlots = kAlike ? 2 : 3;
  using Share = LaneShare<K, HEAD_DIM, true>;

  const DecodeParams& p;
  const int32_t* pages;     // null: rows are not paged
  const K* keys;            // the lane's share of the first row of the step that is copied next; paged: of page 0
  const V* values;          // likewise
  int position;             // paged: of the first key of the run
  int num_keys;             // of the run
  int num_fast;             // of those whose steps are copied in whole groups of 16 rows: all or none
  int32_t page, next_page;  // paged: of key `lane` of the step; looked up long before it is needed
  uint32_t place;           // of the lane's share in a slot of keys

  __device__ __forceinline__ TileLoader(const DecodeParams& p, const Work<false>& work, int warp, int lane)
      : p(p), num_keys(work.num_keys()), place(opaque(Share::place(lane))) {
    const int batch_index = work.unit.batch_index, kv_head = work.unit.kv_head, start = work.unit.row.kv_start;
    const KvRows<K> key = key_rows<K>(p, batch_index, kv_head, start);
    const KvRows<V> value = value_rows<V>(p, batch_index, kv_head, start);
    const int64_t first = key.paged() ? 0 : work.first_key() + warp * kStepKeys;
    pages = key.pages;
    position = key.first_position + work.first_key();
    keys = key.base + first * key.stride_token + Share::offset(key.stride_token, lane);
    values = value.base + first * value.stride_token + LaneShare<V, HEAD_DIM, true>::offset(value.stride_token, lane);
    num_fast = p.aligned && (!key.paged() || has_whole_pages(key)) ? num_keys : 0;
    next_page = look_up(warp * kStepKeys, lane);
  }

  // Whether there is a step in which the warp takes the keys `first` and on, if they are there. All warps take as many
  // steps, of a row without keys one.
  __device__ __forceinline__ bool has_step(int first) const { return (first & -kCtaKeys) < max(num_keys, 1); }

  // The page of key `lane` of a step, or of the last key if that is before it.
  __device__ __forceinline__ int32_t look_up(int first, int lane) const {
    if (!unlikely(pages != nullptr) || first >= num_keys) return 0;
    const int64_t own_position = position + min(first + lane % kStepKeys, num_keys - 1);
    return pages[own_position >> p.page_shift];
  }

  // Slot number SLOT of the step that takes the keys `first` and on: the next each time. Every call is a group of
  // copies, be it an empty one.
  template <int SLOT>
  __device__ __forceinline__ void load(uint32_t slot, int first, int lane) {
    using E = std::conditional_t<SLOT == 0, K, V>;
    constexpr int kRows = SLOT == 0 || kAlike ? kStepKeys : kSlotRows, kFirst = SLOT <= 1 ? 0 : kSlotRows;
    const E*& shares = share_of<E, SLOT>();
    const int64_t stride = SLOT == 0 ? p.stride_k_token : p.stride_v_token;
    if (SLOT == 0) page = next_page;
    if (first + kStepKeys <= num_fast) {
      const E* sources[kRows / 16];
#pragma unroll
      for (int group = 0; group < kRows / 16; ++group) {
        const int row = kFirst + 16 * group;
        if (unlikely(pages != nullptr)) {
          const int32_t own_page = kStepKeys == 16 ? page : __shfl_sync(0xffffffffu, page, row);
          sources[group] = shares + offset_in_pages(own_page, position + first + row, SLOT == 0, stride);
        } else {
          sources[group] = shares + row * stride;
        }
      }
      const uint32_t share = SLOT == 0 || kAlike ? place : LaneShare<V, HEAD_DIM, true>::place(lane);
      load_groups<E, HEAD_DIM, true>(slot + share, sources, stride, [&] { return kv_policy(p); });
    } else if (has_step(first)) {
      load_any<E, kRows, kFirst>(slot, first, shares, SLOT == 0, stride, lane);
    }
    if (SLOT == 0) next_page = look_up(first + kCtaKeys, lane);
    if (pages == nullptr && (SLOT == 0 || SLOT + 1 == kStepSlots)) shares += kCtaKeys * stride;
    cp_async_commit();
  }

 private:
  template <typename E, int SLOT>
  __device__ __forceinline__ const E*& share_of() {
    if constexpr (SLOT == 0) {
      return keys;
    } else {
      return values;
    }
  }
  __device__ __forceinline__ int64_t offset_in_pages(int32_t page, int position, bool is_key, int64_t stride) const {
    return page * (is_key ? p.stride_k_batch : p.stride_v_batch) + (position & ((1 << p.page_shift) - 1)) * stride;
  }
  // ROWS rows of the step from its row FIRST on, whether they are there or not.
  template <typename E, int ROWS, int FIRST>
  __device__ __forceinline__ void load_any(uint32_t slot, int first, const E* shares, bool is_key, int64_t stride,
                                           int lane) const {
    using OwnShare = LaneShare<E, HEAD_DIM, true>;
    const int there = num_keys - first - FIRST;
    const E* const base = shares - OwnShare::offset(stride, lane);
    const E* own = nullptr;  // of row `lane`
    if (pages != nullptr) {
      const int row = min(FIRST + lane % ROWS, max(num_keys - 1 - first, 0));
      own = base + offset_in_pages(__shfl_sync(0xffffffffu, page, row), position + first + row, is_key, stride);
    }
    if (pages != nullptr && p.aligned && there >= ROWS) {
      load_scattered<E, HEAD_DIM, true, ROWS>(slot, own, [&] { return kv_policy(p); }, lane);
      return;
    }
    const auto row_of = [&](int row) {
      if (pages != nullptr) return shuffle(own, row);
      return there > 0 ? base + (FIRST + row) * stride : static_cast<const E*>(is_key ? p.k : p.v);
    };
    load_some_rows<E, HEAD_DIM, ROWS, true>(slot, row_of, there, p.aligned, kv_policy(p), lane);
  }
};

// Products of a step, by one warp. Lane (g, t) has keys g and g + 8 of each 16, heads 2 t and the next.
template <typename T, typename K, typename V, int HEAD_DIM>
struct TileProducts {
  static constexpr bool kFloat8 = std::is_same_v<K, Float8>, kCodes = std::is_same_v<V, Float8>;
  static constexpr int kGroups = kFloat8 ? 2 : 1;  // of 16 keys

  QueryFragments<T, HEAD_DIM, kFloat8> query;
  float scale[2];                      // of scores of the lane's heads
  float max[2], sum[2];                // of the tile; all lanes of a head agree on the maximum
  float o[HEAD_DIM / 16][4];           // dimensions 16 m + g (0, 1), + 8 (2, 3), of codes 16 m + 2 g and the next
  uint32_t probabilities[kGroups][2];  // B operand: keys x heads
  uint32_t key_place, value_place;     // of what the lane names to ldmatrix first, in a slot

  __device__ __forceinline__ explicit TileProducts(int lane)
      : key_place(opaque(kFloat8 ? code_key_place<HEAD_DIM, true>(lane) : santa::cuda::key_place<HEAD_DIM>(lane))),
        // Lanes name rows: of codes all 32, of 16 bits 16 twice, the second time the next chunk of them.
        value_place(opaque(kCodes ? code_offset<HEAD_DIM, true>(lane, 0)
                                  : chunk_offset<HEAD_DIM>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1))) {}

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

  // Of the keys `first` and on of the run; its keys from num_keys on are not there.
  __device__ __forceinline__ void take_keys(const DecodeParams& p, const RowUnit& unit, int first_key, int num_keys,
                                            uint32_t slot, int first, int lane) {
    float scores[kGroups][4];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if constexpr (kFloat8) {
        score_codes<T, HEAD_DIM>(scores[i], slot + key_place + i * kSlotRows * HEAD_DIM, query);
      } else {
        score_slot<T, HEAD_DIM>(scores[i], slot + key_place, query);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) scores[i][k] = logit_of(scores[i][k], kFloat8 ? scale[k & 1] : p.scale_log2);
    }
    if (unlikely(first + 16 * kGroups > num_keys || changes_logits(p))) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const KeyRange visible = visible_keys(p, unit.row.end(), unit.heads.first + 2 * (lane & 3) + j);
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) {
          float& score = scores[i / 2][i % 2 * 2 + j];
          const int key = first + i * 8 + (lane >> 2);
          if (key >= num_keys) {
            score = -INFINITY;
          } else if (changes_logits(p)) {
            score = attended_logit(p, visible, first_key + key, score);
          }
        }
      }
    }
    float factor[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float own_max = -INFINITY;
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) own_max = fmaxf(own_max, scores[i / 2][i % 2 * 2 + j]);
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
      probabilities[i / 2][i % 2] =
          transpose_8x8(Float16Traits<std::conditional_t<kCodes, __half, T>>::pack(first_weight, second));
    }
  }

  // The values of group GROUP of the step's keys; codes: of all 32 of them. A 16-bit element of their matrices is a
  // pair of dimensions, the two of which become rows g and g + 8 of the product.
  template <int GROUP>
  __device__ __forceinline__ void take_values(uint32_t slot) {
    const uint32_t place = slot + value_place;
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      if constexpr (kCodes) {
        const uint4 pairs = ldmatrix_x4_transposed(chunk_at<code_span(HEAD_DIM)>(place, m));
        const uint2 a = halves_of_pairs(pairs.x), b = halves_of_pairs(pairs.y);
        Float16Traits<__half>::mma(o[m], {a.x, a.y, b.x, b.y}, probabilities[0][0], probabilities[0][1]);
        const uint2 c = halves_of_pairs(pairs.z), d = halves_of_pairs(pairs.w);
        Float16Traits<__half>::mma(o[m], {c.x, c.y, d.x, d.y}, probabilities[kGroups - 1][0],
                                   probabilities[kGroups - 1][1]);
      } else {
        const uint4 a = ldmatrix_x4_transposed(chunk_at<128>(place, 2 * m));
        Float16Traits<T>::mma(o[m], {a.x, a.y, a.z, a.w}, probabilities[GROUP][0], probabilities[GROUP][1]);
      }
    }
  }
  static __device__ __forceinline__ uint2 halves_of_pairs(uint32_t codes) {
    return halves_and_nans_of_codes(__byte_perm(codes, 0, 0x3120));
  }

  // Leaves what the warp has of the tile. `output`: a slot.
  __device__ __forceinline__ void put(TileShared<HEAD_DIM>& shared, unsigned char* output, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3;
    auto* const own = reinterpret_cast<float (*)[HEAD_DIM]>(output);
    static_assert(kHeadBlock * HEAD_DIM * sizeof(float) <= slot_bytes(HEAD_DIM));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for (int offset = 4; offset < 32; offset <<= 1) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
      if (g == 0) shared.max[warp][2 * t + j] = max[j], shared.sum[warp][2 * t + j] = sum[j];
#pragma unroll
      for (int m = 0; m < HEAD_DIM / 16; ++m) {
        if constexpr (kCodes) {
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

// V: of values, T or K.
template <typename T, typename K, typename V, int HEAD_DIM>
__device__ __forceinline__ void attend_run(const DecodeParams& p, const Work<false>& work,
                                           TileShared<HEAD_DIM>& shared) {
  using Loader = TileLoader<K, V, HEAD_DIM>;
  constexpr uint32_t kSlotBytes = slot_bytes(HEAD_DIM);
  constexpr int kStepSlots = Loader::kStepSlots, kAhead = kTileSlots - 1;  // slots between what is read and loaded
  static_assert(kAhead <= kStepSlots);
  const int warp = warp_index(), lane = threadIdx.x & 31;
  if (Loader::kFloat8 && threadIdx.x == 0) shared.unit = work.unit;
  const RowUnit& unit = Loader::kFloat8 ? shared.unit : work.unit;
  TileProducts<T, K, V, HEAD_DIM> products(lane);
  products.load_query(p, work.unit, lane);
  Loader loader(p, work, warp, lane);
  unsigned char* const own = shared.ring(threadIdx.x >> 5);  // not from `warp`: slot_after says why
  const uint32_t ring = shared_address(own);
  // The warp's keys of the step, of those of the run. The turn before the first step only fills the ring, by the same
  // code: what is there twice has to be fetched twice.
  int first = warp * Loader::kStepKeys - Loader::kCtaKeys;
  uint32_t slot = ring + (kTileSlots - kStepSlots % kTileSlots) % kTileSlots * kSlotBytes;
  const auto take_slot = [&](auto number, const auto& take) {
    constexpr int kLoaded = decltype(number)::value + kAhead;
    cp_async_wait<kTileSlots - 2>();
    __syncwarp();
    if (kLoaded >= kStepSlots || first >= 0) {
      loader.template load<kLoaded % kStepSlots>(slot_before<kSlotBytes, kTileSlots>(slot, ring),
                                                 first + kLoaded / kStepSlots * Loader::kCtaKeys, lane);
    }
    if (first >= 0) take(slot);
    slot = slot_after<kSlotBytes, kTileSlots>(slot, ring);
  };
  products.begin();
#pragma unroll 1
  while (loader.has_step(first)) {
    take_slot(std::integral_constant<int, 0>(), [&](uint32_t address) {
      products.take_keys(p, unit, work.first_key(), loader.num_keys, address, first, lane);
    });
    take_slot(std::integral_constant<int, 1>(), [&](uint32_t address) { products.template take_values<0>(address); });
    if constexpr (kStepSlots > 2) {
      take_slot(std::integral_constant<int, 2>(), [&](uint32_t address) { products.template take_values<1>(address); });
    }
    first += Loader::kCtaKeys;
    if (first < Loader::kCtaKeys) {  // the first step is on its way
      products.take_query(p, work.unit.kv_head, lane);
      if (Loader::kFloat8) __syncthreads();  // the unit is there
      continue;
    }
    const bool is_last = !loader.has_step(first);
    const int end = first & -Loader::kCtaKeys;  // of what has been read; tiles have a power of two of keys
    if ((end & (unit.row.tile_kv - 1)) != 0 && !is_last) continue;
    const uint32_t offset = slot_before<kSlotBytes, kTileSlots>(slot, ring) - ring;  // of the slot that has been read
    __syncwarp();                                                                    // by all lanes
    products.put(shared, own + offset, warp, lane);
    write_exact_tile<T>(p, unit, work.first_key() + end, shared, offset);
    if (!is_last) __syncthreads();  // all have read what the tile left in the slots, which are filled again
    products.begin();
  }
  if (!Loader::kFloat8 && threadIdx.x == 0) shared.unit = unit;
}

// Where all tiles of the row were this CTA's, or its cluster's, whose two CTAs take heads in turn. By all threads.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void combine_own_row(const DecodeParams& p, TileShared<HEAD_DIM>& shared) {
  const bool is_pair = p.plan.row_pairs;
  if (p.plan.exact_cut.row_runs != 1 && !is_pair) return;
  if (is_pair) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  const RowUnit& unit = shared.unit;
  if (unit.row.num_tiles <= 1) return;
  const int rank = is_pair ? cluster_rank() : 0, ctas = is_pair ? 2 : 1;
#pragma unroll 1
  for (int head = warp_index() * ctas + rank; head < unit.heads.count; head += tile_warps(HEAD_DIM) * ctas) {
    combine_exact_head<T, HEAD_DIM>(&p, &unit, unit.heads.first + head);
  }
  if (p.rows_read != nullptr && unit.heads.first == 0 && rank == 0 && threadIdx.x == 0) {
    p.rows_read[unit.group] = unit.row.kv_len;
  }
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
    auto& shared = *reinterpret_cast<TileShared<HEAD_DIM>*>(shared_bytes);
    if (std::is_same_v<T, K> || p.v_dtype == Dtype::kFloat8E4M3) {
      attend_run<T, K, K, HEAD_DIM>(p, work, shared);
    } else {
      attend_run<T, K, T, HEAD_DIM>(p, work, shared);
    }
    combine_own_row<T, HEAD_DIM>(p, shared);
  }
  wait_for_previous();
}

}  // namespace santa::cuda
