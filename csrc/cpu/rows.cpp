#include "cpu/rows.h"

#include "cpu/vector_ops.h"

namespace santa::cpu {
namespace {

template <typename T>
void widen_rows(KvRows<T> rows, Dtype dtype, int64_t first, int count, int head_dim, float* block) {
  for (int n = 0; n < count; ++n) widen(rows.row(first + n), dtype, block + n * head_dim, head_dim);
}

// Calls body with a number of the size of an element: all that the address of a row depends on.
template <typename Body>
void with_element(Dtype dtype, const Body& body) {
  switch (element_size(dtype)) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    default:
      return body(float{});
  }
}

}  // namespace

int element_size(Dtype dtype) { return dtype == Dtype::kFloat8E4M3 ? 1 : dtype == Dtype::kFloat32 ? 4 : 2; }

void widen_query(const DecodeParams& p, GroupIndex at, int h, float* q) {
  const int64_t offset = p.query_offset(at.batch_index, at.kv_head, h);
  widen(static_cast<const char*>(p.q) + offset * element_size(p.dtype), p.dtype, q, p.head_dim);
}

void widen_keys(const DecodeParams& p, GroupIndex at, const RowShape& row, int64_t first, int count, float* block) {
  with_element(p.k_dtype, [&](auto element) {
    const auto rows = key_rows<decltype(element)>(p, at.batch_index, at.kv_head, row.kv_start);
    widen_rows(rows, p.k_dtype, first, count, p.head_dim, block);
  });
}

void widen_values(const DecodeParams& p, GroupIndex at, const RowShape& row, int64_t first, int count, float* block) {
  with_element(p.v_dtype, [&](auto element) {
    const auto rows = value_rows<decltype(element)>(p, at.batch_index, at.kv_head, row.kv_start);
    widen_rows(rows, p.v_dtype, first, count, p.head_dim, block);
  });
}

}  // namespace santa::cpu
