// Sampled rows in one kernel that keeps the scores on chip. One CTA per multiprocessor walks the blocks of all rows
// (queue.cuh). Its warps have two roles, so that keys keep streaming while blocks are drawn from:
//
//   score warps   stream the keys of a block through rings of shared-memory slots that run on across blocks, and leave
//                 scores and softmax states in one of two buffers;
//   select warps  follow one block behind: publish the block's state, wait for the states of the row's other blocks,
//                 draw rows, read them from V, and write the block's share of the estimate. The CTA that finishes the
//                 last block of a (batch row, KV head) adds the shares up, in block order.
//
// Every sum has an order that depends on the row alone: which CTA does what, and when, changes no bit.
//
// CTAs wait for each other, so all of them have to be resident: the launch is cooperative.
#pragma once

#include "core/mixture.h"
#include "cuda/decode/gather.cuh"
#include "cuda/decode/queue.cuh"
#include "cuda/decode/tile.cuh"

namespace santa::cuda {

constexpr int kSelectWarps = 8;
constexpr int kSelectThreads = kSelectWarps * 32;
constexpr int kMaxScoreWarps = 8;
constexpr int kMaxPersistentThreads = kSelectThreads + kMaxScoreWarps * 32;
constexpr int kMaxBuffers = 2;
constexpr int kStatesKept = 16;       // rounds of a warp
constexpr uint64_t kPending = ~0ull;  // block_state not there yet: as floats two NaNs, which no state is

// Level 1 of the CDF, as far as one block and stream need it.
struct StreamPlan {
  uint64_t block_start, block_mass;
  uint32_t first_draw, last_draw;
  Draws draws;
};

struct PersistentShared {
  uint64_t full[kMaxBuffers];   // the score warps are done with the buffer
  uint64_t empty[kMaxBuffers];  // the select warps are
  SoftmaxState warp_state[kMaxBuffers][kMaxScoreWarps][kHeadBlock];
  StreamPlan plan[kHeadBlock];
  uint64_t block_states[kStatesKept * 32];  // of the row's blocks, as plan_stream has read them
  float row_lse[kHeadBlock];
  float segment_lse[kHeadBlock];
  uint32_t part_weight[kSelectWarps];
  uint32_t read_mask[kMaxBlockKv / 32];
  uint8_t order[kSelectWarps][32];
  int is_last;
};

// Dynamic shared memory: PersistentShared, the score buffers, cumulative weights (grouped), the rings.
//
// A buffer holds planes of float2, a plane per pair of heads: [pair][key]. The pitch of a plane shifts it by half the
// banks, so that the lanes of two pairs write side by side. When the block's rows are read, the warps' partial outputs
// take the buffer's place.
struct PersistentMemory {
  PersistentShared* shared;
  unsigned char* buffers;
  uint32_t* cumulative;
  unsigned char* rings;

  __device__ PersistentMemory(const DecodeParams& p, unsigned char* bytes) {
    shared = reinterpret_cast<PersistentShared*>(bytes);
    buffers = bytes + (sizeof(PersistentShared) + 127) / 128 * 128;
    unsigned char* end = buffers + p.persistent.num_buffers * p.persistent.buffer_bytes;
    cumulative = reinterpret_cast<uint32_t*>(end);
    rings = end + (p.sampler == Sampler::kGrouped ? p.persistent.plane_pitch * 4 : 0);
  }
  __device__ unsigned char* buffer(const DecodeParams& p, int index) const {
    return buffers + index * p.persistent.buffer_bytes;
  }
};

__device__ __forceinline__ void select_barrier() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
static_assert(kSelectThreads == 256, "select_barrier has the number");

__device__ __forceinline__ int first_power_of_2(int n) { return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : 8; }

// ---- score warps

template <typename T>
struct BlockKeys {
  StridedKvView<T> view;  // row 0 is the block's first key
  int num_keys;
  int num_steps;  // 16 keys per score warp each; at least as many as a ring can be ahead

