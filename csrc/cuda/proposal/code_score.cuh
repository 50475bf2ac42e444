// Scores of proposal keys: products of the codes of keys with those of the query vectors, in integers. Keys are the M
// of m16n8k32 and query vectors its N.
//
// A lane (g, t) reads the t-th quarter of the codes of keys g and g + 8. The low nibbles of a word are four features of
// the first half of head_dim, the high ones those of the second half that lie as far in: A fragments for which the
// codes of q, at the same features, are B fragments. High nibbles are not moved down: their products are 16 times too
// large, so those of the low ones are multiplied with 16 and all of them with the scale over 16, exactly. Codes are
// stored 8 too high, which is what sums start from.
#pragma once

#include "cuda/decode/one_pass.cuh"
#include "cuda/proposal/heuristics.h"
#include "proposal_params.h"

namespace santa::cuda {

// What a CTA knows of its query vectors, in shared memory; those past the heads of the block are zeros.
template <typename T, int HEAD_DIM>
struct alignas(16) QueryCodes {
  T exact[kHeadBlock][query_pitch(HEAD_DIM)];  // for the keys that are drawn
  int8_t codes[kHeadBlock][HEAD_DIM];
  ProposalQuery common[kHeadBlock];  // factor: over 16
  int offset[kHeadBlock];            // what products are too large
};

// A query vector and what its codes depend on, on their way to registers: a lane has features lane, lane + 32, ...
template <typename T, int HEAD_DIM>
struct QueryFeatures {
  static constexpr int kFeatures = HEAD_DIM / 32;

  T q[kFeatures];
  float channel_scale[kFeatures], center[kFeatures];

  // Of `head` of the block, which is there.
  __device__ __forceinline__ void load(const ProposalParams& p, const RowUnit& unit, int head, int lane) {
    const DecodeParams& d = p.decode;
    const int64_t statistics = p.statistics_offset(unit.batch_index, unit.kv_head) + lane;
    const T* const row =
        static_cast<const T*>(d.q) + d.query_offset(unit.batch_index, unit.kv_head, unit.heads.first + head) + lane;
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      q[i] = row[i * 32];
      channel_scale[i] = __ldg(p.channel_scale + statistics + i * 32);
      center[i] = __ldg(p.center + statistics + i * 32);
    }
  }

  __device__ __forceinline__ void put(const ProposalParams& p, const RowUnit& unit, QueryCodes<T, HEAD_DIM>& queries,
                                      int head, int lane) const {
    float scaled[kFeatures], largest = 0.0f, shift = 0.0f;  // the shift in the order of core/proposal.h
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      const float feature = Float16Traits<T>::to_float(q[i]);
      scaled[i] = feature * channel_scale[i];
      largest = larger_magnitude(largest, scaled[i]);
      shift = fmaf(feature, center[i], shift);
      queries.exact[head][i * 32 + lane] = q[i];
    }
#pragma unroll
    for (int apart = kCenterLanes / 2; apart > 0; apart /= 2) {
      largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
      shift += __shfl_xor_sync(0xffffffffu, shift, apart);
    }
    const float scale = query_scale_of(largest), inverse = inverse_scale_of(scale);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      const int code = query_code_of(scaled[i], inverse);
      queries.codes[head][i * 32 + lane] = static_cast<int8_t>(code);
      sum += code;
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) {
      const float score_scale = p.decode.score_scale(unit.kv_head);
      queries.common[head] = {score_scale * scale * 0.0625f, score_scale * shift};
      queries.offset[head] = kCodeOffset * sum;
    }
  }

  // One that is not there.
  static __device__ __forceinline__ void put_zeros(QueryCodes<T, HEAD_DIM>& queries, int head, int lane) {
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      queries.exact[head][i * 32 + lane] = Float16Traits<T>::from_float(0.0f);
      queries.codes[head][i * 32 + lane] = 0;
    }
    if (lane == 0) queries.common[head] = {0.0f, 0.0f}, queries.offset[head] = 0;
  }
};

