// The memory that the stages hand to each other: sizes and places, without Torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace santa {

// Carves aligned arrays out of one allocation; with a null base it only measures.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  void take(T*& array, int64_t count) {
    array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Fills the workspace fields of p, whose inputs and plan are set, and returns the bytes needed at `base`.
inline int64_t place_workspace(DecodeParams& p, void* base) {
  const CallPlan& plan = p.plan;
  p.max_tiles = plan.max_parts;
  if (plan.exact) p.max_tiles = std::max(p.max_tiles, max_exact_tiles(plan.longest_exact));
  p.group_pitch = p.group_size == 1 ? 1 : (p.group_size + 1) / 2 * 2;
  p.scores_per_row = (static_cast<int64_t>(p.max_kv_len) + kMaxTileKv) * p.group_pitch;

  Workspace workspace(base);
  const int64_t groups = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  const int64_t tiles = groups * p.max_tiles, stats = tiles * p.group_size;
  workspace.take(p.o_accum, stats * p.head_dim);
  workspace.take(p.tile_max, stats);
  workspace.take(p.tile_sum, stats);
  if (plan.one_pass && p.budget == Budget::kStreaming && !p.has_levels) workspace.take(p.level, groups * p.group_size);
  if (plan.one_pass && p.rows_read != nullptr) workspace.take(p.tile_rows, tiles * p.num_head_blocks());
  if (plan.proportional) {
    workspace.take(p.tile_rows, tiles * p.num_streams());
    workspace.take(p.scores, groups * p.scores_per_row);
    workspace.take(p.row_lse, groups * p.group_size);
    workspace.take(p.tile_start, tiles * p.num_streams());
    workspace.take(p.tile_mass, tiles * p.num_streams());
    workspace.take(p.tile_draw, tiles * p.num_streams());
    workspace.take(p.draws, groups * p.num_streams());
    if (p.rows_read != nullptr) workspace.take(p.read_mask, tiles * kMaskWords);
  }
  return workspace.used();
}

}  // namespace santa
