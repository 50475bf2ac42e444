// Sampled rows with Bernoulli scores: the persistent kernel of decode/persistent.cuh with score warps that take keys by
// features.
//
// A score warp takes 128 keys of the block at a time, in stages of 16 of the features that any head of the group drew:
// they are copied to a ring in shared memory, 256 contiguous bytes each. A stage is one matrix product with the counts,
// which are whole numbers in q's dtype; what is copied runs ahead of what is added, from step to step and into the next
// block. Features that were not drawn cost neither traffic nor a place in the products.
//
// What a head did not draw is multiplied with a count of zero, which adds nothing, but makes NaN of NaN and infinity:
// a step with a NaN among its sums is done over, see take_apart.
//
// What was drawn comes from draw_kernel; the state warp fetches it for the next block.
#pragma once

#include "bernoulli_params.h"
#include "cuda/bernoulli/features.cuh"
#include "cuda/bernoulli/heuristics.h"
#include "cuda/bernoulli/launch.h"
#include "cuda/decode/stages.cuh"

namespace santa::cuda {

constexpr int kStepTiles = kFeatureStepKeys / 16;  // matrix products of a stage

// A block's keys and what was drawn for its group, in shared memory; counts [kPersistentHeads, count_pitch] follow.
struct FeatureList {
  const void* keys;  // the first one, feature 0
  int num_keys;      // 0: there is no block
  int num_features;
  int aligned;  // whether keys can be copied by 16 bytes
  float scales[kPersistentHeads];
  alignas(16) uint8_t features[kMaxHeadDim];
};
static_assert(sizeof(FeatureList) <= kListHeadBytes, "heuristics.h has to know of it");

// What does not change the sums of heads that did not draw it.
template <typename T>
__device__ __forceinline__ bool is_finite_half(uint16_t bits) {
  constexpr uint16_t kExponent = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  return (bits & kExponent) != kExponent;
}

template <typename T, int HEAD_DIM>
struct FeatureScores {
  static constexpr int kLookAheadLanes = 32;
  static constexpr int kMostGatherHeads = kGatherHeads;  // more would spill, and so would
  static constexpr bool kRoleAnew = true;                // roles that are kept

  const BernoulliParams& params;
  const DecodeParams& p;

  __device__ explicit FeatureScores(const BernoulliParams& bernoulli) : params(bernoulli), p(bernoulli.decode) {}

  __device__ void start(const PersistentMemory& memory);
  __device__ void look_ahead(const PersistentMemory& memory, const Turn& turn, bool has_block, const Block& block,
                             int lane) const;
  __device__ void score_blocks(const PersistentMemory& memory);

 private:
  // What is copied next: `left` features from `item` on, of the step that begins at key `first` of the block.
  int item = 0, left = 0;
  int first = 0;
  int listed_in = 0;    // place of the block's list: that of the block that is scored, or of the next one
  uint32_t copied = 0;  // stages so far
  const T* source;      // the lane's keys of the step, feature 0
  int source_keys;      // of 8, that are there; less than 0 if they have to be copied one by one

