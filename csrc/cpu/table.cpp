// The network's geometry on a table, on a CPU. A worker has whole atoms, whose edges are next to each other, so nothing
// is shared and the bits are the same with any number of workers. An edge touches 4 x 8 coefficients.

#include "../table.h"

#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace rlekf::cpu {
namespace {

constexpr int64_t kAtomsAtOnce = 4;

/// The products of (t - i) / (j - i) over all i but j, and their derivatives by t.
RLEKF_INLINE void stencil(double t, double* values, double* slopes) {
  constexpr double kFactor[kStencil] = {-1.0 / 5040, 1.0 / 720, -1.0 / 240, 1.0 / 144,
                                        -1.0 / 144,  1.0 / 240, -1.0 / 720, 1.0 / 5040};
  double after[kStencil], slope_after[kStencil];
  double product = 1, slope = 0;
  for (int j = kStencil - 1; j >= 0; --j) {
    after[j] = product;
    slope_after[j] = slope;
    slope = slope * (t - j) + product;
    product *= t - j;
  }
  product = 1;
  slope = 0;
  for (int j = 0; j < kStencil; ++j) {
    values[j] = kFactor[j] * product * after[j];
    slopes[j] = kFactor[j] * (slope * after[j] + product * slope_after[j]);
    slope = slope * (t - j) + product;
    product *= t - j;
  }
}

/// s, R = s (1, x/r, y/r, z/r) and their derivatives by the edge: matrix (4), jacobian (4, 3).
RLEKF_INLINE void environment(const double* edge, double rcut, double rcut_smth, double* matrix, double* jacobian) {
  const double r = std::sqrt(edge[0] * edge[0] + edge[1] * edge[1] + edge[2] * edge[2]);
  const double u = std::clamp((r - rcut_smth) / (rcut - rcut_smth), 0.0, 1.0);
  const double smooth = u * u * u * (-6 * u * u + 15 * u - 10) + 1;
  const double bent = u * (1 - u);
  const double s = smooth / r, slope = (-30 * bent * bent / (rcut - rcut_smth) - s) / r;
  const double direction[3] = {edge[0] / r, edge[1] / r, edge[2] / r};
  matrix[0] = s;
  for (int a = 0; a < 3; ++a) {
    matrix[a + 1] = s * direction[a];
    jacobian[a] = slope * direction[a];
    for (int b = 0; b < 3; ++b) {
      jacobian[3 * (a + 1) + b] = (slope - s / r) * direction[a] * direction[b] + (a == b ? s / r : 0);
    }
  }
}

template <typename Scalar>
RLEKF_INLINE void add_outer(const Scalar* row, const Scalar* values, int64_t stride, Scalar* coefficients) {
  Lanes phi, sum;
  load(values, phi);
  for (int c = 0; c < 4; ++c) {
    load(coefficients + c * stride, sum);
    store(coefficients + c * stride, sum + static_cast<double>(row[c]) * phi);
  }
}

template <typename Scalar>
RLEKF_INLINE void tabulate_atom(const Edges<Scalar>& edges, const EdgeInputs<Scalar>& in, Scalar* all, int64_t atom) {
  const int64_t stride = edges.num_types * edges.num_nodes, type = in.center[atom];
  Scalar* own = all + atom * 4 * stride;
  std::fill_n(own, 4 * stride, Scalar{});
  int64_t num_slots = 0;
  for (int64_t t = 0; t < edges.num_types; ++t) num_slots += in.sel[t];
  const Scalar *davg = in.davg + 4 * type, *dstd = in.dstd + 4 * type;
  double scale[4];
  for (int c = 0; c < 4; ++c) scale[c] = 1 / (static_cast<double>(dstd[c]) * static_cast<double>(num_slots));
  const double per_step = static_cast<double>(edges.num_nodes - 1) / in.last;

  // The slots are empty at first, s = 0, which is the first node; an edge fills one.
  const auto empty = static_cast<Scalar>(-static_cast<double>(davg[0]) * scale[0]);
  for (int64_t t = 0; t < edges.num_types; ++t) own[t * edges.num_nodes] = empty * static_cast<Scalar>(in.sel[t]);
  for (int64_t e = edges.first_edge[atom]; e < edges.first_edge[atom + 1]; ++e) {
    double edge[3], matrix[4], jacobian[12], values[kStencil], slopes[kStencil];
    for (int a = 0; a < 3; ++a) edge[a] = static_cast<double>(in.edges[3 * e + a]);
    environment(edge, in.rcut, in.rcut_smth, matrix, jacobian);
    const double where = matrix[0] * per_step;
    const double highest = static_cast<double>(edges.num_nodes - kStencil);
    const double first = std::clamp(std::floor(where) - (kStencil / 2 - 1), 0.0, highest);
    stencil(where - first, values, slopes);
    for (int j = 0; j < kStencil; ++j) {
      edges.values[kStencil * e + j] = static_cast<Scalar>(values[j]);
      edges.slopes[kStencil * e + j] = static_cast<Scalar>(slopes[j] * per_step);
    }
    for (int a = 0; a < 3; ++a) edges.jacobian[15 * e + a] = static_cast<Scalar>(jacobian[a]);
    for (int c = 0; c < 4; ++c) {
      edges.rows[4 * e + c] = static_cast<Scalar>((matrix[c] - static_cast<double>(davg[c])) * scale[c]);
      for (int a = 0; a < 3; ++a) {
        edges.jacobian[15 * e + 3 * (c + 1) + a] = static_cast<Scalar>(jacobian[3 * c + a] * scale[c]);
      }
    }
    const int64_t t = in.neighbor[e];
    edges.place[e] = t * edges.num_nodes + static_cast<int64_t>(first);
    own[t * edges.num_nodes] -= empty;
    add_outer(edges.rows + 4 * e, edges.values + kStencil * e, stride, own + edges.place[e]);
  }
}

template <typename Scalar>
RLEKF_INLINE void by_edge_of_atom(const Edges<Scalar>& edges, const Scalar* by_coefficient, Scalar* result,
                                  int64_t atom) {
  const int64_t stride = edges.num_types * edges.num_nodes;
  for (int64_t e = edges.first_edge[atom]; e < edges.first_edge[atom + 1]; ++e) {
    const Scalar* own = by_coefficient + atom * 4 * stride + edges.place[e];
    Lanes phi, slope, y;
    load(edges.values + kStencil * e, phi);
    load(edges.slopes + kStencil * e, slope);
    Lanes weighted{};  // sum over c of R_c Y_c
    double by[5] = {};
    for (int c = 0; c < 4; ++c) {
      load(own + c * stride, y);
      by[c + 1] = sum(y * phi);
      weighted += static_cast<double>(edges.rows[4 * e + c]) * y;
    }
    by[0] = sum(weighted * slope);
    for (int a = 0; a < 3; ++a) {
      double total = 0;
      for (int i = 0; i < 5; ++i) total += by[i] * static_cast<double>(edges.jacobian[15 * e + 3 * i + a]);
      result[3 * e + a] = static_cast<Scalar>(total);
    }
  }
}

template <typename Scalar>
RLEKF_INLINE void along_of_atom(const Edges<Scalar>& edges, const Scalar* direction, Scalar* all, int64_t atom) {
  const int64_t stride = edges.num_types * edges.num_nodes;
  Scalar* own = all + atom * 4 * stride;
  std::fill_n(own, 4 * stride, Scalar{});
  for (int64_t e = edges.first_edge[atom]; e < edges.first_edge[atom + 1]; ++e) {
    const Scalar *d = direction + 3 * e, *jacobian = edges.jacobian + 15 * e;
    double moved[5];
    for (int i = 0; i < 5; ++i) {
      moved[i] = 0;
      for (int a = 0; a < 3; ++a) moved[i] += static_cast<double>(jacobian[3 * i + a]) * static_cast<double>(d[a]);
    }
    Lanes phi, slope, total;
    load(edges.values + kStencil * e, phi);
    load(edges.slopes + kStencil * e, slope);
    for (int c = 0; c < 4; ++c) {
      Scalar* to = own + edges.place[e] + c * stride;
      load(to, total);
      store(to, total + moved[c + 1] * phi + (static_cast<double>(edges.rows[4 * e + c]) * moved[0]) * slope);
    }
  }
}

// One function for each instruction set and scalar: target_clones takes no templates that are inlined.
#define RLEKF_OVER_ATOMS(name, Scalar, call, ...)                      \
  RLEKF_EVERY_ISA void name(__VA_ARGS__, int64_t begin, int64_t end) { \
    for (int64_t atom = begin; atom < end; ++atom) call;               \
  }
#define RLEKF_FOR_SCALAR(Scalar)                                                                                   \
  RLEKF_OVER_ATOMS(tabulate_atoms, Scalar, tabulate_atom(edges, in, all, atom), const Edges<Scalar>& edges,        \
                   const EdgeInputs<Scalar>& in, Scalar* all)                                                      \
  RLEKF_OVER_ATOMS(by_edge_of_atoms, Scalar, by_edge_of_atom(edges, y, result, atom), const Edges<Scalar>& edges,  \
                   const Scalar* y, Scalar* result)                                                                \
  RLEKF_OVER_ATOMS(along_of_atoms, Scalar, along_of_atom(edges, direction, all, atom), const Edges<Scalar>& edges, \
                   const Scalar* direction, Scalar* all)
RLEKF_FOR_SCALAR(double)
RLEKF_FOR_SCALAR(float)

template <typename Work>
void over_atoms(int64_t num_atoms, const Parallel& parallel, const Work& work) {
  const int64_t count = (num_atoms + kAtomsAtOnce - 1) / kAtomsAtOnce;
  parallel.run(count, [&](int64_t i) { work(i * kAtomsAtOnce, std::min((i + 1) * kAtomsAtOnce, num_atoms)); });
}

}  // namespace