  __device__ BlockKeys() : view{nullptr, 0}, num_keys(0), num_steps(0) {}
  __device__ BlockKeys(const DecodeParams& p, const Block& block) {
    view = make_strided_view<T>(p.k, block.batch_index, block.kv_head,
                                block.kv_start + static_cast<int64_t>(block.index) * block.block_kv, p.stride_k_batch,
                                p.stride_k_token, p.stride_k_head);
    num_keys = block.num_keys();
    const int per_step = kSlotRows * p.persistent.num_score_warps;
    num_steps = max((num_keys + per_step - 1) / per_step, p.persistent.ring_slots - 1);
  }
};

__device__ __forceinline__ void wait_for_slot(int ring_slots) {
  if (ring_slots == 4) {
    cp_async_wait<2>();
  } else if (ring_slots == 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
  __syncwarp();  // the other lanes' copies are visible, and they are done with the slot filled next
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_query(QueryFragments<T, HEAD_DIM>& query, const DecodeParams& p,
                                           const Block& block, int lane) {
  query.load(static_cast<const T*>(p.q) + block.batch_index * p.stride_q_batch +
                 static_cast<int64_t>(block.kv_head) * p.gqa_group_size * p.stride_q_head,
             p.stride_q_head, p.gqa_group_size, p.aligned, lane);
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void score_blocks(const DecodeParams& p, const PersistentMemory& memory) {
  const int warp = (threadIdx.x >> 5) - kSelectWarps, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int num_warps = p.persistent.num_score_warps, ring_slots = p.persistent.ring_slots;
  constexpr uint32_t kSlotBytes = sizeof(typename TileShared<HEAD_DIM>::Slot);
  const uint32_t ring = shared_address(memory.rings) + warp * ring_slots * kSlotBytes;
  const uint32_t ring_end = ring + ring_slots * kSlotBytes;
  const uint64_t policy = evict_first_policy();
  const bool has_pair = 2 * t < p.gqa_group_size;
  constexpr bool kQueryAhead = HEAD_DIM <= 128;  // beyond, there are no registers for the next block's query

  BlockQueue queue(p, lane);
  Block block;
  if (!queue.find(blockIdx.x, block)) return;
  BlockKeys<T> keys(p, block);
  QueryFragments<T, HEAD_DIM> query;
  load_query(query, p, block, lane);

  const auto fill = [&](uint32_t slot, const BlockKeys<T>& source, int step) {
    load_slot<T, HEAD_DIM>(slot, source.view, (step * num_warps + warp) * kSlotRows, source.num_keys, p.aligned, policy,
                           lane);
  };
  uint32_t filled = ring, scored = ring;
  for (int i = 0; i < ring_slots - 1; ++i) {
    fill(filled, keys, i);
    cp_async_commit();
    filled += kSlotBytes;
  }

  for (int n = 0;; ++n) {
    Block next_block;
    BlockKeys<T> next_keys;
    QueryFragments<T, HEAD_DIM> next_query;
    const bool has_next = queue.find(blockIdx.x + static_cast<int64_t>(n + 1) * gridDim.x, next_block);
    if (has_next) {
      next_keys = BlockKeys<T>(p, next_block);
      if (kQueryAhead) load_query(next_query, p, next_block, lane);
    }
    const int buffer = n % p.persistent.num_buffers, use = n / p.persistent.num_buffers;
    if (use > 0) mbarrier_wait(&memory.shared->empty[buffer], (use - 1) & 1);
    float2* plane = reinterpret_cast<float2*>(memory.buffer(p, buffer)) + t * p.persistent.plane_pitch;
    SoftmaxState state[2] = {empty_softmax_state(), empty_softmax_state()};

    for (int step = 0; step < keys.num_steps; ++step) {
      wait_for_slot(ring_slots);
      const int ahead = step + ring_slots - 1;
      if (ahead < keys.num_steps) {
        fill(filled, keys, ahead);
      } else if (has_next) {
        fill(filled, next_keys, ahead - keys.num_steps);
      }
      cp_async_commit();
      filled = filled + kSlotBytes == ring_end ? ring : filled + kSlotBytes;

      const int first = (step * num_warps + warp) * kSlotRows;
      if (first < keys.num_keys) {
        float scores[4];
        score_slot<T, HEAD_DIM>(scores, scored, query, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = first + g + half * 8;
          const bool valid = key < keys.num_keys;
          scores[2 * half] = valid ? scores[2 * half] * p.scale_log2 : -INFINITY;
          scores[2 * half + 1] = valid ? scores[2 * half + 1] * p.scale_log2 : -INFINITY;
          if (has_pair) plane[key] = {scores[2 * half], scores[2 * half + 1]};
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float max = fmaxf(state[j].max, fmaxf(scores[j], scores[2 + j]));
          state[j].sum = state[j].sum * exp2_below(state[j].max, max) + exp2_below(scores[j], max) +
                         exp2_below(scores[2 + j], max);
          state[j].max = max;
        }
      }
      scored = scored + kSlotBytes == ring_end ? ring : scored + kSlotBytes;
    }

#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for (int offset = 4; offset < 32; offset <<= 1) {
        state[j] = merge(state[j], {__shfl_xor_sync(0xffffffffu, state[j].max, offset),
                                    __shfl_xor_sync(0xffffffffu, state[j].sum, offset)});
      }
      if (g == 0) memory.shared->warp_state[buffer][warp][2 * t + j] = state[j];
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&memory.shared->full[buffer]);
    if (!has_next) break;
    block = next_block;
    keys = next_keys;
    if (kQueryAhead) {
      query = next_query;
    } else {
      load_query(query, p, block, lane);
    }
  }
  cp_async_wait<0>();
}

// ---- select warps

// What a select warp does: the draws of one stream fall to `num_parts` warps, and so do the keys that it is drawn from.
struct SelectRole {
  bool grouped;
  int group_size;
  int stream, num_parts, part;
  bool active;     // there is such a stream
  int first_head;  // of the stream
  int num_heads;

  __device__ SelectRole(const DecodeParams& p, int warp) {
    grouped = p.sampler == Sampler::kGrouped;
    group_size = p.gqa_group_size;
    num_parts = kSelectWarps / first_power_of_2(p.num_streams());
    stream = warp / num_parts;
    part = warp % num_parts;
    active = stream < p.num_streams();
    first_head = grouped ? 0 : stream;
    num_heads = grouped ? group_size : 1;
  }
};

// The state of head lane % 8 over the whole block, in every lane.
__device__ __forceinline__ SoftmaxState merge_warp_states(const SoftmaxState (*states)[kHeadBlock], int num_warps,
                                                          int lane) {
  SoftmaxState state = empty_softmax_state();
  for (int w = lane >> 3; w < num_warps; w += 4) state = merge(state, states[w][lane & 7]);
  for (int offset = 8; offset < 32; offset <<= 1) {
    state = merge(state,
                  {__shfl_xor_sync(0xffffffffu, state.max, offset), __shfl_xor_sync(0xffffffffu, state.sum, offset)});
  }
  return state;
}

__device__ __forceinline__ uint64_t bits_of(SoftmaxState state) {
  return static_cast<uint64_t>(__float_as_uint(state.sum)) << 32 | __float_as_uint(state.max);
}
__device__ __forceinline__ SoftmaxState state_of(uint64_t bits) {
  return {__uint_as_float(static_cast<uint32_t>(bits)), __uint_as_float(static_cast<uint32_t>(bits >> 32))};
}

__device__ __forceinline__ SoftmaxState merge_lanes(SoftmaxState state, int width) {
  for (int offset = width; offset < 32; offset <<= 1) {
    state = merge(state,
                  {__shfl_xor_sync(0xffffffffu, state.max, offset), __shfl_xor_sync(0xffffffffu, state.sum, offset)});
  }
  return state;
}

// Level 1 of the CDF for one stream, by one warp, as soon as the states of all blocks of the row are there. Lanes hold
// heads (fastest) and blocks, in rounds; the states of the first rounds are kept for the second pass.
static __device__ __noinline__ void plan_stream(const DecodeParams& p, PersistentShared& shared, const SelectRole& role,
                                            const Block& block, int lane) {
  const int64_t group = p.group_index(block.batch_index, block.kv_head);
  const uint64_t* states = p.block_state + group * p.max_blocks * role.group_size + role.first_head;
  const int width = first_power_of_2(role.num_heads), head = lane & (width - 1), step = 32 / width;
  const int first_block = lane / width;
  const bool has_head = head < role.num_heads;
  const auto state_address = [&](int b) { return states + static_cast<int64_t>(b) * role.group_size + head; };
  const auto is_mine = [&](int b) { return has_head && b < block.num_blocks; };

  const SegmentPlan plan = plan_segments(block.num_blocks, 1, p.num_samples, p.budget == Budget::kUniform);
  const int segment = block.index / plan.tiles_per_segment, segment_first = segment * plan.tiles_per_segment;
  const int segment_last = min(segment_first + plan.tiles_per_segment, block.num_blocks);
  const int64_t row_seed = p.row_seeds != nullptr ? p.row_seeds[block.batch_index] : 0;
  const auto random = RandomStream::make(
      p.seed, row_seed, block.kv_len, role.grouped ? block.kv_head : block.kv_head * role.group_size + role.stream);
  const uint64_t random_bits = random.bits(segment, 0);

  const int num_kept = kStatesKept * role.num_parts / kSelectWarps;
  uint64_t* kept = shared.block_states + role.stream * num_kept * 32 + lane;

  SoftmaxState row = empty_softmax_state(), segment_state = empty_softmax_state();
  for (int base = 0; base * step < block.num_blocks; base += 4) {
    uint64_t bits[4];  // four loads in flight
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int b = first_block + (base + i) * step;
      bits[i] = is_mine(b) ? load_relaxed(state_address(b)) : bits_of(empty_softmax_state());
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int b = first_block + (base + i) * step;
      while (bits[i] == kPending) {
        __nanosleep(20);
        bits[i] = load_relaxed(state_address(b));
      }
      const SoftmaxState state = state_of(bits[i]);
      row = merge(row, state);
      if (b >= segment_first && b < segment_last) segment_state = merge(segment_state, state);
      if (base + i < num_kept) kept[(base + i) * 32] = bits[i];
    }
  }
  __syncwarp();
  const float row_lse = log2_sum(merge_lanes(row, width));
  const float segment_lse = plan.num_segments == 1 ? row_lse : log2_sum(merge_lanes(segment_state, width));

  uint64_t total = 0, start = 0, mass = 0;
  const auto add_block = [&](int b, SoftmaxState state) {
    const float factor = tile_factor(state.max, segment_lse);
    float share = has_head && factor > 0.0f ? factor * state.sum : 0.0f;
    for (int offset = 1; offset < width; offset <<= 1) share += __shfl_xor_sync(0xffffffffu, share, offset);
    if (b < segment_first || b >= segment_last) return;
    const uint64_t block_mass = tile_mass_of(share / static_cast<float>(role.num_heads));
    total += block_mass;
    if (b < block.index) start += block_mass;
    if (b == block.index) mass = block_mass;
  };
  for (int round = 0; round * step < block.num_blocks; ++round) {
    const int b = first_block + round * step;
    const uint64_t bits = round < num_kept ? kept[round * 32]
                          : is_mine(b)     ? load_relaxed(state_address(b))
                                           : bits_of(empty_softmax_state());
    add_block(b, state_of(bits));
  }
  for (int offset = width; offset < 32; offset <<= 1) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
    start += __shfl_xor_sync(0xffffffffu, start, offset);
    mass += __shfl_xor_sync(0xffffffffu, mass, offset);
  }

