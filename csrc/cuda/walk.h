// The order in which a grid of thread blocks (CTAs) visits the tiles, and the slots of their partial sums. Index
// arithmetic only, on host and device: no list is built, sent or stored, and the host never reads `layout`.
//
// A block of the covariance is cut into column panels of `width` tile columns (a power of two). Its tiles are visited
// panel by panel and, within a panel, row by row: the sums of a panel's columns then stay with a thread block all the
// way down. The tiles of one row in one panel are a row segment; runs begin and end between segments. A position counts
// tiles in this order; a block's `first_tile` is the same in this order as in memory.
//
//     tile columns   0 1 2 3 | 4 5 6        width 4: panel 0 has columns 0 to 3 and rows 0 to 6, panel 1 has columns
//     tile row 4     * * * * | *            4 to 6 and rows 4 to 6. "* * * *" is the segment (panel 0, row 4).
//
// Partial sums have numbered slots. The numbers leave gaps between blocks, so that they follow from the layout row of
// one block: a slot for every 2^log2 weights begins, for block `index`, at first_weight / 2^log2 + index.

#pragma once

#include "../covariance.h"

namespace rlekf::cuda {

#define RLEKF_INLINE_HD RLEKF_HOST_DEVICE inline

// Divisors are powers of two, given by their logarithm: a GPU divides 64-bit numbers slowly and with many registers.
constexpr int kTileLog2 = 6;
static_assert(int64_t{1} << kTileLog2 == kTile);

/// Number of tile columns of a panel.
struct Width {
  int log2;
  RLEKF_INLINE_HD int columns() const { return 1 << log2; }
};

/// Number of tiles before panel `panel` of a block with `rows` tile rows. It must be one of the block's panels.
RLEKF_INLINE_HD int64_t tiles_before_panel(int64_t rows, Width width, int64_t panel) {
  const int64_t columns = panel << width.log2;  // less the triangle of these columns above the diagonal
  return columns * rows - columns * (columns - 1) / 2;
}

RLEKF_INLINE_HD int64_t num_panels(int64_t rows, Width width) { return (rows + width.columns() - 1) >> width.log2; }

/// The index of the last of `count` ascending numbers first(0), first(1), ... that is at most `wanted`; first(0) is.
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

/// A position in the order, with `left` tiles of the run to go, this one included. Small, since a GPU thread holds two:
/// what can be read again from `blocks` is not stored.
struct Walk {
  const Block* blocks;
  int block;
  int panel, row, col;  // within the block
  int left;

  RLEKF_INLINE_HD int rows() const { return static_cast<int>(tile_rows(blocks[block].size)); }

  /// Index of the tile in memory.
  RLEKF_INLINE_HD int64_t tile() const { return blocks[block].first_tile + tile_index(row, col); }

  RLEKF_INLINE_HD bool ends_segment(Width width) const { return col == row || col == ((panel + 1) << width.log2) - 1; }

  RLEKF_INLINE_HD void enter(int64_t index) {
    block = static_cast<int>(index);
    panel = row = col = 0;
  }

  /// To the next tile. Reads the next block only if there is one.
  RLEKF_INLINE_HD void advance(Width width) {
    --left;
    if (!ends_segment(width)) {
      ++col;
      return;
    }
    const int end = rows();
    if (++row == end) {
      ++panel;
      row = panel << width.log2;
    }
    col = panel << width.log2;
    if (row >= end && left > 0) enter(block + 1);
  }
};

/// The position of the first segment at or after position `wanted`; moves the walk there (with left = 0).
RLEKF_INLINE_HD int64_t first_segment(Walk& walk, int64_t num_blocks, int64_t num_tiles, Width width, int64_t wanted) {
  if (wanted >= num_tiles) return num_tiles;
  const Block* blocks = walk.blocks;
  walk.enter(last_not_beyond(num_blocks, wanted, [&](int64_t i) { return blocks[i].first_tile; }));
  const int rows = walk.rows();
  const int64_t first_tile = blocks[walk.block].first_tile, local = wanted - first_tile;
  walk.panel = static_cast<int>(last_not_beyond(num_panels(rows, width), local,
                                                [&](int64_t panel) { return tiles_before_panel(rows, width, panel); }));
  walk.row = walk.panel << width.log2;
  int64_t position = tiles_before_panel(rows, width, walk.panel);
  for (int length = 1; length < width.columns() && position < local && walk.row < rows; ++length) {
    position += length;  // the panel's top rows end at the diagonal
    ++walk.row;
  }
  if (position < local && walk.row < rows) {
    const int segments = static_cast<int>((local - position + width.columns() - 1) >> width.log2);
    walk.row += segments;
    position += static_cast<int64_t>(segments) << width.log2;
  }
  position += first_tile;
  if (walk.row == rows) walk.row = ++walk.panel << width.log2;
  if (walk.row >= rows && position < num_tiles) walk.enter(walk.block + 1);
  walk.col = walk.panel << width.log2;
  return position;
}

/// `total` items cut into runs, one per thread block; the first `longer` runs have one more than `each`. ctas <= total.
struct Runs {
  int total, ctas, each, longer;

