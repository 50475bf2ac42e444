// Sampled rows in one kernel that keeps the scores on chip. One CTA per multiprocessor walks the blocks of all rows
// (queue.cuh). Its warps have four roles, so that keys keep streaming while blocks are drawn from:
//
//   score warps   stream the keys of a block through rings of shared-memory slots that run on across blocks, and leave
//                 scores and softmax states in one of the buffers;
//   a state warp  finds the blocks for all, merges the score warps' states and publishes the block's, for other CTAs
//                 and for the two roles below; counts finished blocks, and says which rows are complete;
//   a plan warp   waits for the states of all blocks of the row and finds the block's place in level 1 of the CDF;
//   select warps  weigh the block's rows (level 2), draw, read rows of V, and write the block's share of the estimate.
//                 One CTA adds up the shares of a (batch row, KV head), in block order: see count_block.
//
// Every sum has an order that depends on the row alone: which CTA does what, and when, changes no bit.
//
// CTAs wait for each other, so all of them have to be resident: the launch is cooperative.
#pragma once

#include "core/mixture.h"
#include "cuda/decode/float8_keys.cuh"
#include "cuda/decode/gather.cuh"
#include "cuda/decode/heuristics.h"
#include "cuda/decode/queue.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

constexpr int kSelectThreads = kSelectWarps * 32;
constexpr int kPlanWarp = kSelectWarps;
constexpr int kStateWarp = kPlanWarp + 1;
constexpr int kFirstScoreWarp = kStateWarp + 1;
static_assert(kStepKeys % 32 == 0 && kStepCodedKeys % 32 == 0 && kMinBlockKv % kStepCodedKeys == 0,
              "a step is pairs of matrix products, and ends inside the block");
static_assert(kPersistentHeads == kHeadBlock, "the N of the matrix product");
constexpr int kMaxBuffers = 3;
constexpr int kMaxPending = 16;  // a power of two, and more than the blocks that CTAs can be apart: see take_oldest
constexpr int kStatesKept = 8;   // rounds of the plan warp
constexpr int kRoundsAhead = 2;  // whose loads are in flight together; more were slower, polling is traffic

// Level 1 of the CDF, as far as one block and stream need it.
struct StreamPlan {
  TilePositions positions;
  uint32_t first_draw, last_draw;
  float expected_draws;  // R times the block's share of the mass
  Draws draws;
};

struct BlockPlan {
  float row_lse[kHeadBlock];
  float segment_lse[kHeadBlock];
  StreamPlan stream[kHeadBlock];
};

// What it takes to count a finished block, and to add up its row's. With num_blocks 0: there is none.
struct FinishedBlock {
  int batch_index, kv_head, num_blocks;
  uint32_t defined;  // bit h: head h has a finite log-sum-exp. A NaN or an infinite score leaves the output undefined
};

// Rows that a CTA has yet to add up, oldest first: a ring. Of one thread: of the state warp, from the last block on of
// the select warps.
struct PendingRows {
  FinishedBlock rows[kMaxPending];
  int first, count;
};

// Block n of a CTA: its buffer, and the parity of this use of the buffer, by which barriers are waited for. (That of
// the use before is the other one; before the first use there is nothing to wait for.)
struct Turn {
  int n = 0, buffer = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int num_buffers) {
    ++n;
    if (++buffer == num_buffers) buffer = 0, parity ^= 1;
  }
  // n modulo twice the number of buffers.
  __device__ __forceinline__ int place(int num_buffers) const { return parity == 0 ? buffer : buffer + num_buffers; }
};

// What the score warps have to know of a block.
struct BlockKeys {
  const void* keys;   // the first one
  const void* query;  // the first head
  int num_keys;       // 0: there is no block
  float score_scale;
};

struct PersistentShared {
  // Barriers, one per buffer and hand-over. Whoever has written arrives, every lane, and whoever reads waits, even
  // where a chain of other barriers would do: racecheck follows no chains.
  uint64_t started[kMaxBuffers];       // block is there
  uint64_t looked_ahead[kMaxBuffers];  // next and is_final are
  uint64_t scored[kMaxBuffers];        // scores and warp_state are
  uint64_t published[kMaxBuffers];     // state is
  uint64_t lse_known[kMaxBuffers];
  uint64_t planned[kMaxBuffers];
  uint64_t released[kMaxBuffers];  // all other roles are done with the block, its buffer and what goes with it
  uint64_t handed_over;            // pending is the select warps', all blocks before the last one are counted

  Block block[kMaxBuffers];     // with num_blocks 0: there is none
  BlockKeys next[kMaxBuffers];  // of the block after it
  bool is_final[kMaxBuffers];   // no block comes after it
  SoftmaxState warp_state[kMaxBuffers][kMaxScoreWarps][kHeadBlock];
  SoftmaxState state[kMaxBuffers][kHeadBlock];  // of the block
  BlockPlan plan[kMaxBuffers];
  SoftmaxState states_kept[kStatesKept][32];  // of the row's blocks; the plan warp's own
  uint32_t part_weight[kSelectWarps];
  uint32_t read_mask[kMaxBlockKv / 32];
  uint8_t order[kSelectWarps][32];
  float4 partial[kSelectThreads];  // of combine_blocks
  // By the turn, modulo twice the number of buffers: a place is read for as long as the buffer, and then some.
  FinishedBlock finished[2 * kMaxBuffers];  // the block, to be counted when it is released
  FinishedBlock complete[2 * kMaxBuffers];  // rows to add up after the block; comes with published
  FinishedBlock last_complete;              // after the last block
  PendingRows pending;
};

// Dynamic shared memory: PersistentShared, the score buffers, cumulative weights (grouped), what belongs to the score
// warps: rings, and before them whatever else these have (ScoreWarps in heuristics.h).
//
// A buffer holds planes of float2, a plane per pair of heads: [pair][key], keys permuted (key_place). The pitch of a
// plane shifts it by half the banks, so that the lanes of two pairs write side by side. When the block's rows are read,
// the warps' partial outputs take the buffer's place.
struct PersistentMemory {
  PersistentShared* shared;
  unsigned char* buffers;
  uint32_t* cumulative;
  unsigned char* rings;

  __device__ PersistentMemory(const DecodeParams& p, unsigned char* bytes) {
    shared = reinterpret_cast<PersistentShared*>(bytes);
    static_assert(sizeof(PersistentShared) <= kPersistentSharedBytes, "heuristics.h has to know of it");
    buffers = bytes + kPersistentSharedBytes;
    unsigned char* end = buffers + p.persistent.num_buffers * p.persistent.buffer_bytes;
    cumulative = reinterpret_cast<uint32_t*>(end);
    rings = end + (p.sampler == Sampler::kGrouped ? p.persistent.plane_pitch * 4 : 0);
  }
  __device__ unsigned char* buffer(const DecodeParams& p, int index) const {
    return buffers + index * p.persistent.buffer_bytes;
  }
};

// Keys are written 8 neighbours at a time and read by lanes that own 8 neighbours each; in this order both are free of
// bank conflicts.
__device__ __forceinline__ int key_place(int key) { return key ^ ((key >> 3) & 15); }

// The state warp sets up the barriers in shared memory; the roles below it in the CTA and those above wait for it, each
// by a barrier of its own. `barrier.sync` may be met from different places, `bar.sync` may not: synccheck sees to it.
__device__ __forceinline__ void setup_barrier_below() { asm volatile("barrier.sync 2, 320;" ::: "memory"); }
__device__ __forceinline__ void setup_barrier_above(int num_score_warps) {
  asm volatile("barrier.sync 3, %0;" ::"r"((num_score_warps + 1) * 32) : "memory");
}
__device__ __forceinline__ void set_up(int num_score_warps) {
  asm volatile("barrier.arrive 2, 320;" ::: "memory");
  asm volatile("barrier.arrive 3, %0;" ::"r"((num_score_warps + 1) * 32) : "memory");
}
static_assert(kFirstScoreWarp * 32 == 320, "setup_barrier_below has the number");
__device__ __forceinline__ void select_barrier() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
static_assert(kSelectThreads == 256, "select_barrier has the number");

// What to subtract before exp2: scores of -inf weigh 0 even if there is nothing larger.
__device__ __forceinline__ float finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ int first_power_of_2(int n) { return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : 8; }