  const uint32_t num_draws = static_cast<uint32_t>(plan.draws) * role.num_heads;
  const Draws draws = Draws::make(p.sampler, random, segment, num_draws, total, random_bits);
  uint32_t bound = lane == 0 ? 0 : num_draws;
  if (draws.sorted() && mass > 0) bound = draws.count_below(lane == 0 ? start : start + mass);
  const uint32_t last_draw = mass > 0 ? __shfl_sync(0xffffffffu, bound, 1) : 0;
  if (lane == 0) shared.plan[role.stream] = {start, mass, mass > 0 ? bound : 0, last_draw, draws};
  if (first_block == 0 && has_head) {
    const int h = role.first_head + head;
    shared.row_lse[h] = row_lse;
    shared.segment_lse[h] = segment_lse;
    if (block.index == 0) {
      p.lse[static_cast<int64_t>(block.batch_index) * p.num_qo_heads + block.kv_head * role.group_size + h] =
          row_lse * kLn2;
    }
  }
}

// The scores and weights of a block, as the select warps use them.
struct BlockScores {
  float2* planes;  // [pair][plane_pitch]
  int pitch;
  uint32_t* cumulative;  // of the stream
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
    part_keys = block.block_kv / role.num_parts;
    num_keys = block.num_keys();
  }
  __device__ float& exponential(int h, int key) const {
    float2& pair = planes[(h >> 1) * pitch + key];
    return (h & 1) != 0 ? pair.y : pair.x;
  }
  __device__ uint32_t& sum(int key) const { return cumulative[key * cumulative_stride]; }
};