template <typename Scalar>
void tabulate(const Edges<Scalar>& edges, const EdgeInputs<Scalar>& inputs, Scalar* coefficients,
              const Parallel& parallel) {
  over_atoms(edges.num_atoms, parallel,
             [&](int64_t begin, int64_t end) { tabulate_atoms(edges, inputs, coefficients, begin, end); });
}

template <typename Scalar>
void by_edge(const Edges<Scalar>& edges, const Scalar* by_coefficient, Scalar* result, const Parallel& parallel) {
  over_atoms(edges.num_atoms, parallel,
             [&](int64_t begin, int64_t end) { by_edge_of_atoms(edges, by_coefficient, result, begin, end); });
}

template <typename Scalar>
void along(const Edges<Scalar>& edges, const Scalar* direction, Scalar* coefficients, const Parallel& parallel) {
  over_atoms(edges.num_atoms, parallel,
             [&](int64_t begin, int64_t end) { along_of_atoms(edges, direction, coefficients, begin, end); });
}

#define RLEKF_INSTANTIATE(Scalar)                                                                    \
  template void tabulate(const Edges<Scalar>&, const EdgeInputs<Scalar>&, Scalar*, const Parallel&); \
  template void by_edge(const Edges<Scalar>&, const Scalar*, Scalar*, const Parallel&);              \
  template void along(const Edges<Scalar>&, const Scalar*, Scalar*, const Parallel&);
RLEKF_INSTANTIATE(double)
RLEKF_INSTANTIATE(float)

}  // namespace rlekf::cpu
