// sample_select on the CPU: scores of the sampled rows -> masses -> columns and slashes -> kept blocks. Parallel over
// heads, or over the groups whose selections are united; heads write disjoint memory.
#include "cpu/sample_select.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/mixture.h"
#include "core/softmax_state.h"
#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

// One head between the stages. A row is a sampled one: chunk * 128 + its number in the block.
struct Head {
  const SampleSelectParams& p;
  int index;  // batch * num_qo_heads + head
  bool broken = false;
  std::vector<uint64_t> mass;        // [num_rows, nk], in units
  std::vector<uint64_t> row_total;   // [num_rows]
  std::vector<uint64_t> block_mass;  // [num_chunks, nk]
  std::vector<uint8_t> columns, slashes;

  Head(const SampleSelectParams& p, int index) : p(p), index(index) {}

  int chunk_of(int row) const { return row / kSelectBlock; }
  bool keeps(int diagonal, int block) const { return columns[block] || slashes[diagonal - block]; }
};

void widen_rows(const void* data, Dtype dtype, int64_t first, int64_t stride, int count, int head_dim, float* block) {
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  for (int n = 0; n < count; ++n) {
    widen(static_cast<const char*>(data) + (first + n * stride) * size, dtype, block + n * head_dim, head_dim);
  }
}

// lse[r, b], base 2, of the rows of one chunk on the key blocks up to its diagonal.
void block_lse_of(const Head& head, int chunk, std::vector<float>& lse) {
  const SampleSelectParams& p = head.p;
  const int batch_index = head.index / p.num_qo_heads, qo_head = head.index % p.num_qo_heads;
  const int64_t q_base = batch_index * p.stride_q_batch + qo_head * p.stride_q_head;
  const int64_t k_base = batch_index * p.stride_k_batch + qo_head / p.gqa_group_size * p.stride_k_head;
  const int diagonal = p.diagonal(chunk), rows = p.rows(chunk);
  const int64_t first_row = static_cast<int64_t>(diagonal - p.offset) * kSelectBlock;

  std::vector<float> q(kSelectBlock * p.head_dim), k(kSelectBlock * p.head_dim);
  std::vector<float> scores(kSelectBlock * kSelectBlock), weights(kSelectBlock);
  widen_rows(p.q, p.dtype, q_base + first_row * p.stride_q_token, p.stride_q_token, rows, p.head_dim, q.data());
  for (int b = 0; b <= diagonal; ++b) {
    const int64_t first_key = static_cast<int64_t>(b) * kSelectBlock;
    const int keys = static_cast<int>(std::min<int64_t>(kSelectBlock, p.kv_len - first_key));
    widen_rows(p.k, p.dtype, k_base + first_key * p.stride_k_token, p.stride_k_token, keys, p.head_dim, k.data());
    score_block(q.data(), rows, k.data(), keys, p.head_dim, p.scale_log2, scores.data(), kSelectBlock);
    for (int r = 0; r < rows; ++r) {
      const float* row = scores.data() + r * kSelectBlock;
      const int visible = b == diagonal ? r + 1 : keys;
      const float max = max_block(row, visible);
      const float base = max == -INFINITY ? 0.0f : max;
      lse[static_cast<int64_t>(r) * p.nk + b] = base + std::log2(exp2_block(row, base, weights.data(), visible));
    }
  }
}

// Steps 1 to 3: the masses of the sampled rows.
void measure(Head& head) {
  const SampleSelectParams& p = head.p;
  const int64_t nk = p.nk;
  head.mass.assign(p.num_rows() * nk, 0);
  head.row_total.assign(p.num_rows(), 0);
  head.block_mass.assign(p.num_chunks * nk, 0);
  std::vector<float> lse(kSelectBlock * nk);
  for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
    block_lse_of(head, chunk, lse);
    const int diagonal = p.diagonal(chunk), rows = p.rows(chunk);
    for (int r = 0; r < rows; ++r) {
      const float* row_lse = lse.data() + r * nk;
      SoftmaxState state = empty_softmax_state();
      for (int b = 0; b <= diagonal; ++b) state = merge(state, {row_lse[b], 1.0f});
      const float total = log2_sum(state);
      if (!is_finite(total)) {
        head.broken = true;
        return;
      }
      const int64_t row = chunk * kSelectBlock + r;
      for (int b = 0; b <= diagonal; ++b) {
        const uint64_t mass = mass_units(exp2_below(row_lse[b], total));
        head.mass[row * nk + b] = mass;
        head.row_total[row] += mass;
        head.block_mass[chunk * nk + b] += mass;
      }
    }
  }
}

