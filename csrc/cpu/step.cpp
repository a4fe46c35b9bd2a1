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
//   5. Where H is zero, as for the nets of elements that a frame does not have, P is not read: neither blocks, nor tiles
//      whose row and column are both zero.
//   6. Vector arithmetic uses the compiler's vector types, as wide as the registers: lanes.h.
//
// Traffic of a step with a full H: the triangle, 4 n(n+1) bytes in float64, is read once (and written once by a fold);
// the vectors are O(N). The limit is the machine's read bandwidth.

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

constexpr int kRowsAhead = 3;    // how far ahead rows are prefetched: docs/performance.md has the trials
constexpr int kFoldAtOnce = 32;  // pending vectors whose segments stay in the first-level cache during a fold

template <int kBytes>
using Doubles = Vector<double, kBytes>;
template <int kBytes>
constexpr int kDoubles = kLanes<double, kBytes>;

/// The kTile entries of a vector that belong to one row or column of tiles.
struct alignas(64) Segment {
  double entries[kTile];
};

/// y_i += T x_j and, off the diagonal, y_j += T^T x_i. The tile is read once and prefetched a few rows ahead: the
/// hardware's own prefetcher stops at the end of every small page. y_j takes turns in as many parts as the registers
/// need.
template <int kBytes, typename Scalar>
RLEKF_INLINE void multiply(const Scalar* tile, const Segment& xi, const Segment& xj, Segment& yi, Segment& yj) {
  constexpr int kLine = 64 / sizeof(Scalar), kChunks = 8, kColumns = kChunks * kDoubles<kBytes>;
  for (int group = 0; group < kTile; group += kDoubles<kBytes>) {
    Doubles<kBytes> rows[kDoubles<kBytes>] = {};
    for (int first = 0; first < kTile; first += kColumns) {
      Doubles<kBytes> column[kChunks];
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) column[c] = read_wide<kBytes>(yj.entries + first + c * kDoubles<kBytes>);
#pragma GCC unroll 8
      for (int r = 0; r < kDoubles<kBytes>; ++r) {
        const Scalar* from = tile + (group + r) * kTile + first;
        const Doubles<kBytes> weight = xi.entries[group + r] - Doubles<kBytes>{};
        for (int line = 0; line < kColumns; line += kLine) __builtin_prefetch(from + kRowsAhead * kTile + line);
#pragma GCC unroll 8
        for (int c = 0; c < kChunks; ++c) {
          const Doubles<kBytes> entries = read_wide<kBytes>(from + c * kDoubles<kBytes>);
          rows[r] += entries * read_wide<kBytes>(xj.entries + first + c * kDoubles<kBytes>);
          column[c] += entries * weight;
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) write_wide<kBytes>(yj.entries + first + c * kDoubles<kBytes>, column[c]);
    }
    write_wide<kBytes>(yi.entries + group, read_wide<kBytes>(yi.entries + group) + sums(rows));
  }
}

/// The same for kMany measurements: x and y are (kTile, kMany). A few rows at a time have their x and y in registers. The
/// next tile, from `next`, is prefetched into the second-level cache, evenly, so that it arrives while this one is
/// multiplied.
template <int kBytes, int kMany, typename Scalar>
RLEKF_INLINE void multiply_many(const double* tile, const double* xi, const double* xj, double* yi, double* yj,
                                const Scalar* next) {
  constexpr int kParts = kMany / kDoubles<kBytes>, kRows = std::max(2, 4 / kParts), kLine = 64 / sizeof(Scalar);
  for (int row = 0; row < kTile; row += kRows, tile += kRows * kTile) {
    Doubles<kBytes> x[kRows][kParts], y[kRows][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        x[r][p] = read_wide<kBytes>(xi + (row + r) * kMany + p * kDoubles<kBytes>);
        y[r][p] = read_wide<kBytes>(yi + (row + r) * kMany + p * kDoubles<kBytes>);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kTile; ++c) {
      if (c % (kLine / kRows) == 0) __builtin_prefetch(next + (row * kTile + c * kRows), 0, 2);
      Doubles<kBytes> column[kParts], even[kParts], odd[kParts] = {};
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        column[p] = read_wide<kBytes>(xj + c * kMany + p * kDoubles<kBytes>);
        even[p] = read_wide<kBytes>(yj + c * kMany + p * kDoubles<kBytes>);
      }
#pragma GCC unroll 2
      for (int r = 0; r < kRows; r += 2) {
        const Doubles<kBytes> a = tile[r * kTile + c] - Doubles<kBytes>{},
                              b = tile[(r + 1) * kTile + c] - Doubles<kBytes>{};
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          y[r][p] += a * column[p];
          even[p] += a * x[r][p];
          y[r + 1][p] += b * column[p];
          odd[p] += b * x[r + 1][p];
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) write_wide<kBytes>(yj + c * kMany + p * kDoubles<kBytes>, even[p] + odd[p]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) write_wide<kBytes>(yi + (row + r) * kMany + p * kDoubles<kBytes>, y[r][p]);
    }
  }
}

