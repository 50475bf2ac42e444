// float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa. No infinities; 0x7f and 0xff are NaN, 448 is the
// largest number, and codes below 0x08 are the subnormals, multiples of 2^-9.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace santa {

// An element of a float8 cache, for templates that are told apart by dtype.
struct Float8 {
  uint8_t code;
};

// Without branches, so that loops over it vectorise, and without subnormal float32 numbers, which are slow on some
// processors and zero where they are flushed.
SANTA_HD float float_of_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0.001953125f;  // 2^-9
  uint32_t subnormal_bits;
  std::memcpy(&subnormal_bits, &subnormal, sizeof(subnormal_bits));
  uint32_t bits = (magnitude << 20) + (120u << 23);  // 120: float32's exponent bias minus that of e4m3
  bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
  bits = magnitude < 0x08u ? subnormal_bits : bits;
  bits |= (code & 0x80u) << 24;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace santa
