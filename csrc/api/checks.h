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

// Of integers: another integer dtype is the commonest mistake, torch's default being int64.
inline void check_integers(const char* name, const Tensor& tensor, ScalarType expected) {
  const ScalarType got = tensor.scalar_type();
  const bool integers = got == ScalarType::Int || got == ScalarType::Long || got == ScalarType::Short;
  const std::string cure =
      integers ? std::string(": pass ") + name + ".to(torch." + name_of(expected) + ")" : std::string();
  check_dtype(name, tensor, expected, cure.c_str());
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& q, const char* whose = "q") {
  const bool same = tensor.is_cuda() == q.is_cuda() && tensor.is_cpu() == q.is_cpu() &&
                    tensor.get_device_index() == q.get_device_index();
  if (!same) fail(name, " is on ", device_of(tensor), "; it needs to be on ", whose, "'s device, ", device_of(q));
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

// k and v are in q's dtype, or in float8_e4m3fn: k alone, or both. Not v alone: all keys are read and few values, so
// keys are what it pays to shrink first.
inline void check_cache_dtypes(const Tensor& q, const char* k_name, const Tensor& k, const char* v_name,
                               const Tensor& v) {
  const ScalarType dtype = q.scalar_type(), float8 = ScalarType::Float8_e4m3fn;
  const bool float8_keys = k.scalar_type() == float8;
  if (!float8_keys) check_dtype(k_name, k, dtype, ", q's dtype, or float8_e4m3fn");
  if (v.scalar_type() == dtype || (float8_keys && v.scalar_type() == float8)) return;
  if (v.scalar_type() == float8) {
    fail(v_name, " is float8_e4m3fn while ", k_name, " is ", name_of(dtype), "; it needs to be ", name_of(dtype),
         " too, or ", k_name, " to be float8_e4m3fn");
  }
  check_dtype(v_name, v, dtype, float8_keys ? ", q's dtype, or float8_e4m3fn" : ", q's dtype");
}

// Optional scales of a float8 cache: one number, or one per KV head.
inline void check_scale(const char* name, const Tensor& scale, const char* cache_name, const Tensor& cache,
                        const Tensor& q, int64_t num_kv_heads) {
  if (cache.scalar_type() != ScalarType::Float8_e4m3fn) {
    fail(name, " is given while ", cache_name, " is ", name_of(cache.scalar_type()), "; it needs ", cache_name,
         " to be float8_e4m3fn, or to be None");
  }
  check_dtype(name, scale, ScalarType::Float, "");
  const bool per_tensor = scale.dim() == 0 || (scale.dim() == 1 && scale.size(0) == 1);
  if (!per_tensor && !(scale.dim() == 1 && scale.size(0) == num_kv_heads)) {
    fail(name, " has shape ", shape_of(scale), "; it needs to be [] or [1] (one for the tensor) or [", num_kv_heads,
         "] (one per KV head)");
  }
  check_same_device(name, scale, q);
  if (!per_tensor && scale.stride(0) != 1) {
    fail(name, " has stride ", scale.stride(0), "; it needs to be contiguous");
  }
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  std::string strides;
  for (int64_t i = 0; i < tensor.dim(); ++i) strides += (i > 0 ? ", " : "") + std::to_string(tensor.stride(i));
  fail(name, " has strides [", strides, "]; it needs to be contiguous");
}

// Optional per-row tensors: [batch], contiguous, on q's device.
inline void check_per_row(const char* name, const Tensor& tensor, const Tensor& q, ScalarType dtype) {
  check_integers(name, tensor, dtype);
  check_rank(name, tensor, 1, "[batch]");
  check_size(name, tensor, 0, q.size(0), "batch");
  check_same_device(name, tensor, q);
  if (tensor.size(0) > 1 && tensor.stride(0) != 1) {
    fail(name, " has stride ", tensor.stride(0), "; it needs to be contiguous");
  }
}

// The output that is written in place.
inline void check_rows_read(const Tensor& rows_read, const Tensor& q, int64_t num_kv_heads) {
  check_dtype("rows_read", rows_read, ScalarType::Int, "");
  check_rank("rows_read", rows_read, 2, "[batch, num_kv_heads]");
  check_size("rows_read", rows_read, 0, q.size(0), "batch");
  check_size("rows_read", rows_read, 1, num_kv_heads, "num_kv_heads");
  check_same_device("rows_read", rows_read, q);
  check_contiguous("rows_read", rows_read);
}

}  // namespace santa::api
