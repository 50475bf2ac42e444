// Kernels that read K with 16-byte loads and do nothing else: the floor of any method that scores every key.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace santa::bench {

constexpr int kStreamThreads = 256, kStreamBlocksPerSm = 8, kStreamUnroll = 8;

__global__ void __launch_bounds__(kStreamThreads) read_only(const uint4* data, int64_t count, uint32_t* sink) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t folded = 0;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + (kStreamUnroll - 1) * stride < count; i += kStreamUnroll * stride) {
    uint4 value[kStreamUnroll];  // in flight together
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) value[u] = __ldg(data + i + u * stride);
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) folded ^= value[u].x ^ value[u].y ^ value[u].z ^ value[u].w;
  }
  for (; i < count; i += stride) {
    const uint4 value = __ldg(data + i);
    folded ^= value.x ^ value.y ^ value.z ^ value.w;
  }
  if (folded == 0x12345678u) *sink = folded;
}

// A piece of K; `end` is where it ends in the concatenation of all pieces, in units of 16 bytes.
struct Span {
  const uint4* data;
  int64_t end;
};

// The same for pieces that are not adjacent (rows of different lengths). A thread's indices only grow, so it walks the
// pieces once; the addresses of a round are found first, so that its loads are in flight together.
__global__ void __launch_bounds__(kStreamThreads) read_spans(const Span* spans, int count, uint32_t* sink) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x, total = spans[count - 1].end;
  int64_t begin = 0, end = spans[0].end;
  const uint4* data = spans[0].data;
  int s = 0;
  uint32_t folded = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;) {
    const uint4* address[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u, i += stride) {
      while (i >= end && s + 1 < count) begin = end, ++s, end = spans[s].end, data = spans[s].data;
      address[u] = i < total ? data + (i - begin) : nullptr;
    }
    uint4 value[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) {
      value[u] = address[u] == nullptr ? make_uint4(0, 0, 0, 0) : __ldg(address[u]);
    }
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) folded ^= value[u].x ^ value[u].y ^ value[u].z ^ value[u].w;
  }
  if (folded == 0x12345678u) *sink = folded;
}

// Enough blocks to fill the device, no more than there is work for.
inline cudaError_t stream_blocks(int64_t count, int* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const int64_t needed = (count + kStreamThreads - 1) / kStreamThreads;
  *blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(needed, multiprocessors * kStreamBlocksPerSm)));
  return status;
}

// data is aligned to 16 bytes and `bytes` is a multiple of 16.
inline cudaError_t launch_read_only(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t stream) {
  int blocks = 0;
  const cudaError_t status = stream_blocks(bytes / 16, &blocks);
  if (status != cudaSuccess) return status;
  read_only<<<blocks, kStreamThreads, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16, sink);
  return cudaGetLastError();
}

// `spans` is an array in device memory; `bytes` is what they add up to.
inline cudaError_t launch_read_spans(const Span* spans, int count, int64_t bytes, uint32_t* sink, cudaStream_t stream) {
  int blocks = 0;
  const cudaError_t status = stream_blocks(bytes / 16, &blocks);
  if (status != cudaSuccess) return status;
  read_spans<<<blocks, kStreamThreads, 0, stream>>>(spans, count, sink);
  return cudaGetLastError();
}

}  // namespace santa::bench
