// Scores of proposal keys: products of the codes of keys with those of the query vectors, in integers. Keys are the M
// of m16n8k32 and up to 8 query vectors its N.
//
// A lane (g, t) reads the t-th quarter of the codes of keys g and g + 8. The low nibbles of a word are four features of
// the first half of head_dim, the high ones those of the second half that lie as far in: A fragments for which the
// codes of q, at the same features, are B fragments. Codes are stored 8 too high, which is taken off the products.
#pragma once

#include "cuda/decode/load.cuh"
#include "cuda/decode/one_pass.cuh"
#include "cuda/proposal/heuristics.h"
#include "proposal_params.h"

namespace santa::cuda {

// What a CTA knows of its query vectors, in shared memory; those past the heads of the block are zeros.
template <int HEAD_DIM>
struct QueryCodes {
  float exact[kHeadBlock][HEAD_DIM];  // q times the scale of logits: for the rows that are drawn
  int8_t codes[kHeadBlock][HEAD_DIM];
  ProposalQuery common[kHeadBlock];
  int offset[kHeadBlock];  // what products are too large
};

// By warps first, first + step, ... of as many as there are heads at most.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void put_queries(const ProposalParams& p, const RowUnit& unit, QueryCodes<HEAD_DIM>& queries,
                                            int first, int step, int lane) {
  constexpr int kFeatures = HEAD_DIM / 32;  // of a lane
  const DecodeParams& d = p.decode;
  const int64_t statistics = p.statistics_offset(unit.batch_index, unit.kv_head);
  const float score_scale = d.score_scale(unit.kv_head);
#pragma unroll 1
  for (int head = first; head < kHeadBlock; head += step) {
    const bool there = head < unit.heads.count;
    const T* const row = static_cast<const T*>(d.q) +
                         d.query_offset(unit.batch_index, unit.kv_head, unit.heads.first + (there ? head : 0));
    float q[kFeatures], scaled[kFeatures], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      q[i] = there ? Float16Traits<T>::to_float(row[i * 32 + lane]) : 0.0f;
      scaled[i] = q[i] * __ldg(p.channel_scale + statistics + i * 32 + lane);
      largest = larger_magnitude(largest, scaled[i]);
    }
    float shift = 0.0f;  // in the order of core/proposal.h
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) shift = fmaf(q[i], __ldg(p.center + statistics + i * 32 + lane), shift);
#pragma unroll
    for (int apart = kCenterLanes / 2; apart > 0; apart /= 2) {
      largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
      shift += __shfl_xor_sync(0xffffffffu, shift, apart);
    }
    const float scale = query_scale_of(largest);
    int sum = 0;
    // From shared memory, where a lane finds its own: a loop, as divisions take many instructions.
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) queries.exact[head][i * 32 + lane] = scaled[i];
#pragma unroll 1
    for (int feature = lane; feature < HEAD_DIM; feature += 32) {
      const int code = query_code_of(queries.exact[head][feature], scale);
      queries.codes[head][feature] = static_cast<int8_t>(code);
      sum += code;
    }
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) queries.exact[head][i * 32 + lane] = q[i] * score_scale;
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) {
      queries.common[head] = {score_scale * scale, score_scale * shift};
      queries.offset[head] = kCodeOffset * sum;
    }
  }
}

// T of q.
template <typename T, int HEAD_DIM>
struct CodeScorer {
  static constexpr bool kFloat8 = false, kProposes = true;
  static constexpr int kSlotKeys = code_slot_keys(HEAD_DIM), kRowBytes = HEAD_DIM / 2;
  static constexpr int kScales = kSlotKeys * kRowBytes;  // where they begin in a slot
  static constexpr int kSlotBytes = code_slot_bytes(HEAD_DIM), kPilotBytes = kSlotBytes;
  static constexpr int kOnceBytes = query_bytes(HEAD_DIM), kDrawBytes = kProposedDrawBytes;
  static constexpr int kWords = HEAD_DIM / 32;        // of a lane, in the codes of a key
  static constexpr int kLaneFeatures = HEAD_DIM / 8;  // of a lane, in each half
  static constexpr int kPages = kSlotKeys / 32;
  static_assert(sizeof(QueryCodes<HEAD_DIM>) == kOnceBytes, "heuristics.h has to know of it");
  static_assert(kSlotBytes % 16 == 0 && kPilotWarpKeys <= kSlotKeys);

