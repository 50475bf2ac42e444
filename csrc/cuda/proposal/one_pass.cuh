// Rows that are sampled by proposal keys (core/proposal.h), in one pass. A CTA walks a run of parts of one row and KV
// head (and block of up to 8 query heads), and each of its warps does all there is to do for the tiles that it takes:
// scores the codes, which stream through a ring of slots that the warp fills itself, draws, scores the keys that it
// drew again, and adds up their values. Where there are parts enough a warp takes whole ones; else the tiles of a part
// go to several warps, whose sums are added up in the end, in the same order. No CTA waits for another.
#pragma once

#include "cuda/decode/stages.cuh"
#include "cuda/proposal/code_score.cuh"
#include "cuda/proposal/draw.cuh"
#include "cuda/proposal/launch.h"

namespace santa::cuda {

// Parts [0, num_parts) of the run, counted from its first key on; num_keys of them are there.
template <typename T, typename K, int HEAD_DIM, int QUADS>
__device__ __forceinline__ void propose_parts(const ProposalParams& proposal, const Work<>& work,
                                              unsigned char* shared_bytes) {
  using Warp = ProposalWarp<T, K, HEAD_DIM, QUADS>;
  using Shared = typename Warp::Shared;
  constexpr int kTileKv = Warp::kTileKv, kSlotBytes = code_slot_bytes(HEAD_DIM);
  const DecodeParams& p = proposal.decode;
  auto& cta = *reinterpret_cast<ProposalShared*>(shared_bytes);
  auto& queries = *reinterpret_cast<QueryCodes<T, HEAD_DIM>*>(shared_bytes + kProposalSharedBytes);
  auto* const warps = reinterpret_cast<Shared*>(shared_bytes + kProposalSharedBytes + aligned_query_bytes(HEAD_DIM));
  const int warp = warp_index(), lane = threadIdx.x & 31, ring_slots = p.plan.num_slots;
  // Not from `warp`: slot_after says why.
  Shared& shared = warps[threadIdx.x >> 5];
  const uint32_t ring =
      shared_address(warps + kProposalWarps) + static_cast<uint32_t>(threadIdx.x >> 5) * ring_slots * kSlotBytes;
  const uint32_t ring_end = ring + ring_slots * kSlotBytes;

  QueryFeatures<T, HEAD_DIM> features;  // first of all: they take their time
  if (warp < work.unit.heads.count) features.load(proposal, work.unit, warp, lane);
  const int part_kv = work.unit.row.tile_kv, kv_len = work.unit.row.kv_len;
  if (threadIdx.x == 0) {
    cta.unit = work.unit;
    cta.first_part = work.first_part, cta.num_parts = work.last_part - work.first_part;
    cta.part_kv = part_kv, cta.first_key = work.first_part * part_kv;
    cta.num_keys = min(cta.num_parts * part_kv, kv_len - cta.first_key);
    const int part_tiles = part_kv / kTileKv;
    cta.team = p.plan.whole_parts && part_tiles <= kProposalWarps ? 1 : min(part_tiles, kProposalWarps);
    cta.turns = part_tiles / cta.team, cta.span = cta.team == 1 ? part_kv : kTileKv;
  }
  if (threadIdx.x == 32) {
    cta.keys = key_bytes(p, work.unit);
    cta.first_codes = CodeSlots<HEAD_DIM>::find_first(proposal, work.unit, work.first_part * part_kv);
  }
  if (threadIdx.x == 64) cta.values = value_bytes(p, work.unit);
  if (threadIdx.x == 96) {
    cta.stream =
        random_stream(p, work.unit.batch_index, work.unit.row, work.unit.kv_head, work.unit.block, p.num_head_blocks());
  }
  __syncthreads();

  // From lane 0: see warp_index.
  const auto same = [](int value) { return __shfl_sync(0xffffffffu, value, 0); };
  using Slots = CodeSlots<HEAD_DIM>;
  const bool side_by_side = same(Slots::side_by_side(proposal, cta.unit));
  const int num_keys = same(cta.num_keys), span = same(cta.span);
  int ahead = warp * span;  // what is copied next
  int32_t page =
      side_by_side ? 0 : Slots::load(&proposal, &cta.unit, 0, 0, 0, 0, cta.first_key + ahead, num_keys - ahead);
  const auto load = [&](uint32_t slot) {
    if (ahead < num_keys) {
      const int begin = ahead;
      ahead += kCodeSlotKeys;
      if ((ahead & (span - 1)) == 0) ahead += (kProposalWarps - 1) * span;
      if (side_by_side && begin + kCodeSlotKeys <= num_keys) {
        Slots::load_whole(slot, cta.first_codes, begin, lane);
      } else {
        page = Slots::load(&proposal, &cta.unit, slot, cta.first_key + begin, num_keys - begin, page,
                           cta.first_key + ahead, num_keys - ahead);
      }
    }
    cp_async_commit();  // every call is a group of copies, be it an empty one
  };
  uint32_t slot = ring;
  for (int i = 0; i < ring_slots; ++i) load(ring + i * kSlotBytes);
  put_queries(proposal, cta.unit, features, queries, warp, kProposalWarps, lane);
  __syncthreads();

  const CodeScorer<T, HEAD_DIM, QUADS> scorer(queries, lane);
  Warp own{p, cta, queries, shared, lane};
  int tile_index = 0;
#pragma unroll 1
  for (int part = warp / same(cta.team); part < same(cta.num_parts); part += kProposalWarps / same(cta.team)) {
    own.begin_part();
#pragma unroll 1
    for (int turn = 0; turn < same(cta.turns); ++turn, ++tile_index) {
      const int team = same(cta.team);
      const int tile = part * same(cta.part_kv) + (turn * team + (warp & (team - 1))) * kTileKv;
      const int tile_keys = min(num_keys - tile, kTileKv);
      if (tile_keys <= 0) break;
      // Levels are asked for before the last slots of the first tile: they take their time too. Beside float8 keys,
      // where registers are few, behind it.
      constexpr bool kAsksAhead = !std::is_same_v<K, Float8>;
      int first = 0, stop = kAsksAhead && tile_index == 0 ? tile_keys - kLevelAheadKeys : tile_keys;
      while (true) {
#pragma unroll 1
        for (; first < stop; first += kCodeSlotKeys) {
          // cp_async_wait_but(ring_slots - 1), the usual number first: it is asked for every slot.
          if (ring_slots == 3) {
            cp_async_wait<2>();
          } else if (ring_slots == 2) {
            cp_async_wait<1>();
          } else {
            cp_async_wait<3>();
          }
          __syncwarp();  // the other lanes' copies are visible
          scorer.score(slot, lane, [&](int at, const float (&logits)[4]) { own.put(first + at, logits); });
          __syncwarp();  // the other lanes are done with the slot: it is filled again
          load(slot);
          slot = slot + kSlotBytes == ring_end ? ring : slot + kSlotBytes;
        }
        if (kAsksAhead ? stop >= tile_keys : tile_index > 0) break;
        wait_for_previous();  // the pilot
        const int head = cta.unit.heads.first + min(lane & 7, cta.unit.heads.count - 1);
        own.level = __ldcg(p.level + p.output_index(cta.unit.batch_index, cta.unit.kv_head, head));
        if (!kAsksAhead) break;
        stop = tile_keys;
      }
      if ((tile_index & 31) == 0) {
        const int span_tiles = span / kTileKv, nth = (tile / kTileKv & (span_tiles - 1)) + lane;
        const int64_t position = static_cast<int64_t>(cta.unit.row.span_first) + cta.first_key + tile / span * span +
                                 static_cast<int64_t>(nth / span_tiles) * kProposalWarps * span +
                                 nth % span_tiles * kTileKv;
        shared.offsets[lane] =
            tile_offset(Budget::kStreaming, cta.stream, position, kTileKv, cta.unit.row.span_len, 0, kProposalUnitBits);
        __syncwarp();
      }
      own.draw(cta.first_key + tile, tile_keys, shared.offsets[tile_index & 31]);
    }
    __syncwarp();  // the sums are there
    const int team = same(cta.team);
    if (team == 1) {
      own.write_own(proposal, cta.first_part + part);
      __syncwarp();  // all lanes have read the sums
      continue;
    }
    const int member = warp & (team - 1);
    team_barrier(1 + warp / team, team * 32);
    own.write_shared(proposal, warps + (warp - member), team, member, cta.first_part + part);
    team_barrier(1 + warp / team, team * 32);
  }
  cp_async_wait<0>();
}

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int proposal_ctas(int head_dim) { return head_dim <= 128 ? 3 : 2; }
#else
constexpr int proposal_ctas(int head_dim) { return most_proposal_ctas(head_dim); }
#endif

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kPilotWarps * 32, 1) pilot_proposal_kernel(const __grid_constant__ ProposalParams p) {
  SANTA_DYNAMIC_SHARED(shared_bytes);
  launch_dependents();
  const RowUnit unit = RowUnit::make(p.decode, blockIdx.y, blockIdx.x);
  if (!unit.row.one_pass()) return;
  using Scorer = PilotScorer<T, HEAD_DIM>;
  const int warp = warp_index(), lane = threadIdx.x & 31;
  unsigned char* const slots = shared_bytes + kPilotHeadBytes;
  QueryFeatures<T, HEAD_DIM> features;
  if (warp < unit.heads.count) features.load(p, unit, warp, lane);
  Scorer::load(p, unit, shared_address(slots) + (threadIdx.x >> 5) * Scorer::kPilotBytes, warp, lane);
  auto& queries = *reinterpret_cast<QueryCodes<T, HEAD_DIM>*>(slots + kPilotWarps * Scorer::kPilotBytes);
  put_queries(p, unit, features, queries, warp, kPilotWarps, lane);
  __syncthreads();
  Scorer scorer{queries};
  find_level(p.decode, unit, scorer, shared_bytes);
}

