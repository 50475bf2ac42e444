// One pass, by the gather warps of a CTA: read the value rows that score warps drew, and add them up in the order of
// the keys, whoever drew them and whenever: one warp every other draw of a part, from the first one on, its neighbour
// the others. The sums depend on the row alone.
#pragma once

#include <cstddef>

#include "cuda/decode/draw.cuh"
#include "cuda/decode/lane_values.cuh"

namespace santa::cuda {

// Multiplies the weights of a draw with the factors of its chunk.
__device__ __forceinline__ void scale_weights(uint32_t weights, uint32_t factors, bool wide) {
#pragma unroll 1
  for (int quad = 0; quad <= (wide ? 1 : 0); ++quad) {
    const uint4 w = load_shared_16(weights + quad * 16);
    const uint4 f = load_shared_16(factors + quad * 16);
    const auto product = [](uint32_t a, uint32_t b) {
      return __float_as_uint(__uint_as_float(a) * __uint_as_float(b));
    };
    store_shared_16(weights + quad * 16, {product(w.x, f.x), product(w.y, f.y), product(w.z, f.z), product(w.w, f.w)});
  }
}

constexpr int kChunksInSight = 4;  // lane 8 i + h looks at head h of chunk i

// Rows of V that a warp adds up together, on their way from memory.
template <typename V, int ELEMENTS, int ROWS>
struct RowBatch {
  LaneValues<V, ELEMENTS> rows[ROWS];
  int count;         // of rows that are there
  uint32_t weights;  // of row `lane`: their address
  uint32_t held;     // barrier of chunk lane / 8, if the chunk is to be handed back when these rows have been added up

  // Adds weight[h] v to the sums of four heads, first_head on, row by row.
  __device__ __forceinline__ void add_four(float (&acc)[kHeadBlock][ELEMENTS], int first_head) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (i > 0 && count <= i) break;
      const uint4 bits = load_shared_16(__shfl_sync(0xffffffffu, weights, i) + first_head * 4);
      const float w[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                          __uint_as_float(bits.w)};
      float v[ELEMENTS];
      rows[i].unpack(v);
#pragma unroll
      for (int h = 0; h < 4; ++h) {
#pragma unroll
        for (int d = 0; d < ELEMENTS; ++d) acc[first_head + h][d] = fmaf(w[h], v[d], acc[first_head + h][d]);
      }
    }
  }
};

template <int ELEMENTS>
__device__ __forceinline__ void store_elements(float* to, const float (&values)[ELEMENTS]) {
  if constexpr (ELEMENTS == 2) {
    *reinterpret_cast<float2*>(to) = {values[0], values[1]};
  } else {
#pragma unroll
    for (int d = 0; d < ELEMENTS; d += 4) {
      *reinterpret_cast<float4*>(to + d) = {values[d], values[d + 1], values[d + 2], values[d + 3]};
    }
  }
}

// Hands chunks back: every lane says that it has read them all. Lane 8 i has the barrier of chunk i, or 0.
__device__ __forceinline__ void hand_back(uint32_t held) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kChunksInSight; ++i) {
    const uint32_t barrier = __shfl_sync(0xffffffffu, held, i * 8);
    if (barrier != 0) mbarrier_arrive(barrier);
  }
}

