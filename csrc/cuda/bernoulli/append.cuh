// Keys as a model makes them into feature-major memory: 32 keys x 32 features at a time, transposed in shared memory.
#pragma once

#include "bernoulli_params.h"

namespace santa::cuda {

constexpr int kAppendTile = 32;
constexpr int kAppendRows = 8;  // of threads

__global__ void __launch_bounds__(kAppendTile* kAppendRows) append_kernel(const __grid_constant__ AppendParams p) {
  __shared__ uint16_t tile[kAppendTile][kAppendTile + 2];
  const int feature_tiles = (p.head_dim + kAppendTile - 1) / kAppendTile;
  const int kv_head = blockIdx.y, batch_index = blockIdx.z;
  const int first_feature = blockIdx.x % feature_tiles * kAppendTile;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / feature_tiles) * kAppendTile;
  const int64_t position = p.position(batch_index);
  if (!p.fits(position)) return;

  const auto* rows =
      static_cast<const uint16_t*>(p.rows) + batch_index * p.stride_rows_batch + kv_head * p.stride_rows_head;
  const int feature = first_feature + threadIdx.x;
#pragma unroll
  for (int i = threadIdx.y; i < kAppendTile; i += kAppendRows) {
    const int64_t row = first_row + i;
    if (row < p.num_rows && feature < p.head_dim) {
      tile[i][threadIdx.x] = rows[row * p.stride_rows_row + feature * p.stride_rows_feature];
    }
  }
  __syncthreads();

  const int64_t row = first_row + threadIdx.x;
  if (row >= p.num_rows) return;
  const int64_t offset = p.offset(batch_index, kv_head, position + row);
  if (offset < 0) return;
  auto* features = static_cast<uint16_t*>(p.features) + offset;
#pragma unroll
  for (int i = threadIdx.y; i < kAppendTile; i += kAppendRows) {
    if (first_feature + i < p.head_dim) {
      features[(first_feature + i) * p.stride_features_feature] = tile[threadIdx.x][i];
    }
  }
}

}  // namespace santa::cuda