/// T <- factor (T - sum_k u_k[i] u_k[j]^T). Products commute and the order over k is fixed, so a diagonal tile stays
/// symmetric. Four rows of some columns are in registers; the arithmetic hides the latency of the next tile, which is
/// prefetched here. Vectors u are `stride` numbers apart.
template <int kBytes, typename Scalar>
RLEKF_INLINE void fold(Scalar* tile, const Segment* ui, const double* uj, int64_t stride, int count, double factor) {
  constexpr int kLine = 64 / sizeof(Scalar), kRows = 4, kChunks = std::max(2, kDoubles<kBytes> / 2),
                kColumns = kChunks * kDoubles<kBytes>;
  for (int row = 0; row < kTile; row += kRows) {
    for (int line = 0; line < kRows * kTile; line += kLine)
      __builtin_prefetch(tile + kTileSize + row * kTile + line, 0, 2);
    for (int first = 0; first < kTile; first += kColumns) {
      Scalar* from = tile + row * kTile + first;
      Doubles<kBytes> entries[kRows][kChunks];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kChunks; ++c) entries[r][c] = read_wide<kBytes>(from + r * kTile + c * kDoubles<kBytes>);
      }
      for (int k = 0; k < count; ++k) {
        Doubles<kBytes> columns[kChunks];
#pragma GCC unroll 4
        for (int c = 0; c < kChunks; ++c)
          columns[c] = read_wide<kBytes>(uj + k * stride + first + c * kDoubles<kBytes>);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Doubles<kBytes> a = ui[k].entries[row + r] - Doubles<kBytes>{};
#pragma GCC unroll 4
          for (int c = 0; c < kChunks; ++c) entries[r][c] -= a * columns[c];
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kChunks; ++c)
          write_wide<kBytes>(from + r * kTile + c * kDoubles<kBytes>, entries[r][c] * factor);
      }
    }
  }
}

RLEKF_INLINE void load_segment(const double* from, int64_t count, Segment& to) {
  to = Segment{};
  std::memcpy(to.entries, from, static_cast<size_t>(count) * sizeof(double));
}