// ---- score warps

// The lane and the thread, unknown to the compiler: what is computed from them is not kept for later, for want of
// registers.
__device__ __forceinline__ int fresh_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// What a score warp takes at a time.
template <typename K, int HEAD_DIM>
struct StepShape {
  static constexpr int kKeys = step_keys(sizeof(K));
  static constexpr uint32_t kBytes = step_bytes(HEAD_DIM, sizeof(K));
};

// First key of a block.
template <typename K>
__device__ __forceinline__ const K* keys_of(const DecodeParams& p, const Block& block) {
  return make_strided_view<K>(p.k, block.batch_index, block.kv_head,
                              block.kv_start + static_cast<int64_t>(block.index) * block.block_kv, p.stride_k_batch,
                              p.stride_k_token, p.stride_k_head)
      .base;
}

// Starts the copy of a step's rows, of which the first num_rows are there; zeros for the others, which are not read.
template <typename K, int HEAD_DIM>
__device__ __forceinline__ void load_step(uint32_t slot, const K* rows, int64_t stride, int num_rows, bool aligned,
                                          int lane) {
  constexpr int kKeys = StepShape<K, HEAD_DIM>::kKeys, kChunkElements = 16 / sizeof(K);
  constexpr int kChunks = HEAD_DIM / kChunkElements, kCopies = kKeys * kChunks / 32;
  const auto offset_of = [](int row, int chunk) {
    if constexpr (std::is_same_v<K, Float8>) {
      return code_offset<HEAD_DIM>(row, chunk);
    } else {
      return chunk_offset<HEAD_DIM>(row, chunk);
    }
  };
  const uint64_t policy = evict_first_policy();
  if (!aligned) {
    if constexpr (std::is_same_v<K, Float8>) {
#pragma unroll 1
      for (int item = lane; item < kKeys * HEAD_DIM; item += 32) {
        const int row = item / HEAD_DIM, column = item % HEAD_DIM;
        store_shared_1(slot + offset_of(row, column / 16) + column % 16,
                       row < num_rows ? rows[row * stride + column].code : 0);
      }
      return;
    }
    const StridedKvView<K> view = {rows, stride};
    constexpr uint32_t kHalfBytes = sizeof(typename TileShared<HEAD_DIM>::Slot);
    for (int half = 0; half < 2; ++half) {
      load_slot<K, HEAD_DIM>(slot + half * kHalfBytes, view, half * kSlotRows, num_rows, false, policy, lane);
    }
  } else if (std::is_same_v<K, Float8> && num_rows >= kKeys) {
    // A pattern of rows and chunks that repeats every kPeriod copies, kPeriodRows further on.
    constexpr int kPeriod = kChunks % 3 == 0 ? 3 : 1, kPeriodRows = 32 * kPeriod / kChunks;
#pragma unroll
    for (int u = 0; u < kPeriod; ++u) {
      const int item = u * 32 + lane, row = item / kChunks, chunk = item % kChunks;
      const K* source = rows + row * stride + chunk * kChunkElements;
#pragma unroll
      for (int i = 0; i < kCopies / kPeriod; ++i, source += kPeriodRows * stride) {
        cp_async_16(slot + offset_of(row + i * kPeriodRows, chunk), source, true, policy);
      }
    }
  } else if (num_rows >= kKeys) {
#pragma unroll(HEAD_DIM > 192 ? 2 : 8)
    for (int i = 0; i < kCopies; ++i) {
      const int item = i * 32 + lane, row = item / kChunks, chunk = item % kChunks;
      cp_async_16(slot + offset_of(row, chunk), rows + row * stride + chunk * kChunkElements, true, policy);
    }
  } else {
#pragma unroll 2
    for (int i = 0; i < kCopies; ++i) {
      const int item = i * 32 + lane, row = item / kChunks, chunk = item % kChunks;
      const bool valid = row < num_rows;
      cp_async_16(slot + offset_of(row, chunk), rows + (valid ? row : 0) * stride + chunk * kChunkElements, valid,
                  policy);
    }
  }
}

// First query head of a block.
template <typename T>
__device__ __forceinline__ const T* query_of(const DecodeParams& p, const Block& block) {
  return static_cast<const T*>(p.q) + block.batch_index * p.stride_q_batch +
         static_cast<int64_t>(block.kv_head) * p.gqa_group_size * p.stride_q_head;
}

template <typename T, typename K>
__device__ __forceinline__ BlockKeys block_keys_of(const DecodeParams& p, const Block& block) {
  return {keys_of<K>(p, block), query_of<T>(p, block), block.num_keys(), score_scale_of<K>(p, block.kv_head)};
}

// Raw scores of the 16 keys of a step that begin at `rows`.
template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void score_keys(float (&scores)[4], uint32_t rows, const QueryFragments<T, HEAD_DIM>& query,
                                           int lane) {
  if constexpr (std::is_same_v<K, Float8>) {
    score_codes<T, HEAD_DIM>(scores, rows, query, lane);
  } else {
    score_slot<T, HEAD_DIM>(scores, rows, query, lane);
  }
}

// Where a score warp leaves what it scores of a block, as matrix products have it: lane (g, t) holds two heads, 2 t and
// the next.
struct TakenScores {
  float2* plane;
  float running_max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};

  __device__ TakenScores(const DecodeParams& p, unsigned char* buffer, int t)
      : plane(reinterpret_cast<float2*>(buffer) + t * p.persistent.plane_pitch) {}

  // Raw scores of 32 PAIRS keys from `key` on, [pair][half][key g, both heads; key g + 8, both heads], times the heads'
  // scales; -infinity past the last key. Returns the largest of the lane by head, NaN if there is one.
  template <int PAIRS>
  static __device__ __forceinline__ float2 scale(float (&scores)[PAIRS][2][4], float scale_0, float scale_1, int key,
                                                 int num_keys, int g) {
#pragma unroll
    for (int i = 0; i < 8 * PAIRS; ++i) scores[i >> 3][i >> 2 & 1][i & 3] *= (i & 1) == 0 ? scale_0 : scale_1;
    if (key + 32 * PAIRS > num_keys) {
#pragma unroll
      for (int i = 0; i < 8 * PAIRS; ++i) {
        if (key + (i >> 1) * 8 + g >= num_keys) scores[i >> 3][i >> 2 & 1][i & 3] = -INFINITY;
      }
    }
    float max[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        const float (&own)[2][4] = scores[pair];
        const float pair_max = max_or_nan(max_or_nan(own[0][j], own[0][2 + j]), max_or_nan(own[1][j], own[1][2 + j]));
        max[j] = pair == 0 ? pair_max : max_or_nan(max[j], pair_max);
      }
    }
    return {max[0], max[1]};
  }

  // What `scale` leaves.
  template <int PAIRS>
  __device__ __forceinline__ void take(const DecodeParams& p, const float (&scores)[PAIRS][2][4], float2 max, int key,
                                       int g, int t) {
    if (2 * t < p.gqa_group_size) {
#pragma unroll
      for (int i = 0; i < 4 * PAIRS; ++i) {
        const float* both = scores[i >> 2][i >> 1 & 1] + (i & 1) * 2;
        plane[key_place(key + i * 8 + g)] = {both[0], both[1]};
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float new_max = fmaxf(running_max[j], j == 0 ? max.x : max.y), below = finite_max(new_max);
      float step_sum = 0.0f;
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        const float (&own)[2][4] = scores[pair];
        const float pair_sum = (exp2_approx(own[0][j] - below) + exp2_approx(own[0][2 + j] - below)) +
                               (exp2_approx(own[1][j] - below) + exp2_approx(own[1][2 + j] - below));
        step_sum = pair == 0 ? pair_sum : step_sum + pair_sum;
      }
      sum[j] = sum[j] * exp2_approx(running_max[j] - below) + step_sum;
      running_max[j] = new_max;
    }
  }

  // The softmax states of the warp's part, of 8 heads.
  __device__ __forceinline__ void finish(SoftmaxState (&states)[kHeadBlock], int g, int t) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float warp_max = max_over_keys(running_max[j]);
      sum[j] *= exp2_approx(running_max[j] - finite_max(warp_max));
      for (int offset = 4; offset < 32; offset <<= 1) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
      if (g == 0) states[2 * t + j] = {warp_max, sum[j]};
    }
  }
};