// Step 4: flags the largest entries that make up the part alpha of the sum, ties to the lower index.
void cover(const std::vector<uint64_t>& x, double alpha, std::vector<uint8_t>& flags) {
  if (alpha <= 0.0) return;
  if (alpha >= 1.0) return std::fill(flags.begin(), flags.end(), 1);
  std::vector<int> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return x[a] > x[b]; });
  const uint64_t target = mass_target(std::accumulate(x.begin(), x.end(), uint64_t{0}), alpha);
  uint64_t sum = 0;
  for (size_t i = 0; i < order.size() && sum < target; ++i) {
    flags[order[i]] = 1;
    sum += x[order[i]];
  }
}

// Columns and slashes as one list of candidates, columns first, with what each gains and what it adds.
struct Candidates {
  Head& head;
  std::vector<uint64_t> gain;
  std::vector<int> added;

  explicit Candidates(Head& head) : head(head), gain(2 * head.p.nk, 0), added(2 * head.p.nk, 0) {
    const int nk = head.p.nk;
    for (int item = 0; item < 2 * nk; ++item) {
      if (chosen(item)) continue;
      const std::vector<uint8_t>& mirrors = item < nk ? head.slashes : head.columns;
      const MirrorRange range = mirrors_of(item % nk, nk, head.p.offset);
      for (int i = range.first; i < range.last; ++i) added[item] += !mirrors[i];
    }
  }

  bool chosen(int item) const { return item < head.p.nk ? head.columns[item] : head.slashes[item - head.p.nk]; }

  void choose(int item) {
    const int nk = head.p.nk, mirrors = item < nk ? nk : 0;
    (item < nk ? head.columns[item] : head.slashes[item - nk]) = 1;
    gain[item] = 0, added[item] = 0;
    const MirrorRange range = mirrors_of(item % nk, nk, head.p.offset);
    for (int i = range.first; i < range.last; ++i) {
      if (!chosen(mirrors + i)) --added[mirrors + i];
    }
  }
};

void joint_cover(Head& head) {
  const SampleSelectParams& p = head.p;
  const double alpha = p.joint_alpha();
  if (alpha >= 1.0) {
    std::fill(head.columns.begin(), head.columns.end(), 1);
    std::fill(head.slashes.begin(), head.slashes.end(), 1);
  }
  if (alpha <= 0.0 || alpha >= 1.0) return;
  Candidates candidates(head);
  uint64_t total = 0, kept = 0;
  std::vector<uint64_t>& left = head.block_mass;
  for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
    const int diagonal = p.diagonal(chunk);
    for (int b = 0; b <= diagonal; ++b) {
      uint64_t& mass = left[static_cast<int64_t>(chunk) * p.nk + b];
      total += mass;
      if (head.keeps(diagonal, b)) {
        kept += mass;
        mass = 0;
      }
      candidates.gain[b] += mass;
      candidates.gain[p.nk + diagonal - b] += mass;
    }
  }
  const uint64_t target = mass_target(total, alpha);
  while (kept < target) {
    int best = 0;
    uint64_t best_priority = 0;
    for (int item = 0; item < 2 * p.nk; ++item) {
      const uint64_t priority = priority_of(candidates.gain[item], candidates.added[item]);
      if (priority > best_priority) best = item, best_priority = priority;
    }
    kept += candidates.gain[best];
    candidates.choose(best);
    for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
      const int diagonal = p.diagonal(chunk), b = best < p.nk ? best : diagonal - (best - p.nk);
      if (b < 0 || b > diagonal) continue;
      uint64_t& mass = left[static_cast<int64_t>(chunk) * p.nk + b];
      candidates.gain[best < p.nk ? p.nk + diagonal - b : b] -= mass;
      mass = 0;
    }
  }
}

uint64_t retained(const Head& head, int row) {
  const int diagonal = head.p.diagonal(head.chunk_of(row));
  const uint64_t* mass = head.mass.data() + static_cast<int64_t>(row) * head.p.nk;
  uint64_t sum = 0;
  for (int b = 0; b <= diagonal; ++b) {
    if (head.keeps(diagonal, b)) sum += mass[b];
  }
  return sum;
}

double share_of(uint64_t part, uint64_t total) { return static_cast<double>(part) / static_cast<double>(total); }

