// The scalars of the filter from one measurement to the next: Algorithm 2, lines 8 and 14, with the guard and the
// options that bound P. Written once, for the CPU and for CUDA; rlekf_ext/ops/reference.py says the same in torch.

#pragma once

#include <cmath>
#include <cstdint>

#include "covariance.h"

namespace rlekf {

/// What one measurement does, once y (the cross covariance over the scale) is known: w += gain y, S -= rank_one y y^T.
struct Update {
  double used;      // 1, or 0 when the measurement is skipped
  double shift;     // growth of the shift between the projection and this measurement: y holds shift * h
  double gain;      // a beta e
  double rank_one;  // a beta
  double slot;      // row of `pending` that takes u = sqrt(rank_one) y
};

/// Takes one measurement into the state. `product` is h^T y over all blocks; `innovation` as measured; `left` what the
/// earlier measurements of the same pass left of it.
RLEKF_HOST_DEVICE inline Update take_measurement(double* state, double first_shift, double product, double innovation,
                                                 double left) {
  Update update{0, state[kShift] - first_shift, 0, 0, 0};
  const double variance = state[kScale] * product;
  State cause = kNumState;
  if (!std::isfinite(innovation)) cause = kSkippedInnovation;
  else if (!std::isfinite(variance)) cause = kSkippedJacobian;
  else if (variance < 0) cause = kSkippedVariance;
  if (cause != kNumState) {
    state[cause] += 1;
    state[kSkippedInARow] += 1;
    return update;
  }
  const double noise = state[kMeasurementNoise];
  double lambda = 1 - state[kForgetting];
  if (variance < state[kLeastExcitation] * noise) lambda = 1;
  const double largest = state[kScale] * (state[kLargestDiagonal] + state[kShift]);
  lambda = fmin(1.0, fmax(lambda, largest / state[kDiagonalCeiling]));

  update.used = 1;
  update.rank_one = state[kScale] / (noise * lambda + variance);
  update.gain = update.rank_one * left;
  update.slot = state[kNumPending];
  state[kNumPending] += 1;
  state[kNumUpdates] += 1;
  state[kSkippedInARow] = 0;
  state[kVariance] = variance;
  state[kRankOne] = update.rank_one;
  state[kScale] /= lambda;
  state[kShift] += state[kProcessNoise] / state[kScale];
  state[kProcessNoise] = fmax(state[kLeastProcessNoise], state[kProcessNoise] * state[kProcessNoiseDecay]);
  state[kForgetting] *= state[kForgettingRate];
  return update;
}

/// What a fold does in a pass: it takes off so many waiting vectors, and moves a power of two from the scale into S.
struct Fold {
  int64_t num_vectors;  // 0: no fold
  double factor;
};

/// The fold that `num_measurements` more vectors make necessary, if any.
RLEKF_HOST_DEVICE inline Fold fold_due(const double* state, int64_t num_measurements, int64_t capacity) {
  const auto num_pending = static_cast<int64_t>(state[kNumPending]);
  if (num_pending + num_measurements <= capacity) return {0, 1.0};
  return {num_pending, state[kScale] > kLargestScale ? exp2(static_cast<double>(ilogb(state[kScale]))) : 1.0};
}

/// The state after that fold.
RLEKF_HOST_DEVICE inline void note_fold(double* state, const Fold& fold) {
  if (fold.num_vectors == 0) return;
  state[kNumPending] = 0;
  state[kScale] /= fold.factor;
  state[kShift] *= fold.factor;
  state[kLargestDiagonal] *= fold.factor;
}

}  // namespace rlekf
