// The decode operator on the CPU. Each kind of row leaves partial results of its tiles in the workspace (one_pass.cpp,
// proportional.cpp; exact rows here), and one function combines them. Loops are parallel over independent items that
// write disjoint memory, so the result does not depend on the threads.
#include "cpu/decode.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bitset>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/one_pass.h"
#include "cpu/proportional.h"
#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

// One tile of an exact row: its softmax states and its weighted sum of V.
void attend_tile(const DecodeParams& p, GroupIndex at, int tile, const RowShape& row, const ScoreKeys& score_keys) {
  const int group_size = p.group_size, head_dim = p.head_dim, tile_kv = row.tile_kv;
  const int64_t first = static_cast<int64_t>(tile) * tile_kv;
  const int count = static_cast<int>(std::min<int64_t>(tile_kv, row.kv_len - first));
  const int64_t stats =
      p.stats_offset(p.group_index(at.batch_index, at.kv_head)) + static_cast<int64_t>(tile) * group_size;
  std::vector<float> scores(static_cast<size_t>(group_size) * tile_kv), weights(scores.size());
  score_keys(at, row, first, count, scores.data(), tile_kv);
  for (int h = 0; h < group_size; ++h) {
    const float max = max_block(scores.data() + h * tile_kv, count);
    p.tile_max[stats + h] = max;
    p.tile_sum[stats + h] = exp2_block(scores.data() + h * tile_kv, max, weights.data() + h * tile_kv, count);
  }
  float* o_accum = p.o_accum + stats * head_dim;
  std::fill_n(o_accum, static_cast<int64_t>(group_size) * head_dim, 0.0f);
  float block[kBlockElements];
  for (int n = 0; n < count; n += kBlockKv) {
    const int block_keys = std::min(kBlockKv, count - n);
    widen_values(p, at, row, first + n, block_keys, block);
    accumulate_block(weights.data() + n, tile_kv, group_size, block, block_keys, head_dim, o_accum);
  }
}

void store(const DecodeParams& p, int64_t offset, float value) {
  if (p.dtype == Dtype::kFloat32) {
    static_cast<float*>(p.out)[offset] = value;
  } else if (p.dtype == Dtype::kBFloat16) {
    static_cast<torch::headeronly::BFloat16*>(p.out)[offset] = value;
  } else {
    static_cast<torch::headeronly::Half*>(p.out)[offset] = value;
  }
}

// V rows that were read for a KV head.
int rows_read(const DecodeParams& p, int64_t group, const RowShape& row) {
  int rows = 0;
  switch (row.kind) {
    case RowKind::kExact:
      return row.kv_len;
    case RowKind::kOnePass:
      for (int block = 0; block < p.num_head_blocks(); ++block) {
        const int32_t* part_rows = p.tile_rows + (group * p.num_head_blocks() + block) * p.max_tiles;
        for (int part = 0; part < row.num_tiles; ++part) rows += part_rows[part];
      }
      return rows;
    default:
      for (int i = 0; i < row.num_tiles * kMaskWords; ++i) {
        rows += static_cast<int>(std::bitset<32>(p.read_mask[p.mask_offset(group) + i]).count());
      }
      return rows;
  }
}

// One query head of one batch row, from the partial results of its tiles. lse: of its row, base 2.
void combine_head(const DecodeParams& p, int64_t group, int h, const RowShape& row, float lse) {
  const int head_dim = p.head_dim, group_size = p.group_size;
  const GroupIndex at = group_at(p, group);
  const int64_t head = p.output_index(at.batch_index, at.kv_head, h);
  std::vector<float> sum(head_dim, 0.0f);
  for (int tile = 0; tile < row.num_tiles; ++tile) {
    const int64_t stats = p.stats_offset(group) + static_cast<int64_t>(tile) * group_size + h;
    if (row.proportional() && p.tile_rows[p.stream_offset(group, p.num_streams() == 1 ? 0 : h) + tile] == 0) continue;
    // Proportional tiles are relative to the row's log-sum-exp already.
    const float weight = row.proportional() ? 1.0f : exp2_below(p.tile_max[stats], lse);
    for (int d = 0; d < head_dim; ++d) sum[d] += weight * p.o_accum[stats * head_dim + d];
  }
  const Epilogue epilogue = epilogue_of(p, row, at.kv_head, h, lse);
  for (int d = 0; d < head_dim; ++d) store(p, head * head_dim + d, epilogue.output(sum[d]));
  p.lse[head] = epilogue.lse;
}

}  // namespace

