// The phases after the projection. The inner products are added up, by all thread blocks if they are many. The first
// thread block runs the recursion of ../recursion.h over the M measurements; then all thread blocks apply the updates to
// weights and pending vectors.

#pragma once

#include "task.cuh"

namespace rlekf::cuda {

/// How many thread blocks add up the inner products.
RLEKF_DEVICE int num_gathering(const Task& task) {
  return 2 * task.p.num_blocks * task.m.count * task.m.count <= kFewSums ? 1 : num_ctas();
}

/// In the first `ctas` thread blocks: the inner products, over the rows of each block.
template <int kM>
RLEKF_PHASE void gather_gram(const Task& task, int ctas) {
  const Covariance& p = task.p;
  const int count = task.m.count, num_blocks = static_cast<int>(p.num_blocks);
  const Runs& rows = task.launch.rows;
  const int sums = 2 * num_blocks * count * count;
  int together = 32;  // threads that share a sum
  while (together > 1 && sums * together > ctas * kThreads) together /= 2;
  for (int first = cta() * kThreads / together; first < sums; first += ctas * kThreads / together) {
    const int n = first + thread() / together;
    double sum = 0;
    if (n < sums) {
      const int which = n / (num_blocks * count * count), index = n / (count * count) % num_blocks;
      const int j = n / count % count, k = n % count;
      const Block block = p.blocks[index];
      const auto begin = static_cast<int>(first_slot(block, index, kTileLog2));
      const int last = rows.owner(begin + static_cast<int>(tile_rows(block.size)) - 1);
      const int part = rows.owner(begin) + thread() % together, parts = (last - part + together) / together;
      const double* from = task.workspace.gram_part<kM>(part, index) + (which * kM + j) * kM + k;
      RLEKF_UNROLL_BY_4
      for (int w = 0; w < parts; ++w) sum += from[static_cast<int64_t>(w) * together * 2 * kM * kM];
    }
    for (int mask = 1; mask < together; mask *= 2) sum += shuffle_xor(sum, mask);
    if (n < sums && thread() % together == 0) task.projection.gram[n] = sum;
  }
}

/// The inner products, in as many thread blocks as there is work for. If these are several, they wait for one another.
template <int kM>
RLEKF_PHASE void gather_all(const Task& task) {
  const int gathering = num_gathering(task);
  if (cta() < gathering) gather_gram<kM>(task, gathering);
  if (gathering > 1) sync_grid();
}

/// In the first thread block: the recursion over the M measurements, on inner products alone. Block by block,
///     y_i^T h_j = z_i^T h_j + (shift_i - shift_0) h_i^T h_j - sum_{k<i} rank_one_k (y_k^T h_i) (y_k^T h_j)
template <int kM>
RLEKF_PHASE void run_recursion(const Task& task) {
  const Covariance& p = task.p;
  const int count = task.m.count;
  const double* inner = task.projection.gram;
  const double* plain = inner + p.num_blocks * count * count;
  Update* updates = task.workspace.updates;
  State& state = own_state();
  constexpr RecursionShared kOffsets = recursion_shared(kM);
  auto* totals = shared_at<double>(kOffsets.totals);
  auto* parts = shared_at<double>(kOffsets.parts);

  sync_threads();
  const double first_shift = state.shift;
  for (int i = 0; i < count; ++i) {
    const double shift_growth = state.shift - first_shift;
    double sums[kM + 1] = {};  // y_i^T h_j, and h_i^T h_i
    for (int64_t index = thread(); index < p.num_blocks; index += kThreads) {
      double* y = task.workspace.product<kM>(index);
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
      sums[kM] += plain[(index * count + i) * count + i];
    }
    RLEKF_UNROLL
    for (int j = 0; j <= kM; ++j) {
      const double sum = warp_sum(sums[j]);
      if (lane() == 0) parts[warp() * (kM + 1) + j] = sum;
    }
    sync_threads();
    if (thread() == 0) {
      const auto total = [&](int j) {
        double sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += parts[w * (kM + 1) + j];
        return sum;
      };
      for (int j = i; j < count; ++j) totals[i * kM + j] = total(j);
      double left = task.m.innovation[i];
      for (int k = 0; k < i; ++k) {
        if (updates[k].used != 0) left -= updates[k].gain * totals[k * kM + i];
      }
      updates[i] = take_measurement(state, first_shift, totals[i * kM + i], total(kM), task.m.innovation[i], left);
    }
    sync_threads();
  }
}

/// Weights and pending vectors, one weight per thread at a time:
///     y_j = z_j + (shift_j - shift_0) h_j - sum_{k<j} rank_one_k (y_k^T h_j) y_k
///     w += gain_j y_j, u_j = sqrt(rank_one_j) y_j
template <int kM>
RLEKF_PHASE void apply(const Task& task) {
  const Covariance& p = task.p;
  const Update* updates = task.workspace.updates;
  const Rows own = own_rows(task);
  int64_t index = -1;
  for (int64_t n = own.first * kTile + thread(); n < own.last * kTile; n += kThreads) {
    index = next_block_of_slot(p.blocks, p.num_blocks, n / kTile, kTileLog2, index);
    const Block block = p.blocks[index];
    const int64_t local = n - first_slot(block, index, kTileLog2) * kTile;
    if (local >= block.size) continue;
    const int64_t weight = block.first_weight + local;
    const double* products = task.workspace.product<kM>(index);
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

}  // namespace rlekf::cuda