// exp2(score - block maximum) in place of the scores of the warp's keys.
__device__ __forceinline__ void exponentiate(const BlockScores& scores, const SelectRole& role, SoftmaxState state,
                                             int lane) {
  const int first = role.part * scores.part_keys, last = min(first + scores.part_keys, scores.num_keys);
  if (role.grouped) {
    for (int pair = 0; 2 * pair < role.group_size; ++pair) {
      const float max_x = __shfl_sync(0xffffffffu, state.max, 2 * pair);
      const float max_y = __shfl_sync(0xffffffffu, state.max, 2 * pair + 1);
      float2* plane = scores.planes + pair * scores.pitch;
#pragma unroll 2
      for (int key = first + lane; key < last; key += 32) {
        const float2 score = plane[key];
        plane[key] = {exp2_below(score.x, max_x), exp2_below(score.y, max_y)};
      }
    }
  } else {
    const float max = __shfl_sync(0xffffffffu, state.max, role.stream);
#pragma unroll 4
    for (int key = first + lane; key < last; key += 32) {
      float& score = scores.exponential(role.stream, key);
      score = exp2_below(score, max);
    }
  }
}

// Level 2 of the CDF: running sums of the row weights of the warp's keys, and their total.
__device__ __forceinline__ uint32_t weigh(const BlockScores& scores, const SelectRole& role, SoftmaxState state,
                                          const float* segment_lse, int lane) {
  constexpr int kRound = 8;  // 32 keys each
  const int head = lane & 7;
  const bool in_stream = head >= role.first_head && head < role.first_head + role.num_heads;
  const float factor = in_stream ? tile_factor(state.max, segment_lse[head]) : 0.0f;
  float share_sum = 0.0f;
  for (int h = role.first_head; h < role.first_head + role.num_heads; ++h) {
    const float f = __shfl_sync(0xffffffffu, factor, h), sum = __shfl_sync(0xffffffffu, state.sum, h);
    if (f > 0.0f) share_sum += f * sum;
  }
  const int first = role.part * scores.part_keys, last = min(first + scores.part_keys, scores.num_keys);
  uint32_t running = 0;
  for (int base = first; base < last; base += kRound * 32) {
    float shares[kRound] = {};
    if (role.grouped) {
      for (int pair = 0; 2 * pair < role.group_size; ++pair) {
        const float f_x = __shfl_sync(0xffffffffu, factor, 2 * pair), f_y = __shfl_sync(0xffffffffu, factor, 2 * pair + 1);
        const float2* plane = scores.planes + pair * scores.pitch;
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
          const int key = base + i * 32 + lane;
          if (key >= last) continue;
          const float2 e = plane[key];
          if (f_x > 0.0f) shares[i] += f_x * e.x;
          if (f_y > 0.0f) shares[i] += f_y * e.y;
        }
      }
    } else {
      const float f = __shfl_sync(0xffffffffu, factor, role.stream);
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const int key = base + i * 32 + lane;
        if (key < last && f > 0.0f) shares[i] = f * scores.exponential(role.stream, key);
      }
    }
    uint32_t sums[kRound];
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
      sums[i] = warp_inclusive_scan(shares[i] > 0.0f ? row_weight_of(shares[i] / share_sum) : 0, lane);
    }
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
      const int key = base + i * 32 + lane;
      if (key < last) scores.sum(key) = running + sums[i];
      running += __shfl_sync(0xffffffffu, sums[i], 31);
    }
  }
  return running;
}

