// Of rows that are sampled by proposal keys (core/proposal.h): what a warp does with the scores of a tile. It draws,
// scores the keys that it drew again, adds up their values, and writes what it has when a part ends.
#pragma once

#include "cuda/decode/draw.cuh"
#include "cuda/decode/lane_values.cuh"
#include "cuda/proposal/code_score.cuh"

namespace santa::cuda {

// Of all warps: here rather than in the registers of each.
struct ProposalShared {
  RowUnit unit;
  KvRows<char> keys, values;
  FirstKey first_codes;  // of first_key
  RandomStream stream;
  // The CTA's run: parts from first_part on, of part_kv keys; from first_key on num_keys are there.
  int first_part, num_parts, part_kv, first_key, num_keys;
  // Warps that share a part: none, which makes 1, or as many as it has tiles, four at most. A warp takes every fourth
  // span of keys, the first from `span` times its number on, and `turns` tiles of a part.
  int team, span, turns;
};
static_assert(sizeof(ProposalShared) <= kProposalSharedBytes, "heuristics.h has to know of it");

// A key that was drawn.
struct alignas(16) ProposedDraw {
  uint64_t value_row;  // address
  int key;             // within the tile
  float inverse;       // of the probability of the draw; before that is known, its units
};

// Of one warp. Scores of a tile lie in quads of heads, [QUADS, keys of a tile, 4], and the eight keys of an octet in an
// order that makes writers, with 8 neighbouring keys, and readers, with 4 or 8 neighbours a lane, free of bank
// conflicts: key n is at n ^ (n / 8 % 8). Sums are those of a part.
template <int HEAD_DIM, int QUADS>
struct alignas(128) WarpShared {
  float scores[kProposalScores];
  float sums[4 * QUADS][HEAD_DIM];  // of values; a lane adds to elements of its own
  ProposedDraw draws[kListedDraws];
  float weights[kDrawsAtOnce][4 * QUADS];
  // Of the part, beside its values: a head's each; V rows read. The values are there as soon as there are rows.
  float reference[kHeadBlock], z[kHeadBlock], drawn[kHeadBlock];
  int rows;
  uint32_t offsets[32];  // of the thresholds of as many tiles
};

// K by bytes, as value_bytes has V.
__device__ __forceinline__ KvRows<char> key_bytes(const DecodeParams& p, const RowUnit& unit) {
  const int element_bytes = p.k_dtype == Dtype::kFloat8E4M3 ? 1 : 2;
  return make_kv_rows<char>(p, p.k, unit.batch_index, unit.kv_head, unit.row.kv_start, p.stride_k_batch * element_bytes,
                            p.stride_k_token * element_bytes, p.stride_k_head * element_bytes);
}

// Eight elements of a key, of T or of float8, as elements of T: they are the same numbers.
template <typename T>
__device__ __forceinline__ uint4 load_key_elements(const T* source) {
  return __ldg(reinterpret_cast<const uint4*>(source));
}
template <typename T>
__device__ __forceinline__ uint4 load_key_elements(const Float8* source) {
  const uint2 codes = __ldg(reinterpret_cast<const uint2*>(source));
  const float4 low = floats_of_codes(codes.x), high = floats_of_codes(codes.y);
  return {Float16Traits<T>::pack(low.x, low.y), Float16Traits<T>::pack(low.z, low.w),
          Float16Traits<T>::pack(high.x, high.y), Float16Traits<T>::pack(high.z, high.w)};
}

// A lane's elements of a row of values: of T, or, as far as K is float8, of either.
template <typename T, typename K, int ELEMENTS>
struct DrawnValues {
  using Whole = LaneValues<T, ELEMENTS>;
  using Coded = LaneValues<Float8, ELEMENTS>;
  static constexpr bool kEither = std::is_same_v<K, Float8>;
  Whole whole;

