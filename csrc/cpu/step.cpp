// The filter step on a CPU.
//
// Ideas, in order:
//   1. A step reads the packed triangle once. Each tile contributes to both halves of the product:
//      y_i += T x_j and y_j += T^T x_i.
//   2. The tiles of all blocks form one list, cut into equal contiguous runs, one per worker. Each worker adds into a
//      buffer of its own; a second phase adds up the buffers in a fixed order. So the bits are the same on every run
//      with the same number of workers.
//   3. Pending vectors are folded into a tile in the visit that reads it: S is written once every `capacity` steps.
//   4. Several measurements: the tile is multiplied by each while it is in the first-level cache.
//   5. Vector arithmetic uses the compiler's vector types and is compiled for several instruction sets; the loader
//      picks one.
//
// Traffic of a step: the triangle, 4 n(n+1) bytes in float64, is read once (and written once by a fold); the vectors
// are O(N). The limit is the machine's read bandwidth.

#include "../step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../recursion.h"
#include "lanes.h"

namespace rlekf::cpu {
namespace {

constexpr int kChunks = kTile / kLanes;
constexpr int kRowsAhead = 3;    // how far ahead rows are prefetched: docs/performance.md has the trials
constexpr int kFoldAtOnce = 32;  // pending vectors whose segments stay in the first-level cache during a fold

/// The kTile entries of a vector that belong to one row or column of tiles.
struct alignas(64) Segment {
  Lanes lanes[kChunks];
  double& operator[](int64_t i) { return reinterpret_cast<double*>(lanes)[i]; }
};

/// The sums of eight vectors, as one vector.
RLEKF_INLINE Lanes sums(const Lanes (&v)[kLanes]) {
  using Picks = int64_t __attribute__((vector_size(kLanes * sizeof(int64_t))));
  Lanes pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], Picks{0, 8, 2, 10, 4, 12, 6, 14}) +
               __builtin_shuffle(v[2 * i], v[2 * i + 1], Picks{1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int i = 0; i < 2; ++i) {
    fours[i] = __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], Picks{0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], Picks{2, 3, 10, 11, 6, 7, 14, 15});
  }
  return __builtin_shuffle(fours[0], fours[1], Picks{0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(fours[0], fours[1], Picks{4, 5, 6, 7, 12, 13, 14, 15});
}

/// y_i += T x_j and, off the diagonal, y_j += T^T x_i. The tile is read once, front to back. The first product of a
/// visit prefetches a few rows ahead: the hardware's own prefetcher stops at the end of every small page.
template <bool kFirst, typename Scalar>
RLEKF_INLINE void multiply(const Scalar* tile, Segment& xi, const Segment& xj, Segment& yi, Segment& yj) {
  constexpr int kLine = 64 / sizeof(Scalar);
  Lanes column[kChunks];
  for (int c = 0; c < kChunks; ++c) column[c] = yj.lanes[c];
  for (int group = 0; group < kChunks; ++group) {
    Lanes rows[kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < kLanes; ++r, tile += kTile) {
      const Lanes weight = xi[group * kLanes + r] - Lanes{};
      if (kFirst) {
        for (int line = 0; line < kTile; line += kLine) __builtin_prefetch(tile + kRowsAhead * kTile + line);
      }
      Lanes entries;
      load(tile, entries);
      rows[r] = entries * xj.lanes[0];
      column[0] += entries * weight;
#pragma GCC unroll 8
      for (int c = 1; c < kChunks; ++c) {
        load(tile + c * kLanes, entries);
        rows[r] += entries * xj.lanes[c];
        column[c] += entries * weight;
      }
    }
    yi.lanes[group] += sums(rows);
  }
  for (int c = 0; c < kChunks; ++c) yj.lanes[c] = column[c];
}

RLEKF_INLINE void widen(const double*, double*) {}

RLEKF_INLINE void widen(const float* tile, double* wide) {
  for (int64_t i = 0; i < kTileSize; i += kLanes) {
    Lanes entries;
    load(tile + i, entries);
    store(wide + i, entries);
  }
}

/// T <- factor (T - sum_k u_k[i] u_k[j]^T). Products commute and the order over k is fixed, so a diagonal tile stays
/// symmetric. Taking two rows at once halves the loads of u_k. The arithmetic hides the latency of the next tile, which
/// is prefetched here.
template <typename Scalar>
RLEKF_INLINE void fold(Scalar* tile, Segment* ui, const Segment* uj, int count, double factor) {
  constexpr int kLine = 64 / sizeof(Scalar);
  for (int row = 0; row < kTile; row += 2, tile += 2 * kTile) {
    for (int line = 0; line < 2 * kTile; line += kLine) __builtin_prefetch(tile + kTileSize + line);
    Lanes first[kChunks], second[kChunks];
    for (int c = 0; c < kChunks; ++c) {
      load(tile + c * kLanes, first[c]);
      load(tile + kTile + c * kLanes, second[c]);
    }
    for (int k = 0; k < count; ++k) {
      const Lanes a = ui[k][row] - Lanes{}, b = ui[k][row + 1] - Lanes{};
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) {
        first[c] -= a * uj[k].lanes[c];
        second[c] -= b * uj[k].lanes[c];
      }
    }
    for (int c = 0; c < kChunks; ++c) {
      store(tile + c * kLanes, first[c] * factor);
      store(tile + kTile + c * kLanes, second[c] * factor);
    }
  }
}

