// Where the key or value row of a position lies. Kernels see a cache through this alone: a paged cache is another way
// to address rows, not another kernel.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace santa {

// Rows of one (batch row, KV head). `row(0)` is the first valid key of the batch row. Strides are in elements.
template <typename T>
struct KvRows {
  const T* base;         // not paged: of row 0; paged: of the KV head in page 0
  int64_t stride_token;  // from a key to the next, within a page

  // Paged alone; null otherwise. Entry i is the page of the positions [i << page_shift, (i + 1) << page_shift).
  const int32_t* pages;
  int64_t stride_page;
  int page_shift;
  int first_position;  // of row 0

  SANTA_HD bool paged() const { return pages != nullptr; }

  SANTA_HD const T* row(int64_t n) const { return unlikely(paged()) ? row_in(page_of(n), n) : base + n * stride_token; }

  // In two steps, so that the page can be looked up ahead.
  SANTA_HD int32_t page_of(int64_t n) const { return pages[(first_position + n) >> page_shift]; }
  SANTA_HD const T* row_in(int32_t page, int64_t n) const {
    const int64_t within = (first_position + n) & ((int64_t{1} << page_shift) - 1);
    return base + page * stride_page + within * stride_token;
  }
};

}  // namespace santa