RLEKF_INLINE void add_segment(const Segment& from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from.entries[i];
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

/// What of P is read: for each block, which rows of tiles have entries other than zero, in H and in the pending vectors
/// that are due.
struct Reads {
  std::vector<std::vector<bool>> jacobian, pending;
  bool folds, rescales;

  bool multiplied(size_t block, int64_t row, int64_t col) const { return either(jacobian[block], row, col); }
  bool folded(size_t block, int64_t row, int64_t col) const {
    return folds && (rescales || (at(pending[block], row) && at(pending[block], col)));
  }
  bool all() const {
    return folds || std::all_of(jacobian.begin(), jacobian.end(), [](const std::vector<bool>& rows) {
             return std::all_of(rows.begin(), rows.end(), [](bool row) { return row; });
           });
  }

 private:
  static bool at(const std::vector<bool>& rows, int64_t i) { return rows[static_cast<size_t>(i)]; }
  static bool either(const std::vector<bool>& rows, int64_t i, int64_t j) { return at(rows, i) || at(rows, j); }
};

/// Adds to `rows` those rows of tiles in which a vector is not zero; its entries are `many` numbers for each weight.
void mark_rows(const Block& block, const double* vector, int64_t many, std::vector<bool>& rows) {
  rows.resize(static_cast<size_t>(tile_rows(block.size)));
  for (size_t row = 0; row < rows.size(); ++row) {
    const int64_t first = static_cast<int64_t>(row) * kTile, count = std::min(kTile, block.size - first);
    const double* own = vector + (block.first_weight + first) * many;
    rows[row] = rows[row] || std::any_of(own, own + count * many, [](double x) { return x != 0; });
  }
}

/// Where the workers' runs of tiles end: each has as many tiles to read as the others.
std::vector<int64_t> even_cuts(const Covariance& p, const Reads& reads, int64_t num_workers) {
  std::vector<int64_t> cuts{0};
  if (num_workers == 1 || reads.all()) {
    for (int64_t worker = 1; worker <= num_workers; ++worker) cuts.push_back(p.num_tiles * worker / num_workers);
    return cuts;
  }
  std::vector<int64_t> before{0};  // how many are read before each tile
  const Block* block = block_of_tile(p, 0);
  int64_t row = tile_row(-block->first_tile), col = -block->first_tile - tile_index(row, 0);
  for (int64_t t = 0; t < p.num_tiles; ++t) {
    before.push_back(before.back() + reads.multiplied(static_cast<size_t>(block - p.blocks), row, col));
    if (++col <= row) continue;
    col = 0;
    if (++row == tile_rows(block->size)) {
      row = 0;
      ++block;
    }
  }
  for (int64_t worker = 1; worker < num_workers; ++worker) {
    const auto end = std::lower_bound(before.begin(), before.end(), before.back() * worker / num_workers);
    cuts.push_back(end - before.begin());
  }
  cuts.push_back(p.num_tiles);
  return cuts;
}

std::vector<Run> plan_runs(const Covariance& p, int num_measurements, const std::vector<int64_t>& cuts,
                           double* scratch) {
  std::vector<Run> runs;
  for (size_t worker = 0; worker + 1 < cuts.size(); ++worker) {
    Run run{cuts[worker], cuts[worker + 1], 0, 0, scratch};
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
template <typename Scalar, int kBytes>
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
    multiply<kBytes>(tile, xi, xj, yi, yj);
    if (!diagonal) add_segment(yj, width, run.sums + other - run.lo);
  }
  RLEKF_INLINE void end_row(int64_t first, int64_t height) { add_segment(yi, height, run.sums + first - run.lo); }
};

template <int kBytes>
RLEKF_INLINE const double* widened(const double* tile, double*) {
  return tile;
}
template <int kBytes>
RLEKF_INLINE const double* widened(const float* tile, double* wide) {
  for (int64_t i = 0; i < kTileSize; i += kDoubles<kBytes>) write<kBytes>(wide + i, read_wide<kBytes>(tile + i));
  return wide;
}

/// The same with kMany measurements.
template <typename Scalar, int kBytes, int kMany>
struct SideBySide {
  const double* jacobian;  // (N, kMany)
  const Run& run;
  alignas(64) double xi[kTile * kMany], yi[kTile * kMany];
  alignas(64) double wide[std::is_same_v<Scalar, double> ? 1 : kTileSize];

  SideBySide(const double* jacobian, const Run& run) : jacobian(jacobian), run(run) {}

  RLEKF_INLINE double* sums(int64_t weight) const { return run.sums + (weight - run.lo) * kMany; }
  RLEKF_INLINE void start_row(int64_t first, int64_t height) {
    std::fill_n(yi, kTile * kMany, 0.0);
    std::fill_n(std::copy_n(jacobian + first * kMany, height * kMany, xi), (kTile - height) * kMany, 0.0);
  }
  RLEKF_INLINE void visit(const Scalar* tile, int64_t other, int64_t, bool diagonal) {
    alignas(64) double unused[kTile * kMany];
    if (diagonal) std::fill_n(unused, kTile * kMany, 0.0);
    multiply_many<std::min(kBytes, 8 * kMany), kMany>(widened<kBytes>(tile, wide), xi,
                                                      diagonal ? xi : jacobian + other * kMany, yi,
                                                      diagonal ? unused : sums(other), tile + kTileSize);
  }
  RLEKF_INLINE void end_row(int64_t first, int64_t height) {
    for (int64_t i = 0; i < height * kMany; ++i) sums(first)[i] += yi[i];
  }
};

/// One worker's run: each tile is folded if a fold is due, then multiplied; what would change nothing is left out.
template <typename Scalar, int kBytes, typename Products>
RLEKF_INLINE void visit_tiles(const Covariance& p, Products& products, const Reads& reads, const Fold& due,
                              const Run& run) {
  auto* tile = static_cast<Scalar*>(p.tiles) + run.begin * kTileSize;
  std::vector<Segment> ui(static_cast<size_t>(due.num_vectors));
  const Block* block = block_of_tile(p, run.begin);
  int64_t row = tile_row(run.begin - block->first_tile);
  int64_t col = run.begin - block->first_tile - tile_index(row, 0);
  for (int64_t t = run.begin; t < run.end;) {
    const auto number = static_cast<size_t>(block - p.blocks);
    const int64_t first = block->first_weight + row * kTile;
    const int64_t height = std::min(kTile, block->size - row * kTile);
    products.start_row(first, height);
    for (size_t k = 0; k < ui.size(); ++k) {
      load_segment(p.pending + static_cast<int64_t>(k) * p.num_weights + first, height, ui[k]);
    }
    for (; col <= row && t < run.end; ++col, ++t, tile += kTileSize) {
      const int64_t other = block->first_weight + col * kTile;
      for (int64_t done = 0; done < due.num_vectors && reads.folded(number, row, col); done += kFoldAtOnce) {
        const int count = static_cast<int>(std::min<int64_t>(kFoldAtOnce, due.num_vectors - done));
        const double factor = done + count == due.num_vectors ? due.factor : 1.0;
        const Segment* u = ui.data() + done;
        if (col == row) fold<kBytes>(tile, u, u->entries, kTile, count, factor);
        else fold<kBytes>(tile, u, p.pending + done * p.num_weights + other, p.num_weights, count, factor);
      }
      if (reads.multiplied(number, row, col)) products.visit(tile, other, col == row ? height : kTile, col == row);
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
template <typename Scalar, int kBytes>
RLEKF_INLINE void visit_run(const Covariance& p, int count, const double* jacobian, const Reads& reads, const Fold& due,
                            const Run& run) {
  const int many = side_by_side(count);
  std::fill(run.sums, run.sums + many * (run.hi - run.lo), 0.0);
  if (many == 1) {
    OneByOne<Scalar, kBytes> products{jacobian, run, {}, {}};
    visit_tiles<Scalar, kBytes>(p, products, reads, due, run);
  } else if (many == 4) {
    SideBySide<Scalar, kBytes, 4> products(jacobian, run);
    visit_tiles<Scalar, kBytes>(p, products, reads, due, run);
  } else {
    SideBySide<Scalar, kBytes, 8> products(jacobian, run);
    visit_tiles<Scalar, kBytes>(p, products, reads, due, run);
  }
}

void visit(const Covariance& p, int count, const double* jacobian, const Reads& reads, const Fold& due,
           const Run& run) {
  on_widest([&]<int kBytes>() RLEKF_INLINED {
    if (p.storage == Storage::kFloat64) visit_run<double, kBytes>(p, count, jacobian, reads, due, run);
    else visit_run<float, kBytes>(p, count, jacobian, reads, due, run);
  });
}

/// The Jacobians of a block side by side, in `to` (N, side by side).
RLEKF_INLINE void lay_side_by_side(const Covariance& p, const Measurements& m, double* to, int64_t index) {
  const Block& block = p.blocks[index];
  const int many = side_by_side(m.count);
  for (int64_t i = block.first_weight; i < block.first_weight + block.size; ++i) {
    for (int k = 0; k < many; ++k) to[i * many + k] = k < m.count ? m.jacobian[k * p.num_weights + i] : 0.0;
  }
}

/// z = S h of the tiles, in a buffer of each run.
std::vector<Run> visit_runs(const Covariance& p, const Measurements& m, const Fold& due, double* scratch,
                            const Parallel& parallel) {
  const int64_t many = side_by_side(m.count);
  const double* jacobian = many > 1 ? scratch : m.jacobian;
  const auto num_blocks = static_cast<size_t>(p.num_blocks);
  Reads reads{std::vector<std::vector<bool>>(num_blocks), std::vector<std::vector<bool>>(num_blocks),
              due.num_vectors > 0, due.factor != 1};
  parallel.run(p.num_blocks, [&](int64_t i) {
    if (many > 1) on_widest([&]<int>() RLEKF_INLINED { lay_side_by_side(p, m, scratch, i); });
    mark_rows(p.blocks[i], jacobian, many, reads.jacobian[static_cast<size_t>(i)]);
    for (int64_t k = 0; k < due.num_vectors; ++k) {
      mark_rows(p.blocks[i], p.pending + k * p.num_weights, 1, reads.pending[static_cast<size_t>(i)]);
    }
  });
  if (many > 1) scratch += many * p.num_weights;
  const std::vector<Run> runs = plan_runs(p, m.count, even_cuts(p, reads, parallel.num_workers), scratch);
  parallel.run(static_cast<int64_t>(runs.size()),
               [&](int64_t i) { visit(p, m.count, jacobian, reads, due, runs[static_cast<size_t>(i)]); });
  return runs;
}

template <int kBytes>
RLEKF_INLINE double dot(const double* a, const double* b, int64_t count) {
  Doubles<kBytes> even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kDoubles<kBytes> <= count; i += 2 * kDoubles<kBytes>) {
    even += read<kBytes>(a + i) * read<kBytes>(b + i);
    odd += read<kBytes>(a + i + kDoubles<kBytes>) * read<kBytes>(b + i + kDoubles<kBytes>);
  }
  double rest = 0;
  for (; i < count; ++i) rest += a[i] * b[i];
  return sum<double, kBytes>(even + odd) + rest;
}

RLEKF_INLINE void add(double factor, const double* x, double* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

/// z = S h of one block: the workers' sums, in order.
RLEKF_INLINE void add_runs(const Covariance& p, const Measurements& m, double* cross, const std::vector<Run>& runs,
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
template <int kBytes>
RLEKF_INLINE void subtract_pending(const Covariance& p, const Measurements& m, const Projection& out,
                                   const Block& block) {
  const double* h = m.jacobian + block.first_weight;
  for (int64_t i = 0; i < static_cast<int64_t>(p.state->num_pending); ++i) {
    const double* u = p.pending + i * p.num_weights + block.first_weight;
    add(-dot<kBytes>(u, h, block.size), u, out.cross + block.first_weight, block.size);
  }
}

/// The same for kMany measurements, which lie side by side meanwhile; some vectors u at a time.
template <int kBytes, int kMany>
RLEKF_INLINE void subtract_pending_of_many(const Covariance& p, const Measurements& m, const Projection& out,
                                           const Block& block) {
  constexpr int kParts = kMany / kDoubles<kBytes>, kAtOnce = std::max(2, 4 / kParts);
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
  for (int64_t first = 0; first < num_pending; first += kAtOnce) {
    const double* u[kAtOnce];
    Doubles<kBytes> products[kAtOnce][kParts] = {};
    for (int64_t i = 0; i < kAtOnce; ++i)
      u[i] = p.pending + std::min(first + i, num_pending - 1) * p.num_weights + begin;
    for (int64_t w = 0; w < size; ++w) {
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          products[i][part] += u[i][w] * read<kBytes>(h + w * kMany + part * kDoubles<kBytes>);
        }
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      for (int part = 0; part < kParts && first + i >= num_pending; ++part) products[i][part] = Doubles<kBytes>{};
    }
    for (int64_t w = 0; w < size; ++w) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        double* to = z + w * kMany + part * kDoubles<kBytes>;
        Doubles<kBytes> left = read<kBytes>(to);
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) left -= u[i][w] * products[i][part];
        write<kBytes>(to, left);
      }
    }
  }
  for (int k = 0; k < m.count; ++k) {
    for (int64_t i = 0; i < size; ++i) out.cross[k * p.num_weights + begin + i] = z[i * kMany + k];
  }
}

/// z += shift h - sum_i u_i (u_i^T h), and the inner products, of one block.
template <int kBytes>
RLEKF_INLINE void finish_block(const Covariance& p, const Measurements& m, const Projection& out, int64_t index) {
  const Block& block = p.blocks[index];
  const int64_t begin = block.first_weight;
  double* inner = out.gram + index * m.count * m.count;
  double* plain = inner + p.num_blocks * m.count * m.count;
  bool is_zero = true;
  for (int k = 0; k < m.count && is_zero; ++k) {
    const double* h = m.jacobian + k * p.num_weights + begin;
    is_zero = std::all_of(h, h + block.size, [](double x) { return x == 0; });
  }
  if (is_zero) {  // and so is S h
    std::fill_n(inner, m.count * m.count, 0.0);
    std::fill_n(plain, m.count * m.count, 0.0);
    return;
  }
  for (int k = 0; k < m.count; ++k) {
    const int64_t row = k * p.num_weights + begin;
    add(p.state->shift, m.jacobian + row, out.cross + row, block.size);
  }
  if (m.count == 1) subtract_pending<kBytes>(p, m, out, block);
  else if (m.count <= 4) subtract_pending_of_many<std::min(kBytes, 32), 4>(p, m, out, block);
  else subtract_pending_of_many<kBytes, 8>(p, m, out, block);
  for (int j = 0; j < m.count; ++j) {
    for (int k = j; k < m.count; ++k) {
      const double* h = m.jacobian + j * p.num_weights + begin;
      inner[j * m.count + k] = inner[k * m.count + j] =
          dot<kBytes>(h, out.cross + k * p.num_weights + begin, block.size);
      plain[j * m.count + k] = plain[k * m.count + j] =
          dot<kBytes>(h, m.jacobian + k * p.num_weights + begin, block.size);
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
RLEKF_INLINE void correct_block(double* weights, const Covariance& p, const Measurements& m,
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
  // The runs of two workers share the weights of the block in which one ends and the other begins, at most.
  const int many = side_by_side(num_measurements);
  int64_t largest = 0;
  for (int64_t i = 0; i < covariance.num_blocks; ++i) largest = std::max(largest, covariance.blocks[i].size);
  return many * ((many > 1 ? 2 : 1) * covariance.num_weights + (num_workers - 1) * largest);
}

void project(const Covariance& p, const Measurements& m, const Projection& out, double* scratch,
             const Parallel& parallel) {
  const Fold due = fold_due(*p.state, m.count, p.capacity);
  const std::vector<Run> runs = visit_runs(p, m, due, scratch, parallel);
  note_fold(*p.state, due);
  parallel.run(p.num_blocks, [&](int64_t block) {
    on_widest([&]<int kBytes>() RLEKF_INLINED {
      add_runs(p, m, out.cross, runs, block);
      finish_block<kBytes>(p, m, out, block);
    });
  });
}

void multiply_tiles(const Covariance& p, const Measurements& m, double* z, double* scratch, const Parallel& parallel) {
  const std::vector<Run> runs = visit_runs(p, m, fold_due(*p.state, m.count, p.capacity), scratch, parallel);
  parallel.run(p.num_blocks,
               [&](int64_t block) { on_widest([&]<int>() RLEKF_INLINED { add_runs(p, m, z, runs, block); }); });
}

void finish_projection(const Covariance& p, const Measurements& m, const Projection& projection,
                       const Parallel& parallel) {
  note_fold(*p.state, fold_due(*p.state, m.count, p.capacity));
  parallel.run(p.num_blocks, [&](int64_t block) {
    on_widest([&]<int kBytes>() RLEKF_INLINED { finish_block<kBytes>(p, m, projection, block); });
  });
}

void correct(double* weights, const Covariance& p, const Measurements& m, const Projection& projection,
             const Parallel& parallel) {
  const Recursion recursion = run_recursion(p, m, projection);
  parallel.run(p.num_blocks, [&](int64_t block) {
    on_widest([&]<int>() RLEKF_INLINED { correct_block(weights, p, m, projection, recursion, block); });
  });
}

}  // namespace rlekf::cpu