  __device__ __forceinline__ void load(uint64_t row, int first, bool float8) {
    if (kEither && float8) {
      Coded coded;
      coded.load(reinterpret_cast<const Float8*>(row) + first);
#pragma unroll
      for (int i = 0; i < Coded::kWords; ++i) whole.words[i] = coded.words[i];
    } else {
      whole.load(reinterpret_cast<const T*>(row) + first);
    }
  }
  __device__ __forceinline__ void unpack(float (&values)[ELEMENTS], bool float8) const {
    if (kEither && float8) {
      Coded coded;
#pragma unroll
      for (int i = 0; i < Coded::kWords; ++i) coded.words[i] = whole.words[i];
      coded.unpack(values);
    } else {
      whole.unpack(values);
    }
  }
};

// What a warp does for a tile when it has been scored, and for a part when it has been walked. Some of what it knows of
// a head is in lanes head, head + 8, ... ("of head lane % 8"), some with what the lane (g, t) has of heads 2 t and the
// next for draw g of a few ("of the lane's pair").
// T: of q, K: of keys.
template <typename T, typename K, int HEAD_DIM, int QUADS>
struct ProposalWarp {
  using Shared = WarpShared<HEAD_DIM, QUADS>;
  using Lanes = ValueLanes<HEAD_DIM>;
  static_assert(sizeof(Shared) == proposal_warp_bytes(HEAD_DIM, QUADS), "heuristics.h has to know of it");
  static constexpr int kTileKv = kProposalScores / (4 * QUADS), kKeys = kTileKv / 32;  // keys: of a lane
  static constexpr int kPlane = kTileKv * 16;                                          // bytes of a quad's scores
  static constexpr int kElements = Lanes::kElements;

  const DecodeParams& p;
  const ProposalShared& cta;
  const QueryCodes<T, HEAD_DIM>& queries;
  Shared& own;
  const int lane;
  float level;  // of head lane % 8, times level_scale in base 2

  // Sums of the tile: relative to 2^reference, z over all keys and what draws change about it, ProposalState::drawn,
  // the values of heads.
  float reference, z;                                      // of head lane % 8
  float pair_reference[2], pair_change[2], pair_drawn[2];  // of the lane's pair; g has those of every eighth draw
  float sums[4 * QUADS][kElements];

  __device__ __forceinline__ void begin_part() const {
    if (lane < kHeadBlock) own.reference[lane] = -INFINITY, own.z[lane] = own.drawn[lane] = 0.0f;
    if (lane == 0) own.rows = 0;
  }

  // ---- scores in shared memory

  // Of keys first + g and first + g + 8, of the heads that CodeScorer says; `first` is a multiple of 16.
  __device__ __forceinline__ void put(int first, const float (&logits)[4]) const {
    const int head = CodeScorer<T, HEAD_DIM, QUADS>::head_of(lane), octet = first >> 3;
    const uint32_t base = shared_address(own.scores) + (head >> 2) * kPlane + (head & 3) * 4 + (lane >> 2) * 16;
    store_shared_pair((base + octet * 128) ^ (octet & 7) << 4, logits[0], logits[1]);
    store_shared_pair((base + (octet + 1) * 128) ^ ((octet + 1) & 7) << 4, logits[2], logits[3]);
  }
  static __device__ __forceinline__ uint32_t place_of(const Shared& own, int key, int quad) {
    return shared_address(own.scores) + quad * kPlane + (key ^ (key >> 3 & 7)) * 16;
  }

  // Caps and hides the logits of the lane's keys, where there are caps or query vectors that do not see all keys.
  static __device__ __noinline__ void change_scores(const DecodeParams* p, const RowUnit* unit, Shared* own,
                                                    int first_key, int num_keys) {
    const int lane = threadIdx.x & 31;
    for (int h = 0; h < unit->heads.count; ++h) {
      const KeyRange visible = visible_keys(*p, unit->row.end(), unit->heads.first + h);
      for (int key = kKeys * lane; key < min(kKeys * lane + kKeys, num_keys); ++key) {
        const uint32_t place = place_of(*own, key, h >> 2) + (h & 3) * 4;
        store_shared_float(place, attended_logit(*p, visible, first_key + key, load_shared_float(place)));
      }
    }
  }

  // ---- a tile: `num_keys` keys, which are scored; `offset` of its thresholds