// Scores of keys that lie in rows, by matrix products.
//
// How scores come about is a class like this one: all that the other roles see are scores and softmax states in a
// buffer, and what the state warp says of the blocks to come. A thread has one for its whole life.
template <typename T, typename K, int HEAD_DIM>
struct KeyScores {
  // Lanes of the state warp that write in look_ahead.
  static constexpr int kLookAheadLanes = 1;
  // Heads for which select warps add up rows at a time: beyond 128 elements there are no registers for the sums of 8.
  static constexpr int kMostGatherHeads = HEAD_DIM <= 128 ? kHeadBlock : kGatherHeads;
  // Whether a select warp finds its role anew for each block, instead of keeping what follows from it in registers.
  static constexpr bool kRoleAnew = false;

  const DecodeParams& p;
  const K* keys = nullptr;  // of the block that is scored
  int num_keys = 0;
  float score_scale = 0.0f;
  QueryFragments<T, HEAD_DIM> query;

  __device__ explicit KeyScores(const DecodeParams& params) : p(params) {}
  __device__ void start(const PersistentMemory& memory);
  __device__ void look_ahead(const PersistentMemory& memory, const Turn& turn, bool has_block, const Block& block,
                             int lane) const;
  __device__ void score_blocks(const PersistentMemory& memory);

 private:
  static constexpr int kKeys = StepShape<K, HEAD_DIM>::kKeys;
  static constexpr uint32_t kSlotBytes = StepShape<K, HEAD_DIM>::kBytes;

  // Two slots: one in flight while the other is scored. More were slower: what is in flight beyond need makes every
  // load wait longer, those of the select warps among them.
  static __device__ uint32_t first_slot(const PersistentMemory& memory, int score_warp) {
    return shared_address(memory.rings) + score_warp * kScoreSlots * kSlotBytes;
  }
};

// The first keys are on their way before anything else, barriers among it. Blocks to come are found by the state warp:
// that takes most of a microsecond, and few loads would be in flight meanwhile.
template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void KeyScores<T, K, HEAD_DIM>::start(const PersistentMemory& memory) {
  const int warp = (threadIdx.x >> 5) - kFirstScoreWarp;
  Block block{};
  if (BlockQueue(p, threadIdx.x & 31).find(blockIdx.x, block)) {
    const BlockKeys first = block_keys_of<T, K>(p, block);
    keys = static_cast<const K*>(first.keys);
    num_keys = first.num_keys;
    score_scale = first.score_scale;
    const int key = warp * kKeys;
    load_step<K, HEAD_DIM>(first_slot(memory, warp), keys + key * p.stride_k_token, p.stride_k_token, num_keys - key,
                           p.aligned, fresh_lane());
    query.load(static_cast<const T*>(first.query), p.stride_q_head, p.gqa_group_size, p.aligned, fresh_lane());
  }
  cp_async_commit();
}

// Of the block after the turn's.
template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void KeyScores<T, K, HEAD_DIM>::look_ahead(const PersistentMemory& memory, const Turn& turn,
                                                                      bool has_block, const Block& block,
                                                                      int lane) const {
  if (lane == 0) {
    memory.shared->next[turn.buffer] = has_block ? block_keys_of<T, K>(p, block) : BlockKeys{};
  }
}

template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void KeyScores<T, K, HEAD_DIM>::score_blocks(const PersistentMemory& memory) {
  constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  constexpr uint32_t kTileBytes = kSlotBytes / (kKeys / 16);
  constexpr bool kQueryAhead = HEAD_DIM <= 128;  // beyond, there are no registers for the next block's query
  const int warp = (threadIdx.x >> 5) - kFirstScoreWarp, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  uint32_t slot = first_slot(memory, warp), other_slot = slot + kSlotBytes;

  // Which steps of a block: part, part + num_score_warps, ... The steps of all blocks are dealt in turn, so that no
  // warp waits at the end of a block; the part alone, not the warp, decides which keys are summed together.
  int part = warp;

  // A turn scores its block and starts on the keys of the next.
  for (Turn turn; num_keys > 0; turn.advance(p.persistent.num_buffers)) {
    const int buffer = turn.buffer;
    mbarrier_wait(&memory.shared->released[buffer], turn.parity ^ 1);
    BlockKeys next{};
    QueryFragments<T, HEAD_DIM> next_query;
    TakenScores taken(p, memory.buffer(p, buffer), t);

    const int block_steps = ceil_div_int(num_keys, kKeys), turned = (part - block_steps) % p.persistent.num_score_warps;
    const int next_part = turned < 0 ? turned + p.persistent.num_score_warps : turned;
    float head_scale[2];  // of heads 2 t and 2 t + 1
    if (kFloat8) {
      const float query_scale = to_float16(query);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        head_scale[j] = score_scale / kHalvesScale * __shfl_sync(0xffffffffu, query_scale, (2 * t + j) * 4);
      }
    }
    // One at least, for the first keys of the next block.
    const int num_steps = part < block_steps ? ceil_div_int(block_steps - part, p.persistent.num_score_warps) : 1;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      cp_async_wait<0>();
      __syncwarp();  // the other lanes' copies are visible, and they are done with the slot filled next
      const bool wraps = step + 1 == num_steps;
      const K* rows = keys;
      int num_rows = num_keys, first_row = ((step + 1) * p.persistent.num_score_warps + part) * kKeys;
      if (wraps) {
        mbarrier_wait(&memory.shared->looked_ahead[buffer], turn.parity);
        next = memory.shared->next[buffer];
        rows = static_cast<const K*>(next.keys);
        num_rows = next.num_keys;
        first_row = next_part * kKeys;
        if (kQueryAhead && num_rows > 0) {
          next_query.load(static_cast<const T*>(next.query), p.stride_q_head, p.gqa_group_size, p.aligned,
                          fresh_lane());
        }
      }
      if (num_rows > 0) {
        load_step<K, HEAD_DIM>(other_slot, rows + first_row * p.stride_k_token, p.stride_k_token, num_rows - first_row,
                               p.aligned, lane);
      }
      cp_async_commit();

      const int first = (step * p.persistent.num_score_warps + part) * kKeys;
      if (first < num_keys) {
#pragma unroll
        for (int group = 0; group < kKeys / 32; ++group) {
          const uint32_t rows = slot + group * 2 * kTileBytes;
          float scores[1][2][4];
          score_keys<T, K, HEAD_DIM>(scores[0][0], rows, query, lane);
          if (HEAD_DIM > 192) __syncwarp();  // the loads of both tiles at a time take more registers than there are
          score_keys<T, K, HEAD_DIM>(scores[0][1], rows + kTileBytes, query, lane);
          const int key = first + group * 32;
          const float2 max = taken.scale(scores, kFloat8 ? head_scale[0] : p.scale_log2,
                                         kFloat8 ? head_scale[1] : p.scale_log2, key, num_keys, g);
          taken.take(p, scores, max, key, g, t);
        }
      }
      const uint32_t scored_slot = slot;
      slot = other_slot;
      other_slot = scored_slot;
    }

    taken.finish(memory.shared->warp_state[buffer][part], g, t);
    mbarrier_arrive(&memory.shared->scored[buffer]);
    keys = static_cast<const K*>(next.keys);
    num_keys = next.num_keys;
    part = next_part;
    score_scale = next.score_scale;
    if (kQueryAhead) {
      query = next_query;
    } else if (num_keys > 0) {
      query.load(static_cast<const T*>(next.query), p.stride_q_head, p.gqa_group_size, p.aligned, fresh_lane());
    }
  }
  cp_async_wait<0>();
}

// ---- state warp

// The state of head lane % 8 over the whole block, in every lane.
__device__ __forceinline__ SoftmaxState merge_warp_states(const SoftmaxState (*states)[kHeadBlock], int num_warps,
                                                          int lane) {
  const int first = lane >> 3, second = first + 4;
  const SoftmaxState a = first < num_warps ? states[first][lane & 7] : empty_softmax_state();
  const SoftmaxState b = second < num_warps ? states[second][lane & 7] : empty_softmax_state();
  static_assert(kMaxScoreWarps <= 8, "two states per lane");
  float max = fmaxf(a.max, b.max);
  max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 8));
  max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 16));
  const float below = finite_max(max);
  float sum = a.sum * exp2_approx(a.max - below) + b.sum * exp2_approx(b.max - below);
  sum += __shfl_xor_sync(0xffffffffu, sum, 8);
  sum += __shfl_xor_sync(0xffffffffu, sum, 16);
  return {max, sum};
}

