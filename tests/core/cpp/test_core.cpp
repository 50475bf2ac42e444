// csrc/core without Python and without Torch. Exits with 0 if every check holds; each failure prints what
// failed.
#include "core/draw.h"
#include "core/float8.h"
#include "core/kv_rows.h"
#include "core/mixture.h"
#include "core/philox.h"
#include "core/samplers.h"
#include "core/softmax_state.h"
#include "core/tiling.h"
#include "params.h"
#include "workspace.h"

// core/, the params structs and the workspace came first, so they include what they need themselves, and none of it is
// Torch's.
#if defined(C10_API) || defined(TORCH_API) || defined(TORCH_FEATURE_VERSION) || defined(C10_MACROS_MACROS_H_) || \
    defined(AOTI_TORCH_EXPORT) || defined(TORCH_VERSION)
#error "csrc/core, csrc/params.h or csrc/workspace.h includes a header of Torch"
#endif
#if defined(Py_PYTHON_H)
#error "csrc/core, csrc/params.h or csrc/workspace.h includes Python.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "check.h"

using namespace santa;

// Kernels receive it by value.
static_assert(std::is_trivially_copyable<DecodeParams>::value, "DecodeParams is plain data");

namespace {

// Known answers of Random123 (kat_vectors, philox4x32 10).
void test_philox() {
  struct Case {
    PhiloxBlock counter;
    uint32_t key_0, key_1;
    PhiloxBlock expected;
  };
  const uint32_t ones = 0xffffffffu;
  const Case cases[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{ones, ones, ones, ones}}, ones, ones, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0xa4093822u,
       0x299f31d0u,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const Case& c : cases) {
    const PhiloxBlock actual = philox4x32_10(c.counter, c.key_0, c.key_1);
    for (int i = 0; i < 4; ++i) {
      check(actual.word[i] == c.expected.word[i], "philox4x32_10 of counter ", c.counter.word[0], ": word ", i, " is ",
            actual.word[i], ", expected ", c.expected.word[i]);
    }
  }
}

// The value is that of the Python model in test_core.py: a seed gives the same draws in every release.
void test_stream() {
  const uint64_t bits = RandomStream::make(-5, (int64_t{1} << 40) + 9, 32768, 3).bits(/*segment=*/2, /*draw=*/17);
  check(bits == 0x103158b3ca4e86dbu, "RandomStream.bits is ", bits);
}

void test_mul_high() {
  const uint64_t top = std::numeric_limits<uint64_t>::max();
  check(mul_high(top, top) == top - 1, "mul_high(2^64 - 1, 2^64 - 1) is ", mul_high(top, top));
  check(mul_high(top, 7) == 6, "mul_high(2^64 - 1, 7) is ", mul_high(top, 7));
  check(mul_high(uint64_t{1} << 63, 9) == 4, "mul_high(2^63, 9) is ", mul_high(uint64_t{1} << 63, 9));
}

void test_shares() {
  check(tile_mass_of(0.0f) == 0 && row_weight_of(0.0f) == 0, "no mass is not drawn");
  check(tile_mass_of(NAN) == 0 && row_weight_of(NAN) == 0, "NaN counts as no mass");
  check(tile_mass_of(1e-45f) == 1 && row_weight_of(1e-45f) == 1, "the smallest mass keeps one unit");
  check(tile_mass_of(1.0f) == (1u << 31) + 1, "tile_mass_of(1) is ", tile_mass_of(1.0f));
  check(row_weight_of(1.0f) == (1u << 30) + 1, "row_weight_of(1) is ", row_weight_of(1.0f));
  check(tile_mass_of(INFINITY) == 5u * (1u << 29) + 1, "tile_mass_of(inf) is ", tile_mass_of(INFINITY));
}

// The values are those of the Python model in test_core.py.
void test_random_point() {
  const Threshold last = random_point(std::numeric_limits<uint64_t>::max(), 0xffffffffu);
  check(last.scaled == 0xfffffffeu && last.fraction < 1.0f && last.fraction > 0.999999f,
        "the last point of [0, 2^32 - 1) is ", last.scaled, " + ", last.fraction);
  const Threshold half = random_point(uint64_t{1} << 63, 5);
  check(half.scaled == 2 && half.fraction == 0.5f, "the middle of [0, 5) is ", half.scaled, " + ", half.fraction);
}

