// Sampled rows with Bernoulli scores: the persistent kernel of decode/persistent.cuh with score warps that take keys by
// features.
//
// A score warp takes 128 keys of the block at a time, in stages of 16 features: those that any head of the group drew
// are copied to a ring in shared memory, 256 contiguous bytes each, and zeros take the place of the others, which cost
// no traffic. Stages without any are passed over. A stage is one matrix product with the counts, which are whole
// numbers in q's dtype; what is copied runs ahead of what is added, from step to step and into the next block.
//
// A feature has its place in the products whether or not it is drawn, so a head's sums are the same bits whatever the
// other heads draw. But a product with a count of zero lets NaN and infinity through: where a step's sums are not all
// finite it is done over, see take_apart.
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
constexpr int kStagesAhead = kFeatureStages - 1;

// A block's keys and what was drawn for its group, in shared memory; counts [kPersistentHeads, count_pitch] follow.
struct FeatureList {
  const void* keys;  // the first one, feature 0
  int num_keys;      // 0: there is no block
  uint32_t stages;   // bit s: one of features 16 s to 16 s + 15 was drawn
  uint16_t bits[kMaxHeadDim / kStageFeatures];
  int aligned;  // whether keys can be copied by 16 bytes
  float scales[kPersistentHeads];
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
  __device__ void look_ahead(const PersistentMemory& memory, int n, bool has_block, const Block& block, int lane) const;
  __device__ void score_blocks(const PersistentMemory& memory);

 private:
  // What is copied next: stages `stages` of the step that begins at key `first` of the block.
  uint32_t stages = 0;
  int first = 0;
  bool in_next = false;  // the block is the one after that which is scored
  int copied = 0;        // stages so far
  const T* source;       // the lane's keys of the step, of the first feature that it copies in a stage
  int source_bytes;      // of 16, that are there

  static __device__ FeatureList& list(const PersistentMemory& memory, int n) {
    return *reinterpret_cast<FeatureList*>(memory.rings + n % kListPlaces * list_bytes(HEAD_DIM));
  }
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
  __device__ void enter_step(const T* keys, int num_keys, int lane);
  __device__ void copy_stage(uint32_t slot, int stage, uint32_t bits, bool aligned, int lane) const;
  __device__ void enter_next(const PersistentMemory& memory, int n, int next_part, int lane);
  __device__ void copy_next(const PersistentMemory& memory, int n, int next_part, uint32_t ring, int lane);
  __device__ void take_apart(float (&sums)[kStepTiles / 2][2][4], FeatureList& block, int step_first, int lane) const;
};

// By one warp.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::fetch_list(FeatureList& list, const Block& block,
                                                                       int lane) const {
  const int64_t group = p.group_index(block.batch_index, block.kv_head);
  const uint32_t word = lane < HEAD_DIM / 32 ? params.feature_bits[group * (HEAD_DIM / 32) + lane] : 0;
  const auto* from = reinterpret_cast<const uint4*>(params.half_counts + group * kPersistentHeads * HEAD_DIM);
  constexpr int kChunks = HEAD_DIM / 8;
#pragma unroll 4
  for (int i = lane; i < kPersistentHeads * kChunks; i += 32) {
    *reinterpret_cast<uint4*>(counts(list) + i / kChunks * count_pitch(HEAD_DIM) + i % kChunks * 8) = from[i];
  }
  if (lane < kPersistentHeads) {
    list.scales[lane] = lane < p.gqa_group_size ? params.scales[group * p.gqa_group_size + lane] : 0.0f;
  }
  const uint32_t low = __ballot_sync(0xffffffffu, (word & 0xffffu) != 0);
  const uint32_t high = __ballot_sync(0xffffffffu, (word >> 16) != 0);
  if (lane < HEAD_DIM / 32) {
    list.bits[2 * lane] = static_cast<uint16_t>(word);
    list.bits[2 * lane + 1] = static_cast<uint16_t>(word >> 16);
  }
  if (lane == 0) {
    uint32_t stages = 0;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; ++i) stages |= ((low >> i & 1) | (high >> i & 1) << 1) << (2 * i);
    list.keys = first_key(block);
    list.num_keys = block.num_keys();
    list.stages = stages;
    list.aligned = keys_aligned(block);
  }
}

// A lane copies 8 keys of every other feature.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::enter_step(const T* keys, int num_keys, int lane) {
  const int key = first + lane % 16 * kThreadKeys, there = min(max(num_keys - key, 0), kThreadKeys);
  source = keys + (there > 0 ? key : 0) + lane / 16 * params.stride_k_feature;
  source_bytes = there * static_cast<int>(sizeof(T));
}

