// The step in two ops for processes that share the tiles: any run of P's tiles, in the order of memory.
//
//     multiply     each thread block reads its run of the tiles given: row sums, and the column sums of each tile
//     -- grid barrier --
//                  z = S h of these tiles, in a fixed order
//
//     finish       from the sum of z over all processes: shift, pending vectors, inner products
//
// A run of tiles in the order of memory has few rows, so the sums of a column cannot stay with a thread block as in
// visit(): each tile leaves 64 numbers for every measurement, 1.6 % of a tile in float64.

#pragma once

#include "recursion.cuh"
#include "reduce.cuh"
#include "task.cuh"
#include "visit.cuh"

namespace rlekf::cuda {

/// A position among the tiles in the order of memory, with `left` tiles of the run to go, this one included.
struct PartWalk {
  const Block* blocks;
  int block, row, col;
  int left;

  RLEKF_INLINE_HD int64_t tile() const { return blocks[block].first_tile + tile_index(row, col); }

  RLEKF_INLINE_HD void advance(Width) {
    --left;
    if (++col <= row) return;
    col = 0;
    if (++row < tile_rows(blocks[block].size) || left == 0) return;
    ++block;
    row = 0;
  }
};

RLEKF_INLINE_HD PartWalk part_of(const Block* blocks, int64_t num_blocks, const Runs& runs, int cta) {
  const int64_t begin = runs.begin(cta);
  PartWalk walk{blocks, 0, 0, 0, static_cast<int>(runs.begin(cta + 1) - begin)};
  if (walk.left == 0) return walk;
  walk.block = static_cast<int>(last_not_beyond(num_blocks, begin, [&](int64_t i) { return blocks[i].first_tile; }));
  const int64_t local = begin - blocks[walk.block].first_tile;
  walk.row = static_cast<int>(tile_row(local));
  walk.col = static_cast<int>(local - tile_index(walk.row, 0));
  return walk;
}

/// Row sums: a slot for each tile row and thread block on it. Both grow along the order, so their sum never repeats.
RLEKF_INLINE_HD int64_t piece_slot(const Block& block, int64_t index, int64_t row, int64_t cta) {
  return first_slot(block, index, kTileLog2) + row + cta;
}

template <typename Scalar, int kM>
RLEKF_PHASE void visit_part(const Task& task) {
  const Covariance& p = task.p;
  constexpr Width kWidth{0};
  const VisitShared offsets = visit_shared(kM, kWidth, task.launch.stages, sizeof(Scalar));
  const Panel<kM> shared(kWidth, offsets);
  PartWalk at = part_of(p.blocks, p.num_blocks, task.launch.tiles, cta());
  Ring<Scalar, PartWalk> ring(task, offsets.ring, at);
  load_state(task);
  const Fold due = fold_due(own_state(), task.m.count, p.capacity);
  while (at.left > 0) {
    const int index = at.block, row = at.row;
    begin_segment(task, shared, index, row);
    double rows[kM][kRowsPerThread] = {};
    for (bool begins = true; at.left > 0 && at.block == index && at.row == row; begins = false) {
      const int col = at.col;
      const int64_t tile = at.tile();
      begin_panel(task, shared, index, col);
      Pair<Scalar>* entries = ring.acquire();
      if (due.num_vectors > 0) fold_tile<Scalar, kM>(task, due, at, begins, shared.u_rows, entries);
      const Scalar* from = ring.next_tile();
      multiply_tile(shared, entries, 0, col == row, rows);
      ring.prefetch(entries, from);
      write_columns(shared, task.workspace.column_sum<kM>(tile, kWidth));
      at.advance(kWidth);
    }
    write_rows<kM>(task.workspace.row_sum<kM>(piece_slot(p.blocks[index], index, row, cta())), rows);
  }
}

/// z += of this thread's parts: the pieces of the tile row, then the tiles below the diagonal of its column.
template <int kM>
RLEKF_DEVICE void add_parts_of_part(const Task& task, const TileRow& at, double (&sums)[kM]) {
  const Runs& tiles = task.launch.tiles;
  const int64_t num_tiles = task.p.num_tiles, begin = at.block.first_tile + tile_index(at.row, 0);
  const int64_t first = begin > 0 ? begin : 0, last = begin + at.row < num_tiles ? begin + at.row : num_tiles - 1;
  if (first <= last) {
    const int64_t end = tiles.owner(static_cast<int>(last));
    for (int64_t c = tiles.owner(static_cast<int>(first)) + at.group(); c <= end; c += kGroups) {
      const double* from = task.workspace.row_sum<kM>(piece_slot(at.block, at.index, at.row, c)) + at.column();
      RLEKF_UNROLL
      for (int k = 0; k < kM; ++k) sums[k] += from[k * kTile];
    }
  }
  const int64_t rows = tile_rows(at.block.size);
  for (int64_t row = at.row + 1 + at.group(); row < rows; row += kGroups) {
    const int64_t tile = at.block.first_tile + tile_index(row, at.row);
    if (tile < 0 || tile >= num_tiles) continue;
    const double* from = task.workspace.column_sum<kM>(tile, {0}) + at.column();
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) sums[k] += from[k * kTile];
  }
}

template <int kM>
RLEKF_PHASE void reduce_part(const Task& task) {
  const Covariance& p = task.p;
  auto* parts = shared_at<double>(reduce_shared(kM).parts);
  const Rows own = own_rows(task);
  int64_t index = -1;
  for (int slot = own.first; slot < own.last; ++slot) {
    TileRow at;
    index = next_block_of_slot(p.blocks, p.num_blocks, slot, kTileLog2, index);
    at.index = index;
    at.block = p.blocks[index];
    at.row = slot - first_slot(at.block, index, kTileLog2);
    if (at.row >= tile_rows(at.block.size)) continue;  // a gap
    double sums[kM] = {};
    add_parts_of_part(task, at, sums);
    sync_threads();  // `parts` of the row before have been read
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) parts[(k * kGroups + at.group()) * kTile + at.column()] = sums[k];
    sync_threads();
    for (int n = thread(); n < task.m.count * kTile; n += kThreads) {
      const int k = n / kTile, c = n % kTile;
      if (at.row * kTile + c >= at.block.size) continue;
      double sum = 0;
      RLEKF_UNROLL
      for (int g = 0; g < kGroups; ++g) sum += parts[(k * kGroups + g) * kTile + c];
      task.projection.cross[k * p.num_weights + at.block.first_weight + at.row * kTile + c] = sum;
    }
  }
}

template <typename Scalar, int kM>
RLEKF_DEVICE void multiply_part(const Task& task) {
  visit_part<Scalar, kM>(task);
  sync_grid();
  reduce_part<kM>(task);
}

template <int kM>
RLEKF_DEVICE void finish_part(const Task& task) {
  load_state(task);
  const Fold due = fold_due(own_state(), task.m.count, task.p.capacity);
  if (due.num_vectors == 0) dot_pending<kM>(task, static_cast<int>(own_state().num_pending));
  sync_threads();
  if (thread() == 0) note_fold(own_state(), due);
  sync_grid();
  reduce<kM, true>(task);
  sync_grid();
  gather_all<kM>(task);
  if (cta() == 0) copy_state(own_state(), *task.p.state);
}

}  // namespace rlekf::cuda
