// Sampled rows with Bernoulli scores: the one-pass kernel of decode/one_pass.cuh with a scorer that takes keys by
// features.
//
// A slot holds 16 of the features that any head of the group drew, of the 128 keys of a tile: 256 contiguous bytes
// each. It is the K of a matrix product with the counts, which are whole numbers in q's dtype. Features that were not
// drawn cost neither traffic nor a place in the products.
//
// What a head did not draw is multiplied with a count of zero, which adds nothing, but makes NaN of NaN and infinity:
// a tile with a NaN among its sums is done over, see take_apart.
#pragma once

#include "bernoulli_params.h"
#include "cuda/bernoulli/features.cuh"
#include "cuda/bernoulli/heuristics.h"
#include "cuda/bernoulli/launch.h"
#include "cuda/decode/stages.cuh"

namespace santa::cuda {

constexpr int kTileProducts = kDrawTileKv / 16;  // matrix products of a slot
static_assert(kFeatureBytes == kDrawTileKv * 2, "a slot has the keys of a tile");

// What was drawn for the CTA's heads, in shared memory; counts [kHeadBlock, count_pitch] follow.
struct FeatureList {
  int num_features;
  float scales[kHeadBlock];
  alignas(16) uint8_t features[kMaxHeadDim];
};
static_assert(sizeof(FeatureList) <= kListHeadBytes, "heuristics.h has to know of it");

template <typename T>
__device__ __forceinline__ bool is_finite_element(uint16_t bits) {
  constexpr uint16_t kExponent = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  return (bits & kExponent) != kExponent;
}

template <typename T, int HEAD_DIM>
struct FeatureScorer {
  static constexpr bool kFloat8 = false;
  static constexpr int kSlotBytes = santa::cuda::kSlotBytesOfFeatures;
  static constexpr int kOnceBytes = list_bytes(HEAD_DIM), kPilotBytes = 0;
  static constexpr int kSlotKeys = kDrawTileKv;

  const BernoulliParams& p;
  const FeatureList& list;
  const T* keys;  // feature 0 of the row's first key
  bool aligned;   // keys can be copied by 16 bytes
  int tile_first = 0, tile_keys = 0;
  float sums[kTileProducts][4];  // in the order of score_slot

