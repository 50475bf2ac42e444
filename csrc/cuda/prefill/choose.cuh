// Stages 2 to 5: masses of the sampled rows, then one CTA per head (and set) chooses columns and slashes. Sums are sums
// of integers, so they come out the same in any order.
#pragma once

#include <cmath>

#include "core/mixture.h"
#include "core/softmax_state.h"
#include "cuda/common/reduce.cuh"
#include "select_params.h"

namespace santa::cuda {

constexpr int kMassThreads = 1024;
constexpr int kMassSlices = kMassThreads / kSelectBlock;
constexpr int kCoverThreads = 512;
constexpr int kChooseThreads = 1024;

__device__ __forceinline__ void add_shared(uint64_t* sum, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}

// One CTA per (head, chunk). Each row's log-sum-exp over the blocks, then the masses of rows on blocks, summed over
// either.
__global__ void __launch_bounds__(kMassThreads) mass_kernel(const __grid_constant__ SampleSelectParams p) {
  __shared__ SoftmaxState states[kMassSlices][kSelectBlock];
  __shared__ float row_lse[kSelectBlock];
  __shared__ uint64_t row_total[kSelectBlock];
  const int64_t index = blockIdx.x;  // head * num_chunks + chunk
  const int chunk = blockIdx.x % p.num_chunks, diagonal = p.diagonal(chunk), rows = p.rows(chunk);
  const float* lse = p.block_lse + index * p.nk * kSelectBlock;

  const int row = threadIdx.x % kSelectBlock, slice = threadIdx.x / kSelectBlock;
  SoftmaxState state = empty_softmax_state();
  for (int b = slice; b <= diagonal; b += kMassSlices) {
    state = merge(state, {lse[static_cast<int64_t>(b) * kSelectBlock + row], 1.0f});
  }
  states[slice][row] = state;
  __syncthreads();
  bool broken = false;
  if (slice == 0) {
    for (int i = 1; i < kMassSlices; ++i) state = merge(state, states[i][row]);
    const float total = log2_sum(state);
    broken = row < rows && !is_finite(total);
    row_lse[row] = total;
    row_total[row] = 0;
    p.row_lse[index * kSelectBlock + row] = total;
  }
  broken = __syncthreads_or(broken);
  if (threadIdx.x == 0) p.broken[index] = broken;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint64_t own_rows[4] = {0, 0, 0, 0};
  for (int b = warp; b < p.nk; b += kMassThreads / 32) {
    uint64_t sum = 0;
    if (b <= diagonal) {
      const float4 values = reinterpret_cast<const float4*>(lse + static_cast<int64_t>(b) * kSelectBlock)[lane];
      const float value[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t mass = mass_units(exp2_below(value[i], row_lse[4 * lane + i]));
        own_rows[i] += mass;
        sum += mass;
      }
      sum = warp_sum(sum);
    }
    if (lane == 0) p.block_mass[index * p.nk + b] = sum;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) add_shared(&row_total[4 * lane + i], own_rows[i]);
  __syncthreads();
  if (slice == 0) p.row_total[index * kSelectBlock + row] = row_total[row];
}

// The parts of the workspace that belong to one head.
struct HeadWorkspace {
  const uint64_t* block_mass;
  uint64_t* gains;
  int32_t* added;
  uint8_t* chosen;