// Thresholds of the sorted samplers: one in each stratum, counted without a miss; and tile counts that add up
// to R.
void test_draws() {
  const uint32_t totals[] = {1, 7, 1000003, (1u << 31) - 1, 0xffffffffu};
  const uint32_t budgets[] = {1, 3, 128, 4099};
  for (const Sampler sampler : {Sampler::kStratified, Sampler::kSystematic, Sampler::kGrouped}) {
    for (const uint32_t total : totals) {
      for (const uint32_t num_draws : budgets) {
        const auto stream = RandomStream::make(-5, int64_t{1} << 40, 32768, 3);
        const Draws draws = Draws::make(sampler, stream, 2, num_draws, total);
        const auto name = [&](const char* law) {
          check(false, law, ": sampler ", static_cast<int>(sampler), ", total ", total, ", R ", num_draws);
        };
        if (draws.unit() != num_draws) name("unit is not R");
        for (uint32_t m = 0; m < num_draws; ++m) {
          const Threshold threshold = draws.threshold(m);
          const uint64_t low = static_cast<uint64_t>(m) * total;
          if (threshold.scaled < low || threshold.scaled - low >= total) name("threshold leaves its stratum");
          if (!(threshold.fraction >= 0.0f && threshold.fraction < 1.0f)) name("fraction outside [0, 1)");
        }
        // Ten tiles, some of them empty.
        uint32_t below = 0, sum = 0, start = 0;
        for (int tile = 1; tile <= 10; ++tile) {
          const uint32_t end = tile == 10 ? total : total / 10 * (tile / 2 * 2);
          if (end < start) continue;
          const uint32_t below_end = draws.count_below(end);
          const auto positions = TilePositions::make(draws.unit(), start, end - start);
          uint32_t brute = 0, contained = 0;
          for (uint32_t m = 0; m < num_draws; ++m) {
            const Threshold threshold = draws.threshold(m);
            brute += threshold.scaled >= static_cast<uint64_t>(start) * num_draws &&
                     threshold.scaled < static_cast<uint64_t>(end) * num_draws;
            contained += positions.contains(threshold);
          }
          if (below_end - below != brute) name("count_below differs from counting");
          if (contained != brute) name("contains differs from comparing with the boundaries");
          sum += below_end - below;
          below = below_end, start = end;
        }
        if (sum != num_draws) name("counts do not sum to R");
      }
    }
  }
}

// Budgets too large to list: threshold c - 1 is below the position and threshold c is not.
void test_large_budgets() {
  const uint32_t total = 0xffffffffu, num_draws = (1u << 31) - 1;
  for (const Sampler sampler : {Sampler::kStratified, Sampler::kSystematic, Sampler::kGrouped}) {
    for (const uint32_t offset : {0u, 1u, 1u << 31, total - 2, total - 1}) {
      Draws draws = Draws::make(sampler, RandomStream::make(1, 2, 3, 4), 0, num_draws, total);
      draws.shared_offset = {offset, 0.0f};
      check(draws.count_below(0) == 0 && draws.count_below(total) == num_draws, "count_below of the ends, offset ",
            offset);
      for (const uint32_t position : {1u, 2u, 3u, 1u << 16, (1u << 31) - 1, 1u << 31, total - 2, total - 1}) {
        const uint32_t count = draws.count_below(position);
        const uint64_t scaled = static_cast<uint64_t>(position) * num_draws;
        check(count <= num_draws && (count == 0 || draws.threshold(count - 1).scaled < scaled) &&
                  (count == num_draws || draws.threshold(count).scaled >= scaled),
              "count_below(", position, ") is ", count, ": sampler ", static_cast<int>(sampler), ", offset ", offset);
      }
    }
  }
}

