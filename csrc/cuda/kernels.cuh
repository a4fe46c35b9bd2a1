// The filter step on a GPU: one cooperative launch for all blocks.
//
//     visit      each cta reads its run of tiles once: z_i += T x_j, z_j += T^T x_i; a fold also writes them
//     -- grid barrier --
//     reduce     adds the parts of z in a fixed order, subtracts the pending vectors; inner products with H
//     -- grid barrier --
//     plan       the first cta adds these up and runs the recursion over the M measurements on scalars
//     -- grid barrier --
//     apply      weights and new pending vectors
//
// `project` is the first two and the sums of the third; `correct` is the recursion and the last. A step in float64
// reads 4 n (n + 1) bytes and does 2 n (n + 1) floating-point operations; a GPU that reads 4.4 TB/s has time for 13
// times as many. So all that counts is to keep reads in flight. Each thread copies the entries that it will use itself,
// tiles ahead, into shared memory of its own: no barrier separates the arrival of a tile from its use.
//
// A thread holds 8 rows x 2 columns of a tile: warp w has rows 8 w ... 8 w + 7, lane l columns 2 l and 2 l + 1. Row
// sums stay in registers along a segment; column sums stay in shared memory, each thread its own, down a panel. See
// walk.h.

#pragma once

#include "../step.h"
#include "launch.h"

