// From tensors to pointers, with the argument checks that all devices share.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "step.h"

namespace rlekf {

using torch::stable::Tensor;

using torch::headeronly::ScalarType;

constexpr int64_t kAny = -1;  // in a shape

/// -1: CPU.
int device_of(const Tensor& tensor);

/// Checks shape, dtype, device (-1: CPU) and contiguity. Its errors give the rule and the value.
void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype, int device);

/// Each checks shape, dtype, device and contiguity and returns the pointers. Its errors give the rule and the value.
Covariance covariance_of(const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout);
/// For ops that never read S, on the device of the jacobian.
Covariance covariance_without_tiles(const Tensor& pending, const Tensor& state, const Tensor& layout,
                                    const Tensor& jacobian);
Measurements measurements_of(const Covariance& covariance, const Tensor& jacobian);
Measurements measurements_of(const Covariance& covariance, const Tensor& jacobian, const Tensor& innovation);
Projection projection_of(const Covariance& covariance, const Measurements& measurements, const Tensor& cross,
                         const Tensor& gram);
double* weights_of(const Covariance& covariance, const Tensor& weights);

}  // namespace rlekf