__device__ __forceinline__ uint64_t bits_of(SoftmaxState state) {
  return static_cast<uint64_t>(__float_as_uint(state.sum)) << 32 | __float_as_uint(state.max);
}
__device__ __forceinline__ ulonglong2 sealed(uint64_t bits, uint64_t seal) { return {bits, bits ^ seal}; }
__device__ __forceinline__ SoftmaxState state_of(uint64_t bits) {
  return {__uint_as_float(static_cast<uint32_t>(bits)), __uint_as_float(static_cast<uint32_t>(bits >> 32))};
}

// Which CTA adds up a row: the first to finish one of its blocks and have another to go on with. It is ahead of the
// others and will wait for them anyway, so it looks after each of its blocks whether the row is complete by now. The
// CTA that finishes last would stay last, and hold up all that wait for its scores. If nobody has another block, nobody
// has to be spared: the last one does it, at once.
//
// The state warp counts a block when it is released, and finds what is complete: a count is answered after most of a
// microsecond, for which the select warps need not wait. They count the CTA's last block alone.
//
// A row's counter: its finished blocks, and from bit 16 on those of CTAs that went on.
__device__ __forceinline__ uint32_t* counter_of(const DecodeParams& p, const FinishedBlock& row) {
  return p.finished + p.group_index(row.batch_index, row.kv_head);
}

__device__ __forceinline__ void push(PendingRows& pending, const FinishedBlock& row) {
  pending.rows[(pending.first + pending.count++) % kMaxPending] = row;
}

// Takes the oldest row off the ring if it is complete. Acquires what other CTAs have written.
__device__ __forceinline__ FinishedBlock take_oldest(const DecodeParams& p, PendingRows& pending) {
  if (pending.count == 0) return {};
  const FinishedBlock row = pending.rows[pending.first];
  // CTAs are a few blocks apart at most, so the ring is never full, and if it was, what its oldest row lacks would not
  // depend on this CTA.
  do {
    if ((load_acquire(counter_of(p, row)) & 0xffff) == static_cast<uint32_t>(row.num_blocks)) {
      pending.first = (pending.first + 1) % kMaxPending;
      --pending.count;
      return row;
    }
  } while (pending.count == kMaxPending);
  return {};
}

// Counts a block. Its row, if this CTA is to add it up, is returned if it is complete and pending otherwise. Releases
// what the CTA has written, acquires what others have.
__device__ __forceinline__ FinishedBlock count_block(const DecodeParams& p, PendingRows& pending,
                                                     const FinishedBlock& block, bool is_final) {
  const uint32_t before = add_acq_rel(counter_of(p, block), is_final ? 1 : 0x10001);
  const bool is_last = (before & 0xffff) + 1 == static_cast<uint32_t>(block.num_blocks), is_own = before >> 16 == 0;
  if (is_own && is_last) return block;
  if (is_own && !is_final) push(pending, block);
  return {};
}

template <typename Scores>
__device__ __forceinline__ void publish_states(const DecodeParams& p, const PersistentMemory& memory,
                                               const Scores& scores) {
  PersistentShared& shared = *memory.shared;
  const int lane = threadIdx.x & 31;
  BlockQueue queue(p, lane);
  Block block{};
  bool has_block = queue.find(blockIdx.x, block);
  const int num_buffers = p.persistent.num_buffers;
  if (!has_block && lane == 0) {  // a CTA without any block says so in the place of its first
    shared.block[0] = Block{};
    mbarrier_arrive(&shared.started[0]);
  }
  if (lane == 0) shared.pending.first = shared.pending.count = 0;
  Turn counted;  // the next block to count
  for (Turn turn; has_block; turn.advance(num_buffers)) {
    const int buffer = turn.buffer;
    mbarrier_wait(&shared.released[buffer], turn.parity ^ 1);
    if (lane == 0) {
      shared.block[buffer] = block;
      mbarrier_arrive(&shared.started[buffer]);
    }
    const int64_t group = p.group_index(block.batch_index, block.kv_head);
    uint64_t* const address = p.block_state + ((group * p.max_blocks + block.index) * p.gqa_group_size + lane) * 2;
    if (block.index == 0) {  // nobody counts before having seen the states, this block's among them
      if (lane == 0) p.finished[group] = 0;
      __syncwarp();
      __threadfence();
    }

    block = Block{};
    has_block = queue.find(blockIdx.x + (turn.n + 1) * gridDim.x, block);
    scores.look_ahead(memory, turn, has_block, block, lane);
    if (lane == 0) shared.is_final[buffer] = !has_block;
    if (lane < Scores::kLookAheadLanes) mbarrier_arrive(&shared.looked_ahead[buffer]);

    // Blocks are counted as soon as they are finished, while this one is scored. Those that had the buffer have to be.
    FinishedBlock complete{};
    while (counted.n < turn.n) {
      const bool finished = mbarrier_test(&shared.released[counted.buffer], counted.parity);
      if (__all_sync(0xffffffffu, finished)) {
        if (lane == 0) {
          const FinishedBlock row = count_block(p, shared.pending, shared.finished[counted.place(num_buffers)], false);
          if (complete.num_blocks > 0) {
            if (row.num_blocks > 0) push(shared.pending, row);
          } else {
            complete = row.num_blocks > 0 ? row : take_oldest(p, shared.pending);
          }
        }
        counted.advance(num_buffers);
      } else if (__any_sync(0xffffffffu, mbarrier_test(&shared.scored[buffer], turn.parity))) {
        break;
      }
    }
    mbarrier_wait(&shared.scored[buffer], turn.parity);
    const SoftmaxState state = merge_warp_states(shared.warp_state[buffer], p.persistent.num_score_warps, lane);
    if (lane < p.gqa_group_size) store_relaxed(address, sealed(bits_of(state), p.seal));
    if (lane < kHeadBlock) shared.state[buffer][lane] = state;
    if (lane == 0) shared.complete[turn.place(num_buffers)] = complete;
    mbarrier_arrive(&shared.published[buffer]);
    mbarrier_arrive(&shared.released[buffer]);
    if (has_block) continue;

    for (; counted.n < turn.n; counted.advance(num_buffers)) {
      mbarrier_wait(&shared.released[counted.buffer], counted.parity);
      if (lane == 0) {
        const FinishedBlock row = count_block(p, shared.pending, shared.finished[counted.place(num_buffers)], false);
        if (row.num_blocks > 0) push(shared.pending, row);
      }
    }
    mbarrier_arrive(&shared.handed_over);
  }
}

// ---- plan warp

__device__ __forceinline__ bool is_sealed(ulonglong2 words, uint64_t seal) { return (words.x ^ words.y) == seal; }

