// The C interface of native/k_stream.cuh, compiled and loaded by k_stream.py. Returns a cudaError_t.
#include "native/k_stream.cuh"

extern "C" int k_stream_read(const void* data, int64_t bytes, uint32_t* sink, void* stream) {
  return santa::bench::launch_read_only(data, bytes, sink, static_cast<cudaStream_t>(stream));
}

extern "C" int k_stream_read_spans(const void* spans, int count, int64_t bytes, uint32_t* sink, void* stream) {
  return santa::bench::launch_read_spans(static_cast<const santa::bench::Span*>(spans), count, bytes, sink,
                                         static_cast<cudaStream_t>(stream));
}

extern "C" const char* k_stream_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
