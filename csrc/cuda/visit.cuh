// The phase that reads P. Each thread block visits its run of tiles once: folds a tile if a fold is due, multiplies it by
// all Jacobians, and leaves row sums per segment and column sums per panel in the workspace.
//
// A thread holds 8 rows x 2 columns of a tile: warp w has rows 8 w ... 8 w + 7, lane l columns 2 l and 2 l + 1. Row sums
// stay in registers along a segment; column sums stay in shared memory, each thread its own, down a panel. Each warp
// copies the rows that it will use itself, tiles ahead, into shared memory of its own, 16 bytes at a time: no barrier of
// the thread block separates the arrival of a tile from its use. In float64 these 16 bytes are one thread's own, too.

#pragma once

#include "task.cuh"

namespace rlekf::cuda {

/// The tiles of a run in flight from global memory, `stages` at a time.
template <typename Scalar, typename Order = Walk>
struct Ring {
  static constexpr int kPairs = kRowsPerThread * kThreads;                    // of a tile
  static constexpr int kCopies = kTileSize * sizeof(Scalar) / 16 / kThreads;  // of a thread, for each tile
  static constexpr bool kOwn = sizeof(Pair<Scalar>) == 16;                    // whether a thread copies what it uses

  const Scalar* tiles;
  Pair<Scalar>* entries;  // this thread's first
  Width width;
  int stages, next;
  Order ahead;  // the tile to prefetch next

  RLEKF_DEVICE Ring(const Task& task, int64_t offset, const Order& run)
      : tiles(static_cast<const Scalar*>(task.p.tiles)),
        entries(shared_at<Pair<Scalar>>(offset) + warp() * kRowsPerThread * kRowStride + lane()),
        width(task.launch.width),
        stages(task.launch.stages),
        next(0),
        ahead(run) {
    for (int stage = 0; stage < stages; ++stage) prefetch(entries + stage * kPairs, next_tile());
  }

  /// Offset of this thread's first entry of a tile.
  RLEKF_DEVICE static int64_t own_entry(int64_t tile) {
    return tile * kTileSize + warp() * kRowsPerThread * kTile + 2 * lane();
  }

  /// The next tile to prefetch, in global memory; null at the end of the run.
  RLEKF_DEVICE const Scalar* next_tile() {
    if (ahead.left == 0) return nullptr;
    const Scalar* from = tiles + ahead.tile() * kTileSize;
    ahead.advance(width);
    return from;
  }

  /// Starts copying this warp's rows of a tile, for which `to` is this thread's first entry. Without a tile it commits an
  /// empty group: acquire() counts groups.
  RLEKF_DEVICE void prefetch(Pair<Scalar>* to, const Scalar* from) {
    if (!kOwn) sync_warp();  // others may still read what this thread is about to overwrite
    auto* chunk = reinterpret_cast<char*>(to - lane()) + 16 * lane();
    const auto* wanted = reinterpret_cast<const char*>(from + warp() * kRowsPerThread * kTile) + 16 * lane();
    RLEKF_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      if (from) copy_async(chunk + 32 * 16 * i, wanted + 32 * 16 * i);
    }
    copy_commit();
  }

  /// Waits for the current tile. Returns this thread's first entry of it; the entries are kRowStride pairs apart.
  RLEKF_DEVICE Pair<Scalar>* acquire() {
    copy_wait(stages);
    if (!kOwn) sync_warp();
    Pair<Scalar>* current = entries + next * kPairs;
    next = next + 1 == stages ? 0 : next + 1;
    return current;
  }
};

/// The shared memory of visit() beside the ring. visit_shared() has the shapes.
template <int kM>
struct Panel {
  Width width;
  Pair<double>* columns;  // this thread's first
  double* x_columns;
  double* x_rows;  // this warp's
  double* u_rows;  // this warp's

  RLEKF_DEVICE Panel(Width width, const VisitShared& offsets)
      : width(width),
        columns(shared_at<Pair<double>>(offsets.columns) + thread()),
        x_columns(shared_at<double>(offsets.x_columns)),
        x_rows(shared_at<double>(offsets.x_rows) + warp() * kM * kRowsPerThread),
        u_rows(shared_at<double>(offsets.u_rows) + warp() * fold_at_once(kM) * kRowsPerThread) {}

  RLEKF_DEVICE int num_columns() const { return static_cast<int>(kTile) << width.log2; }