// Lanes hold heads (fastest, `width` of them) and blocks of the row, in rounds of 32 / width blocks.
__device__ __forceinline__ void plan_blocks(const DecodeParams& p, const PersistentMemory& memory) {
  PersistentShared& shared = *memory.shared;
  const int lane = threadIdx.x & 31, group_size = p.gqa_group_size;
  const bool grouped = p.sampler == Sampler::kGrouped;
  const int width = first_power_of_2(group_size), step = 32 / width, head = lane & (width - 1), place = lane / width;
  const bool has_head = head < group_size;
  constexpr unsigned kAll = 0xffffffffu;

  for (Turn turn;; turn.advance(p.persistent.num_buffers)) {
    const int buffer = turn.buffer;
    mbarrier_wait(&shared.started[buffer], turn.parity);
    const Block block = shared.block[buffer];
    if (block.num_blocks == 0) break;
    BlockPlan& plan = shared.plan[buffer];
    const int64_t group = p.group_index(block.batch_index, block.kv_head);
    const uint64_t* const states = p.block_state + group * p.max_blocks * group_size * 2;

    // Known before the block is scored.
    const SegmentPlan segments = plan_segments(block.num_blocks, 1, p.num_samples, p.budget == Budget::kUniform);
    const int segment = segments.num_segments == 1 ? 0 : block.index / segments.tiles_per_segment;
    const int segment_first = segment * segments.tiles_per_segment;
    const int segment_last = min(segment_first + segments.tiles_per_segment, block.num_blocks);
    const uint32_t num_draws = static_cast<uint32_t>(segments.draws) * (grouped ? group_size : 1);
    const auto random = RandomStream::make(p.seed, p.row_seeds != nullptr ? p.row_seeds[block.batch_index] : 0,
                                           block.kv_len, grouped ? block.kv_head : block.kv_head * group_size + head);
    const uint64_t random_bits = random.bits(segment, 0);

    mbarrier_wait(&shared.released[buffer], turn.parity ^ 1);
    mbarrier_wait(&shared.looked_ahead[buffer], turn.parity);
    const bool is_final = shared.is_final[buffer];
    mbarrier_wait(&shared.published[buffer], turn.parity);

    // First pass: the maximum.
    float max = -INFINITY;
#pragma unroll 1
    for (int base = 0; base * step < block.num_blocks; base += kRoundsAhead) {
      ulonglong2 words[kRoundsAhead];
#pragma unroll
      for (int i = 0; i < kRoundsAhead; ++i) {
        const int b = (base + i) * step + place;
        words[i] = sealed(bits_of(empty_softmax_state()), p.seal);
        if (has_head && b < block.num_blocks) words[i] = load_relaxed(states + (b * group_size + head) * 2);
      }
#pragma unroll
      for (int i = 0; i < kRoundsAhead; ++i) {
        if ((base + i) * step >= block.num_blocks) break;
        const int b = (base + i) * step + place;
#pragma unroll 1
        while (!is_sealed(words[i], p.seal)) words[i] = load_relaxed(states + (b * group_size + head) * 2);
        const SoftmaxState state = state_of(words[i].x);
        max = fmaxf(max, state.max);
        if (base + i < kStatesKept) shared.states_kept[base + i][lane] = state;
      }
    }
    __syncwarp();
    for (int offset = width; offset < 32; offset <<= 1) max = fmaxf(max, __shfl_xor_sync(kAll, max, offset));

    // Second pass: every block's part of the sum, relative to it.
    const float below = finite_max(max);
    float row_sum = 0.0f, segment_sum = 0.0f;
    const auto state_at = [&](int round) {
      if (round < kStatesKept) return shared.states_kept[round][lane];
      const int b = round * step + place;
      return has_head && b < block.num_blocks ? state_of(load_relaxed(states + (b * group_size + head) * 2).x)
                                              : empty_softmax_state();
    };
    const auto in_segment = [&](int b) { return b >= segment_first && b < segment_last; };
#pragma unroll 2
    for (int round = 0; round * step < block.num_blocks; ++round) {
      const SoftmaxState state = state_at(round);
      const float part = state.sum * exp2_approx(state.max - below);
      if (round < kStatesKept) shared.states_kept[round][lane].sum = part;
      row_sum += part;
      if (in_segment(round * step + place)) segment_sum += part;
    }
    for (int offset = width; offset < 32; offset <<= 1) {
      row_sum += __shfl_xor_sync(kAll, row_sum, offset);
      segment_sum += __shfl_xor_sync(kAll, segment_sum, offset);
    }
    const float row_lse = log2_sum({max, row_sum}), segment_lse = log2_sum({max, segment_sum});
    if (place == 0 && has_head) {
      plan.row_lse[head] = row_lse;
      plan.segment_lse[head] = segment_lse;
    }
    mbarrier_arrive(&shared.lse_known[buffer]);
    const uint32_t defined = __ballot_sync(kAll, place == 0 && has_head && is_finite(row_lse));
    if (lane == 0) {
      shared.finished[turn.place(p.persistent.num_buffers)] = {block.batch_index, block.kv_head, block.num_blocks,
                                                               defined};
    }

    // Third pass: level 1 of the CDF. A stream's columns of lanes agree on it.
    const float per_sum =
        is_finite(segment_lse) ? __fdividef(1.0f, segment_sum * static_cast<float>(grouped ? group_size : 1)) : 0.0f;
    uint32_t total = 0, start = 0, mass = 0;
#pragma unroll 2
    for (int round = 0; round * step < block.num_blocks; ++round) {
      const SoftmaxState state = state_at(round);
      const float part = round < kStatesKept ? state.sum : state.sum * exp2_approx(state.max - below);
      float share = per_sum > 0.0f ? part * per_sum : 0.0f;
      if (grouped) {
        for (int offset = 1; offset < width; offset <<= 1) share += __shfl_xor_sync(kAll, share, offset);
      }
      const int b = round * step + place;
      const uint32_t block_mass = in_segment(b) ? tile_mass_of(share) : 0;
      total += block_mass;
      if (b < block.index) start += block_mass;
      if (b == block.index) mass = block_mass;
    }
    for (int offset = width; offset < 32; offset <<= 1) {
      total += __shfl_xor_sync(kAll, total, offset);
      start += __shfl_xor_sync(kAll, start, offset);
    }
    mass = __shfl_sync(kAll, mass, block.index % step * width + head);

    const Draws draws = Draws::make(p.sampler, random, segment, num_draws, total, random_bits);
    uint32_t bound = place == 0 ? 0 : num_draws;  // of the draws that can fall into the block: first, last
    if (mass == 0) {
      bound = 0;
    } else if (draws.sorted() && place < 2) {
      bound = draws.count_below(place == 0 ? start : start + mass);
    }
    const uint32_t last_draw = __shfl_down_sync(kAll, bound, width);
    if (place == 0 && (grouped ? head == 0 : has_head)) {
      plan.stream[head] = {TilePositions::make(draws.unit(), start, mass), bound, last_draw,
                           static_cast<float>(num_draws) * approximate_quotient(mass, total), draws};
    }
    mbarrier_arrive(&shared.planned[buffer]);
    // Released with the block: what other CTAs did before they published the row's states. Here, where nobody waits.
    __threadfence();
    mbarrier_arrive(&shared.released[buffer]);
    if (place == 0 && has_head && block.index == 0) {
      p.lse[static_cast<int64_t>(block.batch_index) * p.num_qo_heads + block.kv_head * group_size + head] =
          row_lse * kLn2;
    }
    if (is_final) break;
  }
}

// ---- select warps

// What a select warp does: the draws of one stream fall to `num_parts` warps, and so do the keys that it is drawn from.
struct SelectRole {
  bool grouped;
  int group_size;
  int stream, num_parts, parts_log2, part;
  bool active;  // there is such a stream

  __device__ SelectRole(const DecodeParams& p, int warp) {
    grouped = p.sampler == Sampler::kGrouped;
    group_size = p.gqa_group_size;
    const int num_streams = p.num_streams();  // shifts: a division takes longer than a shared-memory access
    parts_log2 = num_streams <= 1 ? 3 : num_streams <= 2 ? 2 : num_streams <= 4 ? 1 : 0;
    static_assert(kSelectWarps == 8, "their logarithm");
    num_parts = 1 << parts_log2;
    stream = warp >> parts_log2;
    part = warp & (num_parts - 1);
    active = stream < p.num_streams();
  }
};

// The scores and weights of a block, as the select warps use them.
struct BlockScores {
  float2* planes;  // [pair][pitch], permuted by key_place
  int pitch;
  uint32_t* cumulative;  // [pitch], permuted likewise
  int cumulative_stride;
  int part_keys, num_keys;

  __device__ BlockScores(const DecodeParams& p, const PersistentMemory& memory, int buffer, const SelectRole& role,
                         const Block& block) {
    planes = reinterpret_cast<float2*>(memory.buffer(p, buffer));
    pitch = p.persistent.plane_pitch;
    // A single head's scores are not needed once its weights are there.
    cumulative = role.grouped ? memory.cumulative
                              : reinterpret_cast<uint32_t*>(planes + (role.stream >> 1) * pitch) + (role.stream & 1);
    cumulative_stride = role.grouped ? 1 : 2;
    part_keys = block.block_kv >> role.parts_log2;
    num_keys = block.num_keys();
  }
  __device__ float* plane_of(int h) const { return reinterpret_cast<float*>(planes + (h >> 1) * pitch) + (h & 1); }
  __device__ float score(int h, int key) const { return plane_of(h)[2 * key_place(key)]; }
  __device__ uint32_t& sum(int key) const { return cumulative[key_place(key) * cumulative_stride]; }
};