  static_assert(kListPlaces == 2, "listed_in is one or the other");
  __device__ bool in_next(const Turn& turn) const { return listed_in != turn.n % kListPlaces; }
  static __device__ FeatureList& list(const PersistentMemory& memory, int n) {
    return *reinterpret_cast<FeatureList*>(memory.rings + n % kListPlaces * list_bytes(HEAD_DIM));
  }
  // Of a stage's features a lane copies the first half or the second, from this one on.
  static __device__ int own_half(int lane) { return lane / 16 * (kStageFeatures / 2); }
  static __device__ uint16_t* counts(FeatureList& list) {
    return reinterpret_cast<uint16_t*>(reinterpret_cast<unsigned char*>(&list) + kListHeadBytes);
  }
  // Stages start at multiples of 256, for the permutation of their 16-byte chunks.
  static __device__ uint32_t ring(const PersistentMemory& memory, int score_warp) {
    const uint32_t rings = shared_address(memory.rings) + kListPlaces * list_bytes(HEAD_DIM);
    return ((rings + 255) & ~255u) + score_warp * (kFeatureStages * kStageBytes);
  }
  __device__ const T* first_key(const Block& block) const {
    return static_cast<const T*>(p.k) + block.batch_index * p.stride_k_batch + block.kv_head * p.stride_k_head +
           block.kv_start + static_cast<int64_t>(block.index) * block.block_kv;
  }
  __device__ bool keys_aligned(const Block& block) const {
    return params.aligned_keys && block.kv_start % kThreadKeys == 0;
  }
  __device__ void fetch_list(FeatureList& list, const Block& block, int lane) const;
  __device__ void enter_step(const T* keys, int num_keys, int num_features, bool aligned, int lane);
  __device__ void copy_stage(uint32_t slot, uint2 features, int num_features, int lane) const;
  __device__ void enter_next(const PersistentMemory& memory, const Turn& turn, int next_part, int lane);
  __device__ void copy_next(const PersistentMemory& memory, const Turn& turn, int next_part, uint32_t ring, int lane);
  __device__ void take_apart(float (&sums)[kStepTiles / 2][2][4], FeatureList& block, int step_first, int lane) const;
};

// By one warp.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::fetch_list(FeatureList& list, const Block& block,
                                                                       int lane) const {
  const int64_t group = p.group_index(block.batch_index, block.kv_head);
  const auto* features = reinterpret_cast<const uint2*>(params.features + group * HEAD_DIM);
  const auto* weights = reinterpret_cast<const uint4*>(params.half_weights + group * kPersistentHeads * HEAD_DIM);
  constexpr int kChunks = HEAD_DIM / 8;
#pragma unroll 4
  for (int i = lane; i < kPersistentHeads * kChunks; i += 32) {
    *reinterpret_cast<uint4*>(counts(list) + i / kChunks * count_pitch(HEAD_DIM) + i % kChunks * 8) = weights[i];
  }
  if (lane < kChunks) reinterpret_cast<uint2*>(list.features)[lane] = features[lane];
  if (lane < kPersistentHeads) {
    list.scales[lane] = lane < p.gqa_group_size ? params.scales[group * p.gqa_group_size + lane] : 0.0f;
  }
  if (lane == 0) {
    list.keys = first_key(block);
    list.num_keys = block.num_keys();
    list.num_features = params.features_read[group];
    list.aligned = keys_aligned(block);
  }
}

// A lane copies 8 keys of half of a stage's features.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::enter_step(const T* keys, int num_keys, int num_features,
                                                                       bool aligned, int lane) {
  const int key = first + lane % 16 * kThreadKeys, there = min(max(num_keys - key, 0), kThreadKeys);
  item = 0;
  left = num_features;
  source = keys + (there > 0 ? key : 0);
  source_keys = aligned ? there : -there;
}

// Of the lane's features, a byte each, num_features are there; zeros for the others.
// Chunk c of row r lies at c ^ (r % 8), so that ldmatrix, which reads one chunk of 8 rows, is free of conflicts.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::copy_stage(uint32_t slot, uint2 features, int num_features,
                                                                       int lane) const {
  constexpr int kOwn = kStageFeatures / 2;
  const uint64_t policy = evict_first_policy();
  const uint32_t place = slot + own_half(lane) * kFeatureBytes + lane % 16 * 16;
  const auto place_of = [&](int u) { return (place ^ u * 16) + u * kFeatureBytes; };
  const uint32_t stride = static_cast<uint32_t>(params.stride_k_feature) * sizeof(T);
  const auto keys_of = [&](int u) {
    const uint32_t feature = __byte_perm(u < 4 ? features.x : features.y, 0, 0x4440 | u % 4);
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(source) + uint64_t{feature} * stride);
  };
  if (source_keys == kThreadKeys && num_features >= kOwn) {
#pragma unroll
    for (int u = 0; u < kOwn; ++u) cp_async_whole_16(place_of(u), keys_of(u), policy);
  } else {
#pragma unroll 1
    for (int u = 0; u < min(num_features, kOwn); ++u) {
      load_some_keys(place_of(u), keys_of(u), abs(source_keys), source_keys >= 0, policy);
    }
#pragma unroll 1
    for (int u = max(num_features, 0); u < kOwn; ++u) store_shared_16(place_of(u), {0, 0, 0, 0});
  }
}

// The first keys are on their way before anything else, as far as they belong to the warp's part of the first block.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::start(const PersistentMemory& memory) {
  const int warp = (threadIdx.x >> 5) - kFirstScoreWarp, lane = threadIdx.x & 31;
  Block block{};
  if (BlockQueue(p, lane).find(blockIdx.x, block)) {
    const int64_t group = p.group_index(block.batch_index, block.kv_head);
    const uint8_t* features = params.features + group * HEAD_DIM + own_half(lane);
    const int num_keys = block.num_keys();
    first = warp * kFeatureStepKeys;
    enter_step(first_key(block), num_keys, first < num_keys ? params.features_read[group] : 0, keys_aligned(block),
               lane);
#pragma unroll 1
    for (; left > 0 && copied < kFeatureStages; item += kStageFeatures, left -= kStageFeatures, ++copied) {
      copy_stage(ring(memory, warp) + copied * kStageBytes, *reinterpret_cast<const uint2*>(features + item),
                 left - own_half(lane), lane);
      cp_async_commit();
    }
    if (warp == 0) fetch_list(list(memory, 0), block, lane);
  } else if (warp == 0 && lane == 0) {
    list(memory, 0).num_keys = 0;
  }
}

