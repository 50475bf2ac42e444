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

// Byte offset of a 16-byte chunk of a row in a slot, for both kinds of keys.
template <typename K, int HEAD_DIM, bool MATRICES>
__device__ __forceinline__ uint32_t place_of_chunk(int row, int chunk) {
  if constexpr (std::is_same_v<K, Float8>) {
    return code_offset<HEAD_DIM, MATRICES>(row, chunk);
  } else {
    return chunk_offset<HEAD_DIM>(row, chunk);
  }
}

// Starts the copy of the rows row_of(0) to row_of(num_rows - 1) to a slot of ROWS; zeros for the others, which are not
// read. Rows that are not aligned to 16 bytes are copied element by element. All lanes call row_of at once.
template <typename K, int HEAD_DIM, int ROWS, bool MATRICES = false, typename RowOf>
__device__ __forceinline__ void load_some_rows(uint32_t slot, const RowOf& row_of, int num_rows, bool aligned,
                                               uint64_t policy, int lane) {
  constexpr int kChunkElements = 16 / sizeof(K), kChunks = HEAD_DIM / kChunkElements;
  if (__builtin_expect(aligned, 1)) {
#pragma unroll 2
    for (int i = 0; i < ROWS * kChunks / 32; ++i) {
      const int item = i * 32 + lane, row = item / kChunks, chunk = item % kChunks;
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

// The same for the rows `first` and on, fast if they are all there. `own`: where rows are paged, the
// address of row `lane`.
template <typename K, int HEAD_DIM, int ROWS, bool MATRICES = false>
__device__ __forceinline__ void load_rows(uint32_t slot, const KvRows<K>& rows, const K* own, int64_t first,
                                          int num_rows, bool aligned, uint64_t policy, int lane) {
  constexpr int kChunkElements = 16 / sizeof(K), kChunks = HEAD_DIM / kChunkElements, kCopies = ROWS * kChunks / 32;
  const int64_t stride = rows.stride_token;
  if (unlikely(!aligned || num_rows < ROWS)) {
    if (rows.paged()) {
      const auto row_of = [&](int row) { return aligned ? shuffle(own, row) : rows.row(first + row); };
      load_some_rows<K, HEAD_DIM, ROWS, MATRICES>(slot, row_of, num_rows, aligned, policy, lane);
    } else {
      const auto row_of = [&](int row) { return rows.base + (first + row) * stride; };
      load_some_rows<K, HEAD_DIM, ROWS, MATRICES>(slot, row_of, num_rows, aligned, policy, lane);
    }
    return;
  }
  // A pattern of rows and chunks that repeats every kPeriod copies, kPeriodRows further on: a power of two, and the
  // pattern's rows are below it, so that the permutation of row + i kPeriodRows is that of the two, one after the
  // other.
  constexpr int kPeriod = kChunks % 3 == 0 ? 3 : 1, kPeriodRows = 32 * kPeriod / kChunks;
  constexpr bool kFloat8 = std::is_same_v<K, Float8>;
  constexpr int kRowBytes = kFloat8 ? HEAD_DIM : slot_row_pitch(HEAD_DIM) * 2;
  static_assert((kPeriodRows & (kPeriodRows - 1)) == 0);
  // Copies whose rows differ by whole periods of the permutation have a place in common, apart from an offset.
  constexpr int kCount = kCopies / kPeriod, kPermutationRows = kFloat8 && !MATRICES ? 4 : 8;
  constexpr int kApart = kPeriodRows >= kPermutationRows ? 1 : kPermutationRows / kPeriodRows;
  constexpr int kPlaces = kCount < kApart ? kCount : kApart;
#pragma unroll
  for (int u = 0; u < kPeriod; ++u) {
    const int item = u * 32 + lane, row = item / kChunks, chunk = item % kChunks;
    const uint32_t place = slot + place_of_chunk<K, HEAD_DIM, MATRICES>(row, chunk);  // slots start at multiples of 128
    uint32_t places[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int further = i * kPeriodRows;
      places[i] =
          opaque(place ^ (kFloat8 ? code_permutation<HEAD_DIM, MATRICES>(further) : chunk_permutation(further)));
    }
    const auto copy = [&](int i, const K* source) {
      cp_async_whole_16(places[i % kPlaces] + i * kPeriodRows * kRowBytes, source, policy);
    };
    const K* source = rows.base + (first + row) * stride + chunk * kChunkElements;
    if (unlikely(rows.paged())) {  // a loop: what is not run must not push out of the cache what is
#pragma unroll 1
      for (int i = 0; i < kCount; i += kPlaces) {
#pragma unroll
        for (int j = 0; j < kPlaces; ++j) {
          cp_async_whole_16(places[j] + (i + j) * kPeriodRows * kRowBytes,
                            shuffle(own, row + (i + j) * kPeriodRows) + chunk * kChunkElements, policy);
        }
      }
    } else if (stride == HEAD_DIM) {  // one behind the other: offsets that the instruction holds
      source = opaque(source);
#pragma unroll
      for (int i = 0; i < kCount; ++i) copy(i, source + i * kPeriodRows * HEAD_DIM);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i, source += kPeriodRows * stride) copy(i, source);
    }
  }
}

// Of 16 rows, `first` and on, for kernels whose slots are as small; those past the first num_rows, which may be none
// and more than there are, become zeros. `own`: as in load_rows.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_slot(uint32_t slot, const KvRows<T>& rows, const T* own, int64_t first,
                                          int num_rows, bool aligned, uint64_t policy, int lane) {
  load_rows<T, HEAD_DIM, kSlotRows>(slot, rows, own, num_rows > 0 ? first : 0, num_rows, aligned, policy, lane);
}

}  // namespace santa::cuda