  /// This thread's column sums for Jacobian k in tile column `col` of the panel.
  RLEKF_DEVICE Pair<double>& column_sums(int k, int col) const { return columns[((k << width.log2) + col) * kThreads]; }

  /// Entries of Jacobian k for this thread's two columns in tile column `col` of the panel.
  RLEKF_DEVICE Pair<double> x_column(int k, int col) const {
    return *reinterpret_cast<const Pair<double>*>(x_columns + k * num_columns() + col * kTile + 2 * lane());
  }

  /// Entry of Jacobian k for row i of this warp's rows.
  RLEKF_DEVICE double x_row(int k, int i) const { return x_rows[k * kRowsPerThread + i]; }
};

/// u_i^T h of each pending vector, in parts of 2^kDotLog2 weights, a warp each.
template <int kM>
RLEKF_PHASE void dot_pending(const Task& task, int num_pending) {
  const Covariance& p = task.p;
  const int items = num_pending * static_cast<int>(num_slots(p.num_weights, p.num_blocks, kDotLog2));
  const int each = (items + num_ctas() * kWarps - 1) / (num_ctas() * kWarps);
  const int first = (cta() * kWarps + warp()) * each, last = first + each < items ? first + each : items;
  for (int item = first; item < last; ++item) {
    const int slot = item / num_pending, i = item % num_pending;
    const int64_t index = block_of_slot(p.blocks, p.num_blocks, slot, kDotLog2);
    const Block block = p.blocks[index];
    const int64_t begin = (slot - first_slot(block, index, kDotLog2)) << kDotLog2;
    const int64_t behind = begin + (1 << kDotLog2), end = behind < block.size ? behind : block.size;
    const double* u = p.pending + i * p.num_weights + block.first_weight;
    double sums[kM] = {};
    constexpr int kEach = (1 << kDotLog2) / 32;
    double entries[kEach];
    RLEKF_UNROLL
    for (int n = 0; n < kEach; ++n) {
      const int64_t w = begin + lane() + 32 * n;
      entries[n] = w < end ? u[w] : 0.0;
    }
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) {
      const double* h = task.m.jacobian + (k < task.m.count ? k : 0) * p.num_weights + block.first_weight;
      RLEKF_UNROLL
      for (int n = 0; n < kEach; ++n) {
        const int64_t w = begin + lane() + 32 * n;
        sums[k] += entries[n] * (w < end ? h[w] : 0.0);
      }
    }
    double* out = task.workspace.dot<kM>(slot, i, p.capacity);
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) {
      const double sum = warp_sum(sums[k]);
      if (lane() == 0) out[k] = sum;
    }
  }
}

