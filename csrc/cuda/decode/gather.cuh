// One pass, by the gather warp of a CTA: reads the value rows that score warps drew, and adds them up in the order of
// the keys, whoever drew them and whenever. Its sums depend on the row alone.
#pragma once

#include "cuda/common/float8.cuh"
#include "cuda/common/row_load.cuh"
#include "cuda/decode/draw.cuh"

namespace santa::cuda {

// How a warp reads a row of values: each lane a few neighbouring elements.
template <int HEAD_DIM>
struct ValueLanes {
  static constexpr int kElements = HEAD_DIM <= 64 ? 2 : HEAD_DIM <= 128 ? 4 : 8;  // of a lane
  static constexpr int kLanes = HEAD_DIM / kElements;                             // 32, or 24
  static constexpr int kInFlight = kElements <= 4 ? 8 : 4;                        // rows, as registers allow
};

// The elements of a row that a lane reads.
template <typename V, int ELEMENTS>
struct LaneValues {
  static constexpr int kWords = ELEMENTS * sizeof(V) < 4 ? 1 : ELEMENTS * sizeof(V) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const V* source, bool aligned) {
    if (aligned) {
      if constexpr (ELEMENTS * sizeof(V) == 16) {
        const uint4 value = __ldg(reinterpret_cast<const uint4*>(source));
        words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
      } else if constexpr (ELEMENTS * sizeof(V) == 8) {
        const uint2 value = __ldg(reinterpret_cast<const uint2*>(source));
        words[0] = value.x, words[1] = value.y;
      } else if constexpr (ELEMENTS * sizeof(V) == 4) {
        words[0] = __ldg(reinterpret_cast<const uint32_t*>(source));
      } else {
        words[0] = __ldg(reinterpret_cast<const uint16_t*>(source));
      }
      return;
    }
    constexpr int kPerWord = ELEMENTS / kWords, kBits = 8 * sizeof(V);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = 0;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        uint32_t bits;
        if constexpr (sizeof(V) == 1) {
          bits = source[w * kPerWord + i].code;
        } else {
          bits = reinterpret_cast<const uint16_t*>(source)[w * kPerWord + i];
        }
        words[w] |= bits << (kBits * i);
      }
    }
  }

  __device__ __forceinline__ void unpack(float (&values)[ELEMENTS]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(V) == 1) {
        const float4 four = floats_of_codes(words[w]);
        values[4 * w] = four.x, values[4 * w + 1] = four.y;
        if constexpr (ELEMENTS >= 4) values[4 * w + 2] = four.z, values[4 * w + 3] = four.w;
      } else {
        const float2 two = Float16Traits<V>::unpack(words[w]);
        values[2 * w] = two.x, values[2 * w + 1] = two.y;
      }
    }
  }
};