// The keys of a part in rounds: lanes own up to 8 neighbours each.
constexpr int kLaneKeys = 8;
static_assert(kMaxBlockKv / kSelectWarps <= 32 * kLaneKeys, "one round for the grouped sampler");

template <typename Round>
__device__ __forceinline__ void for_each_round(const BlockScores& scores, const SelectRole& role, const Round& round) {
  const int first = role.part * scores.part_keys, last = min(first + scores.part_keys, scores.num_keys);
  const int lane_keys = min(kLaneKeys, (scores.part_keys + 31) / 32);
#pragma unroll 1
  for (int base = first; base < last; base += 32 * lane_keys) {
    const int key = base + (threadIdx.x & 31) * lane_keys;
    // The lane's keys and their number, at most 0 past the end; the last key of the part. Lanes read the last key in
    // place of those that they do not have, so that no branch keeps the loads from being in flight together.
    round(key, min(lane_keys, last - key), last - 1);
  }
}

// Lane h: what an exponential of head h counts for in the stream; heads without a finite sum take no part.
__device__ __forceinline__ float stream_factor(const SelectRole& role, SoftmaxState state, const float* segment_lse,
                                               int lane) {
  const int head = lane & 7;
  const bool in_stream = role.grouped ? head < role.group_size : head == role.stream;
  const float own_factor = in_stream ? tile_factor(state.max, segment_lse[head]) : 0.0f;
  float share_sum = own_factor > 0.0f ? own_factor * state.sum : 0.0f;
  for (int offset = 1; offset < 8; offset <<= 1) share_sum += __shfl_xor_sync(0xffffffffu, share_sum, offset);
  return own_factor > 0.0f ? own_factor / share_sum : 0.0f;
}

// From the shares of a lane's keys to running sums, in `cumulative`. `running`: the sum before the round, and after it.
__device__ __forceinline__ void accumulate_weights(const BlockScores& scores, const float (&shares)[kLaneKeys],
                                                   int first, int count, int lane, uint32_t& running) {
  uint32_t sums[kLaneKeys], lane_sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) sums[i] = lane_sum += i < count ? row_weight_of(shares[i]) : 0;
  const uint32_t inclusive = warp_inclusive_scan(lane_sum, lane), before = running + inclusive - lane_sum;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    if (i < count) scores.sum(first + i) = before + sums[i];
  }
  running += __shfl_sync(0xffffffffu, inclusive, 31);
}

// Level 2 of the CDF: running sums of the row weights of the warp's keys, and their total. What needs no log-sum-exp is
// done before wait_for_lse().
template <typename Wait>
__device__ __forceinline__ uint32_t weigh(const BlockScores& scores, const SelectRole& role, SoftmaxState state,
                                          const float* segment_lse, int lane, const Wait& wait_for_lse) {
  const float below = finite_max(state.max);
  uint32_t running = 0;
  if (!role.grouped) {
    wait_for_lse();
    const float f = __shfl_sync(0xffffffffu, stream_factor(role, state, segment_lse, lane), role.stream);
    const float below_h = __shfl_sync(0xffffffffu, below, role.stream);
    const float* const plane = scores.plane_of(role.stream);
    for_each_round(scores, role, [&](int first, int count, int last) {
      float shares[kLaneKeys];
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) shares[i] = plane[2 * key_place(min(first + i, last))];
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) shares[i] = f > 0.0f ? f * exp2_approx(shares[i] - below_h) : 0.0f;
      accumulate_weights(scores, shares, first, count, lane, running);
    });
    return running;
  }
  bool waited = false;
  for_each_round(scores, role, [&](int first, int count, int last) {  // one round
    const auto exponentials = [&](float2(&e)[kLaneKeys], int pair) {
      const float below_x = __shfl_sync(0xffffffffu, below, 2 * pair);
      const float below_y = __shfl_sync(0xffffffffu, below, 2 * pair + 1);
      const float2* plane = scores.planes + pair * scores.pitch;
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) e[i] = plane[key_place(min(first + i, last))];
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) e[i] = {exp2_approx(e[i].x - below_x), exp2_approx(e[i].y - below_y)};
    };
    float2 ahead[2][kLaneKeys] = {};
    exponentials(ahead[0], 0);
    if (role.group_size > 2) exponentials(ahead[1], 1);
    wait_for_lse();
    waited = true;
    const float factor = stream_factor(role, state, segment_lse, lane);
    float shares[kLaneKeys] = {};
    const auto add_shares = [&](const float2(&e)[kLaneKeys], int pair) {
      const float f_x = __shfl_sync(0xffffffffu, factor, 2 * pair);
      const float f_y = __shfl_sync(0xffffffffu, factor, 2 * pair + 1);
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        shares[i] += f_x > 0.0f ? f_x * e[i].x : 0.0f;
        shares[i] += f_y > 0.0f ? f_y * e[i].y : 0.0f;
      }
    };
    add_shares(ahead[0], 0);
    if (role.group_size > 2) add_shares(ahead[1], 1);
#pragma unroll 1
    for (int pair = 2; 2 * pair < role.group_size; ++pair) {
      exponentials(ahead[0], pair);
      add_shares(ahead[0], pair);
    }
    accumulate_weights(scores, shares, first, count, lane, running);
  });
  if (!waited) wait_for_lse();  // the part has no keys
  return running;
}

// Row of the block at `position` of the level-2 CDF, and its weight.
__device__ __forceinline__ int find_row(const BlockScores& scores, const SelectRole& role, const uint32_t* part_weights,
                                        uint32_t position, uint32_t& weight) {
  int part = 0;
  uint32_t below = 0, end = 0;
#pragma unroll
  for (int j = 0; j + 1 < kSelectWarps; ++j) {
    end += j + 1 < role.num_parts ? part_weights[j] : 0;
    const bool beyond = j + 1 < role.num_parts && position >= end;
    part = beyond ? j + 1 : part;
    below = beyond ? end : below;
  }
  // How many keys have running sums up to the position, by quarters: the same few steps in all lanes.
  const int first = part * scores.part_keys, last = min(first + scores.part_keys, scores.num_keys) - 1;
  const uint32_t target = position - below;
  int row = first;
#pragma unroll 1
  for (int step = 1 << ((31 - __clz(scores.part_keys - 1)) & ~1); step > 0; step >>= 2) {
    const int probe = row + step - 1;
    const uint32_t sums[3] = {scores.sum(min(probe, last)), scores.sum(min(probe + step, last)),
                              scores.sum(min(probe + 2 * step, last))};
    int quarters = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) quarters += probe + i * step <= last && sums[i] <= target ? 1 : 0;
    row += quarters * step;
  }
  row = min(row, last);
  const uint32_t before = scores.sum(max(row - 1, first));
  weight = scores.sum(row) - (row > first ? before : 0);
  return row;
}

// The values of a block. Beside float8 keys they are T or float8, which is not known before.
template <typename V>
__device__ __forceinline__ StridedKvView<V> value_view(const DecodeParams& p, const Block& block) {
  return make_strided_view<V>(p.v, block.batch_index, block.kv_head,
                              block.kv_start + static_cast<int64_t>(block.index) * block.block_kv, p.stride_v_batch,
                              p.stride_v_token, p.stride_v_head);
}

template <typename T, typename K>
struct BlockValues {
  StridedKvView<T> view;

  __device__ BlockValues(const DecodeParams& p, const Block& block) : view(value_view<T>(p, block)) {}

  template <typename Function>
  __device__ __forceinline__ void visit(const Function& function) const {
    function(view);
  }
};

template <typename T>
struct BlockValues<T, Float8> {
  const void* base;
  int64_t stride_token;
  bool coded;

  __device__ BlockValues(const DecodeParams& p, const Block& block)
      : stride_token(p.stride_v_token), coded(p.v_dtype == Dtype::kFloat8E4M3) {
    base = coded ? static_cast<const void*>(value_view<Float8>(p, block).base) : value_view<T>(p, block).base;
  }