/// T <- factor (T - sum_k u_k u_k^T) for this thread's entries, in global and in shared memory. Products commute and the
/// order over k is fixed, so a diagonal tile stays symmetric.
template <typename Scalar, int kM, typename Order>
RLEKF_DEVICE void fold_tile(const Task& task, const Fold& due, const Order& at, bool first_of_segment, double* u_rows,
                            Pair<Scalar>* entries) {
  constexpr int kAtOnce = fold_at_once(kM);
  // Vectors in registers before they are used: one where two would spill.
  constexpr int kAhead = kM == 2 || (kM == 1 && kBeforeHopper) ? 1 : 2;
  const Covariance& p = task.p;
  const Block block = p.blocks[at.block];
  double x[kRowsPerThread], y[kRowsPerThread];
  RLEKF_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    x[i] = entries[i * kRowStride].x;
    y[i] = entries[i * kRowStride].y;
  }
  const int64_t col = at.col * kTile + 2 * lane(), row = at.row * kTile + warp() * kRowsPerThread;
  for (int64_t done = 0; done < due.num_vectors; done += kAtOnce) {
    const int count = static_cast<int>(due.num_vectors - done < kAtOnce ? due.num_vectors - done : kAtOnce);
    const double* u = p.pending + done * p.num_weights + block.first_weight;
    if (first_of_segment || due.num_vectors > kAtOnce) {
      sync_warp();
      RLEKF_NO_UNROLL
      for (int n = lane(); n < kAtOnce * kRowsPerThread; n += 32) {
        const int k = n / kRowsPerThread, i = n % kRowsPerThread;
        u_rows[n] = k < count && row + i < block.size ? u[k * p.num_weights + row + i] : 0.0;
      }
      sync_warp();
    }
    u += col;
    const int in_x = col < block.size ? count : 0, in_y = col + 1 < block.size ? count : 0;
    double ux[kAhead], uy[kAhead];
    RLEKF_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      ux[j] = j < in_x ? u[j * p.num_weights] : 0.0;
      uy[j] = j < in_y ? u[j * p.num_weights + 1] : 0.0;
    }
    RLEKF_NO_UNROLL
    for (int k = 0; k < count; k += kAhead) {  // u_rows are zero beyond `count`
      double next_x[kAhead], next_y[kAhead];   // arrive while the present ones are used
      u += kAhead * p.num_weights;
      RLEKF_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        next_x[j] = k + kAhead + j < in_x ? u[j * p.num_weights] : 0.0;
        next_y[j] = k + kAhead + j < in_y ? u[j * p.num_weights + 1] : 0.0;
      }
      RLEKF_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        RLEKF_UNROLL
        for (int i = 0; i < kRowsPerThread; ++i) {
          const double ui = u_rows[(k + j) * kRowsPerThread + i];
          x[i] -= ui * ux[j];
          y[i] -= ui * uy[j];
        }
      }
      RLEKF_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        ux[j] = next_x[j];
        uy[j] = next_y[j];
      }
    }
  }
  auto* out = static_cast<Scalar*>(p.tiles) + Ring<Scalar>::own_entry(at.tile());
  RLEKF_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    const Pair<Scalar> folded{static_cast<Scalar>(x[i] * due.factor), static_cast<Scalar>(y[i] * due.factor)};
    entries[i * kRowStride] = folded;
    *reinterpret_cast<Pair<Scalar>*>(out + i * kTile) = folded;
  }
}

/// Sums over the 32 lanes of eight numbers each; lane l gets that of number 4 (l / 16) + 2 (l / 8 % 2) + l / 4 % 2.
RLEKF_DEVICE double sum_of_eight(const double (&v)[kRowsPerThread]) {
  static_assert(kRowsPerThread == 8);
  const bool high4 = lane() & 16, high2 = lane() & 8, high1 = lane() & 4;
  double fours[4], twos[2];
  RLEKF_UNROLL
  for (int i = 0; i < 4; ++i) fours[i] = (high4 ? v[i + 4] : v[i]) + shuffle_xor(high4 ? v[i] : v[i + 4], 16);
  RLEKF_UNROLL
  for (int i = 0; i < 2; ++i) {
    twos[i] = (high2 ? fours[i + 2] : fours[i]) + shuffle_xor(high2 ? fours[i] : fours[i + 2], 8);
  }
  double sum = (high1 ? twos[1] : twos[0]) + shuffle_xor(high1 ? twos[0] : twos[1], 4);
  sum += shuffle_xor(sum, 2);
  return sum + shuffle_xor(sum, 1);
}

/// Loads the Jacobians' entries for the columns of a panel and zeroes the column sums.
template <int kM>
RLEKF_DEVICE void begin_panel(const Task& task, const Panel<kM>& shared, int index, int panel) {
  const int num_columns = shared.num_columns();
  sync_threads();
  RLEKF_NO_UNROLL
  for (int n = thread(); n < kM * num_columns; n += kThreads) {
    const int64_t col = static_cast<int64_t>(panel) * num_columns + (n & (num_columns - 1));
    shared.x_columns[n] = jacobian_entry(task, n >> (kTileLog2 + shared.width.log2), task.p.blocks[index], col);
  }
  RLEKF_NO_UNROLL
  for (int n = 0; n < kM * shared.width.columns(); ++n) shared.columns[n * kThreads] = {0.0, 0.0};
  sync_threads();
}

/// Loads the Jacobians' entries for this warp's rows of a segment.
template <int kM>
RLEKF_DEVICE void begin_segment(const Task& task, const Panel<kM>& shared, int index, int row) {
  sync_warp();
  RLEKF_NO_UNROLL
  for (int n = lane(); n < kM * kRowsPerThread; n += 32) {
    const int64_t weight = row * kTile + warp() * kRowsPerThread + n % kRowsPerThread;
    shared.x_rows[n] = jacobian_entry(task, n / kRowsPerThread, task.p.blocks[index], weight);
  }
  sync_warp();
}

