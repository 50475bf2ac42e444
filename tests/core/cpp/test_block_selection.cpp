// csrc/core/block_selection.h and the workspace of sample_select, without Torch. Exits with 0 if every check holds.
#include "core/block_selection.h"
#include "select_params.h"

#if defined(C10_API) || defined(TORCH_API) || defined(TORCH_FEATURE_VERSION) || defined(TORCH_VERSION)
#error "csrc/core/block_selection.h or csrc/select_params.h includes a header of Torch"
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "check.h"

using namespace santa;

// Kernels receive it by value.
static_assert(std::is_trivially_copyable<SampleSelectParams>::value, "SampleSelectParams is plain data");

namespace {

void test_sampled_blocks() {
  const int expected[][2] = {{1, 1}, {2, 2}, {100, 2}, {101, 3}, {256, 6}, {400, 8}, {8192, 8}};
  for (const auto& [nq, count] : expected) {
    check(num_sampled_blocks(0, nq) == count, nq, " blocks: ", num_sampled_blocks(0, nq), " are sampled");
  }
  check(num_sampled_blocks(7, 5) == 5, "more blocks are sampled than there are");
  for (const int nq : {1, 2, 5, 300, 1 << 24}) {
    for (const int asked : {1, 2, 3, 8, 65535}) {
      const int count = num_sampled_blocks(asked, nq);
      int last = -1;
      for (int c = 0; c < count; ++c) {
        const int block = sampled_block(c, count, nq);
        check(block > last && block < nq, "block ", block, " after ", last, " of ", nq);
        last = block;
      }
      check(last == nq - 1, "the last sampled block is ", last, " of ", nq);
    }
  }
}

// Against the definition: the least integer that is not below alpha * total.
void test_mass_target() {
  for (const uint64_t total : {uint64_t{1}, uint64_t{1000}, uint64_t{1} << 40, uint64_t{1} << 60}) {
    for (const double alpha : {1e-9, 0.25, 0.5, 0.95, 0.999999999}) {
      const uint64_t target = mass_target(total, alpha);
      check(target >= 1 && target <= total, "mass_target(", total, ", ", alpha, ") is ", target);
      const double least = alpha * static_cast<double>(total);
      check(static_cast<double>(target) >= least, "mass_target(", total, ", ", alpha, ") is too low");
      if (total <= uint64_t{1} << 40) check(static_cast<double>(target - 1) < least, "and is not the least");
    }
  }
}

void test_mass_units() {
  check(mass_units(1.0f) == uint64_t{1} << 40, "a row's whole mass is ", mass_units(1.0f));
  check(mass_units(0.0f) == 0 && mass_units(NAN) == 0, "nothing and NaN have no mass");
  check(mass_units(std::ldexp(1.0f, -40)) == 1 && mass_units(std::ldexp(1.0f, -42)) == 0, "the unit is 2^-40");
}

// Every block (a, b) of an item, listed.
void test_mirrors() {
  for (const int nq : {1, 2, 7}) {
    for (const int offset : {0, 1, 5}) {
      const int nk = nq + offset;
      for (int item = 0; item < nk; ++item) {
        std::vector<int> column(nk, 0), slash(nk, 0);
        for (int a = 0; a < nq; ++a) {
          const int mirror = a + offset - item;  // of column `item`: its slash; of slash `item`: its column
          if (mirror >= 0) ++column[mirror], ++slash[mirror];
        }
        const MirrorRange range = mirrors_of(item, nk, offset);
        for (int i = 0; i < nk; ++i) {
          const int inside = i >= range.first && i < range.last;
          check(inside == column[i] && inside == slash[i], "mirror ", i, " of item ", item, ", nk ", nk);
        }
      }
    }
  }
}

void test_priority() {
  check(priority_of(0, 3) == 0, "no gain has a priority");
  check(priority_of(1, 1) > priority_of(1, 2) && priority_of(uint64_t{1} << 60, 7) > priority_of(3, 1) &&
            priority_of(6, 3) == priority_of(2, 1) && priority_of(1, 1 << 24) > 0,
        "priorities are not in the order of the quotients");
}

void test_percentile() {
  const int expected[][2] = {{1, 0}, {20, 0}, {21, 1}, {128, 6}, {768, 38}};
  for (const auto& [count, index] : expected) {
    check(percentile_index(count) == index, "percentile_index(", count, ") is ", percentile_index(count));
  }
}

void test_workspace() {
  for (const int blocks : {1, 256, 1024, 8192}) {
    for (const int chunks : {1, 8, 64}) {
      SampleSelectParams p{};
      p.batch = 3, p.num_qo_heads = 32, p.num_kv_heads = 8, p.gqa_group_size = 4;
      p.nq = p.nk = blocks, p.num_chunks = chunks < blocks ? chunks : blocks;
      p.heads_per_pass = select_heads_per_pass(p);
      const int64_t bytes = place_select_workspace(p, nullptr);
      check(p.heads_per_pass % 4 == 0 && p.heads_per_pass >= 4 && p.heads_per_pass <= 96, p.heads_per_pass, " heads");
      check(bytes <= kMaxSelectWorkspace + 10 * 256 || p.heads_per_pass == 4, bytes, " bytes of workspace for ", blocks,
            " blocks, ", chunks, " chunks");
    }
  }
}

}  // namespace

int main() {
  test_sampled_blocks();
  test_mass_target();
  test_mass_units();
  test_mirrors();
  test_priority();
  test_percentile();
  test_workspace();
  return exit_code();
}
