// santa::_select and santa::_draw: the draws of a row, given its CDF in integers, under the proportional budget and in
// one pass. They exist so that tests can show that both backends draw the same rows.
#pragma once

#include "api/decode_checks.h"
#include "core/draw.h"
#include "core/samplers.h"

namespace santa {

struct SelectParams {
  const int64_t* tile_mass;    // [rows, tiles], summing to less than 2^32 in a row
  const int32_t* row_weights;  // [rows, tiles, tile_kv]
  const int64_t* row_seeds;    // [rows]
  int32_t* counts;             // [rows, tiles, tile_kv]
  int rows, tiles, tile_kv;
  int num_draws;
  Sampler sampler;
  int64_t seed;
};

struct DrawParams {
  const int32_t* units;      // [rows, tiles, kDrawTileKv], in 2^-unit_bits draws; a tile's add up to 2^31 at most
  const int64_t* row_seeds;  // [rows]
  int32_t* counts;           // [rows, tiles, kDrawTileKv]
  int rows, tiles;
  int unit_bits;
  int64_t seed;

  SANTA_HD uint32_t offset(int row, int tile) const {
    const RandomStream stream = RandomStream::make(seed, row_seeds[row], 0, 0);
    return tile_offset(Budget::kStreaming, stream, static_cast<int64_t>(tile) * kDrawTileKv, kDrawTileKv, 1, 0,
                       unit_bits);
  }
};

namespace api {

template <typename Backend>
Tensor select_op(Tensor tile_mass, Tensor row_weights, Tensor row_seeds, int64_t num_draws, int64_t sampler,
                 int64_t seed) {
  check_dtype("tile_mass", tile_mass, ScalarType::Long, "");
  check_rank("tile_mass", tile_mass, 2, "[rows, tiles]");
  check_dtype("row_weights", row_weights, ScalarType::Int, "");
  check_rank("row_weights", row_weights, 3, "[rows, tiles, tile_kv]");
  check_same_device("row_weights", row_weights, tile_mass);
  check_size("row_weights", row_weights, 0, tile_mass.size(0), "rows");
  check_size("row_weights", row_weights, 1, tile_mass.size(1), "tiles");
  check_per_row("row_seeds", row_seeds, tile_mass, ScalarType::Long);
  check_range("num_draws", num_draws, 1, kMaxNumSamples * kMaxGroupSize);
  check_range("sampler", sampler, 0, 3);
  if (!tile_mass.is_contiguous()) fail("tile_mass needs to be contiguous");
  if (!row_weights.is_contiguous()) fail("row_weights needs to be contiguous");
  if (row_weights.size(2) < 1 || row_weights.size(2) > kMaxTileKv) {
    fail("row_weights has tile_kv ", row_weights.size(2), "; it needs to be in [1, ", kMaxTileKv, "]");
  }
  Tensor counts = empty<3>({row_weights.size(0), row_weights.size(1), row_weights.size(2)}, ScalarType::Int, tile_mass);
  if (counts.numel() == 0) return counts;
  SelectParams p{};
  p.tile_mass = tile_mass.const_data_ptr<int64_t>();
  p.row_weights = row_weights.const_data_ptr<int32_t>();
  p.row_seeds = row_seeds.const_data_ptr<int64_t>();
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.rows = static_cast<int>(row_weights.size(0));
  p.tiles = static_cast<int>(row_weights.size(1));
  p.tile_kv = static_cast<int>(row_weights.size(2));
  p.num_draws = static_cast<int>(num_draws);
  p.sampler = static_cast<Sampler>(sampler);
  p.seed = seed;
  Backend::run(p, tile_mass.is_cpu() ? -1 : tile_mass.get_device_index());
  return counts;
}

template <typename Backend>
Tensor draw_op(Tensor units, Tensor row_seeds, int64_t unit_bits, int64_t seed) {
  check_dtype("units", units, ScalarType::Int, "");
  check_rank("units", units, 3, "[rows, tiles, 128]");
  check_size("units", units, 2, kDrawTileKv, "keys of a tile");
  check_per_row("row_seeds", row_seeds, units, ScalarType::Long);
  check_range("unit_bits", unit_bits, 0, kGroupedUnitBits);
  if (!units.is_contiguous()) fail("units needs to be contiguous");
  Tensor counts = empty<3>({units.size(0), units.size(1), units.size(2)}, ScalarType::Int, units);
  if (counts.numel() == 0) return counts;
  DrawParams p{};
  p.units = units.const_data_ptr<int32_t>();
  p.row_seeds = row_seeds.const_data_ptr<int64_t>();
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.rows = static_cast<int>(units.size(0));
  p.tiles = static_cast<int>(units.size(1));
  p.unit_bits = static_cast<int>(unit_bits);
  p.seed = seed;
  Backend::run(p, units.is_cpu() ? -1 : units.get_device_index());
  return counts;
}

}  // namespace api
}  // namespace santa
