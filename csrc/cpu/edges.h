// The edges of a frame on the table, atom by atom.

#pragma once

#include "../network.h"

namespace rlekf::cpu {

/// R / nnei of an edge is (matrix - davg) scale, for a center of some element.
template <typename Scalar>
struct RowScale {
  const Scalar* davg;  // (4)
  double scale[4];
  double per_step;  // nodes per unit of s
};

template <typename Scalar>
RowScale<Scalar> row_scale(const Normalization<Scalar>& normalization, const Geometry<Scalar>& geometry,
                           int64_t element);

/// For atoms [begin, end) of one element, derivatives by the coefficients (4, T, K) of each -> by_edge (3) of all their
/// edges, starting with the first edge of the atom `begin`.
template <typename Scalar>
struct ByEdge {
  const Scalar* by_coefficient;
  Scalar* by_edge;
};

template <typename Scalar>
void by_edge(const Geometry<Scalar>& geometry, const RowScale<Scalar>& scale, int64_t begin, int64_t end,
             const ByEdge<Scalar>& by);

/// For atoms [begin, end) of one element: adds to coefficients (4, T, K) of each their derivatives in a sum with these
/// factors of forces and virials.
template <typename Scalar>
void along(const Geometry<Scalar>& geometry, const RowScale<Scalar>& scale, int64_t begin, int64_t end,
           const Factors<Scalar>& factors, Scalar* coefficients);

}  // namespace rlekf::cpu
