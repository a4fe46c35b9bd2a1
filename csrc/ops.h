// From tensors to pointers: the checks that every device's registration shares.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "step.h"

namespace rlekf {

using torch::stable::Tensor;

/// Checks shapes, dtypes and contiguity, and returns the pointers. Throws with the rule and the value it got.
Covariance covariance_of(const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout);
Measurements measurements_of(const Covariance& covariance, const Tensor& jacobian);
Measurements measurements_of(const Covariance& covariance, const Tensor& jacobian, const Tensor& innovation);
Projection projection_of(const Covariance& covariance, const Measurements& measurements, const Tensor& cross,
                         const Tensor& gram);
double* weights_of(const Covariance& covariance, const Tensor& weights);

}  // namespace rlekf