  __device__ __forceinline__ HeadWorkspace(const SampleSelectParams& p, int head)
      : block_mass(p.block_mass + static_cast<int64_t>(head) * p.num_chunks * p.nk),
        gains(p.gains + static_cast<int64_t>(head) * 2 * p.nk),
        added(p.added + static_cast<int64_t>(head) * 2 * p.nk),
        chosen(p.chosen + static_cast<int64_t>(head) * 2 * p.nk) {}
};

__device__ __forceinline__ bool is_broken(const SampleSelectParams& p, int head) {
  bool broken = false;
  for (int chunk = 0; chunk < p.num_chunks; ++chunk) broken |= p.broken[head * p.num_chunks + chunk] != 0;
  return broken;
}

// One CTA per (head, set): the columns or the slashes of the paper's rule, or those that are forced. Instead of
// sorting, the smallest mass that is selected is found bit by bit: the largest v such that the entries of at least v
// reach the target. Entries above v are selected, and of those equal to v the first ones, as many as it takes.
__global__ void __launch_bounds__(kCoverThreads) cover_kernel(const __grid_constant__ SampleSelectParams p) {
  __shared__ uint64_t scratch[kCoverThreads / 32];
  __shared__ int ties_of_warp[kCoverThreads / 32];
  const int head = blockIdx.x / 2, nk = p.nk;
  const bool slashes = blockIdx.x % 2 == 1;
  const HeadWorkspace workspace(p, head);
  uint64_t* x = workspace.gains + (slashes ? nk : 0);
  uint8_t* chosen = workspace.chosen + (slashes ? nk : 0);
  const int forced = slashes ? p.window_blocks : p.sink_blocks;
  const bool joint = p.selection == Selection::kJoint;
  const double alpha = joint ? p.joint_alpha() : slashes ? p.alpha_s : p.alpha_c;

  const bool everything = alpha >= 1.0 || p.keeps_everything() || is_broken(p, head);
  if (everything || joint || alpha <= 0.0) {
    for (int i = threadIdx.x; i < nk; i += kCoverThreads) chosen[i] = everything || i < forced;
    return;
  }

  uint64_t own_total = 0;
  for (int i = threadIdx.x; i < nk; i += kCoverThreads) {
    uint64_t sum = 0;
    for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
      const int b = slashes ? p.diagonal(chunk) - i : i;
      if (b >= 0) sum += workspace.block_mass[static_cast<int64_t>(chunk) * nk + b];
    }
    x[i] = sum;
    own_total += sum;
  }
  const uint64_t total = block_sum<kCoverThreads>(own_total, scratch);
  const uint64_t target = mass_target(total, alpha);
  const auto sum_from = [&](uint64_t least) {
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < nk; i += kCoverThreads) sum += x[i] >= least ? x[i] : 0;
    return block_sum<kCoverThreads>(sum, scratch);
  };
  uint64_t least = 0;
  for (int bit = 63 - __clzll(static_cast<long long>(total | 1)); bit >= 0; --bit) {
    const uint64_t candidate = least | (uint64_t{1} << bit);
    if (sum_from(candidate) >= target) least = candidate;
  }
  const uint64_t above = sum_from(least + 1);
  const uint64_t ties = least == 0 ? nk : (target - above + least - 1) / least;

  uint64_t seen = 0;  // ties before the current stretch of indices
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int base = 0; base < nk; base += kCoverThreads) {
    const int i = base + threadIdx.x;
    const bool tie = i < nk && x[i] == least;
    const unsigned votes = __ballot_sync(0xffffffffu, tie);
    __syncthreads();  // the last stretch's counts were read
    if (lane == 0) ties_of_warp[warp] = __popc(votes);
    __syncthreads();
    uint64_t rank = seen + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kCoverThreads / 32; ++w) {
      if (w < warp) rank += ties_of_warp[w];
      seen += ties_of_warp[w];
    }
    if (i < nk) chosen[i] = i < forced || x[i] > least || (tie && rank < ties);
  }
}

// How many blocks each column and slash adds to those that are kept.
__device__ __forceinline__ void count_added(const SampleSelectParams& p, const HeadWorkspace& workspace) {
  for (int item = threadIdx.x; item < 2 * p.nk; item += kChooseThreads) {
    const uint8_t* mirrors = workspace.chosen + (item < p.nk ? p.nk : 0);
    const MirrorRange range = mirrors_of(item % p.nk, p.nk, p.offset);
    int added = 0;
    if (!workspace.chosen[item]) {
      for (int i = range.first; i < range.last; ++i) added += mirrors[i] == 0;
    }
    workspace.added[item] = added;
  }
}

// Chooses a column or slash, which its mirrors then need not add. A barrier has to follow.
__device__ __forceinline__ void choose(const SampleSelectParams& p, const HeadWorkspace& workspace, int item) {
  const int mirrors = item < p.nk ? p.nk : 0;
  const MirrorRange range = mirrors_of(item % p.nk, p.nk, p.offset);
  for (int i = range.first + threadIdx.x; i < range.last; i += kChooseThreads) {
    if (!workspace.chosen[mirrors + i]) --workspace.added[mirrors + i];
  }
  if (threadIdx.x == 0) workspace.chosen[item] = 1;
}

// One CTA per head: joint selection, from the forced columns and slashes on.
__global__ void __launch_bounds__(kChooseThreads, 1) joint_kernel(const __grid_constant__ SampleSelectParams p) {
  __shared__ uint64_t sums[kChooseThreads / 32];
  __shared__ Ranked ranks[kChooseThreads / 32];
  const int head = blockIdx.x, nk = p.nk;
  const double alpha = p.joint_alpha();
  if (alpha <= 0.0 || alpha >= 1.0 || p.keeps_everything() || is_broken(p, head)) return;
  const HeadWorkspace workspace(p, head);
  const uint8_t* chosen = workspace.chosen;

  count_added(p, workspace);
  uint64_t own_total = 0, own_left = 0;
  for (int item = threadIdx.x; item < 2 * nk; item += kChooseThreads) {
    const bool column = item < nk;
    uint64_t gain = 0;
    for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
      const int i = item % nk, mirror = p.diagonal(chunk) - i;
      if (mirror < 0) continue;
      const uint64_t mass = workspace.block_mass[static_cast<int64_t>(chunk) * nk + (column ? i : mirror)];
      if (column) own_total += mass;
      if (!chosen[item] && !chosen[(column ? nk : 0) + mirror]) gain += mass;
    }
    workspace.gains[item] = gain;
    if (column) own_left += gain;
  }
  const uint64_t total = block_sum<kChooseThreads>(own_total, sums);
  uint64_t kept = total - block_sum<kChooseThreads>(own_left, sums);
  const uint64_t target = mass_target(total, alpha);
  while (kept < target) {
    Ranked own = {0, 0x7fffffff};
    for (int item = threadIdx.x; item < 2 * nk; item += kChooseThreads) {
      if (!chosen[item]) own = better(own, {priority_of(workspace.gains[item], workspace.added[item]), item});
    }
    const Ranked best = block_best<kChooseThreads>(own, ranks);
    if (best.rank == 0) break;  // nothing is left to gain
    const bool column = best.index < nk;
    kept += workspace.gains[best.index];
    for (int chunk = threadIdx.x; chunk < p.num_chunks; chunk += kChooseThreads) {
      const int i = best.index % nk, mirror = p.diagonal(chunk) - i, item = (column ? nk : 0) + mirror;
      if (mirror < 0 || chosen[item]) continue;
      workspace.gains[item] -= workspace.block_mass[static_cast<int64_t>(chunk) * nk + (column ? i : mirror)];
    }
    choose(p, workspace, best.index);
    __syncthreads();
  }
}

