// Rows of keys and values on their way from memory to slots in shared memory, 16 bytes at a time, by one warp. Where a
// chunk lies in its slot is decided so that those who read it are free of bank conflicts.
#pragma once

#include <type_traits>

#include "core/kv_rows.h"
#include "cuda/common/float8.cuh"
#include "cuda/common/row_load.cuh"
#include "cuda/decode/heuristics.h"

namespace santa::cuda {

constexpr int kSlotRows = kTileSlotRows;  // the M of the matrix instruction

constexpr int slot_bytes(int head_dim) { return kSlotRows * slot_row_pitch(head_dim) * 2; }

// Byte offset of a 16-byte chunk in a slot. The chunk is permuted within groups of 8 so that both readers are free of
// bank conflicts: ldmatrix reads one chunk of 8 rows (all 8 differ), lanes that read their chunks themselves, 4 of 2
// adjacent rows at once (they differ in bit 2 of the permutation).
SANTA_HD constexpr uint32_t chunk_permutation(int row) { return (((row & 1) << 2) | ((row >> 1) & 3)) * 16; }

template <int HEAD_DIM>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * slot_row_pitch(HEAD_DIM) * 2) + (chunk * 16 ^ chunk_permutation(row));
}

// Byte offset of a 16-byte chunk of codes in a slot, rows without gaps. Two chunks, 32 bytes, stay together: lanes
// (g, t) of a half-warp read 8 bytes each, 32 of 4 adjacent rows, and the permutation spreads the 4 over all banks.
// Rows of 96 bytes need none. MATRICES: ldmatrix, which reads one chunk of 8 rows, is free of conflicts too. Then every
// other 4 rows have the two chunks the other way round.
template <int HEAD_DIM, bool MATRICES>
SANTA_HD constexpr uint32_t code_permutation(int row) {
  const int pair = HEAD_DIM % 128 == 0 ? row & 3 : HEAD_DIM % 64 == 0 ? (row >> 1) & 1 : 0;
  return pair * 32 + (MATRICES ? (row >> 2) & 1 : 0) * 16;
}

template <int HEAD_DIM, bool MATRICES>
__device__ __forceinline__ uint32_t code_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * HEAD_DIM) + (chunk * 16 ^ code_permutation<HEAD_DIM, MATRICES>(row));
}

// From the place of chunk c of a row to that of chunk c + further, where c is smaller than every power of two in
// `further`. SPAN: bytes within which chunks are permuted, and of which rows are multiples; what goes beyond them is an
// offset that an instruction holds.
template <int SPAN>
__device__ __forceinline__ uint32_t chunk_at(uint32_t place, int further) {
  return (place ^ (further * 16 & (SPAN - 1))) + (further * 16 & -SPAN);
}
constexpr int code_span(int head_dim) { return (head_dim & -head_dim) < 128 ? head_dim & -head_dim : 128; }

// Byte offset of a 16-byte chunk of a row in a slot, for both kinds of keys.
template <typename K, int HEAD_DIM, bool MATRICES>
__device__ __forceinline__ uint32_t place_of_chunk(int row, int chunk) {
  if constexpr (std::is_same_v<K, Float8>) {
    return code_offset<HEAD_DIM, MATRICES>(row, chunk);
  } else {
    return chunk_offset<HEAD_DIM>(row, chunk);
  }
}

// Of rows of K and V: with several head blocks they are read again soon.
__device__ __forceinline__ uint64_t kv_policy(const DecodeParams& p) {
  return p.group_size <= kHeadBlock ? evict_first_policy() : evict_normal_policy();
}

// How the lanes share the copy of 16 rows: a lane has the same chunk of every kRows-th row, and where a row has 3 x 2^n
// chunks, of each third of it.
template <typename K, int HEAD_DIM, bool MATRICES>
struct LaneShare {
  static constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  static constexpr int kChunkElements = 16 / sizeof(K), kChunks = HEAD_DIM / kChunkElements;
  static constexpr int kParts = kChunks % 3 == 0 ? 3 : 1, kWidth = kChunks / kParts;  // a power of two
  static constexpr int kRows = 32 / kWidth, kTurns = 16 / kRows;
  static constexpr int kRowBytes = kFloat8 ? HEAD_DIM : slot_row_pitch(HEAD_DIM) * 2;
  static constexpr int kSpan = kFloat8 ? code_span(HEAD_DIM) : 128;
  // Turns whose rows differ by whole periods of the permutation have a place in common, apart from an offset.
  static constexpr int kPermutationRows = kFloat8 && !MATRICES ? 4 : 8;
  static constexpr int kApart = kRows >= kPermutationRows ? 1 : kPermutationRows / kRows;
  static constexpr int kPlaces = kTurns < kApart ? kTurns : kApart;