namespace rlekf::cuda {

constexpr int kProject = 1, kCorrect = 2;

/// All that a launch is told.
struct Task {
  int phases;  // kProject, kCorrect or both
  Covariance p;
  Measurements m;
  Projection projection;
  double* weights;
  double* workspace;
  Launch launch;
  Workspace slots;
};

template <typename Scalar>
struct alignas(2 * sizeof(Scalar)) Pair {
  Scalar x, y;
};

RLEKF_DEVICE int lane() { return thread() % 32; }
RLEKF_DEVICE int warp() { return thread() / 32; }

template <typename T>
RLEKF_DEVICE T* shared_at(int64_t offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

/// The cta's own copy of the filter's scalars: it holds while the first cta changes those in memory.
RLEKF_DEVICE State& own_state() { return *shared_at<State>(0); }

RLEKF_DEVICE void copy_state(const State& from, State& to) {
  const auto* in = reinterpret_cast<const double*>(&from);
  auto* out = reinterpret_cast<double*>(&to);
  for (int n = thread(); n < kNumState; n += kThreads) out[n] = in[n];
}

RLEKF_DEVICE void load_state(const Task& task) {
  copy_state(*task.p.state, own_state());
  sync_threads();
}

RLEKF_DEVICE double warp_sum(double value) {
  RLEKF_UNROLL
  for (int mask = 16; mask >= 1; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

/// The tiles of a run on their way from memory, `stages` of them at a time.
template <typename Scalar>
struct Ring {
  const Scalar* tiles;
  Pair<Scalar>* slots;  // this thread's first
  Width width;
  int stages, next;
  Walk ahead;  // the tile to ask for next

  RLEKF_DEVICE Ring(const Task& task, int64_t offset, const Walk& run)
      : tiles(static_cast<const Scalar*>(task.p.tiles)),
        slots(shared_at<Pair<Scalar>>(offset) + thread()),
        width(task.launch.width),
        stages(task.launch.stages),
        next(0),
        ahead(run) {
    for (int stage = 0; stage < stages; ++stage) {
      const Scalar* from = prefetch();
      RLEKF_UNROLL
      for (int i = 0; i < kRowsPerThread; ++i) {
        if (from) copy_async<sizeof(Pair<Scalar>)>(slots + (stage * kRowsPerThread + i) * kThreads, from + i * kTile);
      }
      copy_commit();  // also an empty group: the wait counts groups
    }
  }

  RLEKF_DEVICE static int64_t own_entry(int64_t tile, int row) {
    return tile * kTileSize + (warp() * kRowsPerThread + row) * kTile + 2 * lane();
  }

  /// Where this thread's entries of the tile to ask for next stand; null when the run has no more.
  RLEKF_DEVICE const Scalar* prefetch() {
    if (ahead.left == 0) return nullptr;
    const Scalar* from = tiles + own_entry(ahead.tile(), 0);
    ahead.advance(width);
    return from;
  }

  /// This thread's first entry of the tile at hand, once it is there; the next is kThreads pairs on.
  RLEKF_DEVICE Pair<Scalar>* acquire() {
    copy_wait(stages);
    Pair<Scalar>* slot = slots + next * kRowsPerThread * kThreads;
    next = next + 1 == stages ? 0 : next + 1;
    return slot;
  }
};

/// Entry `weight` of a block in Jacobian k; zero beyond the block's end and for a k that only rounds the number up.
RLEKF_DEVICE double jacobian_entry(const Task& task, int k, const Block& block, int64_t weight) {
  if (k >= task.m.count || weight >= block.size) return 0.0;
  return task.m.jacobian[k * task.p.num_weights + block.first_weight + weight];
}

/// u_i^T h of each vector that waits, in parts of 2^kDotLog2 weights, a warp each.
template <int kM>
RLEKF_PHASE void dot_pending(const Task& task, int num_pending) {
  const Covariance& p = task.p;
  const int items = num_pending * static_cast<int>(num_slots(p.num_weights, p.num_blocks, kDotLog2));
  for (int item = cta() * kWarps + warp(); item < items; item += num_ctas() * kWarps) {
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
    double* out = task.workspace + task.slots.dots + (slot * p.capacity + i) * kM;
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) {
      const double sum = warp_sum(sums[k]);
      if (lane() == 0) out[k] = sum;
    }
  }
}

/// T <- factor (T - sum_k u_k u_k^T) for this thread's entries, in memory and where they stand in shared memory.
/// Products commute and the order over k is fixed: a diagonal tile stays symmetric.
template <typename Scalar>
RLEKF_DEVICE void fold_tile(const Task& task, const Fold& due, const Walk& at, bool first_of_segment, double* u_rows,
                            Pair<Scalar>* entries) {
  const Covariance& p = task.p;
  const Block block = p.blocks[at.block];
  double x[kRowsPerThread], y[kRowsPerThread];
  RLEKF_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    x[i] = entries[i * kThreads].x;
    y[i] = entries[i * kThreads].y;
  }
  const int64_t col = at.col * kTile + 2 * lane(), row = at.row * kTile + warp() * kRowsPerThread;
  for (int64_t done = 0; done < due.num_vectors; done += kFoldAtOnce) {
    const int count = static_cast<int>(due.num_vectors - done < kFoldAtOnce ? due.num_vectors - done : kFoldAtOnce);
    const double* u = p.pending + done * p.num_weights + block.first_weight;
    if (first_of_segment || due.num_vectors > kFoldAtOnce) {
      sync_warp();
      RLEKF_NO_UNROLL
      for (int n = lane(); n < kFoldAtOnce * kRowsPerThread; n += 32) {
        const int k = n / kRowsPerThread, i = n % kRowsPerThread;
        u_rows[n] = k < count && row + i < block.size ? u[k * p.num_weights + row + i] : 0.0;
      }
      sync_warp();
    }
    u += col;
    double ux = col < block.size ? u[0] : 0.0, uy = col + 1 < block.size ? u[1] : 0.0;
    RLEKF_NO_UNROLL
    for (int k = 0; k < count; ++k) {
      const double now_x = ux, now_y = uy;
      u += k + 1 < count ? p.num_weights : 0;  // the next vector's entries come while these are used
      if (col < block.size) ux = u[0];
      if (col + 1 < block.size) uy = u[1];
      RLEKF_UNROLL
      for (int i = 0; i < kRowsPerThread; ++i) {
        const double ui = u_rows[k * kRowsPerThread + i];
        x[i] -= ui * now_x;
        y[i] -= ui * now_y;
      }
    }
  }
  auto* out = static_cast<Scalar*>(p.tiles) + Ring<Scalar>::own_entry(at.tile(), 0);
  RLEKF_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    const Pair<Scalar> folded{static_cast<Scalar>(x[i] * due.factor), static_cast<Scalar>(y[i] * due.factor)};
    entries[i * kThreads] = folded;
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

/// This cta's run: each tile is folded if due, then multiplied by every Jacobian. Returns the fold.
template <typename Scalar, int kM>
RLEKF_PHASE Fold visit(const Task& task) {
  constexpr int kAtOnce = kM == 1 ? 1 : 2;  // measurements whose operands are in registers
  const Covariance& p = task.p;
  const Width width = task.launch.width;
  const Shared at_shared = shared_layout(kM, width.columns(), task.launch.stages, sizeof(Scalar));
  auto* columns = shared_at<Pair<double>>(at_shared.columns) + thread();  // (kM, width, kThreads), this thread's own
  auto* x_columns = shared_at<double>(at_shared.x_columns);               // (kM, width * kTile)
  auto* x_rows = shared_at<double>(at_shared.x_rows) + warp() * kM * kRowsPerThread;
  auto* u_rows = shared_at<double>(at_shared.u_rows) + warp() * kFoldAtOnce * kRowsPerThread;

  Walk at = run_of(p.blocks, p.num_blocks, width, task.launch.tiles, cta());
  Ring<Scalar> ring(task, at_shared.ring, at);
  load_state(task);  // while the first tiles are on their way
  const Fold due = fold_due(own_state(), task.m.count, p.capacity);
  if (due.num_vectors == 0) dot_pending<kM>(task, static_cast<int>(own_state().num_pending));

  while (at.left > 0) {
    // --- a panel: the Jacobians' entries for its columns, and sums that start at zero
    const int index = at.block, panel = at.panel;
    const int panel_columns = static_cast<int>(kTile) << width.log2;
    sync_threads();
    RLEKF_NO_UNROLL
    for (int n = thread(); n < kM * panel_columns; n += kThreads) {
      const int64_t col = static_cast<int64_t>(panel) * panel_columns + (n & (panel_columns - 1));
      x_columns[n] = jacobian_entry(task, n >> (kTileLog2 + width.log2), p.blocks[index], col);
    }
    RLEKF_NO_UNROLL
    for (int n = 0; n < kM * width.columns(); ++n) columns[n * kThreads] = {0.0, 0.0};
    sync_threads();

    while (at.left > 0 && at.block == index && at.panel == panel) {
      // --- a segment: the tiles of one row
      const int row = at.row;
      sync_warp();
      RLEKF_NO_UNROLL
      for (int n = lane(); n < kM * kRowsPerThread; n += 32) {
        const int64_t weight = row * kTile + warp() * kRowsPerThread + n % kRowsPerThread;
        x_rows[n] = jacobian_entry(task, n / kRowsPerThread, p.blocks[index], weight);
      }
      sync_warp();
      double rows[kM][kRowsPerThread] = {};
      for (bool ends = false, begins = true; !ends; begins = false) {
        Pair<Scalar>* entries = ring.acquire();
        if (due.num_vectors > 0) fold_tile(task, due, at, begins, u_rows, entries);
        const Scalar* from = ring.prefetch();
        const int col = at.col - (panel << width.log2);
        RLEKF_UNROLL
        for (int first = 0; first < kM; first += kAtOnce) {
          Pair<double> x[kAtOnce], sums[kAtOnce];
          RLEKF_UNROLL
          for (int k = 0; k < kAtOnce; ++k) {
            x[k] = *reinterpret_cast<const Pair<double>*>(x_columns + (first + k) * panel_columns + col * kTile +
                                                          2 * lane());
            sums[k] = columns[(((first + k) << width.log2) + col) * kThreads];
          }
          RLEKF_UNROLL
          for (int i = 0; i < kRowsPerThread; ++i) {
            const double a = entries[i * kThreads].x, b = entries[i * kThreads].y;
            RLEKF_UNROLL
            for (int k = 0; k < kAtOnce; ++k) {
              const double x_row = x_rows[(first + k) * kRowsPerThread + i];
              rows[first + k][i] += a * x[k].x;
              rows[first + k][i] += b * x[k].y;
              sums[k].x += a * x_row;
              sums[k].y += b * x_row;
            }
          }
          RLEKF_UNROLL
          for (int k = 0; k < kAtOnce; ++k) {
            // A diagonal tile holds both halves.
            if (at.col != row) columns[(((first + k) << width.log2) + col) * kThreads] = sums[k];
          }
        }
        RLEKF_UNROLL
        for (int i = 0; i < kRowsPerThread; ++i) {
          if (from) copy_async<sizeof(Pair<Scalar>)>(entries + i * kThreads, from + i * kTile);
        }
        copy_commit();
        ends = at.ends_segment(width);
        at.advance(width);
      }
      double* out =
          task.workspace + task.slots.row_sums + row_slot(p.blocks[index], index, width, row, panel) * kM * kTile;
      RLEKF_UNROLL
      for (int k = 0; k < kM; ++k) {
        const double sum = sum_of_eight(rows[k]);
        if (lane() % 4 == 0) out[k * kTile + warp() * kRowsPerThread + lane() / 4] = sum;
      }
    }

    // --- the panel's column sums over the warps
    sync_threads();
    const auto* all = shared_at<double>(at_shared.columns);  // (kM, width, kWarps, kTile)
    double* out = task.workspace + task.slots.column_sums +
                  column_slot(p.blocks[index], index, width, panel, cta()) * kM * panel_columns;
    RLEKF_NO_UNROLL
    for (int n = thread(); n < kM * panel_columns; n += kThreads) {
      double sum = 0;
      RLEKF_UNROLL
      for (int w = 0; w < kWarps; ++w) sum += all[(n / kTile * kWarps + w) * kTile + n % kTile];
      out[n] = sum;
    }
  }
  return due;
}

/// The rows of tiles that this cta reduces and applies: slots [first, last) of kTile weights.
struct Rows {
  int first, last;
};

RLEKF_DEVICE Rows own_rows(const Task& task) {
  const Runs& rows = task.launch.rows;
  if (cta() >= rows.ctas) return {0, 0};
  return {rows.begin(cta()), rows.begin(cta() + 1)};
}

/// z = S h + shift h - sum_i u_i (u_i^T h), row of tiles by row of tiles, and its inner products with H.
template <int kM>
RLEKF_PHASE void reduce(const Task& task) {
  const Covariance& p = task.p;
  const int count = task.m.count;
  const Width width = task.launch.width;
  const int64_t num_weights = p.num_weights;
  const auto num_pending = static_cast<int64_t>(own_state().num_pending);
  const double shift = own_state().shift;
  // Shared memory: what visit() kept there is done with.
  constexpr int kGroups = kThreads / kTile;
  auto* parts = shared_at<double>(shared_layout(kM, 0, 0, 8).columns);  // (kM, kGroups, kTile)
  double* z = parts + kM * kGroups * kTile;                             // (kM, kTile)
  double* h = z + kM * kTile;                                           // (kM, kTile)
  double* dots = h + kM * kTile;                                        // (kFoldAtOnce, kM)
  double* gram = dots + kFoldAtOnce * kM;                               // (2, kM, kM)
  const int column = thread() % kTile, group = thread() / kTile;

  const Rows own = own_rows(task);
  int64_t index = -1;  // the block that `gram` and `dots` belong to
  const auto leave_block = [&] {
    sync_threads();
    double* out = task.workspace + task.slots.gram_parts + (cta() + index) * 2 * kM * kM;
    for (int n = thread(); n < 2 * kM * kM; n += kThreads) out[n] = gram[n];
  };
  for (int slot = own.first; slot < own.last; ++slot) {
    const int64_t found = block_of_slot(p.blocks, p.num_blocks, slot, kTileLog2);
    const Block block = p.blocks[found];
    const int64_t row = slot - first_slot(block, found, kTileLog2);
    if (row >= tile_rows(block.size)) continue;  // a gap
    const bool enters = found != index;
    if (enters) {
      if (index >= 0) leave_block();
      index = found;
      for (int n = thread(); n < 2 * kM * kM; n += kThreads) gram[n] = 0;  // what this thread itself has just read
    }

    // --- four threads a weight add up the parts
    const int64_t weight = row * kTile + column, panel = row >> width.log2;
    const bool inside = weight < block.size;
    double sums[kM] = {};
    const double* from = task.workspace + task.slots.row_sums + row_slot(block, index, width, row, 0) * kM * kTile;
    const int panels = (static_cast<int>(panel) - group + kGroups) / kGroups;  // of this thread
    from += group * kM * kTile + column;
    RLEKF_UNROLL_BY_4
    for (int n = 0; n < panels; ++n) {
      RLEKF_UNROLL
      for (int k = 0; k < kM; ++k) sums[k] += from[(n * kGroups * kM + k) * kTile];
    }
    const CtaRange ctas = ctas_of_panel(block, width, task.launch.tiles, panel);
    from = task.workspace + task.slots.column_sums + (row - (panel << width.log2)) * kTile;
    const int parts_here = (ctas.last - ctas.first - group + kGroups) / kGroups;
    from += (column_slot(block, index, width, panel, ctas.first + group) * kM << width.log2) * kTile + column;
    RLEKF_UNROLL_BY_4
    for (int n = 0; n < parts_here; ++n) {
      RLEKF_UNROLL
      for (int k = 0; k < kM; ++k) sums[k] += from[((n * kGroups * kM + k) << width.log2) * kTile];
    }
    for (int64_t first = 0; first < num_pending; first += kFoldAtOnce) {
      const int now = static_cast<int>(num_pending - first < kFoldAtOnce ? num_pending - first : kFoldAtOnce);
      if (enters || num_pending > kFoldAtOnce) {
        sync_threads();
        const int64_t begin = first_slot(block, index, kDotLog2);
        const int64_t end = begin + ((block.size + (1 << kDotLog2) - 1) >> kDotLog2);
        for (int n = thread(); n < now * kM; n += kThreads) {
          double sum = 0;
          for (int64_t q = begin; q < end; ++q) {
            sum += task.workspace[task.slots.dots + (q * p.capacity + first) * kM + n];
          }
          dots[n] = sum;
        }
        sync_threads();
      }
      const double* u = p.pending + first * num_weights + block.first_weight + weight;
      double entries[kFoldAtOnce / kGroups];
      RLEKF_UNROLL
      for (int n = 0; n < kFoldAtOnce / kGroups; ++n) {
        const int i = group + n * kGroups;
        entries[n] = inside && i < now ? u[i * num_weights] : 0.0;
      }
      RLEKF_UNROLL
      for (int n = 0; n < kFoldAtOnce / kGroups; ++n) {
        const int i = group + n * kGroups;
        RLEKF_UNROLL
        for (int k = 0; k < kM; ++k) sums[k] -= entries[n] * (i < now ? dots[i * kM + k] : 0.0);
      }
    }
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) parts[(k * kGroups + group) * kTile + column] = sums[k];
    sync_threads();
    for (int n = thread(); n < kM * kTile; n += kThreads) {
      const int k = n / kTile, c = n % kTile;
      const bool real = k < count && row * kTile + c < block.size;
      const int64_t at = k * num_weights + block.first_weight + row * kTile + c;
      double sum = 0;
      RLEKF_UNROLL
      for (int g = 0; g < kGroups; ++g) sum += parts[(k * kGroups + g) * kTile + c];
      h[n] = real ? task.m.jacobian[at] : 0.0;
      z[n] = real ? sum + shift * h[n] : 0.0;
      if (real) task.projection.cross[at] = z[n];
    }
    sync_threads();

    // --- inner products, a warp each: first h_j^T z_k, then h_j^T h_k
    for (int n = warp(); n < 2 * kM * kM; n += kWarps) {
      const int j = n / kM % kM, k = n % kM;
      const double* other = (n < kM * kM ? z : h) + k * kTile;
      const double sum =
          warp_sum(h[j * kTile + lane()] * other[lane()] + h[j * kTile + 32 + lane()] * other[32 + lane()]);
      if (lane() == 0) gram[n] += sum;
    }
  }
  if (index >= 0) leave_block();
}

/// By the first cta: the inner products over the rows of each block.
template <int kM>
RLEKF_PHASE void gather_gram(const Task& task) {
  const Covariance& p = task.p;
  const int count = task.m.count, num_blocks = static_cast<int>(p.num_blocks);
  const Runs& rows = task.launch.rows;
  const int sums = 2 * num_blocks * count * count;
  int together = 32;  // threads that share a sum
  while (together > 1 && sums * together > kThreads) together /= 2;
  for (int first = 0; first < sums; first += kThreads / together) {
    const int n = first + thread() / together;
    double sum = 0;
    if (n < sums) {
      const int which = n / (num_blocks * count * count), index = n / (count * count) % num_blocks;
      const int j = n / count % count, k = n % count;
      const Block block = p.blocks[index];
      const auto begin = static_cast<int>(first_slot(block, index, kTileLog2));
      const int last = rows.owner(begin + static_cast<int>(tile_rows(block.size)) - 1);
      const double* from = task.workspace + task.slots.gram_parts + (which * kM + j) * kM + k;
      const int part = rows.owner(begin) + thread() % together, parts = (last - part + together) / together;
      from += static_cast<int64_t>(part + index) * 2 * kM * kM;
      RLEKF_UNROLL_BY_4
      for (int w = 0; w < parts; ++w) sum += from[static_cast<int64_t>(w) * together * 2 * kM * kM];
    }
    for (int mask = 1; mask < together; mask *= 2) sum += shuffle_xor(sum, mask);
    if (n < sums && thread() % together == 0) task.projection.gram[n] = sum;
  }
}

/// By the first cta: the recursion over the M measurements, on inner products alone.
/// y_i^T h_j = z_i^T h_j + (shift_i - shift_0) h_i^T h_j - sum_{k<i} rank_one_k (y_k^T h_i) (y_k^T h_j), block by
/// block.
template <int kM>
RLEKF_PHASE void run_recursion(const Task& task) {
  const Covariance& p = task.p;
  const int count = task.m.count;
  const double* inner = task.projection.gram;
  const double* plain = inner + p.num_blocks * count * count;
  double* products = task.workspace + task.slots.products;
  auto* updates = reinterpret_cast<Update*>(task.workspace + task.slots.updates);
  State& state = own_state();
  auto* totals = shared_at<double>(shared_layout(kM, 0, 0, 8).columns);  // (kM, kM) y_i^T h_j over all blocks
  double* parts = totals + kM * kM;                                      // (kWarps, kM)

  sync_threads();
  const double first_shift = state.shift;
  for (int i = 0; i < count; ++i) {
    const double shift_growth = state.shift - first_shift;
    double sums[kM] = {};
    for (int64_t index = thread(); index < p.num_blocks; index += kThreads) {
      double* y = products + index * kM * kM;
      RLEKF_UNROLL
      for (int j = 0; j < kM; ++j) {
        if (j < i || j >= count) continue;
        double value = inner[(index * count + i) * count + j];
        if (shift_growth != 0) value += shift_growth * plain[(index * count + i) * count + j];
        for (int k = 0; k < i; ++k) {
          if (updates[k].used != 0) value -= updates[k].rank_one * y[k * kM + i] * y[k * kM + j];
        }
        y[i * kM + j] = value;
        sums[j] += value;
      }
    }
    RLEKF_UNROLL
    for (int j = 0; j < kM; ++j) {
      const double sum = warp_sum(sums[j]);
      if (lane() == 0) parts[warp() * kM + j] = sum;
    }
    sync_threads();
    if (thread() == 0) {
      for (int j = i; j < count; ++j) {
        double sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += parts[w * kM + j];
        totals[i * kM + j] = sum;
      }
      double left = task.m.innovation[i];
      for (int k = 0; k < i; ++k) {
        if (updates[k].used != 0) left -= updates[k].gain * totals[k * kM + i];
      }
      updates[i] = take_measurement(state, first_shift, totals[i * kM + i], task.m.innovation[i], left);
    }
    sync_threads();
  }
}

/// y_j = z_j + (shift_j - shift_0) h_j - sum_{k<j} rank_one_k (y_k^T h_j) y_k; w += gain_j y_j; u_j = sqrt(rank_one_j)
/// y_j. A thread has one weight at a time.
template <int kM>
RLEKF_PHASE void apply(const Task& task) {
  const Covariance& p = task.p;
  const auto* updates = reinterpret_cast<const Update*>(task.workspace + task.slots.updates);
  const Rows own = own_rows(task);
  for (int64_t n = own.first * kTile + thread(); n < own.last * kTile; n += kThreads) {
    const int64_t index = block_of_slot(p.blocks, p.num_blocks, n / kTile, kTileLog2);
    const Block block = p.blocks[index];
    const int64_t local = n - first_slot(block, index, kTileLog2) * kTile;
    if (local >= block.size) continue;
    const int64_t weight = block.first_weight + local;
    const double* products = task.workspace + task.slots.products + index * kM * kM;
    double y[kM], moved = 0;
    RLEKF_UNROLL
    for (int j = 0; j < kM; ++j) {
      y[j] = 0;
      if (j >= task.m.count) continue;
      const Update update = updates[j];
      if (update.used == 0) continue;
      y[j] = task.projection.cross[j * p.num_weights + weight];
      if (update.shift_growth != 0) y[j] += update.shift_growth * task.m.jacobian[j * p.num_weights + weight];
      RLEKF_UNROLL
      for (int k = 0; k < kM; ++k) {
        if (k < j && updates[k].used != 0) y[j] -= updates[k].rank_one * products[k * kM + j] * y[k];
      }
      moved += update.gain * y[j];
      p.pending[static_cast<int64_t>(update.slot) * p.num_weights + weight] = sqrt(update.rank_one) * y[j];
    }
    task.weights[weight] += moved;
  }
}

template <typename Scalar, int kM>
RLEKF_DEVICE void filter_step(const Task& task) {
  if (task.phases & kProject) {
    const Fold due = visit<Scalar, kM>(task);
    sync_threads();
    if (thread() == 0) note_fold(own_state(), due);
    sync_grid();
    reduce<kM>(task);
    sync_grid();
    if (cta() == 0) gather_gram<kM>(task);
  } else if (cta() == 0) {
    load_state(task);
  }
  if (cta() == 0) {
    if (task.phases & kCorrect) run_recursion<kM>(task);
    copy_state(own_state(), *task.p.state);
  }
  if (task.phases & kCorrect) {
    sync_grid();
    apply<kM>(task);
  }
}

}  // namespace rlekf::cuda
