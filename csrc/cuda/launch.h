// What a launch on a GPU needs: how many ctas, how much shared memory, and what stands where in the workspace. Plain
// data from plain numbers: no device is asked, and `layout` is not read.

#pragma once

#include "../recursion.h"
#include "walk.h"

namespace rlekf::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerThread = kTile / kWarps;  // a thread holds 8 rows x 2 columns of a tile
constexpr int kFoldAtOnce = 32;                 // vectors of a fold whose row segments stand in shared memory
constexpr int kDotLog2 = 9;                     // 2^9 weights to a partial inner product with a waiting vector
constexpr int kMaxStages = 4;

struct Device {
  int64_t sms;
  int64_t shared_per_cta;  // the most that a thread block may ask for
  int64_t shared_per_sm;   // of which each resident block takes kReservedShared more than it asks for
};
constexpr int64_t kReservedShared = 1024;

/// Kernels are compiled for these numbers of measurements; others take the next.
constexpr int rounded_up(int num_measurements) {
  return num_measurements <= 2 ? num_measurements : num_measurements <= 4 ? 4 : kMaxMeasurements;
}

/// Thread blocks that share an SM: many measurements need all registers for one.
constexpr int ctas_per_sm(int num_measurements) { return num_measurements <= 2 ? 2 : 1; }

/// Offsets in shared memory, in bytes.
struct Shared {
  int64_t state;      // the cta's own copy
  int64_t columns;    // (M, width, kThreads) pairs: sums of the panel's columns, each pair one thread's own
  int64_t x_columns;  // (M, width * kTile) the Jacobians' entries for the panel's columns
  int64_t x_rows;     // (kWarps, M, kRowsPerThread) ... for the tile's rows
  int64_t u_rows;     // (kWarps, kFoldAtOnce, kRowsPerThread) the waiting vectors' entries for the tile's rows
  int64_t ring;       // (stages, kRowsPerThread, kThreads) pairs: tiles on their way from memory
  int64_t size;
};

RLEKF_INLINE_HD Shared shared_layout(int m, int64_t columns, int64_t stages, int64_t bytes_each) {
  Shared s{};
  s.columns = (sizeof(State) + 15) / 16 * 16;
  s.x_columns = s.columns + m * columns * kThreads * 16;
  s.x_rows = s.x_columns + m * columns * kTile * 8;
  s.u_rows = s.x_rows + kWarps * m * kRowsPerThread * 8;
  s.ring = s.u_rows + kWarps * kFoldAtOnce * kRowsPerThread * 8;
  s.size = s.ring + stages * kTileSize * bytes_each;
  return s;
}

/// What the later phases put into the memory of the ring and the column sums, once these are done. In numbers.
RLEKF_INLINE_HD int64_t reduce_shared(int m) {
  return m * (4 + 2) * kTile + kFoldAtOnce * m + 2 * m * m;  // parts, z and h, inner products, gram
}

struct Launch {
  int num_measurements;  // rounded up
  Width width;           // of a panel
  int stages;            // tiles on their way to a cta
  int64_t ctas;
  int64_t shared_bytes;
  Runs tiles;  // who visits which tile
  Runs rows;   // who reduces and applies which kTile weights; fewer ctas than slots, or as many
};

/// Assigns tiles and rows of weights to `ctas`, or to as many as have something to do.
inline void assign(Launch& launch, int64_t ctas, int64_t num_tiles, int64_t num_weights, int64_t num_blocks) {
  // A cta has at least `width` tiles, so at least one segment; without tiles (correct alone) it has rows of weights.
  const int64_t rows = num_slots(num_weights, num_blocks, kTileLog2);
  const int64_t most = num_tiles > 0 ? num_tiles >> launch.width.log2 : rows;
  launch.ctas = ctas < most ? ctas : most > 0 ? most : 1;
  launch.tiles = runs_of(num_tiles, launch.ctas);
  launch.rows = runs_of(rows, launch.ctas < rows ? launch.ctas : rows);
}

/// The widest panels that leave room for two tiles on their way, and then as many of these as fit.
inline Launch plan_launch(const Device& device, int num_measurements, int64_t bytes_each, int64_t num_tiles,
                          int64_t num_weights, int64_t num_blocks) {
  Launch launch{};
  launch.num_measurements = rounded_up(num_measurements);
  const int m = launch.num_measurements;
  int64_t resident = ctas_per_sm(m);
  for (; resident >= 1 && launch.stages == 0; --resident) {
    const int64_t shared = device.shared_per_sm / resident - kReservedShared;
    const int64_t room = shared < device.shared_per_cta ? shared : device.shared_per_cta;
    for (int least = 2; least >= 1 && launch.stages == 0; --least) {
      for (int log2 = 2; log2 >= 0; --log2) {
        const Width width{log2};
        int stages = kMaxStages;
        while (stages >= least && shared_layout(m, width.columns(), stages, bytes_each).size > room) --stages;
        if (stages < least) continue;
        launch.width = width;
        launch.stages = stages;
        launch.shared_bytes = shared_layout(m, width.columns(), stages, bytes_each).size;
        assign(launch, resident * device.sms, num_tiles, num_weights, num_blocks);
        break;
      }
    }
  }
  return launch;  // with 0 stages if there is no room at all: the caller says so
}

/// Offsets in the workspace, in float64 numbers. Its contents before a call do not matter.
struct Workspace {
  int64_t row_sums;     // (row slots, M, kTile)
  int64_t column_sums;  // (column slots, M, width * kTile)
  int64_t dots;         // (slots of 2^kDotLog2, capacity, M) u_i^T h in parts
  int64_t gram_parts;   // (ctas + blocks, 2, M, M)
  int64_t cross;        // (M, N) and
  int64_t gram;         // (2, L, M, M): the projection, where the caller has no use for it
  int64_t products;     // (L, M, M) y_i^T h_j
  int64_t updates;      // kMaxMeasurements of Update
  int64_t size;
};

inline Workspace workspace_layout(const Launch& launch, int64_t num_tiles, int64_t num_weights, int64_t num_blocks,
                                  int64_t capacity) {
  const int64_t m = launch.num_measurements;
  Workspace w{};
  w.column_sums = m * kTile * num_row_slots(num_tiles, num_weights, num_blocks, launch.width);
  w.dots = w.column_sums +
           m * kTile * launch.width.columns() * num_column_slots(num_weights, num_blocks, launch.width, launch.ctas);
  w.gram_parts = w.dots + m * capacity * num_slots(num_weights, num_blocks, kDotLog2);
  w.cross = w.gram_parts + 2 * m * m * (launch.ctas + num_blocks);
  w.gram = w.cross + m * num_weights;
  w.products = w.gram + 2 * m * m * num_blocks;
  w.updates = w.products + m * m * num_blocks;
  w.size = w.updates + kMaxMeasurements * static_cast<int64_t>(sizeof(Update) / sizeof(double));
  return w;
}

}  // namespace rlekf::cuda
