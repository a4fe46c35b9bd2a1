// The phase between the visit and the recursion: z = S h + shift h - sum_i u_i (u_i^T h), tile row by tile row, and its
// inner products with H. The parts of S h are added in a fixed order. It reuses the shared memory of visit().

#pragma once

#include "task.cuh"

namespace rlekf::cuda {

/// A row of tiles. Of its kTile weights, this thread has number thread() % kTile, together with the kGroups - 1 threads
/// of the other groups.
struct TileRow {
  Block block;
  int64_t index;  // of the block
  int64_t row;    // within the block

  RLEKF_DEVICE static int column() { return thread() % kTile; }
  RLEKF_DEVICE static int group() { return thread() / kTile; }
  RLEKF_DEVICE int64_t weight() const { return row * kTile + column(); }
};

/// sums += this thread's parts of S h: row sums of the panels up to the diagonal, then column sums of the thread blocks
/// on the row's own panel.
template <int kM>
RLEKF_DEVICE void add_parts(const Task& task, const TileRow& at, double (&sums)[kM]) {
  const Width width = task.launch.width;
  const int64_t panel = at.row >> width.log2;
  const int num_rows = (static_cast<int>(panel) - at.group() + kGroups) / kGroups;
  const double* from =
      task.workspace.row_sum<kM>(row_slot(at.block, at.index, width, at.row, at.group())) + at.column();
  RLEKF_UNROLL_BY_4
  for (int n = 0; n < num_rows; ++n) {
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) sums[k] += from[(n * kGroups * kM + k) * kTile];
  }
  const CtaRange ctas = ctas_of_panel(at.block, width, task.launch.tiles, panel);
  const int num_columns = (ctas.last - ctas.first - at.group() + kGroups) / kGroups;
  from = task.workspace.column_sum<kM>(column_slot(at.block, at.index, width, panel, ctas.first + at.group()), width) +
         (at.row - (panel << width.log2)) * kTile + at.column();
  RLEKF_UNROLL_BY_4
  for (int n = 0; n < num_columns; ++n) {
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) sums[k] += from[((n * kGroups * kM + k) << width.log2) * kTile];
  }
}

/// dots (count, kM) = u_i^T h over the block, of pending vectors `first` on.
template <int kM>
RLEKF_DEVICE void gather_dots(const Task& task, const TileRow& at, int64_t first, int count, double* dots) {
  sync_threads();
  const int64_t begin = first_slot(at.block, at.index, kDotLog2);
  const int64_t end = begin + ((at.block.size + (1 << kDotLog2) - 1) >> kDotLog2);
  for (int n = thread(); n < count * kM; n += kThreads) {
    double sum = 0;
    for (int64_t q = begin; q < end; ++q) sum += task.workspace.dot<kM>(q, first, task.p.capacity)[n];
    dots[n] = sum;
  }
  sync_threads();
}

/// sums -= this thread's parts of sum_i u_i (u_i^T h). `dots` holds the block's inner products, unless there are too
/// many for one gathering.
template <int kM>
RLEKF_DEVICE void subtract_pending(const Task& task, const TileRow& at, int64_t num_pending, bool enters_block,
                                   double* dots, double (&sums)[kM]) {
  const int64_t num_weights = task.p.num_weights;
  const bool inside = at.weight() < at.block.size;
  for (int64_t first = 0; first < num_pending; first += kPendingAtOnce) {
    const int now = static_cast<int>(num_pending - first < kPendingAtOnce ? num_pending - first : kPendingAtOnce);
    if (enters_block || num_pending > kPendingAtOnce) gather_dots<kM>(task, at, first, now, dots);
    const double* u = task.p.pending + first * num_weights + at.block.first_weight + at.weight();
    double entries[kPendingAtOnce / kGroups];
    RLEKF_UNROLL
    for (int n = 0; n < kPendingAtOnce / kGroups; ++n) {
      const int i = at.group() + n * kGroups;
      entries[n] = inside && i < now ? u[i * num_weights] : 0.0;
    }
    RLEKF_UNROLL
    for (int n = 0; n < kPendingAtOnce / kGroups; ++n) {
      const int i = at.group() + n * kGroups;
      RLEKF_UNROLL
      for (int k = 0; k < kM; ++k) sums[k] -= entries[n] * (i < now ? dots[i * kM + k] : 0.0);
    }
  }
}