// The list of the block after the turn's. The place held the list of the block before it, which is scored.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::look_ahead(const PersistentMemory& memory, const Turn& turn,
                                                                       bool has_block, const Block& block,
                                                                       int lane) const {
  FeatureList& next = list(memory, turn.n + 1);
  if (has_block) {
    fetch_list(next, block, lane);
  } else if (lane == 0) {
    next.num_keys = 0;
  }
}

// What is copied next is the first step of the block after the turn's, if there is one and the part has a step in it.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::enter_next(const PersistentMemory& memory, const Turn& turn,
                                                                       int next_part, int lane) {
  mbarrier_wait(&memory.shared->looked_ahead[turn.buffer], turn.parity);
  listed_in ^= 1;
  const FeatureList& next = list(memory, listed_in);
  first = next_part * kFeatureStepKeys;
  left = 0;
  if (first < next.num_keys) {
    enter_step(static_cast<const T*>(next.keys), next.num_keys, next.num_features, next.aligned != 0, lane);
  }
}

// Starts the copies of the next stage, be it of the block after the turn's; of none if that is as far as one can see.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::copy_next(const PersistentMemory& memory, const Turn& turn,
                                                                      int next_part, uint32_t ring, int lane) {
  while (left <= 0) {
    const FeatureList& from = list(memory, listed_in);
    const int next_step = first + p.persistent.num_score_warps * kFeatureStepKeys;
    if (next_step < from.num_keys && from.num_features > 0) {
      first = next_step;
      enter_step(static_cast<const T*>(from.keys), from.num_keys, from.num_features, from.aligned != 0, lane);
    } else if (!in_next(turn)) {
      enter_next(memory, turn, next_part, lane);
    } else {
      break;
    }
  }
  if (left > 0) {
    const uint8_t* features = list(memory, listed_in).features + own_half(lane) + item;
    copy_stage(ring + copied % kFeatureStages * kStageBytes, *reinterpret_cast<const uint2*>(features),
               left - own_half(lane), lane);
    item += kStageFeatures;
    left -= kStageFeatures;
    ++copied;
  }
  cp_async_commit();
}

// The sums of a step once more, from memory, with zeros in place of keys that are not finite; then those keys, one by
// one, for the heads that drew their features. Rare, so short rather than fast.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::take_apart(float (&sums)[kStepTiles / 2][2][4],
                                                                       FeatureList& block, int step_first,
                                                                       int lane) const {
  const int g = lane >> 2, t = lane & 3;
  const auto* keys = static_cast<const uint16_t*>(block.keys);
  const uint16_t* own_counts = counts(block);
  const auto key_at = [&](int key, int item) -> uint16_t {
    const bool there = key < block.num_keys && item < block.num_features;
    return there ? keys[key + block.features[item] * params.stride_k_feature] : 0;
  };
#pragma unroll 1
  for (int tile = 0; tile < kStepTiles; ++tile) {
    const int key = step_first + tile * 16 + g;
    float redone[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int item = 2 * t; item < block.num_features + 2 * t; item += kStageFeatures) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // key or key + 8, features or features + 8
        const uint16_t low = key_at(key + i % 2 * 8, item + i / 2 * 8);
        const uint16_t high = key_at(key + i % 2 * 8, item + i / 2 * 8 + 1);
        a[i] = (is_finite_half<T>(low) ? low : 0u) | (is_finite_half<T>(high) ? high : 0u) << 16;
      }
      const auto* b = reinterpret_cast<const uint32_t*>(own_counts + g * count_pitch(HEAD_DIM) + item);
      Half<T>::mma(redone, a, b[0], b[4]);
    }
