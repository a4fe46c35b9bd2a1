// The network's geometry on a table, as pointers and sizes: no torch, no Python. rlekf_ext/potential/table.py has the
// formulas, and says the same in torch.
//
// n atoms in the order of their elements, E edges in the order of the atoms that they start from, T elements, K nodes.
// An array of coefficients is (n, 4, T, K): of each atom the four columns of the environment matrix, the element of the
// neighbour, the nodes.

#pragma once

#include <cstdint>

#include "step.h"

namespace rlekf {

constexpr int kStencil = 8;  // nodes per interpolation

/// The edges of a frame. Scalar is float or double.
template <typename Scalar>
struct Edges {
  int64_t num_atoms, num_types, num_nodes, num_edges;
  const int64_t* first_edge;  // (n + 1), of each atom
  int64_t* place;             // (E), t K + the first node of the stencil
  Scalar* values;             // (E, kStencil), of the polynomials
  Scalar* slopes;             // (E, kStencil), by s
  Scalar* rows;               // (E, 4), R / nnei
  Scalar* jacobian;           // (E, 5, 3), of s and of the rows by the edge
};

/// What edges are made from.
template <typename Scalar>
struct EdgeInputs {
  const Scalar* edges;           // (E, 3)
  const int64_t* neighbor;       // (E), element of the atom that it points to
  const int64_t* center;         // (n), element of each atom
  const Scalar *davg, *dstd;     // (T, 4)
  const int64_t* sel;            // (T)
  double rcut, rcut_smth, last;  // last: s at the last node
};

namespace cpu {

/// Fills in the edges, and their coefficients with those of the empty slots.
template <typename Scalar>
void tabulate(const Edges<Scalar>& edges, const EdgeInputs<Scalar>& inputs, Scalar* coefficients,
              const Parallel& parallel);

/// result (E, 3): the derivatives by the edges, from those by the coefficients.
template <typename Scalar>
void by_edge(const Edges<Scalar>& edges, const Scalar* by_coefficient, Scalar* result, const Parallel& parallel);

/// coefficients: their derivatives as the edges move along `direction` (E, 3).
template <typename Scalar>
void along(const Edges<Scalar>& edges, const Scalar* direction, Scalar* coefficients, const Parallel& parallel);

}  // namespace cpu

}  // namespace rlekf