// Adds up the parts of a CTA's run. `queue_of(w)`: of score warp w, which has the tiles w, w + num_warps, ... of the
// run. `neighbour`: in shared memory, [heads of the block, HEAD_DIM], for the sums of the second warp.
//
// Rows take their time to arrive: a batch of them is added up when the next one is on its way, if there are draws for
// one. Chunks are taken in the order of their tiles, up to four at once, and go back to their score warps when the last
// of their rows has been added up.
template <typename V, int HEAD_DIM, int ROWS, typename QueueOf>
__device__ __forceinline__ void gather_parts(const DecodeParams& p, const RowUnit& unit, int first_part, int last_part,
                                             const QueueOf& queue_of, float* neighbour, int gather_warp, int lane) {
  using Lanes = ValueLanes<HEAD_DIM>;
  constexpr int kElements = Lanes::kElements;
  using Batch = RowBatch<V, kElements, ROWS>;
  const int num_warps = p.plan.num_warps, num_heads = unit.heads.count, part_kv = unit.row.tile_kv,
            draw_kv = unit.row.draw_kv;
  const int own_head = lane & 7, own_chunk = lane >> 3;
  const int weight_bytes = score_pitch_of(num_heads) * 4;  // of a draw
  const bool wide = num_heads > 4, has_head = own_head < num_heads;
  const int lane_element = min(lane, Lanes::kLanes - 1) * kElements;

  uint32_t consumed = 0;  // chunks of score warp `lane`
  int owner = 0;          // score warp of the next tile
  for (int part = first_part; part < last_part; ++part) {
    float acc[kHeadBlock][kElements] = {};
    float reference = -INFINITY, sum = 0.0f;  // of head lane % 8
    int rows_read = 0;
    int tiles_left = ceil_div_int(min(part_kv, unit.row.kv_len - part * part_kv), draw_kv);

    // The chunks that were taken last. Their draws are one list, those of chunk i end at ends_at[i]; this warp's that
    // are not on their way yet are `next`, next + 2, ...
    int ends_at[kChunksInSight] = {}, num_draws = 0, next = 0;
    uint32_t chunk_address = 0, held = 0;  // of chunk own_chunk; its barrier
    bool scaled = false;                   // its weights are to be multiplied with its factors

    Batch under_way;
    under_way.count = 0;
#pragma unroll 1
    while (true) {
      if (next >= num_draws && tiles_left > 0) {
        // Chunk i is that of the tile i further on, if it is there. The first one is waited for unless there is
        // something to do. Every lane sees for itself which are full; lane 8 i + h then looks at chunk i.
        uint32_t n = 0;
        int warp = owner, own_warp = owner;
        bool full = false;
#pragma unroll
        for (int i = 0; i < kChunksInSight; ++i) {
          const uint32_t nth = __shfl_sync(0xffffffffu, consumed, warp), parity = DrawQueue::parity(nth);
          const uint32_t barrier = queue_of(warp).full_barrier(DrawQueue::buffer(nth));
          if (i == 0 && under_way.count == 0) mbarrier_wait(barrier, parity);
          const bool there = i < min(num_warps, tiles_left) && __all_sync(0xffffffffu, mbarrier_test(barrier, parity));
          if (i == own_chunk) full = there, n = nth, own_warp = warp;
          warp = warp + 1 == num_warps ? 0 : warp + 1;
        }
        const DrawQueue queue = queue_of(own_warp);
        DrawChunk& chunk = queue.chunk(DrawQueue::buffer(n));
        const int own_count = full ? chunk.count : 0;
        const bool is_last = full && chunk.is_last != 0;
        const float tile_reference = full ? chunk.reference[own_head] : 0.0f;
        const SoftmaxState tile = full ? chunk.tile[own_head] : empty_softmax_state();

        // What sums are relative to rises at the first chunk only: a later one that would raise it has to wait its
        // turn, however many are there at once, and the first one for the rows that are under way.
        const float first_reference = __shfl_sync(0xffffffffu, tile_reference, own_head);
        const bool rises = __any_sync(0xffffffffu, has_head && first_reference > reference);
        const bool ready = __shfl_sync(0xffffffffu, full, 0) && !(rises && under_way.count > 0);
        if (ready && rises) {
          const float risen = fmaxf(reference, first_reference), scale = exp2_below(reference, risen);
          reference = risen;
          sum *= scale;
#pragma unroll
          for (int h = 0; h < kHeadBlock; ++h) {
            const float head_scale = __shfl_sync(0xffffffffu, scale, h);
#pragma unroll
            for (int d = 0; d < kElements; ++d) acc[h][d] *= head_scale;
          }
        }
        if (ready) {
          // A chunk ends what is taken if it is not there, if it would raise the reference, or if its tile goes on
          // after it.
          const uint32_t ends = __ballot_sync(0xffffffffu, !full || (has_head && tile_reference > reference));
          const uint32_t unfinished = __ballot_sync(0xffffffffu, !is_last);
          int num_chunks = ends == 0 ? kChunksInSight : (__ffs(ends) - 1) >> 3;
          if (unfinished != 0) num_chunks = min(num_chunks, ((__ffs(unfinished) - 1) >> 3) + 1);
          const bool taken = own_chunk < num_chunks;
          // Tile by tile, in their order.
          const float factor = taken && has_head ? exp2_below(tile_reference, reference) : 1.0f;
          const float mass = taken && is_last && has_head ? tile.sum * exp2_below(tile.max, reference) : 0.0f;
#pragma unroll
          for (int i = 0; i < kChunksInSight; ++i) sum += __shfl_sync(0xffffffffu, mass, i * 8 + own_head);
          scaled = __any_sync(0xffffffffu, factor != 1.0f);
          if (scaled && taken) chunk.factor[1 + gather_warp][own_head] = factor;

          num_draws = 0;
#pragma unroll
          for (int i = 0; i < kChunksInSight; ++i) {
            const int count = __shfl_sync(0xffffffffu, own_count, i * 8);
            ends_at[i] = num_draws += i < num_chunks ? count : 0;
          }
          next = (rows_read ^ gather_warp) & 1;
          rows_read += num_draws;
          chunk_address = shared_address(&chunk);
          held = taken ? queue.empty_barrier(DrawQueue::buffer(n)) : 0;

          int position = lane - owner;  // of this lane's warp among the chunks
          if (position < 0) position += num_warps;
          if (lane < num_warps && position < num_chunks) ++consumed;
          const bool goes_on = (unfinished >> (8 * num_chunks - 8) & 1) != 0;
          const int finished = goes_on ? num_chunks - 1 : num_chunks;
          owner += finished;
          while (owner >= num_warps) owner -= num_warps;
          tiles_left -= finished;
          if (next >= num_draws) hand_back(held);
        }
      }

      Batch batch;
      batch.count = next < num_draws ? min(ceil_div_int(num_draws - next, kGatherWarps), ROWS) : 0;
      if (batch.count > 0) {
        // Lane i finds draw next + 2 i; those that have none, the last of this warp's.
        const int draw = next + kGatherWarps * min(lane, batch.count - 1);
        int of = 0, before = 0;
#pragma unroll
        for (int i = 0; i + 1 < kChunksInSight; ++i) {
          if (draw >= ends_at[i]) of = i + 1, before = ends_at[i];
        }
        const uint32_t address = __shfl_sync(0xffffffffu, chunk_address, of * 8);
        batch.weights = address + kChunkHeadBytes + (draw - before) * weight_bytes;
        const uint2 own_row = load_shared_8(address + offsetof(DrawChunk, row) + (draw - before) * 8);
        const uint64_t row_address = static_cast<uint64_t>(own_row.y) << 32 | own_row.x;
        __syncwarp();  // the factors are there
        if (scaled && lane < batch.count) {
          scale_weights(batch.weights, address + offsetof(DrawChunk, factor) + (1 + gather_warp) * 32, wide);
        }
        const auto source = [&](int i) {
          return reinterpret_cast<const V*>(__shfl_sync(0xffffffffu, row_address, i)) + lane_element;
        };
        // Past the end the last row is read again, for nothing: no branch keeps the loads from being in flight
        // together.
        if (p.aligned) {
#pragma unroll
          for (int i = 0; i < ROWS; ++i) batch.rows[i].load(source(i));
        } else {
#pragma unroll
          for (int i = 0; i < ROWS; ++i) batch.rows[i] = LaneValues<V, kElements>::by_elements(source(i));
        }
        next += kGatherWarps * ROWS;
        batch.held = next < num_draws ? 0 : held;
        __syncwarp();  // the weights are there
      }

      if (under_way.count > 0) {
        under_way.add_four(acc, 0);
        if (wide) under_way.add_four(acc, 4);
        hand_back(under_way.held);
      } else if (batch.count == 0 && tiles_left == 0) {
        break;
      }
      under_way = batch;
    }

    // The second warp's sums to the first.
    gather_warps_barrier();  // those of the part before are taken
    const int lane_offset = lane * kElements;
    if (gather_warp == 1) {
#pragma unroll
      for (int h = 0; h < kHeadBlock; ++h) {
        if (h < num_heads && lane < Lanes::kLanes) store_elements(neighbour + h * HEAD_DIM + lane_offset, acc[h]);
      }
    }
    gather_warps_barrier();
    if (gather_warp == 1) continue;
    const int64_t stats = p.stats_offset(unit.group) + static_cast<int64_t>(part) * p.group_size + unit.heads.first;
    if (lane < num_heads) {
      p.tile_max[stats + lane] = reference;
      p.tile_sum[stats + lane] = sum;
    }
#pragma unroll
    for (int h = 0; h < kHeadBlock; ++h) {
      if (h >= num_heads || lane >= Lanes::kLanes) break;
#pragma unroll
      for (int d = 0; d < kElements; ++d) acc[h][d] += neighbour[h * HEAD_DIM + lane_offset + d];
      store_global(p.o_accum + (stats + h) * HEAD_DIM + lane_offset, acc[h], evict_last_policy());
    }
    if (p.rows_read != nullptr && lane == 0) {
      p.tile_rows[(unit.group * p.num_head_blocks() + unit.block) * p.max_tiles + part] = rows_read;
    }
  }
}

}  // namespace santa::cuda
