// The filter step on a CPU.
//
// Ideas, in order:
//   1. A step reads the packed triangle once. Each tile contributes to both halves of the product:
//      y_i += T x_j and y_j += T^T x_i.
//   2. The tiles of all blocks form one list, cut into equal contiguous runs, one per worker. Each worker adds into a
//      buffer of its own; a second phase adds up the buffers in a fixed order. So the bits are the same on every run
//      with the same number of workers.
//   3. Pending vectors are folded into a tile in the visit that reads it: S is written once every `capacity` steps.
//   4. Several measurements: their entries of one weight lie side by side in a vector, and the tile is read once for all.
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

/// y_i += T x_j and, off the diagonal, y_j += T^T x_i. The tile is read once, front to back, and prefetched a few rows
/// ahead: the hardware's own prefetcher stops at the end of every small page.
template <typename Scalar>
RLEKF_INLINE void multiply(const Scalar* tile, Segment& xi, const Segment& xj, Segment& yi, Segment& yj) {
  constexpr int kLine = 64 / sizeof(Scalar);
  Lanes column[kChunks];
  for (int c = 0; c < kChunks; ++c) column[c] = yj.lanes[c];
  for (int group = 0; group < kChunks; ++group) {
    Lanes rows[kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < kLanes; ++r, tile += kTile) {
      const Lanes weight = xi[group * kLanes + r] - Lanes{};
      for (int line = 0; line < kTile; line += kLine) __builtin_prefetch(tile + kRowsAhead * kTile + line);
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

/// The numbers of a weight for several measurements, in registers and in memory.
template <int kMany>
struct SeveralOf;
template <>
struct SeveralOf<4> {
  using Value = double __attribute__((vector_size(32)));
  using Stored = double __attribute__((vector_size(32), aligned(8), may_alias));
};
template <>
struct SeveralOf<8> {
  using Value = Lanes;
  using Stored = LanesUnaligned;
};

/// The same for kMany measurements: x and y are (kTile), each entry those of all measurements. Four rows at a time have
/// their x and y in registers. The next tile, from `next`, is prefetched into the second-level cache, evenly, so that it
/// arrives while this one is multiplied.
template <int kMany, typename Scalar, typename Stored = typename SeveralOf<kMany>::Stored>
RLEKF_INLINE void multiply_many(const double* tile, const Stored* xi, const Stored* xj, Stored* yi, Stored* yj,
                                const Scalar* next) {
  using Value = typename SeveralOf<kMany>::Value;
  constexpr int kRows = 4, kLine = 64 / sizeof(Scalar);
  for (int row = 0; row < kTile; row += kRows, tile += kRows * kTile) {
    Value x[kRows], y[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x[r] = xi[row + r], y[r] = yi[row + r];
#pragma GCC unroll 4
    for (int c = 0; c < kTile; ++c) {
      if (c % (kLine / kRows) == 0) __builtin_prefetch(next + (row * kTile + c * kRows), 0, 2);
      const Value column = xj[c];
      Value even = yj[c], odd{};
#pragma GCC unroll 2
      for (int r = 0; r < kRows; r += 2) {
        const Value a = tile[r * kTile + c] - Value{}, b = tile[(r + 1) * kTile + c] - Value{};
        y[r] += a * column;
        even += a * x[r];
        y[r + 1] += b * column;
        odd += b * x[r + 1];
      }
      yj[c] = even + odd;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) yi[row + r] = y[r];
  }
}

/// T <- factor (T - sum_k u_k[i] u_k[j]^T). Products commute and the order over k is fixed, so a diagonal tile stays
/// symmetric. Four rows of half of the columns are in registers; the arithmetic hides the latency of the next tile,
/// which is prefetched here. Vectors u are `stride` numbers apart.
template <typename Scalar>
RLEKF_INLINE void fold(Scalar* tile, Segment* ui, const double* uj, int64_t stride, int count, double factor) {
  constexpr int kLine = 64 / sizeof(Scalar), kRows = 4, kHalf = kChunks / 2;
  for (int row = 0; row < kTile; row += kRows) {
    for (int half = 0; half < 2; ++half) {
      Scalar* from = tile + row * kTile + half * kHalf * kLanes;
      for (int line = 0; line < 2 * kTile; line += kLine) {
        __builtin_prefetch(tile + kTileSize + (row + 2 * half) * kTile + line);
      }
      Lanes entries[kRows][kHalf];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kHalf; ++c) load(from + r * kTile + c * kLanes, entries[r][c]);
      }
      for (int k = 0; k < count; ++k) {
        Lanes columns[kHalf];
#pragma GCC unroll 4
        for (int c = 0; c < kHalf; ++c) load(uj + k * stride + (half * kHalf + c) * kLanes, columns[c]);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Lanes a = ui[k][row + r] - Lanes{};
#pragma GCC unroll 4
          for (int c = 0; c < kHalf; ++c) entries[r][c] -= a * columns[c];
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kHalf; ++c) store(from + r * kTile + c * kLanes, entries[r][c] * factor);
      }
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

/// How many measurements lie side by side: 1, 4 or 8; those beyond the last are zero.
int side_by_side(int num_measurements) { return num_measurements == 1 ? 1 : num_measurements <= 4 ? 4 : 8; }

/// A worker's contiguous run of tiles [begin, end), and the weights [lo, hi) that it adds to.
struct Run {
  int64_t begin, end;
  int64_t lo, hi;
  double* sums;  // (hi - lo, side by side)
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
    scratch += side_by_side(num_measurements) * (run.hi - run.lo);
    runs.push_back(run);
  }
  return runs;
}

/// The products of a row of tiles, with one measurement.
template <typename Scalar>
struct OneByOne {
  const double* jacobian;  // (N)
  const Run& run;
  Segment xi, yi;

  RLEKF_INLINE void start_row(int64_t first, int64_t height) {
    load_segment(jacobian + first, height, xi);
    yi = Segment{};
  }
  RLEKF_INLINE void visit(const Scalar* tile, int64_t other, int64_t width, bool diagonal) {
    Segment xj, yj{};
    load_segment(jacobian + other, width, xj);
    multiply(tile, xi, xj, yi, yj);
    if (!diagonal) add_segment(yj, width, run.sums + other - run.lo);
  }
  RLEKF_INLINE void end_row(int64_t first, int64_t height) { add_segment(yi, height, run.sums + first - run.lo); }
};

RLEKF_INLINE const double* widened(const double* tile, double*) { return tile; }
RLEKF_INLINE const double* widened(const float* tile, double* wide) {
  for (int64_t i = 0; i < kTileSize; i += kLanes) {
    Lanes entries;
    load(tile + i, entries);
    store(wide + i, entries);
  }
  return wide;
}

/// The same with kMany measurements.
template <typename Scalar, int kMany>
struct SideBySide {
  using Stored = typename SeveralOf<kMany>::Stored;
  const Stored* jacobian;  // (N)
  const Run& run;
  Stored xi[kTile], yi[kTile];
  alignas(64) double wide[std::is_same_v<Scalar, double> ? 1 : kTileSize];

  SideBySide(const double* from, const Run& of) : jacobian(reinterpret_cast<const Stored*>(from)), run(of) {}

  RLEKF_INLINE Stored* sums(int64_t weight) const { return reinterpret_cast<Stored*>(run.sums) + weight - run.lo; }
  RLEKF_INLINE void start_row(int64_t first, int64_t height) {
    for (int64_t i = 0; i < kTile; ++i) xi[i] = i < height ? jacobian[first + i] : Stored{}, yi[i] = Stored{};
  }
  RLEKF_INLINE void visit(const Scalar* tile, int64_t other, int64_t, bool diagonal) {
    Stored unused[kTile];
    if (diagonal) std::fill_n(unused, kTile, Stored{});
    multiply_many<kMany>(widened(tile, wide), xi, diagonal ? xi : jacobian + other, yi, diagonal ? unused : sums(other),
                         tile + kTileSize);
  }
  RLEKF_INLINE void end_row(int64_t first, int64_t height) {
    for (int64_t i = 0; i < height; ++i) sums(first)[i] += yi[i];
  }
};

/// One worker's run: each tile is folded if a fold is due, then multiplied.
template <typename Scalar, typename Products>
RLEKF_INLINE void visit_tiles(const Covariance& p, Products& products, const Fold& due, const Run& run) {
  auto* tile = static_cast<Scalar*>(p.tiles) + run.begin * kTileSize;
  std::vector<Segment> ui(static_cast<size_t>(due.num_vectors));
  const Block* block = block_of_tile(p, run.begin);
  int64_t row = tile_row(run.begin - block->first_tile);
  int64_t col = run.begin - block->first_tile - tile_index(row, 0);
  for (int64_t t = run.begin; t < run.end;) {
    const int64_t first = block->first_weight + row * kTile;
    const int64_t height = std::min(kTile, block->size - row * kTile);
    products.start_row(first, height);
    for (size_t k = 0; k < ui.size(); ++k) {
      load_segment(p.pending + static_cast<int64_t>(k) * p.num_weights + first, height, ui[k]);
    }
    for (; col <= row && t < run.end; ++col, ++t, tile += kTileSize) {
      const int64_t other = block->first_weight + col * kTile;
      for (int64_t done = 0; done < due.num_vectors; done += kFoldAtOnce) {
        const int count = static_cast<int>(std::min<int64_t>(kFoldAtOnce, due.num_vectors - done));
        const double factor = done + count == due.num_vectors ? due.factor : 1.0;
        Segment* u = ui.data() + done;
        if (col == row) fold(tile, u, &(*u)[0], kTile, count, factor);
        else fold(tile, u, p.pending + done * p.num_weights + other, p.num_weights, count, factor);
      }
      products.visit(tile, other, col == row ? height : kTile, col == row);
    }
    products.end_row(first, height);
    if (col > row) {
      col = 0;
      if (++row == tile_rows(block->size)) {
        row = 0;
        ++block;
      }
    }
  }
}

/// `jacobian` as its measurements lie side by side.
template <typename Scalar>
RLEKF_INLINE void visit_run(const Covariance& p, int count, const double* jacobian, const Fold& due, const Run& run) {
  const int many = side_by_side(count);
  std::fill(run.sums, run.sums + many * (run.hi - run.lo), 0.0);
  if (many == 1) {
    OneByOne<Scalar> products{jacobian, run, {}, {}};
    visit_tiles<Scalar>(p, products, due, run);
  } else if (many == 4) {
    SideBySide<Scalar, 4> products(jacobian, run);
    visit_tiles<Scalar>(p, products, due, run);
  } else {
    SideBySide<Scalar, 8> products(jacobian, run);
    visit_tiles<Scalar>(p, products, due, run);
  }
}

RLEKF_EVERY_ISA void visit_float64(const Covariance& p, int count, const double* jacobian, const Fold& due,
                                   const Run& run) {
  visit_run<double>(p, count, jacobian, due, run);
}

RLEKF_EVERY_ISA void visit_float32(const Covariance& p, int count, const double* jacobian, const Fold& due,
                                   const Run& run) {
  visit_run<float>(p, count, jacobian, due, run);
}

/// The Jacobians of a block side by side, in `to` (N, side by side).
RLEKF_EVERY_ISA void lay_side_by_side(const Covariance& p, const Measurements& m, double* to, int64_t index) {
  const Block& block = p.blocks[index];
  const int many = side_by_side(m.count);
  for (int64_t i = block.first_weight; i < block.first_weight + block.size; ++i) {
    for (int k = 0; k < many; ++k) to[i * many + k] = k < m.count ? m.jacobian[k * p.num_weights + i] : 0.0;
  }
}

/// z = S h of the tiles, in a buffer of each run.
std::vector<Run> visit_runs(const Covariance& p, const Measurements& m, const Fold& due, double* scratch,
                            const Parallel& parallel) {
  const auto visit = p.storage == Storage::kFloat64 ? visit_float64 : visit_float32;
  const double* jacobian = m.jacobian;
  if (side_by_side(m.count) > 1) {
    parallel.run(p.num_blocks, [&](int64_t block) { lay_side_by_side(p, m, scratch, block); });
    jacobian = scratch;
    scratch += side_by_side(m.count) * p.num_weights;
  }
  const std::vector<Run> runs = plan_runs(p, m.count, parallel.num_workers, scratch);
  parallel.run(static_cast<int64_t>(runs.size()),
               [&](int64_t i) { visit(p, m.count, jacobian, due, runs[static_cast<size_t>(i)]); });
  return runs;
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
  const int many = side_by_side(m.count);
  for (int k = 0; k < m.count; ++k) {
    double* z = cross + k * p.num_weights;
    std::fill(z + begin, z + end, 0.0);
    for (const Run& run : runs) {
      const int64_t from = std::max(run.lo, begin), to = std::min(run.hi, end);
      for (int64_t i = from; i < to; ++i) z[i] += run.sums[(i - run.lo) * many + k];
    }
  }
}

/// z -= sum_i u_i (u_i^T h) of one block and one measurement.
RLEKF_INLINE void subtract_pending(const Covariance& p, const Measurements& m, const Projection& out,
                                   const Block& block) {
  const double* h = m.jacobian + block.first_weight;
  for (int64_t i = 0; i < static_cast<int64_t>(p.state->num_pending); ++i) {
    const double* u = p.pending + i * p.num_weights + block.first_weight;
    add(-dot(u, h, block.size), u, out.cross + block.first_weight, block.size);
  }
}

/// The same for kMany measurements, which lie side by side meanwhile; four vectors u at a time.
template <int kMany>
RLEKF_INLINE void subtract_pending_of_many(const Covariance& p, const Measurements& m, const Projection& out,
                                           const Block& block) {
  using Value = typename SeveralOf<kMany>::Value;
  using Stored = typename SeveralOf<kMany>::Stored;
  constexpr int64_t kAtOnce = 4;
  const auto num_pending = static_cast<int64_t>(p.state->num_pending);
  if (num_pending == 0) return;
  const int64_t begin = block.first_weight, size = block.size;
  std::vector<double> memory(static_cast<size_t>(2 * size * kMany), 0.0);
  double *h = memory.data(), *z = h + size * kMany;
  for (int k = 0; k < m.count; ++k) {
    const int64_t row = k * p.num_weights + begin;
    for (int64_t i = 0; i < size; ++i) {
      h[i * kMany + k] = m.jacobian[row + i];
      z[i * kMany + k] = out.cross[row + i];
    }
  }
  const auto* hs = reinterpret_cast<const Stored*>(h);
  auto* zs = reinterpret_cast<Stored*>(z);
  for (int64_t first = 0; first < num_pending; first += kAtOnce) {
    const double* u[kAtOnce];
    Value products[kAtOnce];
    for (int64_t i = 0; i < kAtOnce; ++i) {
      u[i] = p.pending + std::min(first + i, num_pending - 1) * p.num_weights + begin;
      products[i] = Value{};
    }
    for (int64_t w = 0; w < size; ++w) {
      for (int64_t i = 0; i < kAtOnce; ++i) products[i] += u[i][w] * hs[w];
    }
    for (int64_t i = 0; i < kAtOnce; ++i) {
      if (first + i >= num_pending) products[i] = Value{};
    }
    for (int64_t w = 0; w < size; ++w) {
      Value left = zs[w];
      for (int64_t i = 0; i < kAtOnce; ++i) left -= u[i][w] * products[i];
      zs[w] = left;
    }
  }
  for (int k = 0; k < m.count; ++k) {
    for (int64_t i = 0; i < size; ++i) out.cross[k * p.num_weights + begin + i] = z[i * kMany + k];
  }
}

/// z += shift h - sum_i u_i (u_i^T h), and the inner products, of one block.
RLEKF_EVERY_ISA void finish_block(const Covariance& p, const Measurements& m, const Projection& out, int64_t index) {
  const Block& block = p.blocks[index];
  const int64_t begin = block.first_weight;
  double* inner = out.gram + index * m.count * m.count;
  double* plain = inner + p.num_blocks * m.count * m.count;
  for (int k = 0; k < m.count; ++k) {
    const int64_t row = k * p.num_weights + begin;
    add(p.state->shift, m.jacobian + row, out.cross + row, block.size);
  }
  if (m.count == 1) subtract_pending(p, m, out, block);
  else if (m.count <= 4) subtract_pending_of_many<4>(p, m, out, block);
  else subtract_pending_of_many<8>(p, m, out, block);
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
  const int many = side_by_side(num_measurements);
  int64_t size = many > 1 ? many * covariance.num_weights : 0;
  for (const Run& run : plan_runs(covariance, num_measurements, num_workers, nullptr)) size += many * (run.hi - run.lo);
  return size;
}

void project(const Covariance& p, const Measurements& m, const Projection& out, double* scratch,
             const Parallel& parallel) {
  const Fold due = fold_due(*p.state, m.count, p.capacity);
  const std::vector<Run> runs = visit_runs(p, m, due, scratch, parallel);
  note_fold(*p.state, due);
  parallel.run(p.num_blocks, [&](int64_t block) {
    add_runs(p, m, out.cross, runs, block);
    finish_block(p, m, out, block);
  });
}

void multiply_tiles(const Covariance& p, const Measurements& m, double* z, double* scratch, const Parallel& parallel) {
  const std::vector<Run> runs = visit_runs(p, m, fold_due(*p.state, m.count, p.capacity), scratch, parallel);
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