  template <typename Function>
  __device__ __forceinline__ void visit(const Function& function) const {
    if (coded) {
      function(StridedKvView<Float8>{static_cast<const Float8*>(base), stride_token});
    } else {
      function(StridedKvView<T>{static_cast<const T*>(base), stride_token});
    }
  }
};

// Draws the warp's share of the block's draws, reads the rows, and adds them up for HEADS heads of the stream from
// head_base on.
template <typename T, typename K, int HEAD_DIM, int HEADS>
__device__ __forceinline__ void draw_and_gather(float (&acc)[HEADS][8], const DecodeParams& p, PersistentShared& shared,
                                                const BlockPlan& block_plan, const BlockScores& scores,
                                                const SelectRole& role, const Block& block, SoftmaxState state,
                                                int head_base, int warp, int lane) {
  const StreamPlan& plan = block_plan.stream[role.stream];
  const uint32_t count = plan.last_draw - plan.first_draw, share = (count + role.num_parts - 1) >> role.parts_log2;
  const uint32_t first = plan.first_draw + min(count, share * role.part), last = min(first + share, plan.last_draw);
  if (first >= last) return;
  const uint32_t* part_weights = shared.part_weight + (role.stream << role.parts_log2);
  uint32_t weight_sum = 0;
#pragma unroll
  for (int j = 0; j < kSelectWarps; ++j) weight_sum += j < role.num_parts ? part_weights[j] : 0;
  if (weight_sum == 0) return;

  const Draws& draws = plan.draws;  // what is needed in one place only stays in shared memory
  // exp2(block maximum - row's log-sum-exp) of head lane % 8: from exponentials to probabilities.
  const int head = lane & 7;
  const float factor = role.grouped && head < role.group_size ? tile_factor(state.max, block_plan.row_lse[head]) : 0.0f;
  const float below = finite_max(state.max);
  // A grouped row counts once, however often it is drawn: lane 0 holds the draw before this warp's, for comparison.
  const uint32_t lead = role.grouped ? 1 : 0;
  const bool sorted = draws.sorted();
#pragma unroll 1
  for (uint32_t base = first; base < last; base += 32 - lead) {
    const uint32_t m = base - lead + lane;
    const Threshold threshold = draws.threshold(m);
    const bool drawn = m < last && plan.positions.contains(threshold);
    const uint32_t position = drawn ? plan.positions.position(threshold, weight_sum) : 0;
    uint32_t weight;
    const int key = find_row(scores, role, part_weights, position, weight);
    const BlockValues<T, K> values(p, block);
    if (drawn) values.visit([&](const auto& view) { prefetch_row<HEAD_DIM>(view.row(key)); });
    const int previous = __shfl_up_sync(0xffffffffu, drawn ? key : -1, 1);
    const bool repeats = sorted && lane > 0 && key == previous;
    const bool chosen = drawn && !repeats && (lane > 0 || lead == 0);
    const uint32_t chosen_lanes = __ballot_sync(0xffffffffu, chosen), drawn_lanes = __ballot_sync(0xffffffffu, drawn);
    const int num_rows = __popc(chosen_lanes);
    if (num_rows == 0) continue;

    float weights[HEADS];
    if (role.grouped) {  // Horvitz-Thompson: p_{h,n} / P(n is drawn)
      const float inclusion =
          fminf(1.0f, plan.expected_draws * __fdividef(static_cast<float>(weight), static_cast<float>(weight_sum)));
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const float f = __shfl_sync(0xffffffffu, factor, head_base + h);
        const float e = exp2_approx(scores.score(min(head_base + h, role.group_size - 1), key) -
                                    __shfl_sync(0xffffffffu, below, head_base + h));
        weights[h] = f > 0.0f ? __fdividef(f * e, inclusion) : 0.0f;
      }
    } else {
      // How often it is drawn in this round: up to the next row, or to the end.
      const uint32_t later = lane == 31 ? 0 : chosen_lanes >> (lane + 1);
      const int end = later != 0 ? lane + __ffs(later) : 32 - __clz(drawn_lanes);
      weights[0] = sorted ? static_cast<float>(end - lane) : 1.0f;
    }
    if (chosen) {
      if (p.rows_read != nullptr) atomicOr(&shared.read_mask[key >> 5], 1u << (key & 31));
      shared.order[warp][__popc(chosen_lanes & ((1u << lane) - 1u))] = static_cast<uint8_t>(lane);
    }
    __syncwarp();
    const int source = shared.order[warp][min(lane, num_rows - 1)];
    const int row = __shfl_sync(0xffffffffu, key, source);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) weights[h] = __shfl_sync(0xffffffffu, weights[h], source);
    values.visit(
        [&](const auto& view) { accumulate_rows<HEAD_DIM>(acc, view, row, weights, num_rows, p.aligned, lane); });
    __syncwarp();
  }
}

__device__ __forceinline__ void add(float4& sum, float4 value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}

__device__ __forceinline__ void scale(float4& sum, float factor) {
  sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
}

// The block's share of the estimate, to o_accum, for HEADS heads of every stream. The warps' sums meet in the buffer,
// [warp][slot][HEADS][HEAD_DIM]: the scores there are no longer needed, those of the next heads of the stream lie
// further on.
template <typename T, typename K, int HEAD_DIM, int HEADS>
__device__ __forceinline__ void estimate(const DecodeParams& p, PersistentShared& shared, const BlockPlan& block_plan,
                                         const BlockScores& scores, const SelectRole& role, const Block& block,
                                         SoftmaxState state, int head_base, int warp, int lane) {
  constexpr int kLanes = HEAD_DIM / 4, kSlots = GatherShape<HEAD_DIM>::kRows;
  float acc[HEADS][8] = {};
  if (role.active) {
    draw_and_gather<T, K, HEAD_DIM, HEADS>(acc, p, shared, block_plan, scores, role, block, state, head_base, warp,
                                           lane);
  }
  select_barrier();  // all are done with these heads' scores
  float4* const partial = reinterpret_cast<float4*>(scores.planes);
  // Lanes that read different rows at a time have sums of their own.
  const int slot = lane / GatherShape<HEAD_DIM>::kChunks, chunk = lane % GatherShape<HEAD_DIM>::kChunks;
  if (slot < kSlots) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float4* out = partial + ((warp * kSlots + slot) * HEADS + h) * kLanes + chunk * 2;
      out[0] = {acc[h][0], acc[h][1], acc[h][2], acc[h][3]};
      out[1] = {acc[h][4], acc[h][5], acc[h][6], acc[h][7]};
    }
  }
  select_barrier();

  // In warp order.
  const int num_heads = role.grouped ? min(HEADS, role.group_size - head_base) : role.group_size;
  const int64_t stats = p.stats_offset(p.group_index(block.batch_index, block.kv_head)) +
                        static_cast<int64_t>(block.index) * role.group_size + head_base;
  float4* const out = reinterpret_cast<float4*>(p.o_accum + stats * HEAD_DIM);
  for (int item = threadIdx.x; item < num_heads * kLanes; item += kSelectThreads) {
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (role.grouped) {
#pragma unroll 8
      for (int w = 0; w < kSelectWarps * kSlots; ++w) add(sum, partial[w * HEADS * kLanes + item]);
    } else {
      const int h = item / kLanes;
      for (int w = 0; w < role.num_parts * kSlots; ++w) {
        add(sum, partial[(h * role.num_parts * kSlots + w) * kLanes + item % kLanes]);
      }
      const float scale = segment_factor(block_plan.segment_lse[h], block_plan.row_lse[h]) /
                          static_cast<float>(block_plan.stream[h].draws.num_draws);
      sum.x *= scale, sum.y *= scale, sum.z *= scale, sum.w *= scale;
    }
    out[item] = sum;
  }
}