#pragma unroll 1
    for (int item = 0; item < block.num_features; ++item) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint16_t bits = key_at(key + i / 2 * 8, item);
        const uint16_t count = own_counts[(2 * t + i % 2) * count_pitch(HEAD_DIM) + item];
        if (!is_finite_half<T>(bits) && (count & 0x7fff) != 0) {
          redone[i] += Half<T>::to_float(*reinterpret_cast<const T*>(&bits)) *
                       Half<T>::to_float(*reinterpret_cast<const T*>(&count));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kStepTiles * 4; ++i) {
      float& sum = sums[i / 8][i / 4 % 2][i % 4];
      sum = i / 4 == tile ? redone[i % 4] : sum;
    }
  }
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::score_blocks(const PersistentMemory& memory) {
  const int warp = (threadIdx.x >> 5) - kFirstScoreWarp, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int num_warps = p.persistent.num_score_warps;
  const uint32_t slots = ring(memory, warp);
  // Of a lane: the row of a stage and, at the first product, the chunk that it names to ldmatrix.
  const int row = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
  const uint32_t fragment = row * kFeatureBytes + (chunk ^ row % 8) * 16;
  int part = warp;     // of the steps of a block, as in KeyScores
  uint32_t added = 0;  // stages so far

  for (Turn turn; list(memory, turn.n).num_keys > 0; turn.advance(p.persistent.num_buffers)) {
    const int buffer = turn.buffer;
    FeatureList& block = list(memory, turn.n);
    const int num_keys = block.num_keys;
    const int turned = (part - ceil_div_int(num_keys, kFeatureStepKeys)) % num_warps;
    const int next_part = turned < 0 ? turned + num_warps : turned;
    mbarrier_wait(&memory.shared->released[buffer], turn.parity ^ 1);
    TakenScores taken(p, memory.buffer(p, buffer), t);

    // Once at least, even without a stage: for the copies, which run ahead.
    int step_first = part * kFeatureStepKeys;
    do {
      const int num_features = step_first < num_keys ? block.num_features : 0;
      float sums[kStepTiles / 2][2][4] = {};  // pairs of products, as they are taken
      int item = 0;
#pragma unroll 1
      do {
        __syncwarp();  // the other lanes are done with the slot that is filled next
        // Once, or more often where the block after this one was out of sight. A call is a group of copies, be it an
        // empty one, so a stage's is followed by kFeatureStages - 1 at least when it is its turn.
#pragma unroll 1
        for (uint32_t ahead = copied - added; ahead < kFeatureStages; ++ahead) {
          copy_next(memory, turn, next_part, slots, lane);
        }
        if (num_features == 0) break;
        cp_async_wait<kFeatureStages - 1>();
        __syncwarp();  // the other lanes' copies are visible
        const uint32_t slot = slots + added % kFeatureStages * kStageBytes;
        ++added;
        const auto* b = reinterpret_cast<const uint32_t*>(counts(block) + g * count_pitch(HEAD_DIM) + item + 2 * t);
        const uint32_t low = b[0], high = b[4];
#pragma unroll
        for (int tile = 0; tile < kStepTiles; ++tile) {
          const uint4 a = ldmatrix_x4_transposed(slot + (fragment ^ (tile * 32)));
          Half<T>::mma(sums[tile / 2][tile % 2], {a.x, a.y, a.z, a.w}, low, high);
        }
        item += kStageFeatures;
      } while (item < num_features);
      if (step_first >= num_keys) break;
      const auto scale = [&] {
        return taken.scale(sums, block.scales[2 * t], block.scales[2 * t + 1], step_first, num_keys, g);
      };
      float2 max = scale();
      if (__any_sync(0xffffffffu, max.x != max.x || max.y != max.y)) {
        take_apart(sums, block, step_first, lane);
        max = scale();
      }
      taken.take(p, sums, max, step_first, g, t);
      step_first += num_warps * kFeatureStepKeys;
    } while (step_first < num_keys);
    taken.finish(memory.shared->warp_state[buffer][part], g, t);

    // Before the block is said to be scored: the buffer's next user may come any time after.
    if (!in_next(turn)) enter_next(memory, turn, next_part, lane);
    part = next_part;
    mbarrier_arrive(&memory.shared->scored[buffer]);
  }
  cp_async_wait<0>();
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__((kFirstScoreWarp + max_score_warps(HEAD_DIM)) * 32, 1)
    persistent_bernoulli_kernel(const __grid_constant__ BernoulliParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  FeatureScores<T, HEAD_DIM> scores(p);
  play_roles<T, T, HEAD_DIM>(p.decode, shared_bytes, scores);
}

template <typename T, int HEAD_DIM>
void launch_persistent_bernoulli(const BernoulliParams& p, cudaStream_t stream) {
  const int shared_bytes = persistent_shared_bytes(p.decode, feature_score_warps(p.decode));
  launch_persistent_kernel(persistent_bernoulli_kernel<T, HEAD_DIM>, p, p.decode, shared_bytes, stream);
}

}  // namespace santa::cuda