// All query vectors of the block, by `num_warps` warps. `features`: of head `warp`, loaded if it is there, long before.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void put_queries(const ProposalParams& p, const RowUnit& unit,
                                            QueryFeatures<T, HEAD_DIM>& features, QueryCodes<T, HEAD_DIM>& queries,
                                            int warp, int num_warps, int lane) {
  static_assert(sizeof(QueryCodes<T, HEAD_DIM>) == query_bytes(HEAD_DIM), "heuristics.h has to know of it");
#pragma unroll 1
  for (int head = warp; head < kHeadBlock; head += num_warps) {
    if (head >= unit.heads.count) {
      QueryFeatures<T, HEAD_DIM>::put_zeros(queries, head, lane);
      continue;
    }
    if (head != warp) features.load(p, unit, head, lane);
    features.put(p, unit, queries, head, lane);
  }
}

// Where codes and scales of the first key lie.
struct alignas(16) FirstKey {
  const uint8_t* code;
  const uint16_t* scale;
};

// Codes and scales of a row's keys, a slot of kCodeSlotKeys of them at a time: how they get to shared memory.
template <int HEAD_DIM>
struct CodeSlots {
  static constexpr int kRowBytes = HEAD_DIM / 2, kScales = kCodeSlotKeys * kRowBytes;  // where scales begin in a slot
  static constexpr int kChunks = kRowBytes / 16;                                       // of a row
  static_assert(kCodeSlotKeys == 32, "a lane finds the row of one key");

  // From the row's first key on.
  static __device__ __forceinline__ KvRows<uint8_t> codes(const ProposalParams& p, const RowUnit& unit) {
    return p.code_rows(unit.batch_index, unit.kv_head, unit.row.kv_start);
  }
  static __device__ __forceinline__ KvRows<uint16_t> scales(const ProposalParams& p, const RowUnit& unit) {
    return p.scale_rows(unit.batch_index, unit.kv_head, unit.row.kv_start);
  }

  // Whether all codes lie one behind the other, and all scales.
  static __device__ __forceinline__ bool side_by_side(const ProposalParams& p, const RowUnit& unit) {
    return !p.decode.paged && p.stride_codes_token == kRowBytes && p.codes_aligned && p.scales_side_by_side &&
           (unit.row.kv_start & 7) == 0;
  }
  static __device__ __forceinline__ FirstKey find_first(const ProposalParams& p, const RowUnit& unit, int key) {
    return {codes(p, unit).base + static_cast<int64_t>(key) * kRowBytes, scales(p, unit).base + key};
  }

  // Starts the copy of a slot, whole and side by side: of keys `begin` and on, counted from the first one.
  static __device__ __forceinline__ void load_whole(uint32_t slot, const FirstKey& first, int begin, int lane) {
    const uint64_t policy = evict_first_policy();
    const uint4 words = load_shared_16(shared_address(&first));
    const auto address = [](uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; };
    const auto* const source = reinterpret_cast<const uint8_t*>(address(words.x, words.y)) +
                               static_cast<int64_t>(begin) * kRowBytes + lane * 16;
    const auto* const scale = reinterpret_cast<const uint16_t*>(address(words.z, words.w)) + (begin + lane * 8);
#pragma unroll
    for (int i = 0; i < kScales / 512; ++i) cp_async_whole_16(slot + i * 512 + lane * 16, source + i * 512, policy);
    cp_async_whole_16_if(lane < kCodeSlotKeys / 8, slot + kScales + lane * 16, scale, policy);
  }

  // Of any: of the row's keys from `begin` on, of which `there` are there, which may be more than a slot has. `page`:
  // of key `lane` of the slot, looked up before; returned is that of as many keys from `next` on, of which `next_there`
  // are there. Out of line: code that seldom runs gets in the way of what does.
  static __device__ __noinline__ int32_t load(const ProposalParams* p, const RowUnit* unit, uint32_t slot, int begin,
                                              int there, int32_t page, int next, int next_there) {
    const int lane = threadIdx.x & 31;
    const uint64_t policy = evict_first_policy();
    const KvRows<uint8_t> rows = codes(*p, *unit);
    if (there > 0) {
      const int key = begin + min(lane, there - 1);
      copy_rows(slot, rows.paged() ? rows.row_in(page, key) : rows.row(key), p->codes_aligned, there, policy, lane);
      copy_scales(*p, *unit, slot, begin, there, page, policy, lane);
    }
    return rows.paged() && next_there > 0 ? rows.page_of(next + min(lane, next_there - 1)) : 0;
  }

