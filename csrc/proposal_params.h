// What decode with proposal keys and the append to them receive: plain data, as params.h.
#pragma once

#include <cstdint>

#include "core/proposal.h"
#include "params.h"
#include "workspace.h"

namespace santa {

struct ProposalParams {
  DecodeParams decode;  // its k and v are what is drawn

  // The keys in 4 bits, laid out as k: [batch, cache_kv_len, num_kv_heads] through the strides below, or pages of it.
  const uint8_t* codes;    // [..., head_dim / 2], the last dimension contiguous
  const uint16_t* scales;  // float16
  int64_t stride_codes_batch, stride_codes_token, stride_codes_head;  // batch: of a page, where there are pages
  int64_t stride_scales_batch, stride_scales_token, stride_scales_head;
  bool codes_aligned;        // those of a key start on a 16-byte boundary
  bool scales_side_by_side;  // eight scales, from a position on that is a multiple of 8, are 16 bytes that are aligned

  const float* center;         // [batch, num_kv_heads, head_dim], contiguous
  const float* channel_scale;  // the same
  bool shared_statistics;      // both are [1, ...]

  // Workspace: ProposalState::drawn of each part, beside tile_max and tile_sum, which hold its reference and Z.
  float* tile_drawn;  // [tiles, group_size]

  SANTA_HD int64_t statistics_offset(int batch_index, int kv_head) const {
    return ((shared_statistics ? 0 : static_cast<int64_t>(batch_index)) * decode.num_kv_heads + kv_head) *
           decode.head_dim;
  }

  SANTA_HD KvRows<uint8_t> code_rows(int batch_index, int kv_head, int kv_start) const {
    return make_kv_rows<uint8_t>(decode, codes, batch_index, kv_head, kv_start, stride_codes_batch, stride_codes_token,
                                 stride_codes_head);
  }
  SANTA_HD KvRows<uint16_t> scale_rows(int batch_index, int kv_head, int kv_start) const {
    return make_kv_rows<uint16_t>(decode, scales, batch_index, kv_head, kv_start, stride_scales_batch,
                                  stride_scales_token, stride_scales_head);
  }
};

// Rows are cut another way than without proposal keys. `p` is filled otherwise.
inline void plan_proposal_call(DecodeParams& p) {
  p.proposal_tile_kv = proposal_tile_kv_of(head_block_of(p, 0).count);
  p.most_part_kv = kMostProposalPartKv;
  p.plan = plan_call(p);
}

// Fills the workspace fields of p and p.decode and returns the bytes needed at `base`.
inline int64_t place_proposal_workspace(ProposalParams& p, void* base) {
  const DecodeParams& d = p.decode;
  const int64_t stages = place_workspace(p.decode, base);
  Workspace workspace(base == nullptr ? nullptr : static_cast<char*>(base) + stages);
  if (d.plan.one_pass) {
    workspace.take(p.tile_drawn, static_cast<int64_t>(d.batch) * d.num_kv_heads * d.max_tiles * d.group_size);
  }
  return stages + workspace.used();
}

// Keys to codes, in place.
struct AppendProposalParams {
  uint8_t* codes;    // [batch, max_kv_len, num_kv_heads, head_dim / 2] through its strides, or pages of it
  uint16_t* scales;  // the same without the last dimension
  const float *center, *channel_scale;  // [batch, num_kv_heads, head_dim], contiguous
  const void* k_new;                    // [batch, num_keys, num_kv_heads, head_dim] through its strides
  const void* positions;                // [batch, num_keys], contiguous, int32 or int64; negative: not written
  bool wide_positions;                  // int64
  bool shared_statistics;
  bool by_slot;        // positions are page page_size + offset, of pages that no batch row owns
  bool aligned;        // rows of k_new start on 16-byte boundaries
  bool codes_aligned;  // those of a key start on an 8-byte boundary
  Dtype dtype;         // of k_new
  int batch, num_keys, num_kv_heads, head_dim;
  int64_t page_size;  // by slot; else max_kv_len
  int64_t limit;      // positions, or slots, that there are
  int64_t stride_codes_batch, stride_codes_token, stride_codes_head;
  int64_t stride_scales_batch, stride_scales_token, stride_scales_head;
  int64_t stride_new_batch, stride_new_token, stride_new_head;

  SANTA_HD int64_t position(int batch_index, int key) const {
    const int64_t index = static_cast<int64_t>(batch_index) * num_keys + key;
    return wide_positions ? static_cast<const int64_t*>(positions)[index]
                          : static_cast<const int32_t*>(positions)[index];
  }
  // Where a key lies in the first and the second dimension, NHD.
  struct Place {
    int64_t batch, token;
  };
  SANTA_HD Place place_of(int batch_index, int64_t position) const {
    if (!by_slot) return {batch_index, position};
    return {position / page_size, position % page_size};
  }
  SANTA_HD int64_t statistics_offset(int batch_index, int kv_head) const {
    return ((shared_statistics ? 0 : static_cast<int64_t>(batch_index)) * num_kv_heads + kv_head) * head_dim;
  }
};

}  // namespace santa
