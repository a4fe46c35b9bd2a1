// The order in which a grid of workers (thread blocks) visits the tiles, and where each leaves its partial sums.
// Index arithmetic only, on host and device: no list is built, sent or kept, and the host never reads `layout`.
//
// A block of the covariance is cut into strips of `width` tile columns (a power of two). Its tiles are taken strip
// after strip, and in a strip row after row: the sums of a strip's columns then stay with the worker all the way down.
// The tiles of one row in one strip are a unit; runs begin and end between units. A position counts tiles in this
// order; `first_tile` of a block is the same in this order as in memory.
//
//     tile columns   0 1 2 3 | 4 5 6        width 4: strip 0 has columns 0 to 3 and rows 0 to 6, strip 1 has columns
//     tile row 4     * * * * | *            4 to 6 and rows 4 to 6. "* * * *" is the unit (strip 0, row 4).
//
// Partial sums have numbered places. Numbers leave gaps between blocks, so that they follow from one block's own layout
// row: the first of a block is at first_weight / 2^log2 + index, where a place stands for 2^log2 weights.

#pragma once

#include "../covariance.h"

namespace rlekf::cuda {

#define RLEKF_INLINE_HD RLEKF_HOST_DEVICE inline

// Divisors are powers of two, and told by their logarithm: a GPU divides 64-bit numbers slowly and with many registers.
constexpr int kTileLog2 = 6;
static_assert(int64_t{1} << kTileLog2 == kTile);

/// Tile columns of a strip.
struct Width {
  int log2;
  RLEKF_INLINE_HD int columns() const { return 1 << log2; }
};

/// Tiles of a block of `rows` tile rows before its strip `strip`, which must be one of its strips.
RLEKF_INLINE_HD int64_t tiles_before_strip(int64_t rows, Width width, int64_t strip) {
  const int64_t columns = strip << width.log2;  // the triangle that they would reach into above the diagonal is absent
  return columns * rows - columns * (columns - 1) / 2;
}

RLEKF_INLINE_HD int64_t num_strips(int64_t rows, Width width) { return (rows + width.columns() - 1) >> width.log2; }

/// The last of `count` ascending numbers first(0), first(1), ... that is not beyond `wanted`; first(0) is not.
template <typename First>
RLEKF_INLINE_HD int64_t last_not_beyond(int64_t count, int64_t wanted, First first) {
  int64_t low = 0;
  while (count > 1) {
    const int64_t half = count / 2;
    if (first(low + half) <= wanted) low += half;
    count -= half;
  }
  return low;
}

/// A tile on its way through the order, with `left` tiles of the run still to come, itself included. Small, since a GPU
/// thread keeps two: what can be read again from `blocks` is not kept.
struct Walk {
  const Block* blocks;
  int block;
  int strip, row, col;  // where in the block
  int left;

  RLEKF_INLINE_HD int rows() const { return static_cast<int>(tile_rows(blocks[block].size)); }

  /// Where the tile stands in memory.
  RLEKF_INLINE_HD int64_t tile() const { return blocks[block].first_tile + tile_index(row, col); }

  RLEKF_INLINE_HD bool ends_unit(Width width) const { return col == row || col == ((strip + 1) << width.log2) - 1; }

  RLEKF_INLINE_HD void enter(int64_t index) {
    block = static_cast<int>(index);
    strip = row = col = 0;
  }

  /// To the next tile. The blocks are only looked at when there is one.
  RLEKF_INLINE_HD void advance(Width width) {
    --left;
    if (!ends_unit(width)) {
      ++col;
      return;
    }
    const int end = rows();
    if (++row == end) {
      ++strip;
      row = strip << width.log2;
    }
    col = strip << width.log2;
    if (row >= end && left > 0) enter(block + 1);
  }
};

/// The position of the first unit at or after position `wanted`, and a walk that stands there (with left = 0).
RLEKF_INLINE_HD int64_t first_unit(Walk& walk, int64_t num_blocks, int64_t num_tiles, Width width, int64_t wanted) {
  if (wanted >= num_tiles) return num_tiles;
  const Block* blocks = walk.blocks;
  walk.enter(last_not_beyond(num_blocks, wanted, [&](int64_t i) { return blocks[i].first_tile; }));
  const int rows = walk.rows();
  const int64_t first_tile = blocks[walk.block].first_tile, local = wanted - first_tile;
  walk.strip = static_cast<int>(last_not_beyond(num_strips(rows, width), local,
                                                [&](int64_t strip) { return tiles_before_strip(rows, width, strip); }));
  walk.row = walk.strip << width.log2;
  int64_t position = tiles_before_strip(rows, width, walk.strip);
  for (int short_units = 1; short_units < width.columns() && position < local && walk.row < rows; ++short_units) {
    position += short_units;  // the strip's top rows end at the diagonal
    ++walk.row;
  }
  if (position < local && walk.row < rows) {
    const int units = static_cast<int>((local - position + width.columns() - 1) >> width.log2);
    walk.row += units;
    position += static_cast<int64_t>(units) << width.log2;
  }
  position += first_tile;
  if (walk.row == rows) walk.row = ++walk.strip << width.log2;
  if (walk.row >= rows && position < num_tiles) walk.enter(walk.block + 1);
  walk.col = walk.strip << width.log2;
  return position;
}

/// `total` things cut into runs, one per worker; the first `longer` runs have one more than `each`. workers <= total.
struct Runs {
  int total, workers, each, longer;