namespace {

// What row b says of its keys, for an error.
std::string row_text(const DecodeParams& p, int b) {
  std::string text = "santa: row " + std::to_string(b);
  const char* link = " has ";
  const auto add = [&](const char* name, const int32_t* values, int index) {
    if (values != nullptr) text += link + (name + (" " + std::to_string(values[index]))), link = " and ";
  };
  add("kv_lens", p.kv_lens, b), add("kv_starts", p.kv_starts, b);
  add("kv_indptr", p.kv_indptr, b), add("kv_indptr behind it", p.kv_indptr, b + 1);
  add("kv_last_page_len", p.kv_last_page_lens, b);
  add("whole_lens", p.whole_lens, b), add("shard_starts", p.shard_starts, b);
  return text;
}

void check_pages(const DecodeParams& p, int b, const RowShape& row) {
  const auto rows = key_rows<char>(p, b, 0, row.kv_start);
  for (int64_t n = 0; n < row.kv_len;) {
    const int64_t page = rows.page_of(n);
    if (page < 0 || page >= p.num_pages) {
      throw std::invalid_argument("santa: row " + std::to_string(b) + " has page " + std::to_string(page) +
                                  " for the key at position " + std::to_string(row.kv_start + n) +
                                  "; pages need to be in [0, " + std::to_string(p.num_pages) + ")");
    }
    n = (((row.kv_start + n) >> p.page_shift) + 1 << p.page_shift) - row.kv_start;  // the next page's first
  }
}

}  // namespace

void check_rows(const DecodeParams& p) {
  for (int b = 0; b < p.batch; ++b) {
    const RowShape row = row_shape_of(p, b);
    if (row.valid && p.paged) check_pages(p, b, row);
    if (row.valid) continue;
    const std::string bound = std::to_string(p.cache_kv_len) + ")";
    const std::string ranges =
        p.has_lists
            ? "; kv_indptr needs to ascend within kv_indices (" + std::to_string(p.num_indices) +
                  " entries) and kv_last_page_len to be in [1, page_size], for at most max_kv_len keys (" + bound
            : "; kv_starts >= 0, kv_lens >= 0 and kv_starts + kv_lens <= max_kv_len (" + bound + " are needed";
    const char* shards = p.has_shards ? ", and shard_starts, a multiple of 128, up to whole_lens - kv_lens" : "";
    throw std::invalid_argument(row_text(p, b) + ranges + shards);
  }
}

void decode(const DecodeParams& p) {
  check_rows(p);
  const std::vector<float> queries = widen_queries(p);
  decode_with(p, exact_scores(p, queries), /*pilot_run=*/1);
}

void decode_with(const DecodeParams& p, const ScoreKeys& raw_scores, int pilot_run) {
  const ScoreKeys score_keys = attended_scores(p, raw_scores);
  const OnePassStage one_pass = {
      [&] { decode_one_pass(p, score_keys, pilot_run); },
      [&](int64_t group, int h, int num_parts) { return lse_of_tiles(p, group, h, num_parts); }};
  decode_rows(p, score_keys, one_pass);
}

void decode_rows(const DecodeParams& p, const ScoreKeys& score_keys, const OnePassStage& one_pass) {
  if (p.plan.exact) {
    for_each_tile(p, RowKind::kExact,
                  [&](GroupIndex at, int tile, const RowShape& row) { attend_tile(p, at, tile, row, score_keys); });
  }
  if (p.plan.one_pass) one_pass.run();
  if (p.plan.proportional) decode_proportional(p, score_keys);
  for_each_group(p, [&](int64_t group, const RowShape& row) {
    for (int h = 0; h < p.group_size; ++h) {
      const float lse = row.proportional() ? p.row_lse[group * p.group_size + h]
                        : row.one_pass()   ? one_pass.lse(group, h, row.num_tiles)
                                           : lse_of_tiles(p, group, h, row.num_tiles);
      combine_head(p, group, h, row, lse);
    }
    if (p.rows_read != nullptr) p.rows_read[group] = rows_read(p, group, row);
  });
}

}  // namespace santa::cpu