  // Of the first row: where its chunk goes in a slot, and where it is in memory.
  static __device__ __forceinline__ uint32_t place(int lane) {
    return place_of_chunk<K, HEAD_DIM, MATRICES>(lane / kWidth, lane % kWidth);
  }
  static __device__ __forceinline__ int64_t offset(int64_t stride, int lane) {
    return lane / kWidth * stride + lane % kWidth * kChunkElements;
  }

  // If all rows are there: starts the copies to `place`, the lane's in the slot (which starts at a multiple of 128).
  // source_of(turn): the lane's chunk of the row kRows * turn.
  template <typename SourceOf>
  static __device__ __forceinline__ void copy(uint32_t place, const SourceOf& source_of, uint64_t policy) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t places[kPlaces];
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
        const int row = i * kRows;
        places[i] = opaque(chunk_at<kSpan>(place, part * kWidth) ^
                           (kFloat8 ? code_permutation<HEAD_DIM, MATRICES>(row) : chunk_permutation(row)));
      }
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        cp_async_whole_16(places[i % kPlaces] + i * kRows * kRowBytes, source_of(i) + part * kWidth * kChunkElements,
                          policy);
      }
    }
  }
};

// Starts the copy of the rows row_of(0) to row_of(num_rows - 1) to a slot of ROWS; zeros for the others, which are not
// read. Rows that are not aligned to 16 bytes are copied element by element. All lanes call row_of at once.
template <typename K, int HEAD_DIM, int ROWS, bool MATRICES = false, typename RowOf>
__device__ __forceinline__ void load_some_rows(uint32_t slot, const RowOf& row_of, int num_rows, bool aligned,
                                               uint64_t policy, int lane) {
  using Share = LaneShare<K, HEAD_DIM, MATRICES>;
  constexpr int kChunkElements = Share::kChunkElements;
  if (__builtin_expect(aligned, 1)) {
#pragma unroll 2
    for (int i = 0; i < ROWS * Share::kChunks / 32; ++i) {
      const int row = i / Share::kParts * Share::kRows + lane / Share::kWidth;
      const int chunk = i % Share::kParts * Share::kWidth + lane % Share::kWidth;
      const bool valid = row < num_rows;
      cp_async_16(slot + place_of_chunk<K, HEAD_DIM, MATRICES>(row, chunk),
                  row_of(valid ? row : 0) + chunk * kChunkElements, valid, policy);
    }
    return;
  }
  static_assert(HEAD_DIM % 32 == 0);  // the lanes are in the same row
#pragma unroll 1
  for (int item = lane; item < ROWS * HEAD_DIM; item += 32) {
    const int row = item / HEAD_DIM, column = item % HEAD_DIM;
    const uint32_t place = slot + place_of_chunk<K, HEAD_DIM, MATRICES>(row, column / kChunkElements) +
                           column % kChunkElements * static_cast<int>(sizeof(K));
    if constexpr (std::is_same_v<K, Float8>) {
      store_shared_1(place, row < num_rows ? row_of(row)[column].code : 0);
    } else {
      store_shared_2(place, row < num_rows ? reinterpret_cast<const uint16_t*>(row_of(row))[column] : 0);
    }
  }
}

// Starts the copy of GROUPS x 16 rows that are all there, `stride` elements from one to the next in a group. `place`,
// `sources`: the lane's shares. `policy`: called where it is needed, since it belongs in uniform registers.
template <typename K, int HEAD_DIM, bool MATRICES, int GROUPS, typename Policy>
__device__ __forceinline__ void load_groups(uint32_t place, const K* (&sources)[GROUPS], int64_t stride,
                                            const Policy& policy) {
  using Share = LaneShare<K, HEAD_DIM, MATRICES>;
  if (stride == HEAD_DIM) {  // one behind the other: offsets that the instruction holds
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const K* const source = opaque(sources[group]);
      Share::copy(
          place + group * 16 * Share::kRowBytes, [&](int turn) { return source + turn * Share::kRows * HEAD_DIM; },
          policy());
    }
  } else {
    const int64_t step = Share::kRows * stride;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const K* const source = sources[group];
      Share::copy(place + group * 16 * Share::kRowBytes, [&](int turn) { return source + turn * step; }, policy());
    }
  }
}