// QUADS: head_quads of the block.
template <typename T, typename K, int HEAD_DIM, int QUADS>
__global__ void __launch_bounds__(kProposalWarps * 32, proposal_ctas(HEAD_DIM))
    one_pass_proposal_kernel(const __grid_constant__ ProposalParams p) {
  SANTA_DYNAMIC_SHARED(shared_bytes);
  launch_dependents();
  const Work<> work(p.decode);
  if (!__shfl_sync(0xffffffffu, work.exists(RowKind::kOnePass), 0)) return;
  propose_parts<T, K, HEAD_DIM, QUADS>(p, work, shared_bytes);
}

template <typename T, typename K, int HEAD_DIM>
void launch_one_pass_proposal(const ProposalParams& p, cudaStream_t stream) {
  auto* const kernel = head_quads(head_block_of(p.decode, 0).count) == 1 ? one_pass_proposal_kernel<T, K, HEAD_DIM, 1>
                                                                         : one_pass_proposal_kernel<T, K, HEAD_DIM, 2>;
  launch_one_pass_kernels(pilot_proposal_kernel<T, HEAD_DIM>, kernel, p, p.decode, pilot_proposal_bytes(HEAD_DIM),
                          proposal_shared_bytes(p.decode, p.decode.plan.num_slots), kProposalWarps * 32, stream);
}

}  // namespace santa::cuda