// Chunk c of feature f lies at c ^ (f % 8), so that ldmatrix, which reads one chunk of 8 features, is free of
// conflicts.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::copy_stage(uint32_t slot, int stage, uint32_t bits,
                                                                       bool aligned, int lane) const {
  const uint64_t policy = evict_first_policy();
  const int half = lane / 16;
  const uint32_t place = slot + half * kFeatureBytes + (lane % 16 ^ half) * 16;
  const T* from = source + stage * kStageFeatures * params.stride_k_feature;
  bits >>= half;
  const auto place_of = [&](int u) { return (place ^ (2 * u % 8 * 16)) + 2 * u * kFeatureBytes; };
  if (aligned) {
#pragma unroll
    for (int u = 0; u < kStageFeatures / 2; ++u, from += 2 * params.stride_k_feature) {
      cp_async_up_to_16(place_of(u), from, (bits >> (2 * u) & 1) != 0 ? source_bytes : 0, policy);
    }
  } else {
#pragma unroll 1
    for (int u = 0; u < kStageFeatures / 2; ++u, from += 2 * params.stride_k_feature) {
      const int bytes = (bits >> (2 * u) & 1) != 0 ? source_bytes : 0;
      load_some_keys(place_of(u), from, bytes / static_cast<int>(sizeof(T)), false, policy);
    }
  }
}

// The first keys are on their way before anything else, as far as they belong to the warp's part of the first block.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::start(const PersistentMemory& memory) {
  const int warp = (threadIdx.x >> 5) - kFirstScoreWarp, lane = threadIdx.x & 31;
  Block block{};
  if (BlockQueue(p, lane).find(blockIdx.x, block)) {
    const uint32_t* words = params.feature_bits + p.group_index(block.batch_index, block.kv_head) * (HEAD_DIM / 32);
    const int num_keys = block.num_keys();
    first = warp * kFeatureStepKeys;
    enter_step(first_key(block), num_keys, lane);
#pragma unroll 1
    for (int stage = 0; stage < HEAD_DIM / kStageFeatures && first < num_keys; ++stage) {
      const uint32_t bits = words[stage / 2] >> (stage % 2 * 16) & 0xffff;
      if (bits == 0) continue;
      if (copied < kStagesAhead) {
        copy_stage(ring(memory, warp) + copied * kStageBytes, stage, bits, keys_aligned(block), lane);
        cp_async_commit();
        ++copied;
      } else {
        stages |= 1u << stage;
      }
    }
    if (warp == 0) fetch_list(list(memory, 0), block, lane);
  } else if (warp == 0 && lane == 0) {
    list(memory, 0).num_keys = 0;
  }
  for (int i = copied; i < kStagesAhead; ++i) cp_async_commit();
}

// In round n: the list of the block after it. The place held the list of block n - 1, which is scored.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::look_ahead(const PersistentMemory& memory, int n,
                                                                       bool has_block, const Block& block,
                                                                       int lane) const {
  FeatureList& next = list(memory, n + 1);
  if (has_block) {
    fetch_list(next, block, lane);
  } else if (lane == 0) {
    next.num_keys = 0;
  }
}

// What is copied next is the first step of the block after block n, if there is one and the part has a step in it.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::enter_next(const PersistentMemory& memory, int n,
                                                                       int next_part, int lane) {
  mbarrier_wait(&memory.shared->looked_ahead[n % p.persistent.num_buffers], n / p.persistent.num_buffers & 1);
  const FeatureList& next = list(memory, n + 1);
  in_next = true;
  first = next_part * kFeatureStepKeys;
  stages = first < next.num_keys ? next.stages : 0;
  if (stages != 0) enter_step(static_cast<const T*>(next.keys), next.num_keys, lane);
}