// Row of the block at `position` of the level-2 CDF, and its weight.
__device__ __forceinline__ int find_row(const BlockScores& scores, const SelectRole& role, const uint32_t* part_weight,
                                        uint32_t position, uint32_t& weight) {
  int part = 0;
  uint32_t below = 0, sum = 0;
  for (int j = 0; j + 1 < role.num_parts; ++j) {
    sum += part_weight[j];
    if (position >= sum) {
      part = j + 1;
      below = sum;
    }
  }
  const int first = part * scores.part_keys;
  int low = first, high = min(first + scores.part_keys, scores.num_keys) - 1;
  while (low < high) {
    const int middle = (low + high) >> 1;
    if (scores.sum(middle) > position - below) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  weight = scores.sum(low) - (low > first ? scores.sum(low - 1) : 0);
  return low;
}

// Draws the warp's share of the block's draws, reads the rows, and adds them up for HEADS heads of the stream from
// head_base on.
template <typename T, int HEAD_DIM, int HEADS>
__device__ __forceinline__ void draw_and_gather(float (&acc)[HEADS][8], const DecodeParams& p, PersistentShared& shared,
                                                const BlockScores& scores, const SelectRole& role, const Block& block,
                                                SoftmaxState state, int head_base, int warp, int lane) {
  const StreamPlan& plan = shared.plan[role.stream];
  const uint32_t count = plan.last_draw - plan.first_draw, share = (count + role.num_parts - 1) / role.num_parts;
  const uint32_t first = plan.first_draw + min(count, share * role.part), last = min(first + share, plan.last_draw);
  if (first >= last) return;
  const uint32_t* part_weight = shared.part_weight + role.stream * role.num_parts;
  uint32_t weight_sum = 0;
  for (int j = 0; j < role.num_parts; ++j) weight_sum += part_weight[j];
  if (weight_sum == 0) return;

  auto values = make_strided_view<T>(p.v, block.batch_index, block.kv_head,
                                     block.kv_start + static_cast<int64_t>(block.index) * block.block_kv,
                                     p.stride_v_batch, p.stride_v_token, p.stride_v_head);
  // exp2(block maximum - row's log-sum-exp) of head lane % 8: from exponentials to probabilities.
  const int head = lane & 7;
  const float factor = role.grouped && head < role.group_size ? tile_factor(state.max, shared.row_lse[head]) : 0.0f;
  // A grouped row counts once, however often it is drawn: lane 0 holds the draw before this warp's, for comparison.
  const uint32_t lead = role.grouped ? 1 : 0;
  const bool sorted = plan.draws.sorted();
  for (uint32_t base = first; base < last; base += 32 - lead) {
    const uint32_t m = base - lead + lane;
    int row = -1;
    uint32_t weight = 0;
    if (m < last) {
      const uint64_t threshold = plan.draws.threshold(m);
      if (threshold >= plan.block_start && threshold - plan.block_start < plan.block_mass) {
        row = find_row(scores, role, part_weight,
                       position_in_tile(threshold - plan.block_start, plan.block_mass, weight_sum), weight);
      }
    }
    const int previous = __shfl_up_sync(0xffffffffu, row, 1);
    const bool repeats = sorted && lane > 0 && row == previous;
    const bool chosen = row >= 0 && !repeats && (lane > 0 || lead == 0);
    const uint32_t chosen_lanes = __ballot_sync(0xffffffffu, chosen), drawn_lanes = __ballot_sync(0xffffffffu, row >= 0);
    const int num_rows = __popc(chosen_lanes);

    float weights[HEADS] = {};
    if (role.grouped) {  // Horvitz-Thompson: p_{h,n} / P(n is drawn)
      const float inclusion =
          fminf(1.0f, expected_draws(plan.draws.num_draws, plan.block_mass, plan.draws.total, weight, weight_sum));
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const float f = __shfl_sync(0xffffffffu, factor, head_base + h);
        if (chosen && f > 0.0f) weights[h] = f * scores.exponential(head_base + h, row) / inclusion;
      }
    } else if (chosen) {
      // How often it is drawn in this round: up to the next row, or to the end.
      const uint32_t later = lane == 31 ? 0 : chosen_lanes >> (lane + 1);
      const int end = later != 0 ? lane + __ffs(later) : 32 - __clz(drawn_lanes);
      weights[0] = sorted ? static_cast<float>(end - lane) : 1.0f;
    }
    if (chosen) {
      if (p.rows_read != nullptr) atomicOr(&shared.read_mask[row >> 5], 1u << (row & 31));
      shared.order[warp][__popc(chosen_lanes & ((1u << lane) - 1u))] = static_cast<uint8_t>(lane);
    }
    __syncwarp();
    const int source = lane < num_rows ? shared.order[warp][lane] : 0;
    row = __shfl_sync(0xffffffffu, row, source);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) weights[h] = __shfl_sync(0xffffffffu, weights[h], source);
    accumulate_rows<T, HEAD_DIM, HEADS>(acc, values, row, weights, num_rows, p.aligned, lane);
    __syncwarp();
  }
}