// Adds up the blocks of a (batch row, KV head), in block order, and writes the output.
template <typename T, typename K, int HEAD_DIM>
__device__ __forceinline__ void combine_blocks(const DecodeParams& p, float4* partial, const FinishedBlock& row) {
  constexpr int kLanes = HEAD_DIM / 4;
  const int batch_index = row.batch_index, kv_head = row.kv_head, num_blocks = row.num_blocks;
  const uint32_t defined = row.defined;
  const int64_t group = p.group_index(batch_index, kv_head);
  const int items = p.gqa_group_size * kLanes, slots = max(1, kSelectThreads / items);
  const float4* blocks = reinterpret_cast<const float4*>(p.o_accum + p.stats_offset(group) * HEAD_DIM);
  T* const out = static_cast<T*>(p.out) +
                 (static_cast<int64_t>(batch_index) * p.num_qo_heads + kv_head * p.gqa_group_size) * HEAD_DIM;
  const int thread = threadIdx.x, slot = thread / items;
#pragma unroll 1
  for (int base = 0; base < items; base += kSelectThreads) {
    const int item = slots == 1 ? base + thread : thread % items;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (item < items && slot < slots + base) {
#pragma unroll 8
      for (int b = slots == 1 ? 0 : slot; b < num_blocks; b += slots) add(sum, __ldcg(blocks + b * items + item));
    }
    if (slots > 1) {
      partial[thread] = sum;
      select_barrier();
      if (thread >= items) break;
#pragma unroll 1
      for (int s = 1; s < slots; ++s) add(sum, partial[s * items + thread]);
    }
    if (item < items) {
      const float nan = __int_as_float(0x7fffffff);
      if (std::is_same_v<K, Float8>) scale(sum, p.output_scale(kv_head));
      if ((defined >> (item / kLanes) & 1) == 0) sum = {nan, nan, nan, nan};
      *reinterpret_cast<uint2*>(out + item * 4) = {Half<T>::pack(sum.x, sum.y), Half<T>::pack(sum.z, sum.w)};
    }
  }
  if (p.rows_read != nullptr && thread < 32) {
    int rows = 0;
#pragma unroll 1
    for (int b = thread; b < num_blocks; b += 32) rows += __ldcg(p.tile_rows + p.stream_offset(group, 0) + b);
    rows = __reduce_add_sync(0xffffffffu, rows);
    if (thread == 0) p.rows_read[group] = rows;
  }
}

// All blocks are finished, so all CTAs have seen the states.
__device__ __forceinline__ void forget_states(const DecodeParams& p, const FinishedBlock& row) {
  const int64_t group = p.group_index(row.batch_index, row.kv_head);
  uint64_t* const states = p.block_state + group * p.max_blocks * p.gqa_group_size * 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < row.num_blocks * p.gqa_group_size; i += kSelectThreads) {
    store_relaxed(states + i * 2, {0, 0});
  }
}

template <typename T, typename K, int HEAD_DIM, typename Scores>
__device__ __forceinline__ void select_blocks(const DecodeParams& p, const PersistentMemory& memory) {
  PersistentShared& shared = *memory.shared;
  for (Turn turn;; turn.advance(p.persistent.num_buffers)) {
    const int thread = Scores::kRoleAnew ? fresh_thread() : threadIdx.x, warp = thread >> 5, lane = thread & 31;
    const SelectRole role(p, warp);
    const int buffer = turn.buffer;
    mbarrier_wait(&shared.started[buffer], turn.parity);
    const Block& block = shared.block[buffer];
    const BlockPlan& plan = shared.plan[buffer];
    if (block.num_blocks == 0) break;
    if (p.rows_read != nullptr && warp == 0) {
      for (int word = lane; word < kMaxBlockKv / 32; word += 32) shared.read_mask[word] = 0;
    }
    const BlockScores scores(p, memory, buffer, role, block);
    mbarrier_wait(&shared.looked_ahead[buffer], turn.parity);
    mbarrier_wait(&shared.scored[buffer], turn.parity);
    mbarrier_wait(&shared.published[buffer], turn.parity);
    const SoftmaxState state = shared.state[buffer][lane & 7];  // lane h: head h
    const auto wait_for_lse = [&] { mbarrier_wait(&shared.lse_known[buffer], turn.parity); };
    uint32_t weight = 0;
    if (role.active) {
      weight = weigh(scores, role, state, plan.segment_lse, lane, wait_for_lse);
    } else {
      wait_for_lse();
    }
    if (lane == 0) shared.part_weight[warp] = weight;
    mbarrier_wait(&shared.planned[buffer], turn.parity);
    select_barrier();  // all weights are there

    if (!role.grouped) {
      estimate<T, K, HEAD_DIM, 1>(p, shared, plan, scores, role, block, state, 0, warp, lane);
    } else if (Scores::kMostGatherHeads > kGatherHeads) {
      if (role.group_size <= kGatherHeads) {
        estimate<T, K, HEAD_DIM, kGatherHeads>(p, shared, plan, scores, role, block, state, 0, warp, lane);
      } else {
        estimate<T, K, HEAD_DIM, kHeadBlock>(p, shared, plan, scores, role, block, state, 0, warp, lane);
      }
    } else {
      for (int head = 0; head < role.group_size; head += kGatherHeads) {
        estimate<T, K, HEAD_DIM, kGatherHeads>(p, shared, plan, scores, role, block, state, head, warp, lane);
      }
    }
    if (p.rows_read != nullptr && warp == 0) {
      int rows = 0;
      for (int word = lane; word < kMaxBlockKv / 32; word += 32) rows += __popc(shared.read_mask[word]);
      rows = __reduce_add_sync(0xffffffffu, rows);
      const int64_t group = p.group_index(block.batch_index, block.kv_head);
      if (lane == 0) p.tile_rows[p.stream_offset(group, 0) + block.index] = rows;
    }

    const bool is_final = shared.is_final[buffer];
    const int place = turn.place(p.persistent.num_buffers);
    mbarrier_arrive(&shared.released[buffer]);
    if (is_final) {
      if (threadIdx.x == 0) {
        mbarrier_wait(&shared.released[buffer], turn.parity);  // all shares are written
        mbarrier_wait(&shared.handed_over, 0);
        shared.last_complete = count_block(p, shared.pending, shared.finished[place], true);
      }
      select_barrier();
    }
    FinishedBlock row = shared.complete[place];
    for (bool first = true;; first = false) {
      if (row.num_blocks > 0) {
        combine_blocks<T, K, HEAD_DIM>(p, shared.partial, row);
        forget_states(p, row);
      }
      if (!is_final) break;
      if (!first && shared.pending.count <= 0) return;
      if (!first || row.num_blocks > 0) select_barrier();  // all are done with what is written next
      if (!first) {
        if (threadIdx.x == 0) {
          do {
            shared.last_complete = take_oldest(p, shared.pending);
          } while (shared.last_complete.num_blocks == 0);
        }
        select_barrier();
      }
      row = shared.last_complete;
    }
  }
}

// The body of the kernel: T of q and the output, K of keys and what comes with it, for values.
template <typename T, typename K, int HEAD_DIM, typename Scores>
__device__ __forceinline__ void play_roles(const DecodeParams& p, unsigned char* shared_bytes, Scores& scores) {
  const PersistentMemory memory(p, shared_bytes);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (warp < kPlanWarp) {
    setup_barrier_below();
    select_blocks<T, K, HEAD_DIM, Scores>(p, memory);
  } else if (warp == kPlanWarp) {
    setup_barrier_below();
    plan_blocks(p, memory);
  } else if (warp == kStateWarp) {
    if (lane < p.persistent.num_buffers) {
      PersistentShared* const shared = memory.shared;
      mbarrier_init(&shared->started[lane], 1);
      mbarrier_init(&shared->looked_ahead[lane], Scores::kLookAheadLanes);
      mbarrier_init(&shared->scored[lane], p.persistent.num_score_warps * 32);
      mbarrier_init(&shared->published[lane], 32);
      mbarrier_init(&shared->lse_known[lane], 32);
      mbarrier_init(&shared->planned[lane], 32);
      mbarrier_init(&shared->released[lane], kFirstScoreWarp * 32);
      if (lane == 0) mbarrier_init(&shared->handed_over, 32);
    }
    __syncwarp();
    set_up(p.persistent.num_score_warps);
    publish_states(p, memory, scores);
  } else {
    scores.start(memory);
    setup_barrier_above(p.persistent.num_score_warps);
    scores.score_blocks(memory);
  }
}

template <typename T, typename K, int HEAD_DIM>
__global__ void __launch_bounds__((kFirstScoreWarp + max_score_warps(HEAD_DIM)) * 32, 1)
    persistent_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  KeyScores<T, K, HEAD_DIM> scores(p);
  play_roles<T, K, HEAD_DIM>(p, shared_bytes, scores);
}

}  // namespace santa::cuda