void test_positions() {
  const uint32_t units[] = {1, 128, (1u << 31) - 1}, masses[] = {1, 5, 1u << 30, 0xfffffff0u};
  const uint32_t sums[] = {1, 512, (1u << 30) + 512, 1u << 31};
  const float fractions[] = {0.0f, 0.5f, 1.0f - 1.0f / (1 << 24)};
  const uint32_t start = 15;
  for (const uint32_t unit : units) {
    for (const uint32_t mass : masses) {
      const auto positions = TilePositions::make(unit, start, mass);
      const uint64_t first = static_cast<uint64_t>(start) * unit, width = static_cast<uint64_t>(mass) * unit;
      check(!positions.contains({first - 1, 0.5f}) && !positions.contains({first + width, 0.0f}),
            "a tile contains its neighbours: unit ", unit, ", mass ", mass);
      for (const uint32_t sum : sums) {
        uint32_t previous = 0;
        for (int i = 0; i <= 100; ++i) {
          const auto offset = static_cast<uint64_t>(static_cast<unsigned __int128>(width - 1) * i / 100);
          for (const float fraction : fractions) {
            const Threshold threshold = {first + offset, fraction};
            const uint32_t position = positions.position(threshold, sum);
            check(positions.contains(threshold) && position < sum && (width < 100 || position >= previous),
                  "position of ", offset, " + ", fraction, " of ", width, " in ", sum, " is ", position, " after ",
                  previous);
            previous = position;
          }
        }
      }
    }
  }
  // Resolution below one unit: R = 1 and a tile of mass 1.
  const auto one_unit = TilePositions::make(1, start, 1);
  for (uint32_t i = 0; i < 1024; ++i) {
    const uint32_t position = one_unit.position({start, static_cast<float>(i) / 1024.0f}, 1u << 30);
    check(position == i << 20, "position of ", i, " / 1024 of one unit is ", position);
  }
  const uint32_t cumulative[] = {0, 0, 4, 4, 4, 5, 9, 9};  // weights 0 0 4 0 0 1 4 0
  const int expected[] = {2, 2, 2, 2, 5, 6, 6, 6, 6};
  for (uint32_t position = 0; position < 9; ++position) {
    const int row = row_at(cumulative, 8, position);
    check(row == expected[position], "row_at(", position, ") is ", row, ", expected ", expected[position]);
  }
}

void test_tiles_and_parts() {
  int most_tiles = 0, most_parts = 0;
  for (int64_t kv_len = 0; kv_len <= 70000; ++kv_len) {
    most_tiles = std::max(most_tiles, num_tiles_of(kv_len));
    check(max_num_tiles(kv_len) >= most_tiles, "max_num_tiles(", kv_len, ") is ", max_num_tiles(kv_len),
          ", but a row takes ", most_tiles);
    const int part = part_kv_of(kv_len, 8);
    most_parts = std::max(most_parts, static_cast<int>(ceil_div(kv_len, part)));
    check(part % kDrawTileKv == 0 && part >= kMinPartKv && part <= kMaxPartKv, "part_kv_of(", kv_len, ") is ", part);
    check(max_num_parts(kv_len, 8) >= most_parts, "max_num_parts(", kv_len, ") is ", max_num_parts(kv_len, 8),
          ", but a row takes ", most_parts);
  }
  check(num_tiles_of(2147483647) == 4194304, "num_tiles_of(2^31 - 1) is ", num_tiles_of(2147483647));
}

// Every head of a group is in one block, and blocks differ by less than the number of blocks.
void test_head_blocks() {
  for (int group = 1; group <= 1024; ++group) {
    DecodeParams p{};
    p.group_size = group;
    int heads = 0;
    for (int i = 0; i < p.num_head_blocks(); ++i) {
      const HeadBlock block = head_block_of(p, i);
      check(block.first == heads && block.count >= 1 && block.count <= kHeadBlock, "block ", i, " of ", group,
            " heads is ", block.first, " + ", block.count);
      heads += block.count;
    }
    check(heads == group, group, " heads are cut into blocks of ", heads);
  }
}

