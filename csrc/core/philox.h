// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").
//
// A draw is a pure function of (seed, row seed, position, head, segment, draw index). Nothing is advanced or stored, so
// the numbers do not depend on batch, split, layout, device or the number of calls. The position is kv_len unless the
// caller says otherwise, so a replayed CUDA graph draws fresh numbers as soon as a row grows.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace santa {

struct PhiloxBlock {
  uint32_t word[4];
};

SANTA_HD PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key_0, uint32_t key_1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(kMultiplier0) * counter.word[0];
    const uint64_t product_1 = static_cast<uint64_t>(kMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(product_1 >> 32) ^ counter.word[1] ^ key_0, static_cast<uint32_t>(product_1),
                static_cast<uint32_t>(product_0 >> 32) ^ counter.word[3] ^ key_1, static_cast<uint32_t>(product_0)}};
    key_0 += kWeyl0;
    key_1 += kWeyl1;
  }
  return counter;
}

// High 64 bits of a * b: maps 64 random bits to an integer in [0, b) with an error of 2^-64 in every probability.
SANTA_HD uint64_t mul_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// The stream of one (request, step, head). 64 + 64 + 32 + 32 bits of identity do not fit a Philox counter beside the
// draw index, so the identity is hashed into a key first.
struct RandomStream {
  uint32_t key_0, key_1;

  SANTA_HD static RandomStream make(int64_t seed, int64_t row_seed, int64_t position, int head) {
    const auto seed_bits = static_cast<uint64_t>(seed), row_bits = static_cast<uint64_t>(row_seed);
    const PhiloxBlock identity = {{static_cast<uint32_t>(row_bits), static_cast<uint32_t>(row_bits >> 32),
                                   static_cast<uint32_t>(position), static_cast<uint32_t>(head)}};
    const PhiloxBlock hash =
        philox4x32_10(identity, static_cast<uint32_t>(seed_bits), static_cast<uint32_t>(seed_bits >> 32));
    return {hash.word[0], hash.word[1]};
  }

  // 64 random bits for draw `draw` of segment `segment`.
  SANTA_HD uint64_t bits(uint32_t segment, uint32_t draw) const {
    const PhiloxBlock block = philox4x32_10({{draw, segment, 0u, 0u}}, key_0, key_1);
    return (static_cast<uint64_t>(block.word[1]) << 32) | block.word[0];
  }
};

}  // namespace santa
