// The scalars of the filter from one measurement to the next: Algorithm 2, lines 8 and 14, with the guard.
// Written once, for the CPU and for CUDA; rlekf_ext/ops/reference.py says the same in torch.

#pragma once

#include <cmath>
#include <cstdint>

#include "covariance.h"

namespace rlekf {

/// What one measurement does, given y, its cross covariance over the scale: w += gain y, S -= rank_one y y^T.
struct Update {
  double used;          // 1, or 0 if the measurement is skipped
  double shift_growth;  // of the shift since the projection: y includes shift_growth * h
  double gain;          // a beta e
  double rank_one;      // a beta
  double slot;          // row of `pending` for u = sqrt(rank_one) y
};

/// The factor a of Algorithm 2, line 8. It is smaller, down to 0, where the update would leave less than `least` of the
/// variance: what rounding leaves of a smaller one may be negative.
RLEKF_HOST_DEVICE inline double gain_factor(double variance, double noise, double least) {
  if (variance <= least) return 0;
  return fmin(1 / (noise + variance), (variance - least) / (variance * variance));
}

/// Updates the state with one measurement. `product` is h^T y over all blocks, `plain` h^T h; `innovation` is as measured,
/// `left` what remains of it after the earlier measurements of the same pass.
RLEKF_HOST_DEVICE inline Update take_measurement(State& state, double first_shift, double product, double plain,
                                                 double innovation, double left) {
  Update update{0, state.shift - first_shift, 0, 0, 0};
  const double variance = state.scale * product,
               least = kLeastVariance * state.scale * (state.largest + state.shift) * plain;
  Count* skipped = nullptr;
  if (!std::isfinite(innovation)) skipped = &state.skipped_innovation;
  else if (!std::isfinite(variance)) skipped = &state.skipped_jacobian;
  else if (variance < -least) skipped = &state.skipped_variance;
  if (skipped) {
    *skipped += 1;
    state.skipped_in_a_row += 1;
    return update;
  }
  const double lambda = 1 - state.forgetting;

  update.used = 1;
  update.rank_one = state.scale * gain_factor(variance, state.measurement_noise * lambda, least);
  update.gain = update.rank_one * left;
  update.slot = state.num_pending;
  state.num_pending += 1;
  state.num_updates += 1;
  state.skipped_in_a_row = 0;
  state.variance = variance;
  state.rank_one = update.rank_one;
  state.scale /= lambda;
  state.shift += state.process_noise / state.scale;
  state.forgetting *= state.forgetting_rate;
  return update;
}

/// A fold subtracts the outer products of pending vectors from S, and moves a power of two from the scale into S.
struct Fold {
  int64_t num_vectors;  // 0: no fold
  double factor;
};

/// The fold that `num_measurements` more vectors make necessary, if any.
RLEKF_HOST_DEVICE inline Fold fold_due(const State& state, int64_t num_measurements, int64_t capacity) {
  const auto num_pending = static_cast<int64_t>(state.num_pending);
  if (num_pending + num_measurements <= capacity) return {0, 1.0};
  return {num_pending, state.scale > kLargestScale ? ldexp(1.0, ilogb(state.scale)) : 1.0};
}

/// The state after that fold.
RLEKF_HOST_DEVICE inline void note_fold(State& state, const Fold& fold) {
  if (fold.num_vectors == 0) return;
  state.num_pending = 0;
  state.scale /= fold.factor;
  state.shift *= fold.factor;
  state.largest *= fold.factor;
}

}  // namespace rlekf