  __device__ __forceinline__ void draw(int first_key, int num_keys, uint32_t offset) {
    const RowUnit& unit = cta.unit;
    const int num_heads = unit.heads.count, own_head = lane & 7;
    __syncwarp();  // all scores are there
    if (changes_logits(p)) change_scores(&p, &cta.unit, &own, first_key, num_keys);
    // The lane's keys. NaN is passed over by the maximum, not by the sum.
    float e[QUADS][kKeys][4];
    SoftmaxState state = empty_softmax_state();
    const uint32_t own_place = place_of(own, kKeys * lane, 0);
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const uint4 four = load_shared_16((own_place ^ j << 4) + quad * kPlane);
        e[quad][j][0] = __uint_as_float(four.x), e[quad][j][1] = __uint_as_float(four.y);
        e[quad][j][2] = __uint_as_float(four.z), e[quad][j][3] = __uint_as_float(four.w);
      }
      if (num_keys < kTileKv) {
#pragma unroll
        for (int i = 0; i < kKeys * 4; ++i) {
          if (kKeys * lane + i / 4 >= num_keys) e[quad][i / 4][i % 4] = -INFINITY;
        }
      }
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i] = -INFINITY;
#pragma unroll
        for (int j = 0; j < kKeys; j += 2) values[i] = fmaxf(values[i], fmaxf(e[quad][j][i], e[quad][j + 1][i]));
      }
      const float max = reduce_four(values, lane, [](float a, float b) { return fmaxf(a, b); });
      const float below = finite_max(max);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float head_below = __shfl_sync(0xffffffffu, below, lane_of_four(i));
        values[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kKeys; j += 2) {
          e[quad][j][i] = exp2_approx(e[quad][j][i] - head_below);
          e[quad][j + 1][i] = exp2_approx(e[quad][j + 1][i] - head_below);
          values[i] += e[quad][j][i] + e[quad][j + 1][i];
        }
      }
      const float sum = reduce_four(values, lane, [](float a, float b) { return a + b; });
      drop_undefined_heads(e[quad], sum);
      const SoftmaxState quad_state = {__shfl_sync(0xffffffffu, max, lane_of_four(own_head & 3)),
                                       __shfl_sync(0xffffffffu, sum, lane_of_four(own_head & 3))};
      if (own_head >> 2 == quad) state = quad_state;
    }

    // What follows for the lane's head: its draws, and all keys' part of Z.
    const bool there = own_head < num_heads;
    const int span_len = unit.row.span_len;
    const float level_log2 = level * p.level_scale;
    const float share = streaming_share(state, level_log2, num_keys, span_len);
    const float rate = there ? draw_rate(p.num_samples, share, state) : 0.0f;
    reference = there ? tile_reference(Budget::kStreaming, level_log2, state.max) : -INFINITY;
    z = there ? state.sum * exp2_below(state.max, reference) : 0.0f;

    // How often each key is drawn, and how many draws there are before it.
    const float floor = floor_draws(p.num_samples, num_heads, span_len);
    float rates[4 * QUADS];
#pragma unroll
    for (int h = 0; h < 4 * QUADS; ++h) rates[h] = __shfl_sync(0xffffffffu, rate, h);
    uint32_t units[kKeys], sum = 0;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      float expected = floor;