void repair(Head& head) {
  const SampleSelectParams& p = head.p;
  Candidates candidates(head);
  std::vector<uint64_t> kept(p.num_rows());
  for (int row = 0; row < p.num_rows(); ++row) kept[row] = retained(head, row);
  while (true) {
    int row = 0;
    for (int r = 1; r < p.num_rows(); ++r) {
      if (share_of(kept[r], head.row_total[r]) < share_of(kept[row], head.row_total[row])) row = r;
    }
    if (share_of(kept[row], head.row_total[row]) >= p.min_mass) return;
    const int diagonal = p.diagonal(head.chunk_of(row));
    int best = 0;
    uint64_t best_priority = 0;
    for (int b = 0; b <= diagonal; ++b) {
      if (head.keeps(diagonal, b)) continue;
      const int added = std::min(candidates.added[b], candidates.added[p.nk + diagonal - b]);
      const uint64_t priority = priority_of(head.mass[static_cast<int64_t>(row) * p.nk + b], added);
      if (priority > best_priority) best = b, best_priority = priority;
    }
    const int slash = p.nk + diagonal - best;
    const int item = candidates.added[best] <= candidates.added[slash] ? best : slash;
    for (int r = 0; r < p.num_rows(); ++r) {
      const int a = p.diagonal(head.chunk_of(r)), b = item < p.nk ? item : a - (item - p.nk);
      if (b >= 0 && b <= a && !head.keeps(a, b)) kept[r] += head.mass[static_cast<int64_t>(r) * p.nk + b];
    }
    candidates.choose(item);
  }
}

// Steps 4 and 5.
void choose(Head& head) {
  const SampleSelectParams& p = head.p;
  const bool everything = head.broken || p.keeps_everything();
  head.columns.assign(p.nk, everything);
  head.slashes.assign(p.nk, everything);
  if (everything) return;
  std::fill_n(head.columns.begin(), p.sink_blocks, 1);
  std::fill_n(head.slashes.begin(), p.window_blocks, 1);
  if (p.selection == Selection::kPaper) {
    std::vector<uint64_t> columns(p.nk, 0), slashes(p.nk, 0);
    for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
      const int diagonal = p.diagonal(chunk);
      for (int b = 0; b <= diagonal; ++b) {
        const uint64_t mass = head.block_mass[static_cast<int64_t>(chunk) * p.nk + b];
        columns[b] += mass;
        slashes[diagonal - b] += mass;
      }
    }
    cover(columns, p.alpha_c, head.columns);
    cover(slashes, p.alpha_s, head.slashes);
  } else {
    joint_cover(head);
  }
  if (p.repairs()) repair(head);
}

// Step 6, and the statistics.
void write(const Head& head) {
  const SampleSelectParams& p = head.p;
  int64_t kept_blocks = 0, causal_blocks = 0;
  for (int a = 0; a < p.nq; ++a) {
    const int64_t block_row = static_cast<int64_t>(head.index) * p.nq + a;
    const int diagonal = a + p.offset;
    int32_t* kv_idx = p.kv_idx + block_row * p.nk;
    int count = 0;
    for (int b = 0; b <= diagonal; ++b) {
      if (head.keeps(diagonal, b)) kv_idx[count++] = b;
    }
    std::fill(kv_idx + count, kv_idx + p.nk, 0);
    p.kv_cnt[block_row] = count;
    kept_blocks += count;
    causal_blocks += diagonal + 1;
  }

  float* stats = p.stats + static_cast<int64_t>(head.index) * kNumSelectStats;
  stats[0] = static_cast<float>(share_of(kept_blocks, causal_blocks));
  stats[4] = static_cast<float>(std::count(head.columns.begin(), head.columns.end(), 1));
  stats[5] = static_cast<float>(std::count(head.slashes.begin(), head.slashes.end(), 1));
  if (head.broken) {
    stats[1] = stats[2] = stats[3] = NAN;
    return;
  }
  std::vector<float> shares(p.num_rows());
  uint64_t sum = 0, total = 0;
  for (int row = 0; row < p.num_rows(); ++row) {
    const uint64_t part = retained(head, row);
    shares[row] = static_cast<float>(share_of(part, head.row_total[row]));
    sum += part, total += head.row_total[row];
  }
  std::sort(shares.begin(), shares.end());
  stats[1] = static_cast<float>(share_of(sum, total));
  stats[2] = shares.front();
  stats[3] = shares[percentile_index(p.num_rows())];
}

}  // namespace

void sample_select(const SampleSelectParams& p) {
  const int united = p.gqa_union ? p.gqa_group_size : 1;
  const int64_t units = static_cast<int64_t>(p.batch) * p.num_qo_heads / united;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      std::vector<Head> heads;
      for (int i = 0; i < united; ++i) {
        heads.emplace_back(p, static_cast<int>(unit * united + i));
        measure(heads.back());
        choose(heads.back());
      }
      for (int i = 1; i < united; ++i) {
        for (int b = 0; b < p.nk; ++b) {
          heads[0].columns[b] |= heads[i].columns[b];
          heads[0].slashes[b] |= heads[i].slashes[b];
        }
      }
      for (Head& head : heads) {
        head.columns = heads[0].columns, head.slashes = heads[0].slashes;
        write(head);
      }
    }
  });
}

}  // namespace santa::cpu