void test_softmax_state() {
  const SoftmaxState empty = empty_softmax_state(), state = {3.0f, 1.5f};
  const SoftmaxState left = merge(empty, state), right = merge(state, empty), none = merge(empty, empty);
  check(left.max == 3.0f && left.sum == 1.5f && right.max == 3.0f && right.sum == 1.5f,
        "empty is the identity of merge");
  check(none.max == -INFINITY && none.sum == 0.0f && log2_sum(none) == -INFINITY, "nothing and nothing is nothing");
  const SoftmaxState merged = merge({2.0f, 1.0f}, {4.0f, 1.0f});
  check(merged.max == 4.0f && merged.sum == 1.25f, "merge({2, 1}, {4, 1}) is {", merged.max, ", ", merged.sum, "}");
  check(std::isnan(log2_sum(merge({NAN, NAN}, state))) && std::isnan(log2_sum(merge({NAN, NAN}, empty))),
        "NaN does not get lost in merge");
}

// Every code against the format's definition: (-1)^sign 2^(exponent - 7) 1.mantissa, subnormal below 2^-6, one NaN.
void test_float8() {
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    const float actual = float_of_e4m3(static_cast<uint8_t>(code));
    const bool nan = (code & 0x7f) == 0x7f;
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                          : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    const float expected = code < 128 ? magnitude : -magnitude;
    const bool same = actual == expected && std::signbit(actual) == (code >= 128);
    check(nan ? std::isnan(actual) : same, "float_of_e4m3(", code, ") is ", actual);
  }
}

// The scales of a float8 cache, and what stands in for them.
void test_scales() {
  const float scales[] = {0.5f, 4.0f};
  DecodeParams p{};
  p.scale_log2 = 3.0f;
  check(p.score_scale(1) == 3.0f && p.output_scale(1) == 1.0f, "no scales count as 1");
  p.k_scale = p.v_scale = scales;
  check(p.score_scale(1) == 1.5f && p.output_scale(1) == 0.5f, "stride 0 is one scale for all heads");
  p.stride_k_scale = p.stride_v_scale = 1;
  check(p.score_scale(1) == 12.0f && p.output_scale(1) == 4.0f, "stride 1 is a scale per head");
}

// Rows of one [batch 2, token 5, head 3, dim 4] buffer of which row (b, n, h) holds 100 b + 10 n + h.
void test_kv_rows() {
  std::vector<int> buffer(2 * 5 * 3 * 4);
  for (int b = 0; b < 2; ++b) {
    for (int n = 0; n < 5; ++n) {
      for (int h = 0; h < 3; ++h) buffer[((b * 5 + n) * 3 + h) * 4] = 100 * b + 10 * n + h;
    }
  }
  DecodeParams p{};
  p.k = buffer.data(), p.stride_k_batch = 60, p.stride_k_token = 12, p.stride_k_head = 4;
  const auto rows = key_rows<int>(p, 1, 2, /*kv_start=*/1);
  for (int n = 0; n < 4; ++n) check(*rows.row(n) == 100 + 10 * (n + 1) + 2, "row(", n, ") is ", *rows.row(n));

  // The same buffer as pages of 4 of the 5 tokens: page 1 then page 0, from their second key on.
  const int32_t table[2][3] = {{7, 7, 7}, {1, 0, 7}}, list[5] = {7, 7, 7, 1, 0}, indptr[3] = {0, 3, 5};
  p.paged = true, p.page_table = table[0], p.stride_page_table = 3, p.page_shift = 2;
  const auto of_table = key_rows<int>(p, 1, 2, /*kv_start=*/1);
  p.page_table = list, p.has_lists = true, p.kv_indptr = indptr;
  const auto of_list = key_rows<int>(p, 1, 2, /*kv_start=*/1);
  for (int n = 0; n < 7; ++n) {
    const int expected = 100 * (n + 1 < 4 ? 1 : 0) + 10 * ((n + 1) % 4) + 2;
    check(*of_table.row(n) == expected && *of_list.row(n) == expected, "paged row(", n, ") is ", *of_table.row(n));
  }
}

}  // namespace

int main() {
  test_philox();
  test_stream();
  test_mul_high();
  test_shares();
  test_random_point();
  test_draws();
  test_large_budgets();
  test_positions();
  test_tiles_and_parts();
  test_head_blocks();
  test_softmax_state();
  test_kv_rows();
  test_float8();
  test_scales();
  return exit_code();
}