/// z and h of the tile row (kM, kTile), from the groups' sums in `parts`; z goes to the projection, too.
template <int kM>
RLEKF_DEVICE void finish_row(const Task& task, const TileRow& at, double shift, const double* parts, double* z,
                             double* h) {
  for (int n = thread(); n < kM * kTile; n += kThreads) {
    const int k = n / kTile, c = n % kTile;
    const bool real = k < task.m.count && at.row * kTile + c < at.block.size;
    const int64_t entry = k * task.p.num_weights + at.block.first_weight + at.row * kTile + c;
    double sum = 0;
    RLEKF_UNROLL
    for (int g = 0; g < kGroups; ++g) sum += parts[(k * kGroups + g) * kTile + c];
    h[n] = real ? task.m.jacobian[entry] : 0.0;
    z[n] = real ? sum + shift * h[n] : 0.0;
    if (real) task.projection.cross[entry] = z[n];
  }
}

/// gram (2, kM, kM) += h_j^T z_k, then h_j^T h_k, over the tile row; a warp each.
template <int kM>
RLEKF_DEVICE void inner_products(const double* z, const double* h, double* gram) {
  for (int n = warp(); n < 2 * kM * kM; n += kWarps) {
    const int j = n / kM % kM, k = n % kM;
    const double* other = (n < kM * kM ? z : h) + k * kTile;
    const double sum =
        warp_sum(h[j * kTile + lane()] * other[lane()] + h[j * kTile + 32 + lane()] * other[32 + lane()]);
    if (lane() == 0) gram[n] += sum;
  }
}

/// With kSummed, `cross` already holds S h.
template <int kM, bool kSummed = false>
RLEKF_PHASE void reduce(const Task& task) {
  const Covariance& p = task.p;
  const auto num_pending = static_cast<int64_t>(own_state().num_pending);
  const double shift = own_state().shift;
  constexpr ReduceShared kOffsets = reduce_shared(kM);
  auto* parts = shared_at<double>(kOffsets.parts);
  auto* z = shared_at<double>(kOffsets.z);
  auto* h = shared_at<double>(kOffsets.h);
  auto* dots = shared_at<double>(kOffsets.dots);
  auto* gram = shared_at<double>(kOffsets.gram);

  const Rows own = own_rows(task);
  int64_t index = -1;  // the block that `gram` and `dots` belong to
  const auto leave_block = [&] {
    sync_threads();
    double* out = task.workspace.gram_part<kM>(cta(), index);
    for (int n = thread(); n < 2 * kM * kM; n += kThreads) out[n] = gram[n];
  };
  for (int slot = own.first; slot < own.last; ++slot) {
    TileRow at;
    at.index = next_block_of_slot(p.blocks, p.num_blocks, slot, kTileLog2, index);
    at.block = p.blocks[at.index];
    at.row = slot - first_slot(at.block, at.index, kTileLog2);
    if (at.row >= tile_rows(at.block.size)) continue;  // a gap
    const bool enters_block = at.index != index;
    if (enters_block) {
      if (index >= 0) leave_block();
      index = at.index;
      for (int n = thread(); n < 2 * kM * kM; n += kThreads) gram[n] = 0;  // the numbers that this thread has just read
    }

    double sums[kM] = {};
    if constexpr (!kSummed) {
      add_parts(task, at, sums);
    } else if (at.group() == 0 && at.weight() < at.block.size) {
      for (int k = 0; k < task.m.count; ++k) {
        sums[k] = task.projection.cross[k * p.num_weights + at.block.first_weight + at.weight()];
      }
    }
    subtract_pending(task, at, num_pending, enters_block, dots, sums);
    RLEKF_UNROLL
    for (int k = 0; k < kM; ++k) parts[(k * kGroups + at.group()) * kTile + at.column()] = sums[k];
    sync_threads();
    finish_row<kM>(task, at, shift, parts, z, h);
    sync_threads();
    inner_products<kM>(z, h, gram);
  }
  if (index >= 0) leave_block();
}

}  // namespace rlekf::cuda
