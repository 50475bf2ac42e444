// Where the key or value row of a position lies. Kernels see a cache through this alone, so another cache format
// (paged, for one) is another way to address rows, not another kernel.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace santa {

// Rows of one (batch row, KV head) at a constant distance. `row(0)` is the first valid key of the batch row.
template <typename T>
struct KvRows {
  const T* base;
  int64_t stride_token;  // elements

  SANTA_HD const T* row(int64_t position) const { return base + position * stride_token; }
};

template <typename T>
SANTA_HD KvRows<T> make_kv_rows(const void* data, int64_t batch_index, int64_t kv_head, int64_t kv_start,
                                int64_t stride_batch, int64_t stride_token, int64_t stride_head) {
  const T* base = static_cast<const T*>(data) + batch_index * stride_batch + kv_head * stride_head;
  return {base + kv_start * stride_token, stride_token};
}

}  // namespace santa
