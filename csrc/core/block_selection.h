// Which key blocks a prefill keeps (SampleAttention, arXiv 2406.15486): the arithmetic that both backends share. The
// rule is written out in santa/reference_prefill.py.
//
// A head's selection is a set of columns b and a set of slashes d: query block a, whose diagonal is key block
// A(a) = a + offset, keeps key block b <= A(a) iff b is a column or A(a) - b is a slash. Columns and slashes mirror
// each other: in the square of (query block, key block), each is what the other is after key blocks are counted from
// the diagonal.
//
// Masses are integers, multiples of 2^-40 of a row's softmax: their sums are exact in any order, so a GPU may sum as it
// likes and ties are ties.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace santa {

constexpr int kSelectBlock = 128;              // tokens
constexpr float kMassUnit = 1099511627776.0f;  // 2^40; 2^20 rows of mass 1 stay below 2^60

// A share of a row's softmax in units; NaN counts as nothing (the head is then kept whole, whatever its masses).
SANTA_HD uint64_t mass_units(float share) { return share > 0.0f ? static_cast<uint64_t>(share * kMassUnit + 0.5f) : 0; }

// The query blocks that are sampled: the last ones of num_chunks equal segments.
SANTA_HD int sampled_block(int chunk, int num_chunks, int nq) {
  return static_cast<int>((static_cast<int64_t>(chunk) + 1) * nq / num_chunks) - 1;
}

// num_chunks as asked for, 0 for 2% of the query blocks, from 2 to 8; never more than there are.
inline int num_sampled_blocks(int64_t asked, int nq) {
  int64_t count = asked;
  if (asked == 0) {
    count = (static_cast<int64_t>(nq) + 49) / 50;
    count = count < 2 ? 2 : count > 8 ? 8 : count;
  }
  return static_cast<int>(count < nq ? count : nq);
}

// The least integer that is at least alpha * total, for 0 < alpha < 1: a sum of masses reaches the part alpha iff it
// reaches this.
SANTA_HD uint64_t mass_target(uint64_t total, double alpha) {
  const auto target = static_cast<uint64_t>(ceil(alpha * static_cast<double>(total)));
  return target < total ? target : total;
}

// What a column or slash adds to the kept blocks: those of its blocks whose mirror image (the slash or column through
// them) is not chosen. They are [first, last) among the mirrors.
struct MirrorRange {
  int first, last;
};

SANTA_HD MirrorRange mirrors_of(int item, int nk, int offset) { return {item < offset ? offset - item : 0, nk - item}; }

// The rank of a candidate: mass gained per block added, as an integer with the order of the quotient. 0: gains nothing.
SANTA_HD uint64_t priority_of(uint64_t gain, int added) {
  if (gain == 0) return 0;
  const double quotient = static_cast<double>(gain) / static_cast<double>(added);
  uint64_t bits;
  memcpy(&bits, &quotient, sizeof(bits));
  return bits;
}

// Index of the 5th percentile among count values in ascending order: the lower neighbour of 0.05 (count - 1).
SANTA_HD int percentile_index(int count) { return (count - 1) / 20; }

}  // namespace santa
