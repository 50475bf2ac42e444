// The order of work of the persistent kernel: all blocks of all its rows, numbered; CTA c takes blocks c, c + grid, ...
#pragma once

#include "params.h"

namespace santa::cuda {

// One block of a row, for one KV head.
struct Block {
  int batch_index, kv_head;
  int64_t kv_start;
  int kv_len;
  int block_kv;
  int index;       // in the row
  int num_blocks;  // of the row

  __device__ int num_keys() const { return min(block_kv, kv_len - index * block_kv); }
};

// Finds blocks by number, for ascending numbers. Every lane of a warp holds one of 32 batch rows.
//
// The blocks of a (batch row, KV head) are consecutive, or those of a row are. So if neither is more than num_buffers *
// grid, no CTA waits for a block that cannot be scored before the wait ends: the block before it in its CTA belongs to
// work that is finished. heuristics.h sees to it (tests/cpp/test_heuristics.cpp), for short rows of small blocks too.
class BlockQueue {
 public:
  __device__ BlockQueue(const DecodeParams& p, int lane)
      : p_(p), lane_(lane), chunk_first_(-32), chunk_start_(0), chunk_blocks_(0) {}

  __device__ __forceinline__ bool find(int number, Block& block) {
    constexpr unsigned kAll = 0xffffffffu;
    const int num_heads = p_.num_kv_heads;
    int within_row;
    if (p_.persistent.blocks_per_row > 0) {  // all rows are of the same length, known to the host
      block.num_blocks = p_.persistent.blocks_per_row;
      const int per_row = block.num_blocks * num_heads;
      block.batch_index = number / per_row;
      within_row = number - block.batch_index * per_row;
      if (block.batch_index >= p_.batch) return false;
      block.kv_start = 0;
      block.kv_len = p_.max_kv_len;
    } else {
      while (number >= chunk_start_ + chunk_blocks_) {
        if (chunk_first_ + 32 >= p_.batch) return false;
        load_next();
      }
      const int within_chunk = number - chunk_start_, row = __popc(__ballot_sync(kAll, end_ <= within_chunk));
      block.num_blocks = __shfl_sync(kAll, num_blocks_, row);
      within_row = within_chunk - (__shfl_sync(kAll, end_, row) - block.num_blocks * num_heads);
      block.batch_index = chunk_first_ + row;
      block.kv_start = __shfl_sync(kAll, kv_start_, row);
      block.kv_len = __shfl_sync(kAll, kv_len_, row);
    }
    block.block_kv = block_kv_of(block.kv_len);
    // Where the heads of a key lie side by side, concurrent CTAs read them together.
    const bool heads_first = p_.stride_k_head < p_.stride_k_token &&
                             block.num_blocks * num_heads <= static_cast<int>(gridDim.x) * p_.persistent.num_buffers;
    const int inner = heads_first ? num_heads : block.num_blocks, outer_index = within_row / inner;
    const int inner_index = within_row - outer_index * inner;
    block.kv_head = heads_first ? inner_index : outer_index;
    block.index = heads_first ? outer_index : inner_index;
    return true;
  }

 private:
  __device__ __forceinline__ void load_next() {
    chunk_first_ += 32;
    chunk_start_ += chunk_blocks_;
    num_blocks_ = kv_len_ = kv_start_ = 0;
    if (chunk_first_ + lane_ < p_.batch) {
      const RowShape row = row_shape_of(p_, chunk_first_ + lane_);
      kv_len_ = row.kv_len;
      kv_start_ = static_cast<int>(row.kv_start);
      if (row.persistent) num_blocks_ = row.num_tiles;
    }
    end_ = num_blocks_ * p_.num_kv_heads;
    for (int offset = 1; offset < 32; offset <<= 1) {
      const int before = __shfl_up_sync(0xffffffffu, end_, offset);
      if (lane_ >= offset) end_ += before;
    }
    chunk_blocks_ = __shfl_sync(0xffffffffu, end_, 31);
  }

  const DecodeParams& p_;
  const int lane_;
  int chunk_first_;  // batch row of lane 0
  int chunk_start_;  // blocks before it
  int chunk_blocks_;
  int kv_len_, kv_start_, num_blocks_;  // of the lane's row
  int end_;                             // blocks of the chunk up to the lane's row and with it
};

}  // namespace santa::cuda