__device__ __forceinline__ void add(float4& sum, float4 value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}

// The block's share of the estimate, to o_accum, for HEADS heads of every stream. The warps' sums meet in the buffer,
// [warp][HEADS][HEAD_DIM]: the scores there are no longer needed, those of the next heads of the stream lie further on.
template <typename T, int HEAD_DIM, int HEADS>
__device__ __forceinline__ void estimate(const DecodeParams& p, PersistentShared& shared, const BlockScores& scores,
                                         const SelectRole& role, const Block& block, SoftmaxState state, int head_base,
                                         int warp, int lane) {
  constexpr int kLanes = HEAD_DIM / 4;
  float acc[HEADS][8] = {};
  if (role.active) {
    draw_and_gather<T, HEAD_DIM, HEADS>(acc, p, shared, scores, role, block, state, head_base, warp, lane);
  }
  select_barrier();  // all are done with these heads' scores
  float4* const partial = reinterpret_cast<float4*>(scores.planes);
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    float sums[8];
#pragma unroll
    for (int d = 0; d < 8; ++d) sums[d] = reduce_rows<HEAD_DIM>(acc[h][d]);
    if (lane < GatherShape<HEAD_DIM>::kChunks) {
      float4* out = partial + (warp * HEADS + h) * kLanes + lane * 2;
      out[0] = {sums[0], sums[1], sums[2], sums[3]};
      out[1] = {sums[4], sums[5], sums[6], sums[7]};
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
#pragma unroll
      for (int w = 0; w < kSelectWarps; ++w) add(sum, partial[w * HEADS * kLanes + item]);
    } else {
      const int h = item / kLanes;
      for (int part = 0; part < role.num_parts; ++part) {
        add(sum, partial[(h * role.num_parts + part) * kLanes + item % kLanes]);
      }
      const SegmentPlan plan = plan_segments(block.num_blocks, 1, p.num_samples, p.budget == Budget::kUniform);
      const float scale = segment_factor(shared.segment_lse[h], shared.row_lse[h]) / static_cast<float>(plan.draws);
      sum.x *= scale, sum.y *= scale, sum.z *= scale, sum.w *= scale;
    }
    out[item] = sum;
  }
}