#pragma unroll
      for (int h = 4 * QUADS - 1; h >= 0; --h) expected = fmaf(rates[h], e[h / 4][j][h % 4], expected);
      units[j] = proposal_units(expected);
    }
    if (num_keys < kTileKv) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) units[j] = kKeys * lane + j < num_keys ? units[j] : 0;
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j) sum += units[j];
    const uint32_t end = inclusive_scan(sum) + offset;
    const int count = static_cast<int>(__shfl_sync(0xffffffffu, end, 31) >> kProposalUnitBits);

    // From here on, so that registers are free before.
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      pair_reference[j] = __shfl_sync(0xffffffffu, reference, 2 * (lane & 3) + j);
      pair_change[j] = pair_drawn[j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4 * QUADS * kElements; ++i) sums[i / kElements][i % kElements] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < count; first += kListedDraws) {
      uint32_t position = end - sum;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const uint32_t place = (position >> kProposalUnitBits) - first;
        position += units[j];
        const bool drawn = (position >> kProposalUnitBits) - first != place;
        if (drawn && place < kListedDraws) {
          *reinterpret_cast<uint2*>(&own.draws[place].key) = {static_cast<uint32_t>(kKeys * lane + j), units[j]};
        }
      }
      __syncwarp();
      take(first_key, min(count - first, kListedDraws));
    }
    end_tile(count);
  }

  // ---- draws

  // Those that are listed: finds their rows and adds them up.
  __device__ __forceinline__ void take(int first_key, int listed) {
    uint64_t key_row = 0;  // of draw `lane`
    if (lane < listed) {
      ProposedDraw& draw = own.draws[lane];
      const int key = first_key + draw.key;
      const char* const k_row = cta.keys.row(key);
      const char* const v_row = cta.values.row(key);
      key_row = reinterpret_cast<uint64_t>(k_row);
      draw.value_row = reinterpret_cast<uint64_t>(v_row);
      draw.inverse = approximate_quotient(static_cast<float>(1u << kProposalUnitBits),
                                          static_cast<float>(__float_as_uint(draw.inverse)));
      if (lane >= kDrawsAtOnce) {  // those that have to wait come to the L2 meanwhile
#pragma unroll 1
        for (int byte = 0; byte < 2 * HEAD_DIM; byte += 128) {
          if (byte < HEAD_DIM * static_cast<int>(sizeof(K))) prefetch_l2(k_row + byte);
          if (byte < HEAD_DIM || p.v_dtype != Dtype::kFloat8E4M3) prefetch_l2(v_row + byte);
        }
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < listed; first += kDrawsAtOnce) {
      add(first_key, first, min(listed - first, kDrawsAtOnce), key_row);
    }
  }

  // Draws [first, first + count) of the list.
  __device__ __forceinline__ void add(int first_key, int first, int count, uint64_t key_row) {
    const int g = lane >> 2, t = lane & 3;
    const bool v_float8 = p.v_dtype == Dtype::kFloat8E4M3;

    // Rows are on their way together. Keys are the M of m16n8k16, up to 8 of them; a lane has eight elements of each
    // 32, those of q likewise, in an order of features that is the same for both.
    constexpr int kChunks = HEAD_DIM / 32, kAhead = HEAD_DIM <= 128 ? kDrawsAtOnce : 0;
    const auto* const k_row = reinterpret_cast<const K*>(__shfl_sync(0xffffffffu, key_row, first + min(g, count - 1)));
    uint4 k[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) k[i] = load_key_elements<T>(k_row + i * 32 + t * 8);
    DrawnValues<T, K, kElements> v[kAhead > 0 ? kAhead : 4];
    const int lane_element = min(lane, Lanes::kLanes - 1) * kElements;
    const auto load_values = [&](int from, int place) {  // four of them; past the end the last one again
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[place + i].load(own.draws[first + min(from + i, count - 1)].value_row, lane_element, v_float8);
      }
    };
    if constexpr (kAhead > 0) load_values(0, 0);

    float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of draw g, the lane's pair
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 q = *reinterpret_cast<const uint4*>(&queries.exact[g][i * 32 + t * 8]);
      Float16Traits<T>::mma(scores, {k[i].x, 0u, k[i].y, 0u}, q.x, q.y);
      Float16Traits<T>::mma(scores, {k[i].z, 0u, k[i].w, 0u}, q.z, q.w);
    }
    if constexpr (kAhead > 0) {  // registers are few: when those of the keys are free again
      if (count > 4) load_values(4, 4);
    }

    const ProposedDraw draw = own.draws[first + min(g, count - 1)];
    const int quad = QUADS == 1 ? 0 : t >> 1;
    const uint2 proposed = load_shared_8(place_of(own, draw.key, quad) + (t & 1) * 8);
    const float score_scale = p.score_scale(cta.unit.kv_head);
    const int head = 2 * t;
    bool there[2], rises = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      there[j] = g < count && head + j < cta.unit.heads.count;
      scores[j] = logit_of(scores[j], score_scale);
      if (changes_logits(p)) {
        const KeyRange visible = visible_keys(p, cta.unit.row.end(), cta.unit.heads.first + head + j);
        scores[j] = attended_logit(p, visible, first_key + draw.key, scores[j]);
      }
      rises = rises || (there[j] && scores[j] > pair_reference[j]);
    }
    if (__any_sync(0xffffffffu, rises)) {
      float most[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) most[j] = max_over_keys(there[j] ? scores[j] : -INFINITY);
      const int from = (lane & 7) >> 1;
      const float even = __shfl_sync(0xffffffffu, most[0], from), odd = __shfl_sync(0xffffffffu, most[1], from);
      raise((lane & 1) != 0 ? odd : even);
    }
    float weights[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float from_codes = __uint_as_float(j == 0 ? proposed.x : proposed.y);
      weights[j] = there[j] ? exp2_below(scores[j], pair_reference[j]) * draw.inverse : 0.0f;
      pair_drawn[j] += weights[j];
      if (there[j]) pair_change[j] += weights[j] - exp2_below(from_codes, pair_reference[j]) * draw.inverse;
    }
    if (t < 2 * QUADS) *reinterpret_cast<float2*>(&own.weights[g][head]) = {weights[0], weights[1]};
    __syncwarp();

    const auto add_values = [&](int from, int place, int there) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i > 0 && i >= there) break;
        float value[kElements];
        v[place + i].unpack(value, v_float8);
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
          const float4 w = *reinterpret_cast<const float4*>(&own.weights[from + i][quad * 4]);
          const float of_head[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int h = 0; h < 4; ++h) {
#pragma unroll
            for (int d = 0; d < kElements; ++d) {
              sums[quad * 4 + h][d] = fmaf(of_head[h], value[d], sums[quad * 4 + h][d]);
            }
          }
        }
      }
    };
    if constexpr (kAhead > 0) {
      add_values(0, 0, count);
      if (count > 4) add_values(4, 4, count - 4);
    } else {
#pragma unroll 1
      for (int from = 0; from < count; from += 4) {
        load_values(from, 0);
        add_values(from, 0, count - from);
      }
    }
    __syncwarp();  // all lanes have read the weights
  }

  // Makes sure that 2^reference is as large as what is asked for, of head lane % 8: it seldom is not.
  __device__ __forceinline__ void raise(float least) {
    if (!__any_sync(0xffffffffu, least > reference)) return;
    const float raised = fmaxf(reference, least), factor = exp2_below(reference, raised);
    reference = raised, z *= factor;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int head = 2 * (lane & 3) + j;
      pair_reference[j] = __shfl_sync(0xffffffffu, raised, head);
      const float pair_factor = __shfl_sync(0xffffffffu, factor, head);
      pair_change[j] *= pair_factor, pair_drawn[j] *= pair_factor;
    }
