// The layers of a net over many rows, which lie side by side in vectors: a panel is (units, numbers, kWidth), a unit
// being kWidth rows. `x_bar` is the derivative of a result by x, `x_dot` that of x along a direction.

#pragma once

#include "../network.h"
#include "matrix.h"

namespace rlekf::cpu {

/// Units are `stride` numbers apart, which lets them be parts of larger records.
template <typename Scalar>
struct Panel {
  Scalar* data = nullptr;
  int64_t stride = 0;
  Panel from(int64_t unit) const { return {data + unit * stride, stride}; }
};

/// What is known of a layer: of its inputs x and z = x W + b.
template <typename Scalar>
struct Trace {
  Panel<Scalar> x, h;          // h: before time step and shortcut
  Panel<Scalar> y_bar, z_bar;  // of the sum of the net's outputs
  Panel<Scalar> x_dot, z_dot;
};

template <typename Scalar>
using Traces = std::vector<Trace<Scalar>>;

/// Fills in h, and x of all layers but the first.
template <typename Scalar>
void forward(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces, Panel<Scalar> y);

/// With y_bar of the last layer: fills in z_bar and y_bar of the others, and x_bar of the first unless it has no data.
template <typename Scalar>
void backward(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces, Panel<Scalar> x_bar);

/// With x_dot of the first layer: fills in z_dot, and x_dot of the others.
template <typename Scalar>
void forward_along(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces);

/// Adds to `gradient`, padded_size() numbers, the derivatives by the weights of <y_bar, y> and, if `along`, of the sum of
/// y_dot; x_bar likewise, unless it has no data. y_bar is overwritten. `scratch`: reverse_scratch() numbers.
template <typename Scalar>
void reverse(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces, bool along, Panel<Scalar> y_bar,
             Panel<Scalar> x_bar, Scalar* gradient, Scalar* scratch);

template <typename Scalar>
int64_t padded_size(const Net<Scalar>& net);
template <typename Scalar>
int64_t reverse_scratch(const Net<Scalar>& net, int64_t units);
template <typename Scalar>
int64_t widest(const Net<Scalar>& net);

/// gradient (N) of this net's weights <- the sum of `count` padded ones, `stride` numbers apart. `part` of `parts` of it,
/// by the outputs of each layer.
template <typename Scalar>
void collect(const Net<Scalar>& net, const Scalar* padded_gradients, int64_t count, int64_t stride, int64_t part,
             int64_t parts, Scalar* gradient);

}  // namespace rlekf::cpu
