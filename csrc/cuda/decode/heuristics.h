// Choices that change how fast a result is computed, never the result. Plain functions, the reason beside each.
#pragma once

namespace santa::cuda {

// Batch rows between the tile CTAs of a row and its gather CTAs. A gather CTA that comes too early holds a slot while
// it waits; one that comes late only moves work to the end of the launch. About two waves of tile CTAs in between is
// enough: 4 CTAs on each of some 140 multiprocessors are one wave.
inline int gather_lag(int batch, int tile_ctas_per_row) {
  constexpr int kTwoWaves = 2 * 4 * 140;
  const int lag = 1 + kTwoWaves / (tile_ctas_per_row + 1);
  return lag < batch ? lag : batch;
}

}  // namespace santa::cuda