/// Multiplies this thread's entries of a tile, in tile column `col` of the panel, by all Jacobians.
template <typename Scalar, int kM>
RLEKF_DEVICE void multiply_tile(const Panel<kM>& shared, const Pair<Scalar>* entries, int col, bool diagonal,
                                double (&rows)[kM][kRowsPerThread]) {
  constexpr int kAtOnce = kM == 1 ? 1 : 2;  // measurements with operands in registers
  RLEKF_UNROLL
  for (int first = 0; first < kM; first += kAtOnce) {
    Pair<double> x[kAtOnce], sums[kAtOnce];
    RLEKF_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      x[k] = shared.x_column(first + k, col);
      sums[k] = shared.column_sums(first + k, col);
    }
    RLEKF_UNROLL
    for (int i = 0; i < kRowsPerThread; ++i) {
      const double a = entries[i * kRowStride].x, b = entries[i * kRowStride].y;
      RLEKF_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const double x_row = shared.x_row(first + k, i);
        rows[first + k][i] += a * x[k].x;
        rows[first + k][i] += b * x[k].y;
        sums[k].x += a * x_row;
        sums[k].y += b * x_row;
      }
    }
    RLEKF_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      if (!diagonal) shared.column_sums(first + k, col) = sums[k];  // a diagonal tile holds both halves
    }
  }
}

/// Writes the row sums of a segment, (kM, kTile).
template <int kM>
RLEKF_DEVICE void write_rows(double* out, const double (&rows)[kM][kRowsPerThread]) {
  RLEKF_UNROLL
  for (int k = 0; k < kM; ++k) {
    const double sum = sum_of_eight(rows[k]);
    if (lane() % 4 == 0) out[k * kTile + warp() * kRowsPerThread + lane() / 4] = sum;
  }
}

/// Adds up the column sums of a panel over the warps, and writes them, (kM, width * kTile).
template <int kM>
RLEKF_DEVICE void write_columns(const Panel<kM>& shared, double* out) {
  sync_threads();
  const auto* all = reinterpret_cast<const double*>(shared.columns - thread());  // (kM, width, kWarps, kTile)
  RLEKF_NO_UNROLL
  for (int n = thread(); n < kM * shared.num_columns(); n += kThreads) {
    double sum = 0;
    RLEKF_UNROLL
    for (int w = 0; w < kWarps; ++w) sum += all[(n / kTile * kWarps + w) * kTile + n % kTile];
    out[n] = sum;
  }
}

/// This thread block's run: each tile is folded if a fold is due, then multiplied by every Jacobian. Returns the fold.
template <typename Scalar, int kM>
RLEKF_PHASE Fold visit(const Task& task) {
  const Covariance& p = task.p;
  const Width width = task.launch.width;
  const VisitShared offsets = visit_shared(kM, width, task.launch.stages, sizeof(Scalar));
  const Panel<kM> shared(width, offsets);
  Walk at = run_of(p.blocks, p.num_blocks, width, task.launch.tiles, cta());
  Ring<Scalar> ring(task, offsets.ring, at);
  load_state(task);  // while the first tiles are in flight
  const Fold due = fold_due(own_state(), task.m.count, p.capacity);
  if (due.num_vectors == 0) dot_pending<kM>(task, static_cast<int>(own_state().num_pending));

  while (at.left > 0) {
    const int index = at.block, panel = at.panel;
    begin_panel(task, shared, index, panel);
    while (at.left > 0 && at.block == index && at.panel == panel) {
      const int row = at.row;
      begin_segment(task, shared, index, row);
      double rows[kM][kRowsPerThread] = {};
      for (bool ends = false, begins = true; !ends; begins = false) {
        Pair<Scalar>* entries = ring.acquire();
        if (due.num_vectors > 0) fold_tile<Scalar, kM>(task, due, at, begins, shared.u_rows, entries);
        const Scalar* from = ring.next_tile();
        multiply_tile(shared, entries, at.col - (panel << width.log2), at.col == row, rows);
        ring.prefetch(entries, from);
        ends = at.ends_segment(width);
        at.advance(width);
      }
      write_rows<kM>(task.workspace.row_sum<kM>(row_slot(p.blocks[index], index, width, row, panel)), rows);
    }
    write_columns(shared,
                  task.workspace.column_sum<kM>(column_slot(p.blocks[index], index, width, panel, cta()), width));
  }
  return due;
}

}  // namespace rlekf::cuda
