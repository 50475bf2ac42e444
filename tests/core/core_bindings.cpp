// santa_core_test: csrc/core as a Python module, for the tests alone. Built by tools/build_test_module.py. Functions
// that a test calls many times take and return arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "core/draw.h"
#include "core/float8.h"
#include "core/mixture.h"
#include "core/philox.h"
#include "core/samplers.h"
#include "core/softmax_state.h"
#include "core/tiling.h"

namespace py = pybind11;
using namespace santa;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const PhiloxBlock block = philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {block.word[0], block.word[1], block.word[2], block.word[3]};
}

// stream.bits(segment, first + i) for i in [0, count).
Array<uint64_t> bits_of(const RandomStream& stream, uint32_t segment, uint32_t first, uint32_t count) {
  Array<uint64_t> bits(count);
  for (uint32_t i = 0; i < count; ++i) bits.mutable_at(i) = stream.bits(segment, first + i);
  return bits;
}

Draws make_draws(Sampler sampler, RandomStream stream, uint32_t segment, uint32_t num_draws, uint32_t total) {
  if (num_draws == 0 || total == 0) throw std::invalid_argument("num_draws and total need to be above 0");
  return Draws::make(sampler, stream, segment, num_draws, total);
}

// (scaled, fraction) of all thresholds.
std::pair<Array<uint64_t>, Array<float>> thresholds(const Draws& draws) {
  Array<uint64_t> scaled(draws.num_draws);
  Array<float> fraction(draws.num_draws);
  for (uint32_t m = 0; m < draws.num_draws; ++m) {
    const Threshold threshold = draws.threshold(m);
    scaled.mutable_at(m) = threshold.scaled;
    fraction.mutable_at(m) = threshold.fraction;
  }
  return {scaled, fraction};
}

Array<uint32_t> counts_below(const Draws& draws, const Array<uint32_t>& positions) {
  Array<uint32_t> result(positions.size());
  for (py::ssize_t i = 0; i < positions.size(); ++i) result.mutable_at(i) = draws.count_below(positions.at(i));
  return result;
}

bool tile_contains(uint32_t unit, uint32_t tile_start, uint32_t tile_mass, uint64_t scaled, float fraction) {
  return TilePositions::make(unit, tile_start, tile_mass).contains({scaled, fraction});
}

uint32_t tile_position(uint32_t unit, uint32_t tile_start, uint32_t tile_mass, uint64_t scaled, float fraction,
                       uint32_t weight_sum) {
  return TilePositions::make(unit, tile_start, tile_mass).position({scaled, fraction}, weight_sum);
}

Array<int> rows_at(const Array<uint32_t>& cumulative, const Array<uint32_t>& positions) {
  Array<int> result(positions.size());
  for (py::ssize_t i = 0; i < positions.size(); ++i) {
    result.mutable_at(i) = row_at(cumulative.data(), static_cast<int>(cumulative.size()), positions.at(i));
  }
  return result;
}

// For each tile of a row, by its first key.
Array<uint32_t> tile_offsets(Budget budget, const RandomStream& stream, const Array<int64_t>& first_keys, int tile_kv,
                             int kv_len, int64_t num_draws, int unit_bits) {
  Array<uint32_t> offsets(first_keys.size());
  for (py::ssize_t i = 0; i < first_keys.size(); ++i) {
    offsets.mutable_at(i) = tile_offset(budget, stream, first_keys.at(i), tile_kv, kv_len, num_draws, unit_bits);
  }
  return offsets;
}

using State = std::pair<float, float>;  // (max, sum)