#pragma unroll
    for (int h = 0; h < 4 * QUADS; ++h) {
      const float head_factor = __shfl_sync(0xffffffffu, factor, h);
#pragma unroll
      for (int d = 0; d < kElements; ++d) sums[h][d] *= head_factor;
    }
  }

  // ---- sums: of tiles to those of their part, of warps to those of the part that they share, in the same way

  // a, relative to 2^reference, and b to 2^other: `factor` and `other_factor` of the two, relative to the larger one.
  static __device__ __forceinline__ float merged(float a, float factor, float b, float other_factor) {
    return fmaf(other_factor, b, a * factor);
  }

  __device__ __forceinline__ void end_tile(int rows) {
    // Over the draws that lanes have: halves of the warp take one of the sums each, their halves one head of the pair.
    const bool high = (lane & 16) != 0, odd = (lane & 8) != 0;
    float own_sums[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float sent = high ? pair_change[j] : pair_drawn[j];
      own_sums[j] = (high ? pair_drawn[j] : pair_change[j]) + __shfl_xor_sync(0xffffffffu, sent, 16);
    }
    float sum = (odd ? own_sums[1] : own_sums[0]) + __shfl_xor_sync(0xffffffffu, odd ? own_sums[0] : own_sums[1], 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 4);
    const int from = (lane & 1) << 3 | (lane & 7) >> 1;
    z += __shfl_sync(0xffffffffu, sum, from);
    const float drawn = __shfl_sync(0xffffffffu, sum, 16 + from);

    const int head = lane & 7, rows_before = own.rows;
    const float before = own.reference[head], raised = fmaxf(before, reference);
    const float factor = exp2_below(before, raised), tile_factor = exp2_below(reference, raised);
    const float part_z = merged(own.z[head], factor, z, tile_factor);
    const float part_drawn = merged(own.drawn[head], factor, drawn, tile_factor);
    __syncwarp();  // all lanes have read them
    if (lane < kHeadBlock) own.reference[lane] = raised, own.z[lane] = part_z, own.drawn[lane] = part_drawn;
    if (lane == 0) own.rows = rows_before + rows;
    if (rows_before + rows == 0) return;
#pragma unroll
    for (int h = 0; h < 4 * QUADS; ++h) {
      const float head_factor = __shfl_sync(0xffffffffu, factor, h),
                  head_tile_factor = __shfl_sync(0xffffffffu, tile_factor, h);
      if (lane >= Lanes::kLanes) continue;
      float of_part[kElements] = {};
      if (rows_before > 0) load_elements(of_part, &own.sums[h][lane * kElements]);
#pragma unroll
      for (int d = 0; d < kElements; ++d) of_part[d] = merged(of_part[d], head_factor, sums[h][d], head_tile_factor);
      store_elements(&own.sums[h][lane * kElements], of_part);
    }
  }

  __device__ __forceinline__ int64_t stats_of(int part) const {
    const RowUnit& unit = cta.unit;
    return p.stats_offset(unit.group) + static_cast<int64_t>(part) * p.group_size + unit.heads.first;
  }
  __device__ __forceinline__ void write_rows(int part, int rows) const {
    const RowUnit& unit = cta.unit;
    if (p.rows_read == nullptr || lane != 0) return;
    p.tile_rows[(unit.group * p.num_head_blocks() + unit.block) * p.max_tiles + part] = rows;
  }

  // Writes what a warp has of a part, if it has all of it.
  __device__ __forceinline__ void write_own(const ProposalParams& proposal, int part) const {
    const int64_t stats = stats_of(part);
    const int num_heads = cta.unit.heads.count, rows = own.rows;
#pragma unroll 1
    for (int h = 0; h < num_heads; ++h) {
      float values[kElements] = {};
      if (lane >= Lanes::kLanes) break;
      if (rows > 0) load_elements(values, &own.sums[h][lane * kElements]);
      store_global(p.o_accum + (stats + h) * HEAD_DIM + lane * kElements, values, evict_last_policy());
    }
    if (lane < num_heads) {
      p.tile_max[stats + lane] = own.reference[lane], p.tile_sum[stats + lane] = own.z[lane];
      proposal.tile_drawn[stats + lane] = own.drawn[lane];
    }
    write_rows(part, rows);
  }

  // Writes the part's sums of heads `member`, member + team, ...: those of `team` warps, `first` and on, in their
  // order.
  __device__ __forceinline__ void write_shared(const ProposalParams& proposal, const Shared* first, int team,
                                               int member, int part) const {
    const int64_t stats = stats_of(part);
#pragma unroll 1
    for (int h = member; h < cta.unit.heads.count; h += team) {
      float reference = -INFINITY, z = 0.0f, drawn = 0.0f, sums[kElements] = {};
#pragma unroll
      for (int u = 0; u < kProposalWarps; ++u) {  // no branches: what all warps have is on its way together
        const bool there = u < team;
        const Shared& of = first[there ? u : 0];
        const float other = there ? of.reference[h] : -INFINITY, raised = fmaxf(reference, other);
        const float factor = exp2_below(reference, raised), other_factor = exp2_below(other, raised);
        reference = raised;
        z = there ? merged(z, factor, of.z[h], other_factor) : z;
        drawn = there ? merged(drawn, factor, of.drawn[h], other_factor) : drawn;
        float values[kElements] = {};
        if (of.rows > 0) load_elements(values, &of.sums[h][min(lane, Lanes::kLanes - 1) * kElements]);
#pragma unroll
        for (int d = 0; d < kElements; ++d) {
          sums[d] = there ? merged(sums[d], factor, values[d], other_factor) : sums[d];
        }
      }
      if (lane < Lanes::kLanes) {
        store_global(p.o_accum + (stats + h) * HEAD_DIM + lane * kElements, sums, evict_last_policy());
      }
      if (lane == 0) {
        p.tile_max[stats + h] = reference, p.tile_sum[stats + h] = z, proposal.tile_drawn[stats + h] = drawn;
      }
    }
    if (member != 0) return;
    int rows = 0;
    for (int u = 0; u < team; ++u) rows += first[u].rows;
    write_rows(part, rows);
  }

 private:
  static __device__ __forceinline__ void load_elements(float (&values)[kElements], const float* from) {
    if constexpr (kElements == 2) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      values[0] = two.x, values[1] = two.y;
    } else {
#pragma unroll
      for (int d = 0; d < kElements; d += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + d);
        values[d] = four.x, values[d + 1] = four.y, values[d + 2] = four.z, values[d + 3] = four.w;
      }
    }
  }
};

}  // namespace santa::cuda
