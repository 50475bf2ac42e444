// Bernoulli scores without Torch: the integer law of the draws, and that scores and the values of counting samplers are
// made of additions. Exits with 0 if every check holds; each failure prints what failed.
#include "bernoulli_params.h"
#include "core/bernoulli.h"

// The params struct came first: it includes what it needs, and none of it is Torch's.
#if defined(C10_API) || defined(TORCH_API) || defined(TORCH_FEATURE_VERSION) || defined(Py_PYTHON_H)
#error "csrc/bernoulli_params.h or csrc/core/bernoulli.h includes a header of Torch or Python.h"
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "check.h"

using namespace santa;

static_assert(std::is_trivially_copyable<BernoulliParams>::value, "kernels receive it by value");
static_assert(std::is_trivially_copyable<AppendParams>::value, "kernels receive it by value");
static_assert(sizeof(BernoulliParams) <= 4096, "what a kernel's parameters may take on every architecture");

namespace {

// A number that knows what was done to it.
struct Counted {
  float value = 0.0f;
  static inline int64_t additions = 0, multiplications = 0;

  Counted() = default;
  Counted(float x) : value(x) {}  // NOLINT: as float, so that generic code compiles
  friend Counted operator+(Counted a, Counted b) { return ++additions, Counted(a.value + b.value); }
  friend Counted operator-(Counted a, Counted b) { return ++additions, Counted(a.value - b.value); }
  friend Counted operator*(Counted a, Counted b) { return ++multiplications, Counted(a.value * b.value); }
};

void test_probabilities() {
  check(draw_weight_of(3.5f, 3.5f) == uint64_t{1} << 32, "p = 1 is all of 2^32");
  check(draw_weight_of(-3.5f, 3.5f) == uint64_t{1} << 32, "the sign does not matter");
  check(draw_weight_of(0.0f, 3.5f) == 0 && draw_weight_of(-0.0f, 3.5f) == 0, "p = 0 is 0");
  check(draw_weight_of(0.0f, 0.0f) == 0, "a head that is zero draws nothing");
  check(draw_weight_of(1.0f, INFINITY) == 0 && draw_weight_of(1.0f, NAN) == 0, "nor does one that is not finite");
  check(draw_weight_of(1.0f, 3.0f) == 1431655765, "1/3, rounded to nearest");
  check(draw_weight_of(1e-40f, 3e38f) == 0 && draw_weight_of(1e-40f, 2e-40f) > 0, "denormal numbers");
  check(draw_scale_of(0.0f, 4) == 0.0f && draw_scale_of(2.0f, 4) == 0.5f, "scale");
  check(std::isnan(draw_scale_of(INFINITY, 4)) && std::isnan(draw_scale_of(NAN, 4)), "scale that is not finite");
  float max = 0.0f;
  for (const float x : {1.0f, NAN, -3.0f}) max = larger_magnitude(max, x);
  check(std::isnan(max), "a NaN is not lost in the maximum");
}

void test_certain_draws() {
  const auto stream = ScoreStream::make(1, 2, 3, 4);
  const uint64_t weights[4] = {uint64_t{1} << 32, 0, uint64_t{1} << 31, 1};
  int counts[4];
  count_draws(stream, 7, 1000, weights, counts);
  check(counts[0] == 1000 && counts[1] == 0, "p = 1 always, p = 0 never");
  check(std::abs(counts[2] - 500) < 100, "p = 1/2: ", counts[2]);  // 6 standard deviations
  for (const uint32_t offset : {0u, 1u, 0x80000000u, 0xffffffffu}) {
    const uint64_t one = uint64_t{1} << 32, before = 12345;
    check(systematic_count(before, before + one, 1000, offset) == 1000, "systematic, p = 1");
    check(systematic_count(before, before, 1000, offset) == 0, "systematic, p = 0");
    // The largest sum: 256 features of p = 1, B = 4096.
    check(systematic_count(255 * one, 256 * one, kMaxNumDraws, offset) == kMaxNumDraws, "systematic, largest sum");
  }
  const auto value_stream = RandomStream::make(1, 2, 3, 4);
  check(stream.stream.key_0 != value_stream.key_0 || stream.stream.key_1 != value_stream.key_1,
        "scores and values draw from streams of their own");
}

// Both sides of a decode step over integer counts: what is multiplied in the end is one scale per score.
void test_no_multiplications() {
  constexpr int kKeys = 100, kFeatures = 16;
  std::vector<Counted> keys(kKeys * kFeatures), scores(kKeys);
  std::vector<float> expected(kKeys, 0.0f);
  const int counts[kFeatures] = {1, -1, 0, 2, -2, 3, 0, 7, -7, 16, -4096, 0, 1, 1, 5, -100};
  for (int i = 0; i < kKeys * kFeatures; ++i) keys[i] = Counted(static_cast<float>((i * 37) % 101 - 50));
  for (int feature = 0; feature < kFeatures; ++feature) {
    if (counts[feature] == 0) continue;
    add_times(keys.data() + feature * kKeys, counts[feature], kKeys, scores.data());
    for (int n = 0; n < kKeys; ++n)
      expected[n] += static_cast<float>(counts[feature]) * keys[feature * kKeys + n].value;
  }
  for (int n = 0; n < kKeys; ++n) check(scores[n].value == expected[n], "score ", n);
  check(Counted::additions >= 13 * kKeys, "scores are made of additions: ", Counted::additions);
  check(Counted::multiplications == 0, "and of nothing else: ", Counted::multiplications);

  // Values: drawn rows, as often as they were drawn; a row of an odd length and one of a count past every block.
  constexpr int kHeadDim = 96;
  std::vector<Counted> row(kHeadDim), out(kHeadDim);
  for (int d = 0; d < kHeadDim; ++d) row[d] = Counted(static_cast<float>(d - 40));
  for (const int times : {1, 2, 31, 1024}) add_times(row.data(), times, kHeadDim, out.data());
  for (int d = 0; d < kHeadDim; ++d) check(out[d].value == 1058.0f * row[d].value, "value ", d);
  check(Counted::multiplications == 0, "values are made of additions: ", Counted::multiplications);

  const Counted scaled = scores[0] * Counted(0.5f);
  check(Counted::multiplications == 1 && scaled.value == 0.5f * expected[0], "a multiplication would be seen");
}

void test_append_offsets() {
  const int32_t table[4] = {5, 2, 0, 9};
  AppendParams p{};
  p.block_table = table;
  p.num_rows = 3, p.max_kv_len = 32, p.page_size = 16, p.num_pages = 6;
  p.stride_features_batch = 1000, p.stride_features_head = 100, p.stride_features_feature = 16;
  p.stride_table_batch = 2, p.stride_table_page = 1;
  check(p.offset(0, 1, 3) == 5 * 1000 + 100 + 3 && p.offset(0, 0, 16) == 2 * 1000, "a page and an offset in it");
  check(p.offset(1, 0, 15) == 15 && p.offset(1, 0, 16) == -1, "a page that is not there");
  check(p.fits(29) && !p.fits(30) && !p.fits(-1) && !p.fits(INT64_MAX), "room for three rows");
}

}  // namespace

int main() {
  test_probabilities();
  test_certain_draws();
  test_no_multiplications();
  test_append_offsets();
  return exit_code();
}
