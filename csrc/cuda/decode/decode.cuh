// The whole operator as one kernel: score, plan, gather and combine, overlapped across batch rows.
//
// CTAs are either tile CTAs (stage 1) or gather CTAs (stage 3). The last tile CTA of a batch row and KV head to finish
// runs stage 2 for it, the last gather CTA (for exact rows: the last tile CTA) stage 4. Gather CTAs come `lag` batch
// rows after the tile CTAs they wait for, so that they run beside the streaming of other rows. Who runs a stage depends
// on timing; what it computes does not.
//
// A gather CTA waits for CTAs of a lower index only, and tile CTAs wait for none: CTAs start in the order of their
// index, so those that are waited for are running or done.
#pragma once

#include "cuda/decode/combine.cuh"
#include "cuda/decode/gather.cuh"
#include "cuda/decode/plan.cuh"
#include "cuda/decode/tile.cuh"
#include "params.h"

namespace santa::cuda {

constexpr int kDecodeWarps = kTileWarps;
constexpr int kDecodeThreads = kTileThreads;

// The order of the CTAs: tiles of rows 0 .. lag - 1, then tiles of row s and gathers of row s - lag in turn, then the
// gathers that are left.
struct DecodeGrid {
  int head_blocks;  // blocks of kHeadBlock query heads
  int tile_ctas;    // per batch row
  int gather_ctas;  // per batch row; 0 where no row can be sampled
  int gathers_per_group;
  int lag;  // in batch rows, at most the batch
};

struct CtaWork {
  bool gather;
  int batch_index;
  int index;  // within the row's CTAs of that kind
};

__device__ __forceinline__ CtaWork cta_work_of(const DecodeGrid& grid, int batch, int64_t cta) {
  const int64_t head = static_cast<int64_t>(grid.lag) * grid.tile_ctas;
  if (cta < head) return {false, static_cast<int>(cta / grid.tile_ctas), static_cast<int>(cta % grid.tile_ctas)};
  cta -= head;
  const int both = grid.tile_ctas + grid.gather_ctas;
  const int64_t middle = static_cast<int64_t>(batch - grid.lag) * both;
  if (cta < middle) {
    const int step = static_cast<int>(cta / both), index = static_cast<int>(cta % both);
    if (index < grid.tile_ctas) return {false, grid.lag + step, index};
    return {true, step, index - grid.tile_ctas};
  }
  cta -= middle;
  return {true, batch - grid.lag + static_cast<int>(cta / grid.gather_ctas), static_cast<int>(cta % grid.gather_ctas)};
}

template <int HEAD_DIM>
union DecodeShared {
  TileShared<HEAD_DIM> tile;
  SelectShared select[kDecodeWarps];
  CombineShared<kDecodeThreads> combine;
};

template <int HEAD_DIM>
constexpr int decode_ctas_per_sm() {
  return HEAD_DIM <= 128 ? 4 : 2;
}

// Adds one to a counter after everything this CTA wrote, and tells all threads whether it was the last of `expected`;
// if so, what the others wrote is visible to them.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t expected, bool& shared_flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared_flag = atomicAdd(counter, 1u) + 1 == expected;
  __syncthreads();
  if (shared_flag) __threadfence();
  return shared_flag;
}

__device__ __forceinline__ void publish(uint32_t* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(flag, 1u);
}

__device__ __forceinline__ void wait_for(const uint32_t* flag) {
  if (threadIdx.x == 0) {
    uint32_t value;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
      if (value == 0) __nanosleep(64);
    } while (value == 0);
    __threadfence();
  }
  __syncthreads();
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kDecodeThreads, decode_ctas_per_sm<HEAD_DIM>())
    decode_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ DecodeGrid grid) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ bool flag;
  auto& shared = *reinterpret_cast<DecodeShared<HEAD_DIM>*>(shared_bytes);
  const CtaWork cta = cta_work_of(grid, p.batch, blockIdx.x);
  const RowShape row = row_shape_of(p, cta.batch_index);

  if (!cta.gather) {
    // Head blocks and KV heads fastest: concurrent CTAs read neighbouring memory.
    const int head_block = cta.index % grid.head_blocks;
    const int kv_head = (cta.index / grid.head_blocks) % p.num_kv_heads;
    const int tile = cta.index / grid.head_blocks / p.num_kv_heads;
    if (row.num_tiles == 0) {  // no keys: somebody has to write the outputs
      if (tile == 0 && head_block == 0) combine_group<T>(p, cta.batch_index, kv_head, shared.combine);
      return;
    }
    if (tile >= row.num_tiles) return;
    process_tile<T, HEAD_DIM>(p, row, cta.batch_index, kv_head, head_block, grid.head_blocks, tile, shared.tile);
    uint32_t* counters = p.counters + p.group_index(cta.batch_index, kv_head) * kNumCounters;
    if (!arrive_last(counters, row.num_tiles * grid.head_blocks, flag)) return;
    if (row.sampled) {
      plan_group<kDecodeThreads>(p, cta.batch_index, kv_head);
      publish(counters + 1);
    } else {
      combine_group<T>(p, cta.batch_index, kv_head, shared.combine);
    }
    return;
  }

  if (!row.sampled) return;
  const int kv_head = cta.index / grid.gathers_per_group, gather = cta.index % grid.gathers_per_group;
  const int num_runs = static_cast<int>(ceil_div(row.num_tiles, tiles_per_run(row.num_tiles)));
  const int num_items = num_runs * p.num_streams();
  if (gather * kDecodeWarps >= num_items) return;
  uint32_t* counters = p.counters + p.group_index(cta.batch_index, kv_head) * kNumCounters;
  wait_for(counters + 1);
  const int warp = threadIdx.x >> 5, item = gather * kDecodeWarps + warp;
  if (item < num_items) {
    gather_run<T, HEAD_DIM>(p, row, cta.batch_index, kv_head, item % p.num_streams(), item / p.num_streams(),
                            shared.select[warp], threadIdx.x & 31);
  }
  if (arrive_last(counters + 2, static_cast<uint32_t>(ceil_div(num_items, kDecodeWarps)), flag)) {
    combine_group<T>(p, cta.batch_index, kv_head, shared.combine);
  }
}

}  // namespace santa::cuda