  // The rows of up to 32 keys, a lane's each.
  static __device__ __forceinline__ void copy_rows(uint32_t slot, const uint8_t* own, bool aligned, int there,
                                                   uint64_t policy, int lane) {
    if (aligned) {
#pragma unroll 2
      for (int i = 0; i < kChunks; ++i) {
        const int item = i * 32 + lane, row = item / kChunks, chunk = item % kChunks;
        const uint8_t* const source = shuffle(own, row);
        cp_async_16(slot + row * kRowBytes + chunk * 16, source + (row < there ? chunk * 16 : 0), row < there, policy);
      }
      return;
    }
#pragma unroll 1
    for (int item = lane; item < kScales; item += 32) {
      const int row = item / kRowBytes;
      const uint8_t* const source = shuffle(own, row);
      store_shared_1(slot + item, row < there ? source[item % kRowBytes] : 0);
    }
  }

  // Eight at a time where they lie side by side, and there are no pages or pages of as many at least.
  static __device__ __forceinline__ void copy_scales(const ProposalParams& p, const RowUnit& unit, uint32_t slot,
                                                     int begin, int there, int32_t page, uint64_t policy, int lane) {
    const KvRows<uint16_t> rows = scales(p, unit);
    const int own = lane % (kCodeSlotKeys / 8) * 8;
    const bool valid = own < there;
    const int key = begin + (valid ? own : 0);
    if (p.scales_side_by_side && ((unit.row.kv_start + begin) & 7) == 0) {
      const int32_t own_page = __shfl_sync(0xffffffffu, page, valid ? own : 0);
      const uint16_t* const source = rows.paged() ? rows.row_in(own_page, key) : rows.row(key);
      if (lane < kCodeSlotKeys / 8) {
        cp_async_up_to_16(slot + kScales + own * 2, source, valid ? min(there - own, 8) * 2 : 0, policy);
      }
      return;
    }
    const int last = begin + min(lane, there - 1);
    const uint16_t scale = *(rows.paged() ? rows.row_in(page, last) : rows.row(last));
    store_shared_2(slot + kScales + lane * 2, lane < there ? scale : 0);
  }
};

// The logits of the proposal, from slots. QUADS: of heads. Products are of eight query vectors: where a block has four
// at most, each of them is there twice, and lanes with t = 2, 3 take the next 16 keys of heads 2 t - 4 and the next.
template <typename T, int HEAD_DIM, int QUADS>
struct CodeScorer {
  static constexpr int kRowBytes = HEAD_DIM / 2, kWords = HEAD_DIM / 32;  // words: of a lane, in the codes of a key
  static constexpr int kLaneFeatures = HEAD_DIM / 8;                      // of a lane, in each half
  static constexpr int kGroups = kCodeSlotKeys / 16;
  static_assert(kGroups == 2);

  const QueryCodes<T, HEAD_DIM>& queries;
  uint32_t query[2 * kWords];  // codes of q, of head g: B fragments of the first half of head_dim, then of the second

  // The first of the lane's two heads.
  static __device__ __forceinline__ int head_of(int lane) { return 2 * (lane & (QUADS == 1 ? 1 : 3)); }

  __device__ __forceinline__ CodeScorer(const QueryCodes<T, HEAD_DIM>& queries, int lane) : queries(queries) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int word = 0; word < 2 * kWords; ++word) {
      const int feature = word / kWords * (HEAD_DIM / 2) + t * kLaneFeatures + word % kWords * 4;
      query[word] = *reinterpret_cast<const uint32_t*>(&queries.codes[QUADS == 1 ? g & 3 : g][feature]);
    }
  }

  // Hands logits of the slot to put(first, logits): keys first + g and first + g + 8, of the lane's heads each. `first`
  // is 0 and 16, or, with one quad, the lane's.
  template <typename Put>
  __device__ __forceinline__ void score(uint32_t slot, int lane, const Put& put) const {
    const int g = lane >> 2, t = lane & 3;
    constexpr uint32_t kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
    uint32_t words[2 * kGroups][kWords];  // of keys g, g + 8, ...
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) load_words(words[i], slot + (i * 8 + g) * kRowBytes + t * (kRowBytes / 4));
    // From shared memory: registers are few.
    const uint2 too_large = load_shared_8(shared_address(&queries.offset[head_of(lane)]));
    int32_t low[kGroups][4], high[kGroups][4];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      low[n][0] = low[n][2] = -static_cast<int32_t>(too_large.x);
      low[n][1] = low[n][3] = -static_cast<int32_t>(too_large.y);