  // By all threads of the CTA, which meet before the list is read.
  static __device__ __forceinline__ void fetch_list(const BernoulliParams& p, const RowUnit& unit,
                                                    unsigned char* bytes) {
    auto& list = *reinterpret_cast<FeatureList*>(bytes);
    auto* counts = reinterpret_cast<uint16_t*>(bytes + kListHeadBytes);
    const auto* weights =
        reinterpret_cast<const uint4*>(p.half_weights + p.half_weights_offset(unit.group, unit.block));
    constexpr int kChunks = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < kHeadBlock * kChunks; i += blockDim.x) {
      *reinterpret_cast<uint4*>(counts + i / kChunks * count_pitch(HEAD_DIM) + i % kChunks * 8) = weights[i];
    }
    const uint8_t* features = p.features + unit.group * HEAD_DIM;
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) list.features[i] = features[i];
    if (threadIdx.x < kHeadBlock) {
      const int head = unit.heads.first + threadIdx.x;
      list.scales[threadIdx.x] =
          threadIdx.x < unit.heads.count ? p.scales[unit.group * p.decode.group_size + head] : 0.0f;
    }
    if (threadIdx.x == 0) list.num_features = p.features_read[unit.group];
  }

  __device__ __forceinline__ FeatureScorer(const BernoulliParams& p, const RowUnit& unit, const unsigned char* bytes)
      : p(p),
        list(*reinterpret_cast<const FeatureList*>(bytes)),
        keys(static_cast<const T*>(p.decode.k) + unit.batch_index * p.decode.stride_k_batch +
             unit.kv_head * p.decode.stride_k_head + unit.row.kv_start),
        aligned(p.aligned_keys && unit.row.kv_start % kThreadKeys == 0) {}

  __device__ __forceinline__ void ask_query(const RowUnit&, int) {}
  __device__ __forceinline__ void take_query(const RowUnit&, int) {}
  __device__ __forceinline__ void look_up(int, int, int, int) {}

  __device__ __forceinline__ const uint16_t* counts() const {
    return reinterpret_cast<const uint16_t*>(reinterpret_cast<const unsigned char*>(&list) + kListHeadBytes);
  }

  // One at least, be it empty: a tile without drawn features has scores too.
  __device__ __forceinline__ int num_slots(int) const { return max(ceil_div_int(list.num_features, kSlotFeatures), 1); }

  // A lane copies 8 keys of half of the slot's features. Chunk c of row r lies at c ^ (r % 8), so that ldmatrix, which
  // reads one chunk of 8 rows, is free of conflicts.
  template <typename Policy>
  __device__ __forceinline__ void load(uint32_t slot, int first, int num_keys, int index, const Policy& policy,
                                       int lane) const {
    constexpr int kOwn = kSlotFeatures / 2;
    const int own_first = index * kSlotFeatures + lane / 16 * kOwn, own = list.num_features - own_first;
    const int key = lane % 16 * kThreadKeys, there = min(max(num_keys - key, 0), kThreadKeys);
    const T* source = keys + first + (there > 0 ? key : 0);
    const uint32_t place = slot + lane / 16 * kOwn * kFeatureBytes + lane % 16 * 16;
    const auto place_of = [&](int u) { return (place ^ u * 16) + u * kFeatureBytes; };
    const auto keys_of = [&](int u) { return source + list.features[own_first + u] * p.stride_k_feature; };
    if (aligned && there == kThreadKeys && own >= kOwn) {
#pragma unroll
      for (int u = 0; u < kOwn; ++u) cp_async_whole_16(place_of(u), keys_of(u), policy());
    } else {
#pragma unroll 1
      for (int u = 0; u < min(own, kOwn); ++u) load_some_keys(place_of(u), keys_of(u), there, aligned, policy());
#pragma unroll 1
      for (int u = max(own, 0); u < kOwn; ++u) store_shared_16(place_of(u), {0, 0, 0, 0});
    }
  }

  __device__ __forceinline__ void begin(int first, int num_keys) {
    tile_first = first, tile_keys = num_keys;
#pragma unroll
    for (int i = 0; i < kTileProducts * 4; ++i) sums[i / 4][i % 4] = 0.0f;
  }

  // Adds the slot's features; `finish` has the scores.
  template <typename Put>
  __device__ __forceinline__ void score(uint32_t slot, int index, int lane, const Put&) {
    // Of a lane: the row of the slot and, at the first product, the chunk that it names to ldmatrix.
    const int row = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
    const uint32_t fragment = row * kFeatureBytes + (chunk ^ row % 8) * 16;
    const auto* b = reinterpret_cast<const uint32_t*>(counts() + lane / 4 * count_pitch(HEAD_DIM) +
                                                      index * kSlotFeatures + lane % 4 * 2);
    const uint32_t low = b[0], high = b[4];
#pragma unroll
    for (int tile = 0; tile < kTileProducts; ++tile) {
      const uint4 a = ldmatrix_x4_transposed(slot + (fragment ^ (tile * 32)));
      Float16Traits<T>::mma(sums[tile], {a.x, a.y, a.z, a.w}, low, high);
    }
  }

  __device__ __forceinline__ void finish(TileScores& out, int lane) {
    bool undefined = false;
#pragma unroll
    for (int i = 0; i < kTileProducts * 4; ++i) undefined = undefined || sums[i / 4][i % 4] != sums[i / 4][i % 4];
    if (__any_sync(0xffffffffu, undefined)) take_apart(lane);
    const int t = lane & 3;
    const float first_scale = list.scales[2 * t], second_scale = list.scales[2 * t + 1];
#pragma unroll
    for (int tile = 0; tile < kTileProducts; ++tile) {
      const float (&own)[4] = sums[tile];
      const float logits[4] = {logit_of(own[0], first_scale), logit_of(own[1], second_scale),
                               logit_of(own[2], first_scale), logit_of(own[3], second_scale)};
      out.put(tile * 16, logits, lane);
    }
  }

  // Hands the logits of the pilot keys [32 part, 32 part + 32), in runs of neighbours, to put(group of 16, logits).
  // They come straight from memory, many at a time; those that are not finite count as zeros here, where nothing hangs
  // on them.
  template <typename Put>
  __device__ __forceinline__ void score_pilot(uint32_t, int part, const RowUnit& unit, int lane, const Put& put) const {
    constexpr int kGroups = kPilotWarpKeys / 16, kTogether = 4;  // slots of features
    const int g = lane >> 2, t = lane & 3, kv_len = unit.row.kv_len, size = pilot_size(kv_len);
    int positions[kGroups][2];
#pragma unroll
    for (int i = 0; i < kGroups * 2; ++i) {
      const int key = part * kPilotWarpKeys + i * 8 + g;
      positions[i / 2][i % 2] = pilot_position(min(key, size - 1), kv_len, kFeaturePilotRun);
    }
    // Past the end, the last feature is read again, for nothing: no branch keeps the loads from being in flight
    // together.
    const auto element = [&](int position, int item) -> uint32_t {
      const int feature = list.features[min(item, list.num_features - 1)];
      const uint16_t bits = __ldg(reinterpret_cast<const uint16_t*>(keys) + position + feature * p.stride_k_feature);
      return item < list.num_features && is_finite_element<T>(bits) ? bits : 0;
    };
    float products[kGroups][4] = {};
#pragma unroll 1
    for (int first = 0; first < list.num_features; first += kTogether * kSlotFeatures) {
      uint32_t a[kTogether][kGroups][4];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
#pragma unroll
        for (int i = 0; i < kGroups * 4; ++i) {  // low or high, features or features + 8
          const int position = positions[i / 4][i % 2], item = first + u * kSlotFeatures + 2 * t + i % 4 / 2 * 8;
          a[u][i / 4][i % 4] = element(position, item) | element(position, item + 1) << 16;
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int slot = first + u * kSlotFeatures;
        if (slot >= list.num_features) break;
        const auto* b = reinterpret_cast<const uint32_t*>(counts() + g * count_pitch(HEAD_DIM) + slot + 2 * t);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) Float16Traits<T>::mma(products[i], a[u][i], b[0], b[4]);
      }
    }
    const float first_scale = list.scales[2 * t], second_scale = list.scales[2 * t + 1];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      put(part * kGroups + i, {logit_of(products[i][0], first_scale), logit_of(products[i][1], second_scale),
                               logit_of(products[i][2], first_scale), logit_of(products[i][3], second_scale)});
    }
  }

 private:
  // The sums of the tile once more, from memory, with zeros in place of keys that are not finite; then those keys, one
  // by one, for the heads that drew their features. Rare, so short rather than fast.
  __device__ __forceinline__ void take_apart(int lane) {
    const int g = lane >> 2, t = lane & 3;
    const uint16_t* own_counts = counts();
    const auto key_at = [&](int key, int item) -> uint16_t {
      const bool there = key < tile_keys && item < list.num_features;
      return there
                 ? reinterpret_cast<const uint16_t*>(keys)[tile_first + key + list.features[item] * p.stride_k_feature]
                 : 0;
    };
#pragma unroll 1
    for (int tile = 0; tile < kTileProducts; ++tile) {
      const int key = tile * 16 + g;
      float redone[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
      for (int item = 2 * t; item < list.num_features + 2 * t; item += kSlotFeatures) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // key or key + 8, features or features + 8
          const uint16_t low = key_at(key + i % 2 * 8, item + i / 2 * 8);
          const uint16_t high = key_at(key + i % 2 * 8, item + i / 2 * 8 + 1);
          a[i] = (is_finite_element<T>(low) ? low : 0u) | (is_finite_element<T>(high) ? high : 0u) << 16;
        }
        const auto* b = reinterpret_cast<const uint32_t*>(own_counts + g * count_pitch(HEAD_DIM) + item);
        Float16Traits<T>::mma(redone, a, b[0], b[4]);
      }
#pragma unroll 1
      for (int item = 0; item < list.num_features; ++item) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint16_t bits = key_at(key + i / 2 * 8, item);
          const uint16_t count = own_counts[(2 * t + i % 2) * count_pitch(HEAD_DIM) + item];
          if (!is_finite_element<T>(bits) && (count & 0x7fff) != 0) {
            redone[i] += Float16Traits<T>::to_float(*reinterpret_cast<const T*>(&bits)) *
                         Float16Traits<T>::to_float(*reinterpret_cast<const T*>(&count));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTileProducts * 4; ++i) {
        sums[i / 4][i % 4] = i / 4 == tile ? redone[i % 4] : sums[i / 4][i % 4];
      }
    }
  }
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kPilotWarps * 32, 1)
    pilot_bernoulli_kernel(const __grid_constant__ BernoulliParams p) {
  SANTA_DYNAMIC_SHARED(one_pass_bytes);
  using Scorer = FeatureScorer<T, HEAD_DIM>;
  wait_for_previous();  // what was drawn; the next kernel, which needs it too, starts later
  launch_dependents();
  const RowUnit unit = RowUnit::make(p.decode, blockIdx.y, blockIdx.x);
  if (!unit.row.one_pass()) return;
  unsigned char* const list = one_pass_bytes + kPilotHeadBytes;
  Scorer::fetch_list(p, unit, list);
  __syncthreads();
  Scorer scorer(p, unit, list);
  find_level(p.decode, unit, scorer, one_pass_bytes);
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(bound_threads(kFeatureScoreWarps, HEAD_DIM), 2)
    one_pass_bernoulli_kernel(const __grid_constant__ BernoulliParams p) {
  SANTA_DYNAMIC_SHARED(one_pass_bytes);
  using Scorer = FeatureScorer<T, HEAD_DIM>;
  launch_dependents();
  const Work<> work(p.decode);
  if (!work.exists(RowKind::kOnePass)) return;
  Scorer::fetch_list(p, work.unit, one_pass_bytes + kSharedBytes);
  __syncthreads();
  Scorer scorer(p, work.unit, one_pass_bytes + kSharedBytes);
  one_pass<Scorer, T, HEAD_DIM>(p.decode, one_pass_bytes, scorer, work);
}

template <typename T, int HEAD_DIM>
void launch_one_pass_bernoulli(const BernoulliParams& p, cudaStream_t stream) {
  const ScoreNeeds needs = feature_score_needs(p.decode);
  launch_one_pass_kernels(pilot_bernoulli_kernel<T, HEAD_DIM>, one_pass_bernoulli_kernel<T, HEAD_DIM>, p, p.decode,
                          pilot_shared_bytes(needs), one_pass_shared_bytes(p.decode, needs), one_pass_threads(p.decode),
                          stream, /*is_first=*/false);
}

}  // namespace santa::cuda