// Starts the copy of ROWS rows that are all there, wherever each is. `own`: the address of row `lane`.
template <typename K, int HEAD_DIM, bool MATRICES, int ROWS, typename Policy>
__device__ __forceinline__ void load_scattered(uint32_t slot, const K* own, const Policy& policy, int lane) {
  using Share = LaneShare<K, HEAD_DIM, MATRICES>;
#pragma unroll 1  // what is not run must not push out of the cache what is
  for (int row = lane / Share::kWidth; row < ROWS; row += Share::kRows) {
    const K* const source = shuffle(own, row) + lane % Share::kWidth * Share::kChunkElements;
#pragma unroll
    for (int part = 0; part < Share::kParts; ++part) {
      const int chunk = lane % Share::kWidth + part * Share::kWidth;
      cp_async_whole_16(slot + place_of_chunk<K, HEAD_DIM, MATRICES>(row, chunk),
                        source + part * Share::kWidth * Share::kChunkElements, policy());
    }
  }
}

// The same as load_some_rows for rows that are not paged, fast if they are all there: `first` and on. `share`: the
// lane's of row 0, an offset of LaneShare from it.
template <typename K, int HEAD_DIM, int ROWS, typename Policy>
__device__ __forceinline__ void load_rows(uint32_t slot, const K* share, int64_t stride, int64_t first, int num_rows,
                                          bool aligned, const Policy& policy, int lane) {
  using Share = LaneShare<K, HEAD_DIM, false>;
  if (unlikely(!aligned || num_rows < ROWS)) {
    const K* const base = share - Share::offset(stride, lane) + (num_rows > 0 ? first * stride : 0);
    load_some_rows<K, HEAD_DIM, ROWS>(
        slot, [&](int row) { return base + row * stride; }, num_rows, aligned, policy(), lane);
    return;
  }
  const K* sources[ROWS / 16];
  sources[0] = share + first * stride;
#pragma unroll
  for (int group = 1; group < ROWS / 16; ++group) sources[group] = sources[0] + 16 * group * stride;
  load_groups<K, HEAD_DIM, false>(slot + Share::place(lane), sources, stride, policy);
}

// Whether the 16 rows from a multiple of 16 on are in one page each.
template <typename K>
__device__ __forceinline__ bool has_whole_pages(const KvRows<K>& rows) {
  return rows.page_shift >= 4 && rows.first_position % 16 == 0;
}

// The same for rows that are; `first` is a multiple of 16. `own`: the address of row `lane`.
template <typename K, int HEAD_DIM, int ROWS, typename Policy>
__device__ __forceinline__ void load_paged_rows(uint32_t slot, const KvRows<K>& rows, const K* own, int64_t first,
                                                int num_rows, bool aligned, const Policy& policy, int lane) {
  using Share = LaneShare<K, HEAD_DIM, false>;
  if (!aligned || num_rows < ROWS) {
    const auto row_of = [&](int row) { return aligned ? shuffle(own, row) : rows.row(first + row); };
    load_some_rows<K, HEAD_DIM, ROWS>(slot, row_of, num_rows, aligned, policy(), lane);
    return;
  }
  if (has_whole_pages(rows)) {
    const K* sources[ROWS / 16];
#pragma unroll
    for (int group = 0; group < ROWS / 16; ++group) {
      sources[group] = shuffle(own, 16 * group) + Share::offset(rows.stride_token, lane);
    }
    load_groups<K, HEAD_DIM, false>(slot + Share::place(lane), sources, rows.stride_token, policy);
    return;
  }
  load_scattered<K, HEAD_DIM, false, ROWS>(slot, own, policy, lane);
}

// Of 16 rows, `first` and on, for kernels whose slots are as small; those past the first num_rows, which may be none
// and more than there are, become zeros. Rows are not paged.
template <typename T, int HEAD_DIM, typename Policy>
__device__ __forceinline__ void load_slot(uint32_t slot, const KvRows<T>& rows, int64_t first, int num_rows,
                                          bool aligned, const Policy& policy, int lane) {
  const T* const share = rows.base + LaneShare<T, HEAD_DIM, false>::offset(rows.stride_token, lane);
  load_rows<T, HEAD_DIM, kSlotRows>(slot, share, rows.stride_token, first, num_rows, aligned, policy, lane);
}

}  // namespace santa::cuda