#pragma unroll
      for (int i = 0; i < 4; ++i) high[n][i] = 0;
    }
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const uint32_t (&own)[kWords] = words[2 * n], (&other)[kWords] = words[2 * n + 1];
        mma_u8_s8(low[n], {own[w] & kLow, other[w] & kLow, own[w + 1] & kLow, other[w + 1] & kLow}, query[w],
                  query[w + 1]);
        mma_u8_s8(high[n], {own[w] & kHigh, other[w] & kHigh, own[w + 1] & kHigh, other[w + 1] & kHigh},
                  query[kWords + w], query[kWords + w + 1]);
      }
    }
    if constexpr (kWords % 2 == 1) {
      constexpr int w = kWords - 1;
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const uint32_t own = words[2 * n][w], other = words[2 * n + 1][w];
        mma_u8_s8(low[n], {own & kLow, other & kLow, own >> 4 & kLow, other >> 4 & kLow}, query[w], query[kWords + w]);
      }
    }
    const uint4 four = load_shared_16(shared_address(&queries.common[head_of(lane)]));
    const ProposalQuery common[2] = {{__uint_as_float(four.x), __uint_as_float(four.y)},
                                     {__uint_as_float(four.z), __uint_as_float(four.w)}};
    const auto put_sums = [&](int first, const int32_t (&sums)[4]) {
      float logits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint16_t bits = load_shared_2(slot + CodeSlots<HEAD_DIM>::kScales + (first + (i >> 1) * 8 + g) * 2);
        logits[i] = common[i & 1].logit(sums[i], __half2float(*reinterpret_cast<const __half*>(&bits)));
      }
      put(first, logits);
    };
    int32_t sums[kGroups][4];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = low[n][i] * 16 + high[n][i];
    }
    if constexpr (QUADS == 1) {
      const bool later = t >= 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][i] = later ? sums[1][i] : sums[0][i];
      put_sums(later ? 16 : 0, sums[0]);
    } else {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) put_sums(16 * n, sums[n]);
    }
  }

 private:
  static __device__ __forceinline__ void load_words(uint32_t (&words)[kWords], uint32_t address) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = load_shared_16(address + i * 4);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    } else if constexpr (kWords % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const uint2 two = load_shared_8(address + i * 4);
        words[i] = two.x, words[i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = __float_as_uint(load_shared_float(address + i * 4));
    }
  }
};

// What find_level asks for scores. Copies are started first: the query vectors take their time.
template <typename T, int HEAD_DIM>
struct PilotScorer {
  static constexpr int kPilotBytes = code_slot_bytes(HEAD_DIM);
  static_assert(kPilotWarpKeys == kCodeSlotKeys);

  const QueryCodes<T, HEAD_DIM>& queries;

  static __device__ __forceinline__ void load(const ProposalParams& p, const RowUnit& unit, uint32_t slot, int part,
                                              int lane) {
    const int kv_len = unit.row.kv_len, size = pilot_size(kv_len), first = part * kPilotWarpKeys;
    if (first >= size) return;
    using Slots = CodeSlots<HEAD_DIM>;
    const int key = pilot_position(min(first + lane, size - 1), kv_len, 1);
    Slots::copy_rows(slot, Slots::codes(p, unit).row(key), p.codes_aligned, min(size - first, kPilotWarpKeys),
                     evict_normal_policy(), lane);
    cp_async_commit();
    store_shared_2(slot + Slots::kScales + lane * 2, *Slots::scales(p, unit).row(key));
  }

  template <typename Put>
  __device__ __forceinline__ void score_pilot(uint32_t slot, int part, const RowUnit&, int lane, const Put& put) const {
    const CodeScorer<T, HEAD_DIM, 2> scorer(queries, lane);
    cp_async_wait<0>();
    __syncwarp();
    scorer.score(slot, lane,
                 [&](int row, const float (&logits)[4]) { put(part * kPilotWarpKeys / 16 + row / 16, logits); });
  }
};

}  // namespace santa::cuda