RLEKF_INLINE void load_segment(const double* from, int64_t count, Segment& to) {
  to = Segment{};
  std::memcpy(to.lanes, from, static_cast<size_t>(count) * sizeof(double));
}

RLEKF_INLINE void add_segment(Segment& from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

/// A worker's contiguous run of tiles [begin, end), and the weights [lo, hi) that it adds to.
struct Run {
  int64_t begin, end;
  int64_t lo, hi;
  double* sums;  // (M, hi - lo)
};

const Block* block_of_tile(const Covariance& p, int64_t tile) {
  const auto* after = std::upper_bound(p.blocks, p.blocks + p.num_blocks, tile,
                                       [](int64_t t, const Block& block) { return t < block.first_tile; });
  return after - 1;
}

int64_t weight_of_tile_row(const Block& block, int64_t row) {
  return block.first_weight + std::min(block.size, row * kTile);
}

std::vector<Run> plan_runs(const Covariance& p, int num_measurements, int64_t num_workers, double* scratch) {
  std::vector<Run> runs;
  for (int64_t worker = 0; worker < num_workers; ++worker) {
    Run run{p.num_tiles * worker / num_workers, p.num_tiles * (worker + 1) / num_workers, 0, 0, scratch};
    if (run.begin == run.end) continue;
    const Block* last = block_of_tile(p, run.end - 1);
    run.lo = block_of_tile(p, run.begin)->first_weight;
    run.hi = weight_of_tile_row(*last, tile_row(run.end - 1 - last->first_tile) + 1);
    scratch += num_measurements * (run.hi - run.lo);
    runs.push_back(run);
  }
  return runs;
}

/// One worker's run: each tile is folded if a fold is due, then multiplied by every Jacobian.
template <typename Scalar>
RLEKF_INLINE void visit_tiles(const Covariance& p, const Measurements& m, const Fold& due, const Run& run) {
  std::fill(run.sums, run.sums + m.count * (run.hi - run.lo), 0.0);
  auto* tile = static_cast<Scalar*>(p.tiles) + run.begin * kTileSize;
  Segment xi[kMaxMeasurements], xj[kMaxMeasurements], yi[kMaxMeasurements], yj[kMaxMeasurements];
  Segment ui[kFoldAtOnce], uj[kFoldAtOnce];
  constexpr bool kWiden = !std::is_same_v<Scalar, double>;  // several products convert a tile only once
  alignas(64) double wide[kWiden ? kTileSize : 1];

  const Block* block = block_of_tile(p, run.begin);
  int64_t row = tile_row(run.begin - block->first_tile);
  int64_t col = run.begin - block->first_tile - tile_index(row, 0);
  for (int64_t t = run.begin; t < run.end;) {
    const int64_t first = block->first_weight + row * kTile;
    const int64_t height = std::min(kTile, block->size - row * kTile);
    for (int k = 0; k < m.count; ++k) {
      load_segment(m.jacobian + k * p.num_weights + first, height, xi[k]);
      yi[k] = Segment{};
    }
    for (; col <= row && t < run.end; ++col, ++t, tile += kTileSize) {
      const int64_t other = block->first_weight + col * kTile;
      const int64_t width = col == row ? height : kTile;
      for (int64_t done = 0; done < due.num_vectors; done += kFoldAtOnce) {
        const int count = static_cast<int>(std::min<int64_t>(kFoldAtOnce, due.num_vectors - done));
        for (int k = 0; k < count; ++k) {
          const double* u = p.pending + (done + k) * p.num_weights;
          load_segment(u + first, height, ui[k]);
          load_segment(u + other, width, uj[k]);
        }
        fold(tile, ui, uj, count, done + count == due.num_vectors ? due.factor : 1.0);
      }
      if (kWiden && m.count > 1) widen(tile, wide);
      for (int k = 0; k < m.count; ++k) {
        load_segment(m.jacobian + k * p.num_weights + other, width, xj[k]);
        yj[k] = Segment{};
        if (kWiden && m.count > 1) multiply<false>(wide, xi[k], xj[k], yi[k], yj[k]);
        else if (k == 0) multiply<true>(tile, xi[k], xj[k], yi[k], yj[k]);
        else multiply<false>(tile, xi[k], xj[k], yi[k], yj[k]);
        if (col < row) add_segment(yj[k], width, run.sums + k * (run.hi - run.lo) + other - run.lo);
      }
    }
    for (int k = 0; k < m.count; ++k) {
      add_segment(yi[k], height, run.sums + k * (run.hi - run.lo) + first - run.lo);
    }
    if (col > row) {
      col = 0;
      if (++row == tile_rows(block->size)) {
        row = 0;
        ++block;
      }
    }
  }
}

RLEKF_EVERY_ISA void visit_tiles_float64(const Covariance& p, const Measurements& m, const Fold& due, const Run& run) {
  visit_tiles<double>(p, m, due, run);
}

RLEKF_EVERY_ISA void visit_tiles_float32(const Covariance& p, const Measurements& m, const Fold& due, const Run& run) {
  visit_tiles<float>(p, m, due, run);
}

void visit_runs(const Covariance& p, const Measurements& m, const Fold& due, const std::vector<Run>& runs,
                const Parallel& parallel) {
  const auto visit = p.storage == Storage::kFloat64 ? visit_tiles_float64 : visit_tiles_float32;
  parallel.run(static_cast<int64_t>(runs.size()), [&](int64_t i) { visit(p, m, due, runs[static_cast<size_t>(i)]); });
}

RLEKF_INLINE double dot(const double* a, const double* b, int64_t count) {
  Lanes sums{}, x, y;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    load(a + i, x);
    load(b + i, y);
    sums += x * y;
  }
  double rest = 0;
  for (; i < count; ++i) rest += a[i] * b[i];
  return sum(sums) + rest;
}