  RLEKF_INLINE_HD int begin(int cta) const { return cta * each + (cta < longer ? cta : longer); }
  RLEKF_INLINE_HD int owner(int item) const {
    const int in_longer = longer * (each + 1);
    return item < in_longer ? item / (each + 1) : longer + (item - in_longer) / each;
  }
};

inline Runs runs_of(int64_t total, int64_t ctas) {
  return {static_cast<int>(total), static_cast<int>(ctas), static_cast<int>(total / ctas),
          static_cast<int>(total % ctas)};
}

/// The tiles of one thread block.
RLEKF_INLINE_HD Walk run_of(const Block* blocks, int64_t num_blocks, Width width, const Runs& runs, int cta) {
  Walk end{blocks, 0, 0, 0, 0, 0}, walk = end;
  const int64_t last = first_segment(end, num_blocks, runs.total, width, runs.begin(cta + 1));
  const int64_t first = first_segment(walk, num_blocks, runs.total, width, runs.begin(cta));
  walk.left = static_cast<int>(last - first);
  return walk;
}

// --- numbered slots, with gaps

RLEKF_INLINE_HD int64_t first_slot(const Block& block, int64_t index, int log2) {
  return (block.first_weight >> log2) + index;
}

RLEKF_INLINE_HD int64_t num_slots(int64_t num_weights, int64_t num_blocks, int log2) {
  return (num_weights >> log2) + num_blocks;
}

/// The block that a slot belongs to; the slot may be in the gap after it.
RLEKF_INLINE_HD int64_t block_of_slot(const Block* blocks, int64_t num_blocks, int64_t slot, int log2) {
  return last_not_beyond(num_blocks, slot, [&](int64_t i) { return first_slot(blocks[i], i, log2); });
}

/// The same for slots that ascend: `before` is the block of an earlier slot, or -1.
RLEKF_INLINE_HD int64_t next_block_of_slot(const Block* blocks, int64_t num_blocks, int64_t slot, int log2,
                                           int64_t before) {
  if (before < 0) return block_of_slot(blocks, num_blocks, slot, log2);
  while (before + 1 < num_blocks && first_slot(blocks[before + 1], before + 1, log2) <= slot) ++before;
  return before;
}

/// Row sums: one slot per segment; those of a row are adjacent, in the order of the panels.
RLEKF_INLINE_HD int64_t row_slot(const Block& block, int64_t index, Width width, int64_t row, int64_t panel) {
  const int64_t q = row >> width.log2;  // the rows above have up to q panels, this one has q + 1
  const int64_t segments_above = ((q * (q - 1) / 2) << width.log2) + (row - (q << width.log2)) * q + row;
  return (block.first_tile >> width.log2) + (block.first_weight >> kTileLog2) + 2 * index + segments_above + panel;
}

RLEKF_INLINE_HD int64_t num_row_slots(int64_t num_tiles, int64_t num_weights, int64_t num_blocks, Width width) {
  return (num_tiles >> width.log2) + (num_weights >> kTileLog2) + 2 * num_blocks;
}

/// Column sums: one slot per panel and thread block on it. Both grow along the order, so their sum never repeats.
RLEKF_INLINE_HD int64_t column_slot(const Block& block, int64_t index, Width width, int64_t panel, int64_t cta) {
  return first_slot(block, index, kTileLog2 + width.log2) + panel + cta;
}

RLEKF_INLINE_HD int64_t num_column_slots(int64_t num_weights, int64_t num_blocks, Width width, int64_t num_ctas) {
  return num_slots(num_weights, num_blocks, kTileLog2 + width.log2) + num_ctas;
}

/// The thread blocks that have a segment of a panel: [first, last].
struct CtaRange {
  int first, last;
};

RLEKF_INLINE_HD CtaRange ctas_of_panel(const Block& block, Width width, const Runs& runs, int64_t panel) {
  // A run has the segments whose first tile lies between its cuts.
  const int64_t rows = tile_rows(block.size);
  const int64_t first = block.first_tile + tiles_before_panel(rows, width, panel);
  const int64_t last_row = rows - 1, tiles_in_last = last_row - (panel << width.log2) + 1;
  const int64_t end = panel + 1 < num_panels(rows, width)
                          ? block.first_tile + tiles_before_panel(rows, width, panel + 1)
                          : block.first_tile + tile_index(rows, 0);
  const int64_t last = end - (tiles_in_last < width.columns() ? tiles_in_last : width.columns());
  return {runs.owner(static_cast<int>(first)), runs.owner(static_cast<int>(last))};
}

}  // namespace rlekf::cuda