// Adds up the parts of a CTA's run. `queue_of(w)`: of score warp w, which has the tiles w, w + num_warps, ... of the run.
template <typename V, int HEAD_DIM, typename QueueOf>
__device__ __forceinline__ void gather_parts(const DecodeParams& p, const RowUnit& unit, int first_part, int last_part,
                                             const QueueOf& queue_of, int lane) {
  using Lanes = ValueLanes<HEAD_DIM>;
  constexpr int kElements = Lanes::kElements, kInFlight = Lanes::kInFlight;
  const int num_warps = p.plan.num_warps, num_heads = unit.heads.count, part_kv = unit.row.tile_kv;
  const bool wide = num_heads > 4;
  const int own_head = lane & 7;
  const auto values = value_rows<V>(p, unit.batch_index, unit.kv_head, unit.row.kv_start);
  const int lane_element = min(lane, Lanes::kLanes - 1) * kElements;

  uint32_t consumed = 0;  // chunks of score warp `lane`
  int owner = 0;          // score warp of the next tile
  for (int part = first_part; part < last_part; ++part) {
    float acc[kHeadBlock][kElements] = {};
    float reference = -INFINITY, sum = 0.0f;  // of head lane % 8
    int rows_read = 0;
    int first_key = part * part_kv;
    int tiles_left = ceil_div_int(min(part_kv, unit.row.kv_len - first_key), kDrawTileKv);

    while (tiles_left > 0) {
      // Chunks of the next tiles as far as they are there: lane i looks at the tile i further on.
      const int warp = (owner + lane) % num_warps;
      const uint32_t n = __shfl_sync(0xffffffffu, consumed, warp);
      const DrawQueue queue = queue_of(warp);
      const bool in_sight = lane < min(min(num_warps, 8), tiles_left);
      {
        const uint32_t next = __shfl_sync(0xffffffffu, consumed, owner);
        mbarrier_wait(&queue_of(owner).full[DrawQueue::buffer(next)], DrawQueue::parity(next));
      }
      const bool full = in_sight && mbarrier_test(&queue.full[DrawQueue::buffer(n)], DrawQueue::parity(n));
      const DrawChunk& own_chunk = queue.chunks[DrawQueue::buffer(n)];
      const int own_count = full ? own_chunk.count : 0;
      const bool own_last = full && own_chunk.is_last != 0;
      const uint32_t open = ~__ballot_sync(0xffffffffu, full), unfinished = ~__ballot_sync(0xffffffffu, own_last);
      // Up to the first one that is not there, and no further than one that its tile goes on after.
      int num_chunks = min(__ffs(open) - 1, __ffs(unfinished));

      // In the order of the tiles, so that it does not matter how many are there at once: the reference rises at the
      // first chunk only, later ones that would raise it have to wait.
      bool unscaled = true;
#pragma unroll 1
      for (int i = 0; i < num_chunks; ++i) {
        const int of = (owner + i) % num_warps;
        const uint32_t nth = __shfl_sync(0xffffffffu, consumed, of);
        const DrawQueue from = queue_of(of);
        mbarrier_wait(&from.full[DrawQueue::buffer(nth)], DrawQueue::parity(nth));  // at once: every lane acquires
        DrawChunk& chunk = from.chunks[DrawQueue::buffer(nth)];
        const float tile_reference = chunk.reference[own_head];
        const bool rises = own_head < num_heads && tile_reference > reference;
        if (__any_sync(0xffffffffu, rises)) {
          if (i > 0) {
            num_chunks = i;
            break;
          }
          const float risen = fmaxf(reference, tile_reference), scale = exp2_below(reference, risen);
          reference = risen;
          sum *= scale;
#pragma unroll
          for (int h = 0; h < kHeadBlock; ++h) {
            const float head_scale = __shfl_sync(0xffffffffu, scale, h);
#pragma unroll
            for (int d = 0; d < kElements; ++d) acc[h][d] *= head_scale;
          }
        }
        const float factor = own_head < num_heads ? exp2_below(tile_reference, reference) : 1.0f;
        unscaled = unscaled && __all_sync(0xffffffffu, factor == 1.0f);
        if (chunk.is_last != 0 && own_head < num_heads) {
          const SoftmaxState tile = chunk.tile[own_head];
          sum += tile.sum * exp2_below(tile.max, reference);
        }
        __syncwarp();
        if (lane < kHeadBlock) chunk.reference[lane] = factor;
      }
      __syncwarp();

      // Draws of these chunks, as one list: where those of lane i's chunk end.
      int end = lane < num_chunks ? own_count : 0;
#pragma unroll
      for (int offset = 1; offset < 8; offset <<= 1) {
        const int lower = __shfl_up_sync(0xffffffffu, end, offset);
        if (lane >= offset) end += lower;
      }
      const int num_draws = __shfl_sync(0xffffffffu, end, num_chunks - 1);
      rows_read += num_draws;
#pragma unroll 1
      for (int base = 0; base < num_draws; base += kInFlight) {
        // Lane i finds draw base + i.
        const int draw = base + lane;
        int chunk_index = 0, before = 0;
#pragma unroll 1
        for (int i = 0; i + 1 < num_chunks; ++i) {
          const int chunk_end = __shfl_sync(0xffffffffu, end, i);
          if (draw >= chunk_end) chunk_index = i + 1, before = chunk_end;
        }
        const int of = (owner + chunk_index) % num_warps;
        DrawChunk& chunk = queue_of(of).chunks[DrawQueue::buffer(__shfl_sync(0xffffffffu, consumed, of))];
        const int at = min(draw - before, kChunkDraws - 1);
        const int key = draw < num_draws ? first_key + chunk_index * kDrawTileKv + chunk.key[at] : 0;
        uint32_t weights = shared_address(&chunk.weight[at][0]);
        if (!unscaled && draw < num_draws && lane < kInFlight) {
          float4& low = chunk.weight[at][0];
          const float* factors = chunk.reference;
          low = {low.x * factors[0], low.y * factors[1], low.z * factors[2], low.w * factors[3]};
          if (wide) {
            float4& high = chunk.weight[at][1];
            high = {high.x * factors[4], high.y * factors[5], high.z * factors[6], high.w * factors[7]};
          }
        }
        __syncwarp();

        LaneValues<V, kElements> rows[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int row = __shfl_sync(0xffffffffu, key, i);
          if (base + i < num_draws) rows[i].load(values.row(row) + lane_element, p.aligned);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (base + i >= num_draws) break;
          const uint32_t address = __shfl_sync(0xffffffffu, weights, i);
          float v[kElements];
          rows[i].unpack(v);
#pragma unroll
          for (int quad = 0; quad < 2; ++quad) {
            if (quad == 1 && !wide) break;
            const uint4 bits = load_shared_16(address + quad * 16);
            const float w[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                                __uint_as_float(bits.w)};
#pragma unroll
            for (int h = 0; h < 4; ++h) {
#pragma unroll
              for (int d = 0; d < kElements; ++d) acc[quad * 4 + h][d] = fmaf(w[h], v[d], acc[quad * 4 + h][d]);
            }
          }
        }
      }

      // Hand the chunks back.
#pragma unroll 1
      for (int i = 0; i < num_chunks; ++i) {
        const int of = (owner + i) % num_warps;
        const uint32_t nth = __shfl_sync(0xffffffffu, consumed, of);
        mbarrier_arrive(&queue_of(of).empty[DrawQueue::buffer(nth)]);
      }
      const int position = (lane - owner + num_warps) % num_warps;  // of this lane's warp among the chunks
      if (lane < num_warps && position < num_chunks) ++consumed;
      const int finished = (unfinished >> (num_chunks - 1) & 1) != 0 ? num_chunks - 1 : num_chunks;
      owner = (owner + finished) % num_warps;
      first_key += finished * kDrawTileKv;
      tiles_left -= finished;
    }

    const int64_t stats = p.stats_offset(unit.group) + static_cast<int64_t>(part) * p.gqa_group_size + unit.heads.first;
    if (lane < num_heads) {
      p.tile_max[stats + lane] = reference;
      p.tile_sum[stats + lane] = sum;
    }
#pragma unroll
    for (int h = 0; h < kHeadBlock; ++h) {
      if (h >= num_heads) break;
      if (lane < Lanes::kLanes) {
        float* out = p.o_accum + (stats + h) * HEAD_DIM + lane_element;
        if constexpr (kElements == 2) {
          *reinterpret_cast<float2*>(out) = {acc[h][0], acc[h][1]};
        } else {
#pragma unroll
          for (int d = 0; d < kElements; d += 4) {
            *reinterpret_cast<float4*>(out + d) = {acc[h][d], acc[h][d + 1], acc[h][d + 2], acc[h][d + 3]};
          }
        }
      }
    }
    if (p.rows_read != nullptr && lane == 0) {
      p.tile_rows[(unit.group * p.num_head_blocks() + unit.block) * p.max_tiles + part] = rows_read;
    }
  }
}

}  // namespace santa::cuda