  const ProposalParams& p;
  const QueryCodes<HEAD_DIM>& queries;
  int batch_index, kv_head, kv_start;
  int32_t page[kPages] = {};   // where keys are paged: of keys `lane` and 32 further on of the slot that is copied next
  uint32_t query[2 * kWords];  // codes of q, of head g: B fragments of the first half of head_dim, then of the second
  ProposalQuery common[2];     // of the lane's heads, 2 t and the next
  int offset[2];               // what their products are too large

  __device__ __forceinline__ CodeScorer(const ProposalParams& p, const RowUnit& unit,
                                        const QueryCodes<HEAD_DIM>& queries)
      : p(p), queries(queries), batch_index(unit.batch_index), kv_head(unit.kv_head), kv_start(unit.row.kv_start) {}

  // By the warps that score no keys, before the others need it.
  __device__ __forceinline__ void put_queries(unsigned char* area, const RowUnit& unit, int first, int step,
                                              int lane) const {
    cuda::put_queries<T, HEAD_DIM>(p, unit, *reinterpret_cast<QueryCodes<HEAD_DIM>*>(area), first, step, lane);
  }
  __device__ __forceinline__ float* tile_drawn() const { return p.tile_drawn; }
  __device__ __forceinline__ KvRows<uint8_t> codes() const { return p.code_rows(batch_index, kv_head, kv_start); }
  __device__ __forceinline__ KvRows<uint16_t> scales() const { return p.scale_rows(batch_index, kv_head, kv_start); }