RLEKF_INLINE void add(double factor, const double* x, double* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

/// z = S h of one block: the workers' sums, in order.
RLEKF_EVERY_ISA void add_runs(const Covariance& p, const Measurements& m, double* cross, const std::vector<Run>& runs,
                              int64_t index) {
  const Block& block = p.blocks[index];
  const int64_t begin = block.first_weight, end = begin + block.size;
  for (int k = 0; k < m.count; ++k) {
    double* z = cross + k * p.num_weights + begin;
    std::fill(z, z + block.size, 0.0);
    for (const Run& run : runs) {
      const int64_t from = std::max(run.lo, begin), to = std::min(run.hi, end);
      if (from < to) add(1.0, run.sums + k * (run.hi - run.lo) + from - run.lo, z + from - begin, to - from);
    }
  }
}

/// z += shift h - sum_i u_i (u_i^T h), and the inner products, of one block.
RLEKF_EVERY_ISA void finish_block(const Covariance& p, const Measurements& m, const Projection& out, int64_t index) {
  const Block& block = p.blocks[index];
  const int64_t begin = block.first_weight;
  const auto num_pending = static_cast<int64_t>(p.state->num_pending);
  double* inner = out.gram + index * m.count * m.count;
  double* plain = inner + p.num_blocks * m.count * m.count;
  for (int k = 0; k < m.count; ++k) {
    const double* h = m.jacobian + k * p.num_weights + begin;
    double* z = out.cross + k * p.num_weights + begin;
    add(p.state->shift, h, z, block.size);
    for (int64_t i = 0; i < num_pending; ++i) {
      const double* u = p.pending + i * p.num_weights + begin;
      add(-dot(u, h, block.size), u, z, block.size);
    }
  }
  for (int j = 0; j < m.count; ++j) {
    for (int k = j; k < m.count; ++k) {
      const double* h = m.jacobian + j * p.num_weights + begin;
      inner[j * m.count + k] = inner[k * m.count + j] = dot(h, out.cross + k * p.num_weights + begin, block.size);
      plain[j * m.count + k] = plain[k * m.count + j] = dot(h, m.jacobian + k * p.num_weights + begin, block.size);
    }
  }
}

/// The M updates of a pass, before any vector changes.
struct Recursion {
  Update updates[kMaxMeasurements];
  std::vector<double> products;  // (num_blocks, M, M): y_i^T h_j of each block, i <= j
};

/// Runs the recursion on the inner products alone and leaves the state as after all M measurements.
/// Block by block,
///     y_i^T h_j = z_i^T h_j + (shift_i - shift_0) h_i^T h_j - sum_{k<i} rank_one_k (y_k^T h_i) (y_k^T h_j)
Recursion run_recursion(const Covariance& p, const Measurements& m, const Projection& projection) {
  const int count = m.count;
  const double* plain = projection.gram + p.num_blocks * count * count;
  const double first_shift = p.state->shift;
  Recursion recursion{};
  recursion.products.assign(static_cast<size_t>(p.num_blocks * count * count), 0.0);
  double totals[kMaxMeasurements][kMaxMeasurements] = {};  // y_i^T h_j over all blocks
  for (int i = 0; i < count; ++i) {
    const double shift_growth = p.state->shift - first_shift;
    for (int64_t block = 0; block < p.num_blocks; ++block) {
      double* y = recursion.products.data() + block * count * count;
      for (int j = i; j < count; ++j) {
        double value = projection.gram[(block * count + i) * count + j];
        if (shift_growth != 0) value += shift_growth * plain[(block * count + i) * count + j];
        for (int k = 0; k < i; ++k) {
          if (recursion.updates[k].used) value -= recursion.updates[k].rank_one * y[k * count + i] * y[k * count + j];
        }
        y[i * count + j] = value;
        totals[i][j] += value;
      }
    }
    double left = m.innovation[i];
    for (int k = 0; k < i; ++k) {
      if (recursion.updates[k].used) left -= recursion.updates[k].gain * totals[k][i];
    }
    double square = 0;
    for (int64_t block = 0; block < p.num_blocks; ++block) square += plain[(block * count + i) * count + i];
    recursion.updates[i] = take_measurement(*p.state, first_shift, totals[i][i], square, m.innovation[i], left);
  }
  return recursion;
}

/// y_j = z_j + (shift_j - shift_0) h_j - sum_{k<j} rank_one_k (y_k^T h_j) y_k
/// w += gain_j y_j, u_j = sqrt(rank_one_j) y_j
RLEKF_EVERY_ISA void correct_block(double* weights, const Covariance& p, const Measurements& m,
                                   const Projection& projection, const Recursion& recursion, int64_t index) {
  const Block& block = p.blocks[index];
  const double* products = recursion.products.data() + index * m.count * m.count;
  const int64_t begin = block.first_weight;
  for (int j = 0; j < m.count; ++j) {
    const Update& update = recursion.updates[j];
    if (!update.used) continue;
    double* u = p.pending + static_cast<int64_t>(update.slot) * p.num_weights + begin;
    std::copy_n(projection.cross + j * p.num_weights + begin, block.size, u);
    if (update.shift_growth != 0) add(update.shift_growth, m.jacobian + j * p.num_weights + begin, u, block.size);
    for (int k = 0; k < j; ++k) {
      const Update& earlier = recursion.updates[k];
      if (!earlier.used) continue;
      const double* v = p.pending + static_cast<int64_t>(earlier.slot) * p.num_weights + begin;  // sqrt(rank_one_k) y_k
      add(-std::sqrt(earlier.rank_one) * products[k * m.count + j], v, u, block.size);
    }
    const double root = std::sqrt(update.rank_one);
    double* w = weights + begin;
    for (int64_t i = 0; i < block.size; ++i) {
      w[i] += update.gain * u[i];
      u[i] *= root;
    }
  }
}

}  // namespace