State merge_states(State a, State b) {
  const SoftmaxState state = merge({a.first, a.second}, {b.first, b.second});
  return {state.max, state.sum};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // philox.h
  m.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"));
  m.def("mul_high", &mul_high);
  py::class_<RandomStream>(m, "RandomStream")
      .def(py::init(&RandomStream::make), py::arg("seed") = 0, py::arg("row_seed") = 0, py::arg("position") = 0,
           py::arg("head") = 0)
      .def_property_readonly("key", [](const RandomStream& s) { return std::array<uint32_t, 2>{s.key_0, s.key_1}; })
      .def("bits", &RandomStream::bits, py::arg("segment"), py::arg("draw"))
      .def("bits_of", &bits_of, py::arg("segment"), py::arg("first"), py::arg("count"));

  // samplers.h
  py::enum_<Sampler>(m, "Sampler")
      .value("MULTINOMIAL", Sampler::kMultinomial)
      .value("STRATIFIED", Sampler::kStratified)
      .value("SYSTEMATIC", Sampler::kSystematic)
      .value("GROUPED", Sampler::kGrouped);
  m.def("tile_mass_of", py::vectorize(tile_mass_of));
  m.def("row_weight_of", py::vectorize(row_weight_of));
  py::class_<Threshold>(m, "Threshold")
      .def(py::init([](uint64_t scaled, float fraction) { return Threshold{scaled, fraction}; }), py::arg("scaled"),
           py::arg("fraction") = 0.0f)
      .def_readonly("scaled", &Threshold::scaled)
      .def_readonly("fraction", &Threshold::fraction);
  m.def("random_point", &random_point, py::arg("bits"), py::arg("total"));
  py::class_<Draws>(m, "Draws")
      .def(py::init(&make_draws), py::arg("sampler"), py::arg("stream"), py::arg("segment"), py::arg("num_draws"),
           py::arg("total"))
      .def_readwrite("shared_offset", &Draws::shared_offset)  // the extremes are too rare to wait for
      .def_property_readonly("sorted", &Draws::sorted)
      .def_property_readonly("unit", &Draws::unit)
      .def("threshold", &Draws::threshold)
      .def("thresholds", &thresholds, "(scaled, fraction)")
      .def("count_below", &Draws::count_below)
      .def("counts_below", &counts_below);
  m.def("tile_contains", py::vectorize(tile_contains), py::arg("unit"), py::arg("tile_start"), py::arg("tile_mass"),
        py::arg("scaled"), py::arg("fraction"));
  m.def("tile_position", py::vectorize(tile_position), py::arg("unit"), py::arg("tile_start"), py::arg("tile_mass"),
        py::arg("scaled"), py::arg("fraction"), py::arg("weight_sum"));
  m.def("rows_at", &rows_at, py::arg("cumulative"), py::arg("positions"));
  m.def("expected_draws", &expected_draws, py::arg("num_draws"), py::arg("tile_mass"), py::arg("total"),
        py::arg("weight"), py::arg("weight_sum"));

  // tiling.h
  m.def("tile_kv_of", py::vectorize(tile_kv_of));
  m.def("num_tiles_of", py::vectorize(num_tiles_of));
  m.def("max_num_tiles", py::vectorize(max_num_tiles));
  m.def("exact_tile_kv_of", py::vectorize(exact_tile_kv_of));
  m.def("max_exact_tiles", py::vectorize(max_exact_tiles));
  m.def("draw_tile_kv_of", py::vectorize(draw_tile_kv_of), py::arg("kv_len"), py::arg("by_features"));
  m.def("part_kv_of", py::vectorize(part_kv_of), py::arg("kv_len"), py::arg("num_units"), py::arg("most") = kMaxPartKv);
  m.def("max_num_parts", py::vectorize(max_num_parts), py::arg("max_kv_len"), py::arg("num_units"),
        py::arg("most") = kMaxPartKv);
  m.def("proposal_tile_kv_of", &proposal_tile_kv_of, py::arg("block_heads"));
  m.attr("MOST_PROPOSAL_PART_KV") = kMostProposalPartKv;
  m.def("num_head_blocks_of", &num_head_blocks_of);
  m.def("ceil_div_int", &ceil_div_int);
  m.def("default_min_sampled_len", &default_min_sampled_len, py::arg("num_samples"), py::arg("gqa_group_size"));

  // draw.h
  m.def("pilot_size", &pilot_size);
  m.def("pilot_position", py::vectorize(pilot_position), py::arg("i"), py::arg("kv_len"), py::arg("run"));
  m.def("pilot_log2_weight",
        py::vectorize([](int i, int kv_len) { return pilot_log2_weight(i, kv_len, spaced_log2_weight(kv_len)); }),
        py::arg("i"), py::arg("kv_len"));
  const auto streaming_share_of = [](float tile_max, float tile_sum, float level, int tile_keys, int kv_len) {
    return streaming_share({tile_max, tile_sum}, level, tile_keys, kv_len);
  };
  m.def("streaming_share", py::vectorize(streaming_share_of), py::arg("tile_max"), py::arg("tile_sum"),
        py::arg("level"), py::arg("tile_keys"), py::arg("kv_len"));
  m.def("uniform_share", py::vectorize(uniform_share), py::arg("tile_keys"), py::arg("kv_len"));
  m.def("unit_bits_of", &unit_bits_of, py::arg("sampler"), py::arg("num_samples"));
  m.def("draw_units", py::vectorize(draw_units), py::arg("expected"), py::arg("most"), py::arg("unit_bits"));
  m.def("inclusion_units", py::vectorize(inclusion_units));
  m.def("draws_between", py::vectorize(draws_between), py::arg("below"), py::arg("units"), py::arg("offset"),
        py::arg("unit_bits"));
  py::enum_<Budget>(m, "Budget").value("UNIFORM", Budget::kUniform).value("STREAMING", Budget::kStreaming);
  m.def("tile_offsets", &tile_offsets, py::arg("budget"), py::arg("stream"), py::arg("first_keys"), py::arg("tile_kv"),
        py::arg("kv_len"), py::arg("num_draws"), py::arg("unit_bits"));

  // float8.h
  m.def("float_of_e4m3", py::vectorize(float_of_e4m3));

  // softmax_state.h and mixture.h; a state is (max, sum)
  m.def("merge", &merge_states);
  m.def("empty_softmax_state", [] { return State{empty_softmax_state().max, empty_softmax_state().sum}; });
  m.def("log2_sum", [](State state) { return log2_sum({state.first, state.second}); });
  m.def("is_finite", &is_finite);
  m.def("tile_factor", &tile_factor);
}
