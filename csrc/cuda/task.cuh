// What all phases of the kernel share: the task of a launch, and helpers for threads, warps and shared memory.

#pragma once

#include "../step.h"
#include "launch.h"

namespace rlekf::cuda {

constexpr int kProject = 1, kCorrect = 2;

/// The arguments of a launch.
struct Task {
  int phases;  // kProject, kCorrect or both
  Covariance p;
  Measurements m;
  Projection projection;
  double* weights;
  Launch launch;
  Workspace workspace;
};

template <typename Scalar>
struct alignas(2 * sizeof(Scalar)) Pair {
  Scalar x, y;
};

RLEKF_DEVICE int lane() { return thread() % 32; }
RLEKF_DEVICE int warp() { return thread() / 32; }

RLEKF_DEVICE double warp_sum(double value) {
  RLEKF_UNROLL
  for (int mask = 16; mask >= 1; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <typename T>
RLEKF_DEVICE T* shared_at(int64_t offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

/// The thread block's own copy of the filter's scalars, still valid while the first thread block changes those in
/// global memory.
RLEKF_DEVICE State& own_state() { return *shared_at<State>(kSharedState); }

RLEKF_DEVICE void copy_state(const State& from, State& to) {
  const auto* in = reinterpret_cast<const double*>(&from);
  auto* out = reinterpret_cast<double*>(&to);
  for (int n = thread(); n < kNumState; n += kThreads) out[n] = in[n];
}

RLEKF_DEVICE void load_state(const Task& task) {
  copy_state(*task.p.state, own_state());
  sync_threads();
}

/// Entry `weight` of a block in Jacobian k; zero beyond the block's end and for a k that only rounds up the number.
RLEKF_DEVICE double jacobian_entry(const Task& task, int k, const Block& block, int64_t weight) {
  if (k >= task.m.count || weight >= block.size) return 0.0;
  return task.m.jacobian[k * task.p.num_weights + block.first_weight + weight];
}

/// The tile rows that this thread block reduces and applies: slots [first, last) of kTile weights.
struct Rows {
  int first, last;
};

RLEKF_DEVICE Rows own_rows(const Task& task) {
  const Runs& rows = task.launch.rows;
  if (cta() >= rows.ctas) return {0, 0};
  return {rows.begin(cta()), rows.begin(cta() + 1)};
}

}  // namespace rlekf::cuda