int64_t scratch_size(const Covariance& covariance, int num_measurements, int64_t num_workers) {
  int64_t size = 0;
  for (const Run& run : plan_runs(covariance, num_measurements, num_workers, nullptr)) {
    size += num_measurements * (run.hi - run.lo);
  }
  return size;
}

void project(const Covariance& p, const Measurements& m, const Projection& out, double* scratch,
             const Parallel& parallel) {
  const Fold due = fold_due(*p.state, m.count, p.capacity);
  const std::vector<Run> runs = plan_runs(p, m.count, parallel.num_workers, scratch);
  visit_runs(p, m, due, runs, parallel);
  note_fold(*p.state, due);
  parallel.run(p.num_blocks, [&](int64_t block) {
    add_runs(p, m, out.cross, runs, block);
    finish_block(p, m, out, block);
  });
}

void multiply_tiles(const Covariance& p, const Measurements& m, double* z, double* scratch, const Parallel& parallel) {
  const std::vector<Run> runs = plan_runs(p, m.count, parallel.num_workers, scratch);
  visit_runs(p, m, fold_due(*p.state, m.count, p.capacity), runs, parallel);
  parallel.run(p.num_blocks, [&](int64_t block) { add_runs(p, m, z, runs, block); });
}

void finish_projection(const Covariance& p, const Measurements& m, const Projection& projection,
                       const Parallel& parallel) {
  note_fold(*p.state, fold_due(*p.state, m.count, p.capacity));
  parallel.run(p.num_blocks, [&](int64_t block) { finish_block(p, m, projection, block); });
}

void correct(double* weights, const Covariance& p, const Measurements& m, const Projection& projection,
             const Parallel& parallel) {
  const Recursion recursion = run_recursion(p, m, projection);
  parallel.run(p.num_blocks, [&](int64_t block) { correct_block(weights, p, m, projection, recursion, block); });
}

}  // namespace rlekf::cpu