// Adds up the blocks of a (batch row, KV head), in block order, and writes the output.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void combine_blocks(const DecodeParams& p, const PersistentShared& shared,
                                               const Block& block, float4* partial) {
  constexpr int kLanes = HEAD_DIM / 4;
  const int64_t group = p.group_index(block.batch_index, block.kv_head);
  const int items = p.gqa_group_size * kLanes, slots = max(1, kSelectThreads / items);
  const float* blocks = p.o_accum + p.stats_offset(group) * HEAD_DIM;
  const auto write = [&](int item, float4 sum) {
    const int h = item / kLanes;
    if (!is_finite(shared.row_lse[h])) {  // a NaN or an infinite score: undefined
      const float nan = __int_as_float(0x7fffffff);
      sum = {nan, nan, nan, nan};
    }
    T* out = static_cast<T*>(p.out) +
             (static_cast<int64_t>(block.batch_index) * p.num_qo_heads + block.kv_head * p.gqa_group_size) * HEAD_DIM;
    *reinterpret_cast<uint2*>(out + item * 4) = {Half<T>::pack(sum.x, sum.y), Half<T>::pack(sum.z, sum.w)};
  };
  const auto sum_blocks = [&](int item, int first, int step) {
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int b = first; b < block.num_blocks; b += step) {
      add(sum, __ldcg(reinterpret_cast<const float4*>(blocks) + static_cast<int64_t>(b) * items + item));
    }
    return sum;
  };
  const int thread = threadIdx.x, slot = thread / items;
  if (slots == 1) {
    for (int item = thread; item < items; item += kSelectThreads) write(item, sum_blocks(item, 0, 1));
  } else if (slot < slots) {
    partial[thread] = sum_blocks(thread % items, slot, slots);
  }
  select_barrier();
  if (slots > 1 && thread < items) {
    float4 sum = partial[thread];
    for (int s = 1; s < slots; ++s) add(sum, partial[s * items + thread]);
    write(thread, sum);
  }
  if (p.rows_read != nullptr && thread < 32) {
    int rows = 0;
    for (int b = thread; b < block.num_blocks; b += 32) rows += __ldcg(p.tile_rows + p.stream_offset(group, 0) + b);
    rows = __reduce_add_sync(0xffffffffu, rows);
    if (thread == 0) p.rows_read[group] = rows;
  }
  select_barrier();  // row_lse is the next block's from here on
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void select_blocks(const DecodeParams& p, const PersistentMemory& memory) {
  PersistentShared& shared = *memory.shared;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const SelectRole role(p, warp);
  BlockQueue queue(p, lane);
  Block block;
  for (int n = 0; queue.find(blockIdx.x + static_cast<int64_t>(n) * gridDim.x, block); ++n) {
    const int buffer = n % p.persistent.num_buffers, use = n / p.persistent.num_buffers;
    const int64_t group = p.group_index(block.batch_index, block.kv_head);
    mbarrier_wait(&shared.full[buffer], use & 1);

    const SoftmaxState state = merge_warp_states(shared.warp_state[buffer], p.persistent.num_score_warps, lane);
    if (role.active && role.part == 0 && lane >= role.first_head && lane < role.first_head + role.num_heads) {
      store_relaxed(p.block_state + (group * p.max_blocks + block.index) * role.group_size + lane, bits_of(state));
    }
    if (p.rows_read != nullptr && threadIdx.x < kMaxBlockKv / 32) shared.read_mask[threadIdx.x] = 0;
    const BlockScores scores(p, memory, buffer, role, block);
    if (role.active) {
      exponentiate(scores, role, state, lane);
      if (role.part == 0) plan_stream(p, shared, role, block, lane);
    }
    select_barrier();  // the plans are there

    uint32_t weight = 0;
    if (role.active) weight = weigh(scores, role, state, shared.segment_lse, lane);
    if (lane == 0) shared.part_weight[warp] = weight;
    select_barrier();  // so are the weights

    if (role.grouped) {
      for (int head = 0; head < role.group_size; head += kGatherHeads) {
        estimate<T, HEAD_DIM, kGatherHeads>(p, shared, scores, role, block, state, head, warp, lane);
      }
    } else {
      estimate<T, HEAD_DIM, 1>(p, shared, scores, role, block, state, 0, warp, lane);
    }
    if (p.rows_read != nullptr && warp == 0) {
      int rows = 0;
      for (int word = lane; word < kMaxBlockKv / 32; word += 32) rows += __popc(shared.read_mask[word]);
      rows = __reduce_add_sync(0xffffffffu, rows);
      if (lane == 0) p.tile_rows[p.stream_offset(group, 0) + block.index] = rows;
    }

    __threadfence();
    select_barrier();
    if (threadIdx.x == 0) {
      // The counter starts at -1.
      shared.is_last = atomicAdd(&p.tickets[group], 1u) + 2 == static_cast<uint32_t>(block.num_blocks);
      __threadfence();
    }
    select_barrier();
    if (shared.is_last) combine_blocks<T, HEAD_DIM>(p, shared, block, reinterpret_cast<float4*>(scores.planes));
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.empty[buffer]);
  }
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kMaxPersistentThreads, 1)
    persistent_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const PersistentMemory memory(p, shared_bytes);
  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < p.persistent.num_buffers; ++buffer) {
      mbarrier_init(&memory.shared->full[buffer], p.persistent.num_score_warps);
      mbarrier_init(&memory.shared->empty[buffer], kSelectWarps);
    }
  }
  __syncthreads();
  if (threadIdx.x < kSelectThreads) {
    select_blocks<T, HEAD_DIM>(p, memory);
  } else {
    score_blocks<T, HEAD_DIM>(p, memory);
  }
}

}  // namespace santa::cuda
