// Argument checks: every message names the argument, what it got and what it needs. ValueError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace santa::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Text by std::to_string and snprintf: no iostreams, whose locale machinery crashes where a toolchain links libstdc++
// statically into an extension.
inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(int64_t number) { return std::to_string(number); }
inline std::string text_of(int number) { return std::to_string(number); }
inline std::string text_of(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", number);
  return text;
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument((std::string("santa: ") + ... + text_of(parts)));
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return "a dtype that is not supported";
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cuda()  ? "cuda:" + std::to_string(tensor.get_device_index())
         : tensor.is_cpu() ? "cpu"
                           : "another device";
}

inline void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* shape) {
  if (tensor.dim() != rank) {
    fail(name, " has shape ", shape_of(tensor), "; it needs ", rank, " dimensions, ", shape);
  }
}

inline void check_size(const char* name, const Tensor& tensor, int64_t dim, int64_t expected, const char* meaning) {
  if (tensor.size(dim) != expected) {
    fail(name, " has shape ", shape_of(tensor), "; dimension ", dim, " (", meaning, ") is ", tensor.size(dim),
         " and needs to be ", expected);
  }
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected, const char* why) {
  if (tensor.scalar_type() != expected) {
    fail(name, " is ", name_of(tensor.scalar_type()), "; it needs to be ", name_of(expected), why);
  }
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& q) {
  const bool same = tensor.is_cuda() == q.is_cuda() && tensor.is_cpu() == q.is_cpu() &&
                    tensor.get_device_index() == q.get_device_index();
  if (!same) fail(name, " is on ", device_of(tensor), "; it needs to be on q's device, ", device_of(q));
}

inline void check_last_dim_contiguous(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(name, " has stride ", tensor.stride(last),
         " in its last dimension; it needs a contiguous last dimension "
         "(stride 1)");
  }
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, " is ", value, "; it needs to be in [", low, ", ", high, "]");
}

// Optional per-row tensors: [batch], contiguous, on q's device.
inline void check_per_row(const char* name, const Tensor& tensor, const Tensor& q, ScalarType dtype) {
  check_dtype(name, tensor, dtype, "");
  check_rank(name, tensor, 1, "[batch]");
  check_size(name, tensor, 0, q.size(0), "batch");
  check_same_device(name, tensor, q);
  if (tensor.size(0) > 1 && tensor.stride(0) != 1) {
    fail(name, " has stride ", tensor.stride(0), "; it needs to be contiguous");
  }
}

}  // namespace santa::api