  RLEKF_INLINE_HD int begin(int worker) const { return worker * each + (worker < longer ? worker : longer); }
  RLEKF_INLINE_HD int owner(int thing) const {
    const int in_longer = longer * (each + 1);
    return thing < in_longer ? thing / (each + 1) : longer + (thing - in_longer) / each;
  }
};

inline Runs runs_of(int64_t total, int64_t workers) {
  return {static_cast<int>(total), static_cast<int>(workers), static_cast<int>(total / workers),
          static_cast<int>(total % workers)};
}

/// The tiles of one worker.
RLEKF_INLINE_HD Walk run_of(const Block* blocks, int64_t num_blocks, Width width, const Runs& runs, int worker) {
  Walk end{blocks, 0, 0, 0, 0, 0}, walk = end;
  const int64_t last = first_unit(end, num_blocks, runs.total, width, runs.begin(worker + 1));
  const int64_t first = first_unit(walk, num_blocks, runs.total, width, runs.begin(worker));
  walk.left = static_cast<int>(last - first);
  return walk;
}

// --- numbered places, with gaps

RLEKF_INLINE_HD int64_t first_place(const Block& block, int64_t index, int log2) {
  return (block.first_weight >> log2) + index;
}

RLEKF_INLINE_HD int64_t num_places(int64_t num_weights, int64_t num_blocks, int log2) {
  return (num_weights >> log2) + num_blocks;
}

/// The block that a place belongs to; the place may be in the gap behind it.
RLEKF_INLINE_HD int64_t block_of_place(const Block* blocks, int64_t num_blocks, int64_t place, int log2) {
  return last_not_beyond(num_blocks, place, [&](int64_t i) { return first_place(blocks[i], i, log2); });
}

/// Row sums: one place per unit, those of a row side by side in the order of the strips.
RLEKF_INLINE_HD int64_t row_place(const Block& block, int64_t index, Width width, int64_t row, int64_t strip) {
  const int64_t q = row >> width.log2;  // rows of q strips are above, then q + 1 in each
  const int64_t units_above = ((q * (q - 1) / 2) << width.log2) + (row - (q << width.log2)) * q + row;
  return (block.first_tile >> width.log2) + (block.first_weight >> kTileLog2) + 2 * index + units_above + strip;
}

RLEKF_INLINE_HD int64_t num_row_places(int64_t num_tiles, int64_t num_weights, int64_t num_blocks, Width width) {
  return (num_tiles >> width.log2) + (num_weights >> kTileLog2) + 2 * num_blocks;
}

/// Column sums: one place per strip and worker on it. Both only grow along the order, so their sum never repeats.
RLEKF_INLINE_HD int64_t column_place(const Block& block, int64_t index, Width width, int64_t strip, int64_t worker) {
  return first_place(block, index, kTileLog2 + width.log2) + strip + worker;
}

RLEKF_INLINE_HD int64_t num_column_places(int64_t num_weights, int64_t num_blocks, Width width, int64_t num_workers) {
  return num_places(num_weights, num_blocks, kTileLog2 + width.log2) + num_workers;
}

/// The workers that have a unit of a strip: [first, last].
struct Workers {
  int first, last;
};

RLEKF_INLINE_HD Workers workers_of_strip(const Block& block, Width width, const Runs& runs, int64_t strip) {
  // A run takes the units whose first tile lies between its cuts, rounded up to whole units.
  const int64_t rows = tile_rows(block.size);
  const int64_t first = block.first_tile + tiles_before_strip(rows, width, strip);
  const int64_t last_row = rows - 1, tiles_in_last = last_row - (strip << width.log2) + 1;
  const int64_t end = strip + 1 < num_strips(rows, width)
                          ? block.first_tile + tiles_before_strip(rows, width, strip + 1)
                          : block.first_tile + tile_index(rows, 0);
  const int64_t last = end - (tiles_in_last < width.columns() ? tiles_in_last : width.columns());
  return {runs.owner(static_cast<int>(first)), runs.owner(static_cast<int>(last))};
}

}  // namespace rlekf::cuda
