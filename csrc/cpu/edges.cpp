// The edges of a frame on the table, on a CPU. A worker has whole atoms, whose edges are next to each other, so nothing
// is shared and the bits are the same with any number of workers. An edge touches 4 x 8 coefficients. Of its eight
// polynomials and their slopes it stores none: they are a few products from `where`.

#include "edges.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "../stencil.h"
#include "lanes.h"

namespace rlekf::cpu {
namespace {

static_assert(sizeof(Edge<double>) == 64 && sizeof(Edge<float>) == 32);
constexpr Polynomials kPolynomials;

/// Eight numbers.
template <int kBytes>
struct Stencil {
  static constexpr int kParts = 64 / kBytes, kN = kLanes<double, kBytes>;
  Vector<double, kBytes> part[kParts];
};

/// total += part i of eight numbers, as four sums.
RLEKF_INLINE void add_to(Vector<double, 32>& total, const Vector<double, 64>& part, int) {
  Vector<double, 32> halves[2];
  std::memcpy(halves, &part, sizeof part);
  total += halves[0] + halves[1];
}
RLEKF_INLINE void add_to(Vector<double, 32>& total, const Vector<double, 32>& part, int) { total += part; }
RLEKF_INLINE void add_to(Vector<double, 32>& total, const Vector<double, 16>& part, int i) {
  for (int lane = 0; lane < 2; ++lane) total[2 * (i % 2) + lane] += part[lane];
}

/// The eight polynomials at `where`, and their derivatives by it.
template <int kBytes>
RLEKF_INLINE void interpolate(double where, Stencil<kBytes>& values, Stencil<kBytes>& slopes) {
  const double u = where - kMiddle;
#pragma GCC unroll 4
  for (int i = 0; i < Stencil<kBytes>::kParts; ++i) {
    const int at = i * Stencil<kBytes>::kN;
    Vector<double, kBytes> value = read<kBytes>(kPolynomials.coefficient[kStencil - 1] + at), slope{};
#pragma GCC unroll 8
    for (int d = kStencil - 2; d >= 0; --d) {
      slope = slope * u + value;
      value = value * u + read<kBytes>(kPolynomials.coefficient[d] + at);
    }
    values.part[i] = value;
    slopes.part[i] = slope;
  }
}

template <typename Scalar>
RLEKF_INLINE Edge<Scalar> edge_of(const Scalar* vector, double rcut, double rcut_smth, double per_step,
                                  int64_t num_nodes, int64_t element) {
  const double x = vector[0], y = vector[1], z = vector[2];
  const double r = std::sqrt(x * x + y * y + z * z);
  const double u = std::clamp((r - rcut_smth) / (rcut - rcut_smth), 0.0, 1.0);
  const double smooth = u * u * u * (-6 * u * u + 15 * u - 10) + 1;
  const double bent = u * (1 - u);
  const double s = smooth / r;
  const double t = s * per_step, highest = static_cast<double>(num_nodes - kStencil);
  const double first = t > 0 ? std::clamp(std::floor(t) - (kStencil / 2 - 1), 0.0, highest) : 0;  // 0 for NaN
  return {{static_cast<Scalar>(x / r), static_cast<Scalar>(y / r), static_cast<Scalar>(z / r)},
          static_cast<Scalar>(r),
          static_cast<Scalar>(s / r),
          static_cast<Scalar>((-30 * bent * bent / (rcut - rcut_smth) - s) / r),
          static_cast<Scalar>(t - first),
          static_cast<Scalar>(static_cast<double>(element * num_nodes) + first)};
}

/// R / nnei.
template <typename Scalar>
RLEKF_INLINE void row_of(const Edge<Scalar>& edge, const RowScale<Scalar>& scale, double* row) {
  const double s = static_cast<double>(edge.ratio) * static_cast<double>(edge.length);
  row[0] = (s - static_cast<double>(scale.davg[0])) * scale.scale[0];
  for (int c = 1; c < 4; ++c) {
    row[c] = (s * static_cast<double>(edge.direction[c - 1]) - static_cast<double>(scale.davg[c])) * scale.scale[c];
  }
}

template <int kBytes, typename Scalar>
RLEKF_INLINE void tabulate_atom(const FrameInputs<Scalar>& in, const RowScale<Scalar>& scale,
                                const Normalization<Scalar>& normalization, const Geometry<Scalar>& geometry,
                                int64_t atom) {
  const int64_t num_nodes = geometry.num_nodes, stride = geometry.num_types * num_nodes;
  Scalar* own = geometry.coefficients + atom * 4 * stride;
  std::fill_n(own, 4 * stride, Scalar{});
  // The slots are empty at first: s = 0, which is the first node. An edge fills one.
  double empty[4];
  for (int c = 0; c < 4; ++c) empty[c] = -static_cast<double>(scale.davg[c]) * scale.scale[c];
  int64_t slots = 0;
  for (int64_t element = 0; element < geometry.num_types; ++element) {
    slots += in.slots[static_cast<size_t>(element)];
  }
  const int64_t from = geometry.order[atom];
  const Scalar* vector = in.edges + 3 * from * slots;
  const int64_t* neighbor = in.neighbors + from * slots;
  const uint8_t* near = in.near + from * slots;
  int64_t e = geometry.first_edge[atom];
  for (int64_t element = 0; element < geometry.num_types; ++element) {
    int64_t num_empty = normalization.sel[static_cast<size_t>(element)];
    for (int64_t slot = 0; slot < in.slots[static_cast<size_t>(element)]; ++slot, vector += 3, ++neighbor, ++near) {
      if (!*near) continue;
      const Edge<Scalar> edge = edge_of(vector, in.rcut, in.rcut_smth, scale.per_step, num_nodes, element);
      geometry.edges[e] = edge;
      geometry.neighbor[e] = *neighbor;
      ++e;
      --num_empty;
      double row[4];
      row_of(edge, scale, row);
      Stencil<kBytes> values, slopes;
      interpolate(static_cast<double>(edge.where), values, slopes);
#pragma GCC unroll 4
      for (int i = 0; i < values.kParts; ++i) {
        Scalar* to = own + static_cast<int64_t>(edge.place) + i * values.kN;
        for (int c = 0; c < 4; ++c, to += stride) {
          write_wide<kBytes>(to, read_wide<kBytes>(to) + row[c] * values.part[i]);
        }
      }
    }
    for (int c = 0; c < 4; ++c) {
      own[c * stride + element * num_nodes] += static_cast<Scalar>(empty[c] * static_cast<double>(num_empty));
    }
  }
}

template <int kBytes, typename Scalar>
RLEKF_INLINE void by_edge_of_atom(const Geometry<Scalar>& geometry, const RowScale<Scalar>& scale, int64_t atom,
                                  const Scalar* by_coefficient, Scalar* result) {
  const int64_t stride = geometry.num_types * geometry.num_nodes;
  for (int64_t e = geometry.first_edge[atom]; e < geometry.first_edge[atom + 1]; ++e, result += 3) {
    const Edge<Scalar> edge = geometry.edges[e];
    const Scalar* own = by_coefficient + static_cast<int64_t>(edge.place);
    double row[4];
    row_of(edge, scale, row);
    Stencil<kBytes> values, slopes;
    interpolate(static_cast<double>(edge.where), values, slopes);
    // dE/d(edge) = radial d + ratio (b_1, b_2, b_3), with b_c the derivatives by the columns of the environment matrix
    // and radial = slope (b_0 + dE/ds by the polynomials) + (slope - ratio) b·d: four sums over the stencil.
    const double slope = static_cast<double>(edge.slope), ratio = static_cast<double>(edge.ratio);
    double factor[4];
    for (int c = 0; c < 4; ++c) {
      factor[c] = scale.scale[c] * (c == 0 ? slope : (slope - ratio) * static_cast<double>(edge.direction[c - 1]));
    }
    Vector<double, 32> totals[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < values.kParts; ++i) {
      Vector<double, kBytes> by_slopes{}, by_values{}, terms[4];
      for (int c = 0; c < 4; ++c) {
        const Vector<double, kBytes> y = read_wide<kBytes>(own + c * stride + i * values.kN);
        by_slopes += row[c] * y;
        by_values += factor[c] * y;
        if (c > 0) terms[c] = (ratio * scale.scale[c]) * (y * values.part[i]);
      }
      terms[0] = by_values * values.part[i] + (scale.per_step * slope) * (by_slopes * slopes.part[i]);
      for (int c = 0; c < 4; ++c) add_to(totals[c], terms[c], i);
    }
    const Vector<double, 32> total = sums(totals);
    for (int a = 0; a < 3; ++a) {
      result[a] = static_cast<Scalar>(total[0] * static_cast<double>(edge.direction[a]) + total[a + 1]);
    }
  }
}

template <int kBytes, typename Scalar>
RLEKF_INLINE void along_of_atom(const Geometry<Scalar>& geometry, const RowScale<Scalar>& scale, int64_t atom,
                                const Factors<Scalar>& factors, Scalar* own) {
  const int64_t stride = geometry.num_types * geometry.num_nodes, from = geometry.order[atom];
  const Scalar* start = factors.forces + 3 * from;
  const Scalar* virial = factors.virials + 9 * geometry.structure[from];
  for (int64_t e = geometry.first_edge[atom]; e < geometry.first_edge[atom + 1]; ++e) {
    const Edge<Scalar> edge = geometry.edges[e];
    const Scalar* end = factors.forces + 3 * geometry.neighbor[e];
    // The force on an atom is the sum of dE/d(edge) of the edges that leave it, less that of those that reach it; the
    // virial is the sum of -edge dE/d(edge)ᵀ.
    double d[3], moved[3], inner = 0;
    for (int a = 0; a < 3; ++a) d[a] = static_cast<double>(edge.direction[a]);
    for (int a = 0; a < 3; ++a) {
      const double strain = d[0] * static_cast<double>(virial[a]) + d[1] * static_cast<double>(virial[3 + a]) +
                            d[2] * static_cast<double>(virial[6 + a]);
      moved[a] =
          static_cast<double>(start[a]) - static_cast<double>(end[a]) - static_cast<double>(edge.length) * strain;
      inner += moved[a] * d[a];
    }
    const double slope = static_cast<double>(edge.slope), ratio = static_cast<double>(edge.ratio);
    const double s_dot = slope * inner;
    double row[4], row_dot[4] = {s_dot * scale.scale[0]};
    for (int a = 0; a < 3; ++a) {
      row_dot[a + 1] = ((slope - ratio) * inner * d[a] + ratio * moved[a]) * scale.scale[a + 1];
    }
    row_of(edge, scale, row);
    Stencil<kBytes> values, slopes;
    interpolate(static_cast<double>(edge.where), values, slopes);
#pragma GCC unroll 4
    for (int i = 0; i < values.kParts; ++i) {
      const Vector<double, kBytes> value = values.part[i], value_dot = slopes.part[i] * (s_dot * scale.per_step);
      Scalar* to = own + static_cast<int64_t>(edge.place) + i * values.kN;
      for (int c = 0; c < 4; ++c, to += stride) {
        write_wide<kBytes>(to, read_wide<kBytes>(to) + row_dot[c] * value + row[c] * value_dot);
      }
    }
  }
}

}  // namespace

template <typename Scalar>
RowScale<Scalar> row_scale(const Normalization<Scalar>& normalization, const Geometry<Scalar>& geometry,
                           int64_t element) {
  int64_t num_slots = 0;
  for (const int64_t sel : normalization.sel) num_slots += sel;
  RowScale<Scalar> result{normalization.davg + 4 * element, {}, 0};
  for (int c = 0; c < 4; ++c) {
    result.scale[c] = 1 / (static_cast<double>(normalization.dstd[4 * element + c]) * static_cast<double>(num_slots));
  }
  result.per_step = static_cast<double>(geometry.num_nodes - 1) / normalization.last;
  return result;
}

template <typename Scalar>
void by_edge(const Geometry<Scalar>& geometry, const RowScale<Scalar>& scale, int64_t begin, int64_t end,
             const ByEdge<Scalar>& by) {
  const int64_t size = 4 * geometry.num_types * geometry.num_nodes;
  on_widest([&]<int kBytes>() RLEKF_INLINED {
    for (int64_t a = begin; a < end; ++a) {
      by_edge_of_atom<kBytes>(geometry, scale, a, by.by_coefficient + (a - begin) * size,
                              by.by_edge + 3 * (geometry.first_edge[a] - geometry.first_edge[begin]));
    }
  });
}

template <typename Scalar>
void along(const Geometry<Scalar>& geometry, const RowScale<Scalar>& scale, int64_t begin, int64_t end,
           const Factors<Scalar>& factors, Scalar* coefficients) {
  const int64_t size = 4 * geometry.num_types * geometry.num_nodes;
  on_widest([&]<int kBytes>() RLEKF_INLINED {
    for (int64_t a = begin; a < end; ++a) {
      along_of_atom<kBytes>(geometry, scale, a, factors, coefficients + (a - begin) * size);
    }
  });
}

template <typename Scalar>
void sort_atoms(const FrameInputs<Scalar>& inputs, const Geometry<Scalar>& geometry) {
  std::fill_n(geometry.first_atom, geometry.num_types + 1, 0);
  for (int64_t a = 0; a < inputs.num_atoms; ++a) ++geometry.first_atom[inputs.types[a] + 1];
  for (int64_t t = 0; t < geometry.num_types; ++t) geometry.first_atom[t + 1] += geometry.first_atom[t];
  std::vector<int64_t> next(geometry.first_atom, geometry.first_atom + geometry.num_types);
  for (int64_t a = 0; a < inputs.num_atoms; ++a) geometry.order[next[static_cast<size_t>(inputs.types[a])]++] = a;
  int64_t slots = 0;
  for (const int64_t count : inputs.slots) slots += count;
  geometry.first_edge[0] = 0;
  for (int64_t a = 0; a < inputs.num_atoms; ++a) {
    int64_t count = 0;
    const Scalar* vector = inputs.edges + 3 * geometry.order[a] * slots;
    uint8_t* near = inputs.near + geometry.order[a] * slots;
    for (int64_t slot = 0; slot < slots; ++slot, vector += 3) {
      const double x = vector[0], y = vector[1], z = vector[2];
      near[slot] = !(x * x + y * y + z * z >= inputs.rcut * inputs.rcut);  // so that NaN is an edge, and is seen
      count += near[slot];
    }
    geometry.first_edge[a + 1] = geometry.first_edge[a] + count;
  }
}

template <typename Scalar>
void tabulate(const FrameInputs<Scalar>& inputs, const Normalization<Scalar>& normalization,
              const Geometry<Scalar>& geometry, const Parallel& parallel) {
  parallel.run(parallel.num_workers, [&](int64_t worker) {
    for (int64_t t = 0; t < geometry.num_types; ++t) {
      const int64_t first = geometry.first_atom[t], count = geometry.first_atom[t + 1] - first;
      const int64_t end = first + (worker + 1) * count / parallel.num_workers;
      const RowScale<Scalar> scale = row_scale(normalization, geometry, t);
      on_widest([&]<int kBytes>() RLEKF_INLINED {
        for (int64_t atom = first + worker * count / parallel.num_workers; atom < end; ++atom) {
          tabulate_atom<kBytes>(inputs, scale, normalization, geometry, atom);
        }
      });
    }
  });
  std::fill_n(geometry.first_incoming, geometry.num_atoms + 1, 0);
  for (int64_t e = 0; e < geometry.num_edges; ++e) ++geometry.first_incoming[geometry.neighbor[e] + 1];
  for (int64_t a = 0; a < geometry.num_atoms; ++a) geometry.first_incoming[a + 1] += geometry.first_incoming[a];
  std::vector<int64_t> next(geometry.first_incoming, geometry.first_incoming + geometry.num_atoms);
  for (int64_t e = 0; e < geometry.num_edges; ++e) {
    geometry.incoming[next[static_cast<size_t>(geometry.neighbor[e])]++] = e;
  }
}

#define RLEKF_INSTANTIATE(Scalar)                                                                                   \
  template void by_edge(const Geometry<Scalar>&, const RowScale<Scalar>&, int64_t, int64_t, const ByEdge<Scalar>&); \
  template void along(const Geometry<Scalar>&, const RowScale<Scalar>&, int64_t, int64_t, const Factors<Scalar>&,   \
                      Scalar*);                                                                                     \
  template RowScale<Scalar> row_scale(const Normalization<Scalar>&, const Geometry<Scalar>&, int64_t);              \
  template void sort_atoms(const FrameInputs<Scalar>&, const Geometry<Scalar>&);                                    \
  template void tabulate(const FrameInputs<Scalar>&, const Normalization<Scalar>&, const Geometry<Scalar>&,         \
                         const Parallel&);
RLEKF_INSTANTIATE(double)
RLEKF_INSTANTIATE(float)

}  // namespace rlekf::cpu
