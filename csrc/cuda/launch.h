// What a launch on a GPU needs: the number of thread blocks, the layout of their shared memory and of the workspace.
// Computed from plain numbers: no device is queried, and `layout` is not read. The kernels take every address in shared
// memory and workspace from here.

#pragma once

#include "../recursion.h"
#include "../step.h"
#include "walk.h"

namespace rlekf::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerThread = kTile / kWarps;  // a thread holds 8 rows x 2 columns of a tile
constexpr int kGroups = kThreads / kTile;       // threads that share a weight in a sum
constexpr int kRowStride = 32;                  // pairs of entries between the rows of a thread in shared memory
constexpr int kPendingAtOnce = 32;              // pending vectors with inner products in shared memory at a time
constexpr int kDotLog2 = 9;                     // 2^9 weights per partial inner product with a pending vector
constexpr int kMaxStages = 4;
constexpr int kSegmentsPerCta = 16;  // at least, before panels become wider: runs differ by one segment
constexpr int64_t kFewSums = 2048;   // that the first thread block adds up by itself

struct Device {
  int64_t sms;
  int64_t shared_per_cta;  // the most that a thread block may request
  int64_t shared_per_sm;   // each resident block takes kReservedShared of it more than it requests
};
constexpr int64_t kReservedShared = 1024;

/// Kernels are compiled for these numbers of measurements; other numbers are rounded up.
constexpr int rounded_up(int num_measurements) {
  return num_measurements <= 2 ? num_measurements : num_measurements <= 4 ? 4 : kMaxMeasurements;
}

/// Thread blocks per SM: with many measurements one block needs all registers.
constexpr int ctas_per_sm(int num_measurements) { return num_measurements <= 2 ? 2 : 1; }

/// Pending vectors of a fold with entries in shared memory at a time. With 32 of them, panels of an H200 would have half
/// the width for 2 and for 8 measurements.
RLEKF_INLINE_HD constexpr int fold_at_once(int num_measurements) {
  return num_measurements == 2 || num_measurements == 8 ? 16 : 32;
}

// --- shared memory: the state, and after it what each phase needs. Offsets and sizes in bytes.

constexpr int64_t kSharedState = 0;
constexpr int64_t kSharedRest = (sizeof(State) + 15) / 16 * 16;

struct VisitShared {
  int64_t columns;    // (M, width, kThreads) pairs: sums of the panel's columns, each pair one thread's own
  int64_t x_columns;  // (M, width * kTile): Jacobian entries of the panel's columns
  int64_t x_rows;     // (kWarps, M, kRowsPerThread): Jacobian entries of the tile's rows
  int64_t u_rows;     // (kWarps, fold_at_once(M), kRowsPerThread): entries of pending vectors for the tile's rows
  int64_t ring;       // (stages, kRowsPerThread, kThreads) pairs: tiles in flight
  int64_t size;
};

RLEKF_INLINE_HD VisitShared visit_shared(int m, Width width, int64_t stages, int64_t bytes_each) {
  VisitShared s{};
  s.columns = kSharedRest;
  s.x_columns = s.columns + m * width.columns() * kThreads * 16;
  s.x_rows = s.x_columns + m * width.columns() * kTile * 8;
  s.u_rows = s.x_rows + kWarps * m * kRowsPerThread * 8;
  s.ring = s.u_rows + kWarps * fold_at_once(m) * kRowsPerThread * 8;
  s.size = s.ring + stages * kTileSize * bytes_each;
  return s;
}

struct ReduceShared {
  int64_t parts;  // (M, kGroups, kTile)
  int64_t z;      // (M, kTile)
  int64_t h;      // (M, kTile)
  int64_t dots;   // (kPendingAtOnce, M): u_i^T h
  int64_t gram;   // (2, M, M)
  int64_t size;
};

RLEKF_INLINE_HD constexpr ReduceShared reduce_shared(int m) {
  ReduceShared s{};
  s.parts = kSharedRest;
  s.z = s.parts + m * kGroups * kTile * 8;
  s.h = s.z + m * kTile * 8;
  s.dots = s.h + m * kTile * 8;
  s.gram = s.dots + kPendingAtOnce * m * 8;
  s.size = s.gram + 2 * m * m * 8;
  return s;
}

struct RecursionShared {
  int64_t totals;  // (M, M): y_i^T h_j over all blocks
  int64_t parts;   // (kWarps, M + 1)
  int64_t size;
};

RLEKF_INLINE_HD constexpr RecursionShared recursion_shared(int m) {
  RecursionShared s{};
  s.totals = kSharedRest;
  s.parts = s.totals + m * m * 8;
  s.size = s.parts + kWarps * (m + 1) * 8;
  return s;
}

struct Launch {
  int num_measurements;  // rounded up
  Width width;           // of a panel
  int stages;            // tiles in flight per thread block
  int64_t ctas;
  int64_t shared_bytes;
  bool part;   // of the tiles, in the order of memory: see part.cuh
  Runs tiles;  // who visits which tile
  Runs rows;   // who reduces and applies which slots of kTile weights; no more thread blocks than slots
};