// One CTA per head: adds columns and slashes until every sampled row keeps min_mass.
__global__ void __launch_bounds__(kChooseThreads, 1) repair_kernel(const __grid_constant__ SampleSelectParams p) {
  __shared__ Ranked ranks[kChooseThreads / 32];
  const int head = blockIdx.x, nk = p.nk, num_rows = p.num_rows();
  if (is_broken(p, head)) return;
  const HeadWorkspace workspace(p, head);
  const uint8_t* chosen = workspace.chosen;
  const int64_t first_row = static_cast<int64_t>(head) * p.num_chunks * kSelectBlock;
  uint64_t* retained = p.retained + first_row;
  const uint64_t* row_total = p.row_total + first_row;
  const float* row_lse = p.row_lse + first_row;
  const auto mass_of = [&](int row, int block) {
    const int64_t chunk = static_cast<int64_t>(head) * p.num_chunks + row / kSelectBlock;
    return mass_units(exp2_below(p.block_lse[(chunk * nk + block) * kSelectBlock + row % kSelectBlock], row_lse[row]));
  };
  const auto keeps = [&](int diagonal, int block) { return chosen[block] != 0 || chosen[nk + diagonal - block] != 0; };

  count_added(p, workspace);
  for (int row = threadIdx.x; row < num_rows; row += kChooseThreads) {
    const int diagonal = p.diagonal(row / kSelectBlock);
    uint64_t sum = 0;
    for (int b = 0; b <= diagonal; ++b) {
      if (keeps(diagonal, b)) sum += mass_of(row, b);
    }
    retained[row] = sum;
  }
  __syncthreads();

  while (true) {
    Ranked own = {0, 0x7fffffff};
    for (int row = threadIdx.x; row < num_rows; row += kChooseThreads) {
      const double share = static_cast<double>(retained[row]) / static_cast<double>(row_total[row]);
      if (share < p.min_mass) own = better(own, {~static_cast<uint64_t>(__double_as_longlong(share)), row});
    }
    const Ranked worst = block_best<kChooseThreads>(own, ranks);
    if (worst.rank == 0) return;
    const int diagonal = p.diagonal(worst.index / kSelectBlock);

    own = {0, 0x7fffffff};
    for (int b = threadIdx.x; b <= diagonal; b += kChooseThreads) {
      if (keeps(diagonal, b)) continue;
      const int added = min(workspace.added[b], workspace.added[nk + diagonal - b]);
      own = better(own, {priority_of(mass_of(worst.index, b), added), b});
    }
    const Ranked best = block_best<kChooseThreads>(own, ranks);
    if (best.rank == 0) return;
    const int slash = nk + diagonal - best.index;
    const int item = workspace.added[best.index] <= workspace.added[slash] ? best.index : slash;
    for (int row = threadIdx.x; row < num_rows; row += kChooseThreads) {
      const int a = p.diagonal(row / kSelectBlock), b = item < nk ? item : a - (item - nk);
      if (b >= 0 && b <= a && !keeps(a, b)) retained[row] += mass_of(row, b);
    }
    __syncthreads();  // all have read what choosing changes
    choose(p, workspace, item);
    __syncthreads();
  }
}

// One CTA per group: every head gets the union.
__global__ void __launch_bounds__(kCoverThreads) union_kernel(const __grid_constant__ SampleSelectParams p) {
  uint8_t* chosen = p.chosen + static_cast<int64_t>(blockIdx.x) * p.gqa_group_size * 2 * p.nk;
  for (int item = threadIdx.x; item < 2 * p.nk; item += kCoverThreads) {
    uint8_t any = 0;
    for (int h = 0; h < p.gqa_group_size; ++h) any |= chosen[static_cast<int64_t>(h) * 2 * p.nk + item];
    for (int h = 0; h < p.gqa_group_size; ++h) chosen[static_cast<int64_t>(h) * 2 * p.nk + item] = any;
  }
}

}  // namespace santa::cuda