  // From what put_queries has left.
  __device__ __forceinline__ void load_query(const RowUnit&, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int word = 0; word < 2 * kWords; ++word) {
      const int feature = word / kWords * (HEAD_DIM / 2) + t * kLaneFeatures + word % kWords * 4;
      query[word] = *reinterpret_cast<const uint32_t*>(&queries.codes[g][feature]);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) common[j] = queries.common[2 * t + j], offset[j] = queries.offset[2 * t + j];
  }

  static __device__ __forceinline__ int num_slots(int num_keys) { return ceil_div_int(num_keys, kSlotKeys); }

  __device__ __forceinline__ void look_up(int first, int num_keys, int index, int lane) {
    if (!p.decode.paged) return;
    const KvRows<uint8_t> rows = codes();
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      page[i] = rows.page_of(first + min(index * kSlotKeys + i * 32 + lane, num_keys - 1));
    }
  }

  // Starts the copy of slot `index` of the tile whose first key is `first`.
  __device__ __forceinline__ void load(uint32_t slot, int first, int num_keys, int index, uint64_t policy,
                                       int lane) const {
    const int begin = first + index * kSlotKeys, there = min(num_keys - index * kSlotKeys, kSlotKeys);
    const KvRows<uint8_t> rows = codes();
    if (!rows.paged() && rows.stride_token == kRowBytes && p.codes_aligned) {  // one behind the other
      const uint8_t* const source = rows.base + static_cast<int64_t>(begin) * kRowBytes + lane * 16;
      if (there == kSlotKeys) {
#pragma unroll
        for (int i = 0; i < kScales / 512; ++i) cp_async_whole_16(slot + i * 512 + lane * 16, source + i * 512, policy);
      } else {
#pragma unroll 1
        for (int byte = lane * 16; byte < kScales; byte += 512) {
          const bool valid = byte < there * kRowBytes;
          cp_async_16(slot + byte, rows.base + (valid ? static_cast<int64_t>(begin) * kRowBytes + byte : 0), valid,
                      policy);
        }
      }
    } else {
      const uint8_t* own[kPages];  // rows lane and 32 further on
#pragma unroll
      for (int i = 0; i < kPages; ++i) {
        const int key = begin + min(i * 32 + lane, there - 1);
        own[i] = rows.paged() ? rows.row_in(page[i], key) : rows.row(key);
      }
      copy_rows<kSlotKeys>(slot, own, there, policy, lane);
    }
    load_scales(slot, begin, there, policy, lane);
  }

  __device__ __forceinline__ void begin(int, int) {}

  template <typename Put>
  __device__ __forceinline__ void score(uint32_t slot, int, int lane, const Put& put) const {
    score_rows<kSlotKeys>(slot, lane, put);
  }

  __device__ __forceinline__ void finish(TileScores&, int) const {}

  template <typename Put>
  __device__ __forceinline__ void score_pilot(uint32_t slot, int part, const RowUnit& unit, int lane, const Put& put) {
    const int kv_len = unit.row.kv_len, size = pilot_size(kv_len), first = part * kPilotWarpKeys;
    const int key = pilot_position(min(first + lane, size - 1), kv_len, 1);
    const uint8_t* own[1] = {codes().row(key)};
    copy_rows<kPilotWarpKeys>(slot, own, min(size - first, kPilotWarpKeys), evict_normal_policy(), lane);
    cp_async_commit();
    const uint16_t scale = *scales().row(key);
    load_query(unit, lane);
    store_shared_2(slot + kScales + lane * 2, scale);
    cp_async_wait<0>();
    __syncwarp();
    score_rows<kPilotWarpKeys>(slot, lane, [&](int row, const float (&logits)[4]) { put((first + row) / 16, logits); });
  }

 private:
  // ROWS rows whose addresses lanes have, the first `there` of them.
  template <int ROWS>
  __device__ __forceinline__ void copy_rows(uint32_t slot, const uint8_t* const (&own)[ROWS / 32], int there,
                                            uint64_t policy, int lane) const {
    constexpr int kChunks = kRowBytes / 16;  // of a row
    static_assert(kRowBytes % 16 == 0);
#pragma unroll
    for (int part = 0; part < ROWS / 32; ++part) {
      if (p.codes_aligned) {
#pragma unroll 2
        for (int i = 0; i < kChunks; ++i) {
          const int item = i * 32 + lane, row = item / kChunks, chunk = item % kChunks;
          const bool valid = part * 32 + row < there;
          const uint8_t* const source = shuffle(own[part], row);
          cp_async_16(slot + (part * 32 + row) * kRowBytes + chunk * 16, source + (valid ? chunk * 16 : 0), valid,
                      policy);
        }
      } else {
#pragma unroll 1
        for (int item = lane; item < 32 * kRowBytes; item += 32) {
          const int row = item / kRowBytes, byte = item % kRowBytes;
          const uint8_t* const source = shuffle(own[part], row);
          store_shared_1(slot + part * 32 * kRowBytes + item, part * 32 + row < there ? source[byte] : 0);
        }
      }
    }
  }

  // Eight at a time where they lie side by side, and there are no pages or pages of as many at least.
  __device__ __forceinline__ void load_scales(uint32_t slot, int begin, int there, uint64_t policy, int lane) const {
    const KvRows<uint16_t> rows = scales();
    const int own = min(lane, kSlotKeys / 8 - 1) * 8;
    const bool side_by_side =
        p.scales_side_by_side && ((rows.paged() ? rows.first_position + begin : kv_start + begin) & 7) == 0;
    if (side_by_side) {
      const bool valid = own < there;
      const uint16_t* const source = rows.row(begin + (valid ? own : 0));
      if (lane < kSlotKeys / 8) {
        cp_async_up_to_16(slot + kScales + own * 2, source, valid ? min(there - own, 8) * 2 : 0, policy);
      }
      return;
    }
#pragma unroll 1
    for (int row = lane; row < kSlotKeys; row += 32) {
      store_shared_2(slot + kScales + row * 2, row < there ? *rows.row(begin + row) : 0);
    }
  }

  template <int ROWS, typename Put>
  __device__ __forceinline__ void score_rows(uint32_t slot, int lane, const Put& put) const {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int first = 0; first < ROWS; first += 16) {
      uint32_t low[kWords], high[kWords];  // of keys g and g + 8
      const uint32_t address = slot + (first + g) * kRowBytes + t * (kRowBytes / 4);
      load_words(low, address);
      load_words(high, address + 8 * kRowBytes);
      const float scales[2] = {scale_at(slot, first + g), scale_at(slot, first + g + 8)};
      int32_t products[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        constexpr uint32_t kLow = 0x0f0f0f0fu;
        mma_u8_s8(products, {low[i] & kLow, high[i] & kLow, low[i] >> 4 & kLow, high[i] >> 4 & kLow}, query[i],
                  query[kWords + i]);
      }
      float logits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[i] = common[i & 1].logit(products[i] - offset[i & 1], scales[i >> 1]);
      put(first, logits);
    }
  }

  static __device__ __forceinline__ float scale_at(uint32_t slot, int row) {
    const uint16_t bits = load_shared_2(slot + kScales + row * 2);
    return __half2float(*reinterpret_cast<const __half*>(&bits));
  }

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

}  // namespace santa::cuda