/// Assigns tiles and rows of weights to `ctas` thread blocks, or to as many as have something to do.
inline void assign(Launch& launch, int64_t ctas, int64_t num_tiles, int64_t num_weights, int64_t num_blocks) {
  // `width` tiles per thread block are at least one segment. Without tiles (correct alone) there are rows of weights.
  const int64_t rows = num_slots(num_weights, num_blocks, kTileLog2);
  const int64_t most = num_tiles > 0 ? num_tiles >> launch.width.log2 : rows;
  launch.ctas = ctas < most ? ctas : most > 0 ? most : 1;
  launch.tiles = runs_of(num_tiles, launch.ctas);
  launch.rows = runs_of(rows, launch.ctas < rows ? launch.ctas : rows);
}

/// The widest panels that leave room for two tiles in flight and do not make runs uneven, and then as many tiles in
/// flight as fit.
inline Launch plan_launch(const Device& device, int num_measurements, int64_t bytes_each, int64_t num_tiles,
                          int64_t num_weights, int64_t num_blocks, bool part = false) {
  Launch launch{};
  launch.part = part;
  launch.num_measurements = rounded_up(num_measurements);
  const int m = launch.num_measurements;
  int64_t resident = ctas_per_sm(m);
  for (; resident >= 1 && launch.stages == 0; --resident) {
    const int64_t shared = device.shared_per_sm / resident - kReservedShared;
    const int64_t room = shared < device.shared_per_cta ? shared : device.shared_per_cta;
    for (int least = 2; least >= 1 && launch.stages == 0; --least) {
      for (int log2 = 2; log2 >= 0; --log2) {
        const Width width{log2};
        if (log2 > 0 && (part || num_tiles >> log2 < kSegmentsPerCta * resident * device.sms)) continue;
        int stages = kMaxStages;
        while (stages >= least && visit_shared(m, width, stages, bytes_each).size > room) --stages;
        if (stages < least) continue;
        launch.width = width;
        launch.stages = stages;
        launch.shared_bytes = visit_shared(m, width, stages, bytes_each).size;
        assign(launch, resident * device.sms, num_tiles, num_weights, num_blocks);
        break;
      }
    }
  }
  return launch;  // with 0 stages if there is no room at all, which the caller reports
}

/// What the phases pass on to one another in global memory. kM is the rounded number of measurements.
struct Workspace {
  double* row_sums;       // (row slots, M, kTile)
  double* column_sums;    // (column slots, M, width * kTile)
  double* dots;           // (slots of 2^kDotLog2 weights, capacity, M): partial u_i^T h
  double* gram_parts;     // (thread blocks + blocks, 2, M, M)
  Projection projection;  // if the caller wants none
  double* products;       // (L, M, M): y_i^T h_j
  Update* updates;        // (kMaxMeasurements)
  int64_t size;           // in doubles

  /// (kM, kTile)
  template <int kM>
  RLEKF_INLINE_HD double* row_sum(int64_t slot) const {
    return row_sums + slot * kM * kTile;
  }
  /// (kM, width * kTile)
  template <int kM>
  RLEKF_INLINE_HD double* column_sum(int64_t slot, Width width) const {
    return column_sums + ((slot * kM) << (width.log2 + kTileLog2));
  }
  /// (kM), of pending vector i
  template <int kM>
  RLEKF_INLINE_HD double* dot(int64_t slot, int64_t i, int64_t capacity) const {
    return dots + (slot * capacity + i) * kM;
  }
  /// (2, kM, kM), of the rows of a block that a thread block reduces
  template <int kM>
  RLEKF_INLINE_HD double* gram_part(int64_t cta, int64_t block) const {
    return gram_parts + (cta + block) * 2 * kM * kM;
  }
  /// (kM, kM)
  template <int kM>
  RLEKF_INLINE_HD double* product(int64_t block) const {
    return products + block * kM * kM;
  }
};

/// The workspace in `memory`, whose contents do not matter; with a null pointer, only its size.
inline Workspace workspace_in(double* memory, const Launch& launch, const Covariance& p) {
  const int64_t m = launch.num_measurements;
  Workspace w{};
  const auto next = [&](int64_t count) {
    double* at = memory ? memory + w.size : nullptr;
    w.size += count;
    return at;
  };
  if (launch.part) {
    w.row_sums = next((num_slots(p.num_weights, p.num_blocks, kTileLog2) + launch.ctas) * m * kTile);
    w.column_sums = next(p.num_tiles * m * kTile);
    return w;
  }
  w.row_sums = next(num_row_slots(p.num_tiles, p.num_weights, p.num_blocks, launch.width) * m * kTile);
  w.column_sums =
      next((num_column_slots(p.num_weights, p.num_blocks, launch.width, launch.ctas) * m * kTile) << launch.width.log2);
  w.dots = next(num_slots(p.num_weights, p.num_blocks, kDotLog2) * p.capacity * m);
  w.gram_parts = next((launch.ctas + p.num_blocks) * 2 * m * m);
  w.projection.cross = next(m * p.num_weights);
  w.projection.gram = next(2 * m * m * p.num_blocks);
  w.products = next(m * m * p.num_blocks);
  w.updates = reinterpret_cast<Update*>(next(kMaxMeasurements * int64_t{sizeof(Update) / sizeof(double)}));
  return w;
}

}  // namespace rlekf::cuda