// Starts the copies of the next stage, be it of the block after block n; of none if that is as far as one can see.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void FeatureScores<T, HEAD_DIM>::copy_next(const PersistentMemory& memory, int n,
                                                                      int next_part, uint32_t ring, int lane) {
  while (stages == 0) {
    const FeatureList& from = list(memory, in_next ? n + 1 : n);
    const int next_step = first + p.persistent.num_score_warps * kFeatureStepKeys;
    if (next_step < from.num_keys && from.stages != 0) {
      first = next_step;
      stages = from.stages;
      enter_step(static_cast<const T*>(from.keys), from.num_keys, lane);
    } else if (!in_next) {
      enter_next(memory, n, next_part, lane);
    } else {
      break;
    }
  }
  if (stages != 0) {
    const FeatureList& from = list(memory, in_next ? n + 1 : n);
    const int stage = __ffs(stages) - 1;
    copy_stage(ring + copied % kFeatureStages * kStageBytes, stage, from.bits[stage], from.aligned != 0, lane);
    stages &= stages - 1;
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
  const auto key_at = [&](int key, int feature) -> uint16_t {
    const bool read =
        key < block.num_keys && (block.bits[feature / kStageFeatures] >> feature % kStageFeatures & 1) != 0;
    return read ? keys[key + feature * params.stride_k_feature] : 0;
  };
#pragma unroll 1
  for (int tile = 0; tile < kStepTiles; ++tile) {
    const int key = step_first + tile * 16 + g;
    float redone[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (uint32_t left = block.stages; left != 0; left &= left - 1) {
      const int feature = (__ffs(left) - 1) * kStageFeatures + 2 * t;
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // key or key + 8, features or features + 8
        const uint16_t low = key_at(key + i % 2 * 8, feature + i / 2 * 8);
        const uint16_t high = key_at(key + i % 2 * 8, feature + i / 2 * 8 + 1);
        a[i] = (is_finite_half<T>(low) ? low : 0u) | (is_finite_half<T>(high) ? high : 0u) << 16;
      }
      const auto* b = reinterpret_cast<const uint32_t*>(own_counts + g * count_pitch(HEAD_DIM) + feature);
      Half<T>::mma(redone, a, b[0], b[4]);
    }
#pragma unroll 1
    for (int feature = 0; feature < HEAD_DIM; ++feature) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint16_t bits = key_at(key + i / 2 * 8, feature);
        const uint16_t count = own_counts[(2 * t + i % 2) * count_pitch(HEAD_DIM) + feature];
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
  // Of a lane: the feature and, at the first product, the chunk that it names to ldmatrix.
  const int feature = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
  const uint32_t fragment = feature * kFeatureBytes + (chunk ^ feature % 8) * 16;
  int part = warp;  // of the steps of a block, as in KeyScores
  int added = 0;    // stages so far

  for (int n = 0; list(memory, n).num_keys > 0; ++n) {
    const int buffer = n % p.persistent.num_buffers, use = n / p.persistent.num_buffers;
    FeatureList& block = list(memory, n);
    const int num_keys = block.num_keys;
    const int turned = (part - ceil_div_int(num_keys, kFeatureStepKeys)) % num_warps;
    const int next_part = turned < 0 ? turned + num_warps : turned;
    // Makes up for stages that could not be copied while the block after this one was out of sight. A call is a group
    // of copies, be it an empty one: when a stage is added, kStagesAhead - 1 groups at least have followed its own.
#pragma unroll 1
    for (int missing = kStagesAhead - (copied - added); missing > 0; --missing) {
      copy_next(memory, n, next_part, slots, lane);
    }
    if (use > 0) mbarrier_wait(&memory.shared->released[buffer], (use - 1) & 1);
    TakenScores taken(p, memory.buffer(p, buffer), t);

#pragma unroll 1
    for (int step_first = part * kFeatureStepKeys; step_first < num_keys; step_first += num_warps * kFeatureStepKeys) {
      float sums[kStepTiles / 2][2][4] = {};  // pairs of products, as they are taken
#pragma unroll 1
      for (uint32_t left = block.stages; left != 0; left &= left - 1) {
        cp_async_wait<kStagesAhead - 1>();
        __syncwarp();  // the other lanes' copies are visible, and they are done with the slot filled next
        const uint32_t slot = slots + added % kFeatureStages * kStageBytes;
        copy_next(memory, n, next_part, slots, lane);
        ++added;
        const auto* b = reinterpret_cast<const uint32_t*>(counts(block) + g * count_pitch(HEAD_DIM) +
                                                          (__ffs(left) - 1) * kStageFeatures + 2 * t);
        const uint32_t low = b[0], high = b[4];
#pragma unroll
        for (int tile = 0; tile < kStepTiles; ++tile) {
          const uint4 a = ldmatrix_x4_transposed(slot + (fragment ^ (tile * 32)));
          Half<T>::mma(sums[tile / 2][tile % 2], {a.x, a.y, a.z, a.w}, low, high);
        }
      }
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kStepTiles * 4; ++i) largest += fabsf(sums[i / 8][i / 4 % 2][i % 4]) * 0x1p-6f;
      if (__any_sync(0xffffffffu, !is_finite(largest))) take_apart(sums, block, step_first, lane);
#pragma unroll
      for (int pair = 0; pair < kStepTiles / 2; ++pair) {
        taken.take(p, sums[pair], block.scales[2 * t], block.scales[2 * t + 1], step_first + pair * 32, num_keys, g, t);
      }
    }
    taken.finish(memory.shared->warp_state[buffer][part], g, t);

    // Before the block is said to be scored: the buffer's next user may come any time after.
    if (!in_next) enter_next(memory, n, next_part, lane);
    in_next = false;
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
