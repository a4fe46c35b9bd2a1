// The network on a table, on a GPU: csrc/cpu/network.cpp has the same results, network_plan.h what lies where.
//
//     kNodes      the embedding nets at the nodes, four nodes to a thread block
//     kAtoms      T = C N, D, the fitting net, and with forces back to T, to C and to the edges: one atom to a thread block
//     kForces     sums over the edges that leave and reach an atom: one atom to a warp
//     kVirials    sums over the atoms of a structure
//     kFactors    the error of an update, and the factors of all results in it
//     kAtomsBack  of an atom and an update: dC/dτ along the factors, dT/dτ, the fitting net along and back, back to T
//     kNodesBack  back to N, a sum over all atoms of an element, and through the embedding nets
//     kWeights    the derivatives by the weights, sums over atoms and nodes
//
// Thread blocks are many and small, since an update has few atoms and a GPU some hundred processors: what counts is how
// long the longest chain of dependent reads takes. All sums have a fixed order, so that the bits are the same on every run.

#pragma once

#include <cmath>

#include "../stencil.h"
#include "network_plan.h"
#include "task.cuh"

namespace rlekf::cuda {

RLEKF_CONSTANT constexpr Polynomials kPolynomials;

// --- products, by a whole thread block

/// store(r, j, sum) for the R rows of x W; x (R, inputs) with rows `stride` apart, W (inputs, outputs).
template <int kR, typename Scalar, typename Store>
RLEKF_DEVICE void multiply(const Scalar* x, int64_t stride, int64_t inputs, const Scalar* w, int outputs,
                           const Store& store) {
  Scalar* partial = shared_at<Scalar>(0);  // (R, kThreads)
  const int width = outputs >= kThreads ? kThreads : (outputs + 31) / 32 * 32, parts = kThreads / width;
  const int part = thread() / width;
  for (int first = 0; first < outputs; first += width) {
    const int j = first + thread() % width;
    Scalar total[kR] = {};
    if (part < parts && j < outputs) {
      RLEKF_UNROLL_BY_4
      for (int64_t i = part; i < inputs; i += parts) {
        const Scalar factor = w[i * outputs + j];
        for (int r = 0; r < kR; ++r) total[r] += x[r * stride + i] * factor;
      }
    }
    for (int r = 0; r < kR; ++r) partial[r * kThreads + thread()] = total[r];
    sync_threads();
    for (int at = thread(); at < kR * width; at += kThreads) {
      const int r = at / width, column = at % width;
      if (first + column >= outputs) continue;
      Scalar sum{};
      for (int p = 0; p < parts; ++p) sum += partial[r * kThreads + p * width + column];
      store(r, first + column, sum);
    }
    sync_threads();
  }
}

/// store(r, i, sum) for the R rows of z Wᵀ; z (R, outputs).
template <int kR, typename Scalar, typename Store>
RLEKF_DEVICE void multiply_back(const Scalar* z, int64_t stride, int outputs, const Scalar* w, int64_t inputs,
                                const Store& store) {
  for (int64_t i = warp(); i < inputs; i += kWarps) {
    double total[kR] = {};
    for (int j = lane(); j < outputs; j += 32) {
      const Scalar factor = w[i * outputs + j];
      for (int r = 0; r < kR; ++r) total[r] += static_cast<double>(z[r * stride + j] * factor);
    }
    for (int r = 0; r < kR; ++r) {
      const double sum = warp_sum(total[r]);
      if (lane() == 0) store(r, i, static_cast<Scalar>(sum));
    }
  }
  sync_threads();
}

/// The sum over all threads, for each of them.
RLEKF_DEVICE double block_sum(double value) {
  double* sums = shared_at<double>(0);  // (kWarps)
  const double own = warp_sum(value);
  sync_threads();  // until nobody reads those of the sum before
  if (lane() == 0) sums[warp()] = own;
  sync_threads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

// --- nets

template <typename Scalar>
struct Parameters {
  const Scalar *weight, *bias, *timestep;
};

template <typename Scalar>
RLEKF_DEVICE Parameters<Scalar> parameters_of(const NetworkTask<Scalar>& task, const NetPlan& plan, int64_t net,
                                              const LayerPlan& layer) {
  const Scalar* const* at = task.parameters + plan.first_pointer + net * plan.num_pointers + layer.pointer;
  return {at[0], at[1], layer.timestep ? at[2] : nullptr};
}

/// From the first x in `passed` (R, passed_size) to the others, and `outputs` (R, ...).
template <int kR, typename Scalar>
RLEKF_DEVICE void forward(const NetworkTask<Scalar>& task, const NetPlan& plan, int64_t net, Scalar* passed,
                          Scalar* outputs, int64_t outputs_stride) {
  for (int l = 0; l < plan.num_layers; ++l) {
    const LayerPlan& layer = plan.layers[l];
    const Parameters<Scalar> p = parameters_of(task, plan, net, layer);
    const bool last = l + 1 == plan.num_layers;
    Scalar* next = last ? outputs : passed + plan.layers[last ? l : l + 1].x;
    const int64_t stride = last ? outputs_stride : plan.passed_size;
    multiply<kR>(passed + layer.x, plan.passed_size, layer.inputs, p.weight, layer.outputs,
                 [&](int r, int j, Scalar sum) {
                   Scalar* own = passed + r * plan.passed_size;
                   const Scalar z = sum + p.bias[j], h = layer.hidden ? std::tanh(z) : z;
                   own[layer.h + j] = h;
                   next[r * stride + j] = (layer.timestep ? h * p.timestep[j] : h) +
                                          (layer.copies > 0 ? own[layer.x + j % layer.inputs] : Scalar{});
                 });
  }
}

/// From the first x_dot in `bar` to the others, and z_dot: one row.
template <typename Scalar>
RLEKF_DEVICE void forward_along(const NetworkTask<Scalar>& task, const NetPlan& plan, int64_t net, const Scalar* passed,
                                Scalar* bar) {
  for (int l = 0; l < plan.num_layers; ++l) {
    const LayerPlan& layer = plan.layers[l];
    const Parameters<Scalar> p = parameters_of(task, plan, net, layer);
    const bool last = l + 1 == plan.num_layers;
    Scalar* next = bar + plan.layers[last ? l : l + 1].x_dot;
    multiply<1>(bar + layer.x_dot, 0, layer.inputs, p.weight, layer.outputs, [&](int, int j, Scalar z_dot) {
      bar[layer.z_dot + j] = z_dot;
      if (last) return;
      const Scalar h = passed[layer.h + j], h_dot = layer.hidden ? z_dot * (1 - h * h) : z_dot;
      next[j] = (layer.timestep ? h_dot * p.timestep[j] : h_dot) +
                (layer.copies > 0 ? bar[layer.x_dot + j % layer.inputs] : Scalar{});
    });
  }
}

/// From the last y_bar in `bar` (R, size) to all other bars, the first x_bar only if wanted. With the bars `back` of the
/// sum of all outputs, and what forward_along() left, of a sum of outputs and their derivatives along a direction: one
/// row.
template <int kR, typename Scalar>
RLEKF_DEVICE void backward(const NetworkTask<Scalar>& task, const NetPlan& plan, int64_t net, const Scalar* passed,
                           Scalar* bar, int64_t size, const Scalar* back, bool to_inputs) {
  for (int l = plan.num_layers - 1; l >= 0; --l) {
    const LayerPlan& layer = plan.layers[l];
    const Parameters<Scalar> p = parameters_of(task, plan, net, layer);
    for (int at = thread(); at < kR * layer.outputs; at += kThreads) {
      const int r = at / layer.outputs, j = at % layer.outputs;
      Scalar* own = bar + r * size;
      const Scalar y_bar = own[layer.y_bar + j], h = passed[r * plan.passed_size + layer.h + j];
      const Scalar slope = layer.hidden ? 1 - h * h : Scalar{1};
      Scalar z_bar = (layer.timestep ? y_bar * p.timestep[j] : y_bar) * slope, timestep_bar = h * y_bar;
      if (back && layer.hidden) {
        const Scalar z_dot = own[layer.z_dot + j];
        z_bar -= 2 * h * z_dot * back[layer.z_bar + j];  // the slope depends on h
        timestep_bar += z_dot * slope * back[layer.y_bar + j];
      }
      own[layer.z_bar + j] = z_bar;
      if (layer.timestep) own[layer.timestep_bar + j] = timestep_bar;
    }
    sync_threads();
    if (l == 0 && !to_inputs) break;
    const int to = l > 0 ? plan.layers[l > 0 ? l - 1 : 0].y_bar : plan.x_bar;
    multiply_back<kR>(bar + layer.z_bar, size, layer.outputs, p.weight, layer.inputs,
                      [&](int r, int64_t i, Scalar sum) {
                        Scalar* own = bar + r * size;
                        for (int copy = 0; copy < layer.copies; ++copy)
                          sum += own[layer.y_bar + copy * layer.inputs + i];
                        own[to + i] = sum;
                      });
  }
}

// --- descriptors: T (4, M), D = Tᵀ T_<, (M, M_<)

/// D, or its derivative along that of T.
template <typename Scalar>
RLEKF_DEVICE void describe(const NetworkTask<Scalar>& task, const Scalar* t, const Scalar* t_dot, Scalar* d) {
  const int size = task.num_values;
  for (int at = thread(); at < size * task.axis; at += kThreads) {
    const int i = at / task.axis, j = at % task.axis;
    Scalar sum{};
    for (int c = 0; c < 4; ++c) {
      if (t_dot) sum += t_dot[c * size + i] * t[c * size + j] + t[c * size + i] * t_dot[c * size + j];
      else sum += t[c * size + i] * t[c * size + j];
    }
    d[at] = sum;
  }
  sync_threads();
}

/// One number of the derivatives by T of <d_bar, Tᵀ T_<>.
template <typename Scalar>
RLEKF_DEVICE Scalar describe_back(const NetworkTask<Scalar>& task, const Scalar* t, const Scalar* d_bar, int c, int i) {
  const int size = task.num_values;
  Scalar sum{};
  for (int j = 0; j < task.axis; ++j) sum += d_bar[i * task.axis + j] * t[c * size + j];
  for (int j = 0; i < task.axis && j < size; ++j) sum += d_bar[j * task.axis + i] * t[c * size + j];
  return sum;
}

// --- edges

struct Interpolated {
  double values[kStencil], slopes[kStencil];
};

RLEKF_DEVICE Interpolated interpolated(double where) {
  const double u = where - kMiddle;
  Interpolated result;
  RLEKF_UNROLL
  for (int i = 0; i < kStencil; ++i) {
    double value = kPolynomials.coefficient[kStencil - 1][i], slope = 0;
    RLEKF_UNROLL
    for (int d = kStencil - 2; d >= 0; --d) {
      slope = slope * u + value;
      value = value * u + kPolynomials.coefficient[d][i];
    }
    result.values[i] = value;
    result.slopes[i] = slope;
  }
  return result;
}

/// Of an element: 1 / (dstd nnei), and by which factor a derivative by the place on the table becomes one by s.
struct RowScale {
  double scale[4], per_step;
};

template <typename Scalar>
RLEKF_DEVICE RowScale row_scale(const NetworkTask<Scalar>& task, int64_t element) {
  RowScale result;
  for (int c = 0; c < 4; ++c) {
    result.scale[c] = 1 / (static_cast<double>(task.dstd[4 * element + c]) * task.num_slots);
  }
  result.per_step = static_cast<double>(task.frame.num_nodes - 1) / task.last;
  return result;
}

/// R / nnei.
template <typename Scalar>
RLEKF_DEVICE void row_of(const NetworkTask<Scalar>& task, int64_t element, const Edge<Scalar>& edge,
                         const RowScale& scale, double* row) {
  const double s = static_cast<double>(edge.ratio) * static_cast<double>(edge.length);
  for (int c = 0; c < 4; ++c) {
    const double value = c == 0 ? s : s * static_cast<double>(edge.direction[c > 0 ? c - 1 : 0]);
    row[c] = (value - static_cast<double>(task.davg[4 * element + c])) * scale.scale[c];
  }
}

/// dE/d(edge) of the edges of an atom, from dE/dC.
template <typename Scalar>
RLEKF_DEVICE void derivatives_by_edges(const NetworkTask<Scalar>& task, int64_t atom, int64_t element) {
  const Geometry<Scalar>& frame = task.frame;
  const int64_t columns = task.num_columns();
  const RowScale scale = row_scale(task, element);
  for (int64_t e = frame.first_edge[atom] + thread(); e < frame.first_edge[atom + 1]; e += kThreads) {
    const Edge<Scalar> edge = frame.edges[e];
    const Scalar* y = task.by_coefficients + 4 * atom * columns + static_cast<int64_t>(edge.place);
    double row[4], by_row[4], by_s = 0;
    row_of(task, element, edge, scale, row);
    const Interpolated at = interpolated(static_cast<double>(edge.where));
    RLEKF_UNROLL
    for (int c = 0; c < 4; ++c) {
      double by_value = 0, by_slope = 0;
      RLEKF_UNROLL
      for (int i = 0; i < kStencil; ++i) {
        const auto own = static_cast<double>(y[c * columns + i]);
        by_value += own * at.values[i];
        by_slope += own * at.slopes[i];
      }
      by_row[c] = by_value * scale.scale[c];
      by_s += row[c] * by_slope * scale.per_step;
    }
    const double slope = static_cast<double>(edge.slope), ratio = static_cast<double>(edge.ratio);
    double inner = 0;
    for (int a = 0; a < 3; ++a) inner += by_row[a + 1] * static_cast<double>(edge.direction[a]);
    const double radial = slope * (by_row[0] + by_s) + (slope - ratio) * inner;
    for (int a = 0; a < 3; ++a) {
      task.by_edges[3 * e + a] =
          static_cast<Scalar>(radial * static_cast<double>(edge.direction[a]) + ratio * by_row[a + 1]);
    }
  }
}

/// dC/dτ (4, C) of an atom, as all atoms move along the factors of forces and virials. Each thread has columns of its own
/// and takes from all edges what falls into them.
template <typename Scalar>
RLEKF_DEVICE void along(const NetworkTask<Scalar>& task, int64_t atom, int64_t element, int64_t update,
                        Scalar* result) {
  const Geometry<Scalar>& frame = task.frame;
  const int64_t n = frame.num_atoms, columns = task.num_columns(), from = frame.order[atom];
  const Scalar* moves = task.by_forces + 3 * n * update;
  const Scalar* virial = task.by_virials + 9 * (frame.num_structures * update + frame.structure[from]);
  const RowScale scale = row_scale(task, element);
  double* staged = shared_at<double>(0);  // (edges_at_once, kEdgeNumbers): place, R, dR/dτ, φ, dφ/dτ
  const int64_t end = frame.first_edge[atom + 1];
  int64_t first = frame.first_edge[atom];
  const int64_t begin = first;
  do {
    const int count = static_cast<int>(end - first < task.edges_at_once ? end - first : task.edges_at_once);
    for (int own = thread(); own < count; own += kThreads) {
      const Edge<Scalar> edge = frame.edges[first + own];
      const int64_t to = frame.neighbor[first + own];
      double d[3], moved[3], inner = 0;
      for (int a = 0; a < 3; ++a) d[a] = static_cast<double>(edge.direction[a]);
      for (int a = 0; a < 3; ++a) {
        const double strain = d[0] * static_cast<double>(virial[a]) + d[1] * static_cast<double>(virial[3 + a]) +
                              d[2] * static_cast<double>(virial[6 + a]);
        moved[a] = static_cast<double>(moves[3 * from + a]) - static_cast<double>(moves[3 * to + a]) -
                   static_cast<double>(edge.length) * strain;
        inner += moved[a] * d[a];
      }
      const double slope = static_cast<double>(edge.slope), ratio = static_cast<double>(edge.ratio);
      const double s_dot = slope * inner;
      double* numbers = staged + own * kEdgeNumbers;
      numbers[0] = static_cast<double>(edge.place);
      row_of(task, element, edge, scale, numbers + 1);
      numbers[5] = s_dot * scale.scale[0];
      for (int a = 0; a < 3; ++a) {
        numbers[6 + a] = ((slope - ratio) * inner * d[a] + ratio * moved[a]) * scale.scale[a + 1];
      }
      const Interpolated at = interpolated(static_cast<double>(edge.where));
      RLEKF_UNROLL
      for (int i = 0; i < kStencil; ++i) {
        numbers[9 + i] = at.values[i];
        numbers[9 + kStencil + i] = at.slopes[i] * (s_dot * scale.per_step);
      }
    }
    sync_threads();
    for (int64_t column = thread(); column < columns; column += kThreads) {
      double total[4];
      for (int c = 0; c < 4; ++c) {
        total[c] = first == begin ? 0 : static_cast<double>(result[c * columns + column]);
      }
      for (int own = 0; own < count; ++own) {
        const double* numbers = staged + own * kEdgeNumbers;
        const int64_t i = column - static_cast<int64_t>(numbers[0]);
        if (i < 0 || i >= kStencil) continue;
        for (int c = 0; c < 4; ++c) total[c] += numbers[5 + c] * numbers[9 + i] + numbers[1 + c] * numbers[17 + i];
      }
      for (int c = 0; c < 4; ++c) result[c * columns + column] = static_cast<Scalar>(total[c]);
    }
    sync_threads();
    first += task.edges_at_once;
  } while (first < end);
}

// --- the phases, each by thread block `index` of those that network_plan.h launches

template <typename Scalar>
RLEKF_DEVICE int64_t element_of(const Geometry<Scalar>& frame, int64_t atom) {
  int64_t element = 0;
  while (frame.first_atom[element + 1] <= atom) ++element;
  return element;
}

/// Of a row of nodes: elements, and number of the net.
struct NodePair {
  int64_t center, neighbor, net;
};

template <typename Scalar>
RLEKF_DEVICE NodePair pair_of(const NetworkTask<Scalar>& task, int64_t row) {
  const int64_t types = task.frame.num_types, pair = row / task.frame.num_nodes;
  const int64_t center = pair / types, neighbor = pair % types;
  return {center, neighbor, task.one_sided ? neighbor : neighbor * types + center};
}

template <typename Scalar>
RLEKF_DEVICE void predict_nodes(const NetworkTask<Scalar>& task, int64_t index) {
  const NetPlan& plan = task.embedding;
  const int64_t row = index * kNodesEach;
  const NodePair pair = pair_of(task, row);
  Scalar* passed = task.nodes + row * plan.passed_size;
  if (thread() < kNodesEach) {
    const double s = static_cast<double>(row % task.frame.num_nodes + thread()) *
                     (task.last / static_cast<double>(task.frame.num_nodes - 1));
    const double mean = task.davg[4 * pair.center], deviation = task.dstd[4 * pair.center];
    passed[thread() * plan.passed_size + plan.layers[0].x] = static_cast<Scalar>((s - mean) / deviation);
  }
  sync_threads();
  forward<kNodesEach>(task, plan, pair.net, passed, task.values + row * task.num_values, task.num_values);
}

template <typename Scalar>
RLEKF_DEVICE void predict_atom(const NetworkTask<Scalar>& task, int64_t atom) {
  const NetPlan& plan = task.fitting;
  const int64_t element = element_of(task.frame, atom), columns = task.num_columns();
  const int size = task.num_values;
  const Scalar* values = task.values + element * columns * size;
  Scalar *t = task.moments + 4 * atom * size, *passed = task.atoms + atom * plan.passed_size;
  multiply<4>(task.frame.coefficients + 4 * atom * columns, columns, columns, values, size,
              [&](int c, int i, Scalar sum) { t[c * size + i] = sum; });
  describe<Scalar>(task, t, nullptr, passed + plan.layers[0].x);
  forward<1>(task, plan, element, passed, task.energies + task.frame.order[atom], 0);
  if (!task.forces) return;
  Scalar* back = task.back + atom * plan.bars_size;
  if (thread() == 0) back[plan.layers[plan.num_layers - 1].y_bar] = 1;  // which the same thread reads
  backward<1>(task, plan, element, passed, back, 0, static_cast<const Scalar*>(nullptr), true);
  Scalar* t_bar = task.by_moments + 4 * atom * size;
  for (int at = thread(); at < 4 * size; at += kThreads) {
    t_bar[at] = describe_back(task, t, back + plan.x_bar, at / size, at % size);
  }
  sync_threads();
  Scalar* y = task.by_coefficients + 4 * atom * columns;
  multiply_back<4>(t_bar, size, size, values, columns, [&](int c, int64_t i, Scalar sum) { y[c * columns + i] = sum; });
  derivatives_by_edges(task, atom, element);
}

template <typename Scalar>
RLEKF_DEVICE void sum_forces(const NetworkTask<Scalar>& task, int64_t index) {
  const Geometry<Scalar>& frame = task.frame;
  const int64_t atom = index * kWarps + warp();
  if (atom >= frame.num_atoms) return;
  const int64_t own = frame.order[atom];
  double total[3] = {}, virial[9] = {};
  for (int64_t e = frame.first_edge[atom] + lane(); e < frame.first_edge[atom + 1]; e += 32) {
    const Edge<Scalar> edge = frame.edges[e];
    for (int a = 0; a < 3; ++a) total[a] += static_cast<double>(task.by_edges[3 * e + a]);
    for (int i = 0; task.virials && i < 9; ++i) {
      const double along = static_cast<double>(edge.length) * static_cast<double>(edge.direction[i / 3]);
      virial[i] -= along * static_cast<double>(task.by_edges[3 * e + i % 3]);
    }
  }
  for (int64_t i = frame.first_incoming[own] + lane(); i < frame.first_incoming[own + 1]; i += 32) {
    for (int a = 0; a < 3; ++a) total[a] -= static_cast<double>(task.by_edges[3 * frame.incoming[i] + a]);
  }
  for (int a = 0; a < 3; ++a) {
    const double sum = warp_sum(total[a]);
    if (lane() == 0) task.forces[3 * own + a] = static_cast<Scalar>(sum);
  }
  for (int i = 0; task.virials && i < 9; ++i) {
    const double sum = warp_sum(virial[i]);
    if (lane() == 0) task.virials_of_atoms[9 * own + i] = sum;
  }
}

template <typename Scalar>
RLEKF_DEVICE void sum_virials(const NetworkTask<Scalar>& task, int64_t structure) {
  for (int i = 0; i < 9; ++i) {
    double total = 0;
    for (int64_t a = thread(); a < task.frame.num_atoms; a += kThreads) {
      if (task.frame.structure[a] == structure) total += task.virials_of_atoms[9 * a + i];
    }
    total = block_sum(total);
    if (thread() == 0) task.virials[9 * structure + i] = static_cast<Scalar>(total);
  }
}

template <typename Scalar>
RLEKF_DEVICE void find_factors(const NetworkTask<Scalar>& task, int64_t number) {
  const Geometry<Scalar>& frame = task.frame;
  const UpdatePlan& update = task.updates[number];
  const Labels<Scalar>& labels = task.labels;
  const int64_t n = frame.num_atoms, count = frame.num_structures;
  Scalar* by_energies = task.by_energies + n * number;
  Scalar* by_forces = task.by_forces + 3 * n * number;
  Scalar* by_virials = task.by_virials + 9 * count * number;
  for (int64_t a = thread(); a < n; a += kThreads) by_energies[a] = 0;
  for (int64_t k = thread(); update.along && k < 3 * n; k += kThreads) by_forces[k] = 0;
  for (int64_t k = thread(); update.along && k < 9 * count; k += kThreads) by_virials[k] = 0;
  sync_threads();
  double error = 0;
  if (update.kind == Kind::kEnergy) {
    for (int64_t b = 0; b < count; ++b) {
      double energy = 0;
      for (int64_t a = thread(); a < n; a += kThreads) {
        if (frame.structure[a] == b) energy += static_cast<double>(task.energies[a]) + labels.bias[labels.types[a]];
      }
      energy = block_sum(energy);
      const double share = 1 / (static_cast<double>(labels.num_atoms[b]) * static_cast<double>(count));
      const auto factor = static_cast<Scalar>(add_error(energy, labels.energy[b], share, error));
      for (int64_t a = thread(); a < n; a += kThreads) {
        if (frame.structure[a] == b) by_energies[a] = factor;
      }
    }
  } else if (update.kind == Kind::kForce) {
    const double share = 1 / static_cast<double>(3 * update.num_atoms);
    for (int64_t k = thread(); k < 3 * update.num_atoms; k += kThreads) {
      const int64_t at = 3 * update.atoms[k / 3] + k % 3;
      by_forces[at] = static_cast<Scalar>(
          add_error(static_cast<double>(task.forces[at]), static_cast<double>(labels.forces[at]), share, error));
    }
    error = block_sum(error);
  } else {
    for (int64_t k = thread(); k < 9 * count; k += kThreads) {
      const double share = 1 / (static_cast<double>(labels.num_atoms[k / 9]) * static_cast<double>(9 * count));
      by_virials[k] = static_cast<Scalar>(
          add_error(static_cast<double>(task.virials[k]), static_cast<double>(labels.virial[k]), share, error));
    }
    error = block_sum(error);
  }
  if (thread() == 0) task.errors[number] = error;
}

template <typename Scalar>
RLEKF_DEVICE void atom_back(const NetworkTask<Scalar>& task, int64_t index) {
  const NetPlan& plan = task.fitting;
  const int64_t n = task.frame.num_atoms, atom = index % n, number = index / n, columns = task.num_columns();
  const int64_t element = element_of(task.frame, atom);
  const int size = task.num_values;
  const Scalar *t = task.moments + 4 * atom * size, *passed = task.atoms + atom * plan.passed_size;
  Scalar *bar = task.atoms_bar + index * plan.bar_size, *t_dot = task.moments_dot + 4 * index * size;
  const Scalar* back = nullptr;
  if (task.updates[number].along) {
    back = task.back + atom * plan.bars_size;
    Scalar* dot = task.coefficients_dot + 4 * index * columns;
    along(task, atom, element, number, dot);
    multiply<4>(dot, columns, columns, task.values + element * columns * size, size,
                [&](int c, int i, Scalar sum) { t_dot[c * size + i] = sum; });
    describe<Scalar>(task, t, t_dot, bar + plan.layers[0].x_dot);
    forward_along(task, plan, element, passed, bar);
  }
  if (thread() == 0) {  // which the same thread reads
    bar[plan.layers[plan.num_layers - 1].y_bar] = task.by_energies[n * number + task.frame.order[atom]];
  }
  backward<1>(task, plan, element, passed, bar, 0, back, true);
  Scalar* t_bar = task.moments_bar + 4 * index * size;
  for (int at = thread(); at < 4 * size; at += kThreads) {
    Scalar sum = describe_back(task, t, bar + plan.x_bar, at / size, at % size);
    if (back) sum += describe_back(task, t_dot, back + plan.x_bar, at / size, at % size);
    t_bar[at] = sum;
  }
}

template <typename Scalar>
RLEKF_DEVICE void nodes_back(const NetworkTask<Scalar>& task, int64_t index) {
  const NetPlan& plan = task.embedding;
  const int64_t rows = task.num_rows(), row = index * kNodesEach % rows, number = index * kNodesEach / rows;
  const int64_t n = task.frame.num_atoms, columns = task.num_columns();
  const int size = task.num_values;
  const NodePair pair = pair_of(task, row);
  const bool is_along = task.updates[number].along;
  const int64_t first = 4 * task.frame.first_atom[pair.center], end = 4 * task.frame.first_atom[pair.center + 1];
  const int64_t column = row % columns;
  const Scalar* c = task.frame.coefficients + column;
  const Scalar* c_dot = task.coefficients_dot + 4 * n * number * columns + column;
  const Scalar* t_bar = task.moments_bar + 4 * n * number * size;
  Scalar* bar = task.nodes_bar + (number * rows + row) * plan.bars_size;
  Scalar* partial = shared_at<Scalar>(0);  // (kWarps, kNodesEach, 32)
  for (int begin = 0; begin < size; begin += 32) {
    const int i = begin + lane();
    Scalar total[kNodesEach] = {};
    if (i < size) {
      RLEKF_UNROLL_BY_4
      for (int64_t at = first + warp(); at < end; at += kWarps) {
        const Scalar factor = t_bar[at * size + i];
        for (int k = 0; k < kNodesEach; ++k) total[k] += c[at * columns + k] * factor;
      }
      RLEKF_UNROLL_BY_4
      for (int64_t at = is_along ? first + warp() : end; at < end; at += kWarps) {
        const Scalar factor = task.by_moments[at * size + i];
        for (int k = 0; k < kNodesEach; ++k) total[k] += c_dot[at * columns + k] * factor;
      }
    }
    for (int k = 0; k < kNodesEach; ++k) partial[(warp() * kNodesEach + k) * 32 + lane()] = total[k];
    sync_threads();
    if (warp() < kNodesEach && i < size) {
      Scalar sum{};
      for (int w = 0; w < kWarps; ++w) sum += partial[(w * kNodesEach + warp()) * 32 + lane()];
      bar[warp() * plan.bars_size + plan.layers[plan.num_layers - 1].y_bar + i] = sum;
    }
    sync_threads();
  }
  backward<kNodesEach>(task, plan, pair.net, task.nodes + row * plan.passed_size, bar, plan.bars_size,
                       static_cast<const Scalar*>(nullptr), false);
}

/// Derivatives by some weights: of kInputsEach inputs (bias and time step are two more) and kOutputsEach outputs.
template <typename Scalar>
RLEKF_DEVICE void by_weights(const NetworkTask<Scalar>& task, int64_t index) {
  const int64_t of_embeddings = int64_t{task.embedding.num_nets} * task.embedding.num_tiles;
  const int64_t each = of_embeddings + int64_t{task.fitting.num_nets} * task.fitting.num_tiles;
  const int64_t number = index / each;
  int64_t tile = index % each;
  const bool is_embedding = tile < of_embeddings;
  const NetPlan& plan = is_embedding ? task.embedding : task.fitting;
  if (!is_embedding) tile -= of_embeddings;
  const int64_t net = tile / plan.num_tiles;
  tile %= plan.num_tiles;
  int l = 0;
  while (tile >= plan.layers[l].tiles()) tile -= plan.layers[l++].tiles();
  const LayerPlan& layer = plan.layers[l];
  const int i = static_cast<int>(tile % layer.tiles_across()) * kInputsEach + lane();
  const int j = static_cast<int>(tile / layer.tiles_across()) * kOutputsEach;
  const int count_j = layer.outputs - j < kOutputsEach ? layer.outputs - j : kOutputsEach;

  const Geometry<Scalar>& frame = task.frame;
  const int64_t types = frame.num_types, nodes = frame.num_nodes;
  const int64_t first = is_embedding ? 0 : frame.first_atom[net];
  const int64_t end = !is_embedding ? frame.first_atom[net + 1] : task.one_sided ? types * nodes : nodes;
  const int64_t size = is_embedding ? plan.bars_size : plan.bar_size;
  const Scalar* passed = is_embedding ? task.nodes : task.atoms;
  const Scalar* bars = is_embedding ? task.nodes_bar + number * task.num_rows() * size
                                    : task.atoms_bar + number * frame.num_atoms * size;
  const bool is_along = !is_embedding && task.updates[number].along;
  const bool of_weight = i < layer.inputs, of_bias = i == layer.inputs;
  Scalar total[kOutputsEach] = {};
  if (i < layer.columns()) {
    for (int64_t at = first + warp(); at < end; at += kWarps) {
      int64_t row = at;
      if (is_embedding) {  // a net of one neighbour has the nodes of all centres, one of a pair those of the pair
        const int64_t center = task.one_sided ? at / nodes : net % types;
        const int64_t neighbor = task.one_sided ? net : net / types;
        row = (center * types + neighbor) * nodes + at % nodes;
      }
      const Scalar* bar = bars + row * size;
      const Scalar x = of_weight ? passed[row * plan.passed_size + layer.x + i] : Scalar{1};
      const Scalar* factor = bar + (of_weight || of_bias ? layer.z_bar : layer.timestep_bar) + j;
      RLEKF_UNROLL
      for (int k = 0; k < kOutputsEach; ++k) total[k] += k < count_j ? x * factor[k] : Scalar{};
      if (!is_along || !of_weight) continue;
      const Scalar x_dot = bar[layer.x_dot + i];
      const Scalar* z_bar = task.back + row * plan.bars_size + layer.z_bar + j;
      RLEKF_UNROLL
      for (int k = 0; k < kOutputsEach; ++k) total[k] += k < count_j ? x_dot * z_bar[k] : Scalar{};
    }
  }
  Scalar* partial = shared_at<Scalar>(0);  // (kWarps, kOutputsEach, kInputsEach)
  for (int k = 0; k < kOutputsEach; ++k) partial[(warp() * kOutputsEach + k) * kInputsEach + lane()] = total[k];
  sync_threads();
  const int k = warp();
  if (i >= layer.columns() || k >= count_j) return;
  Scalar sum{};
  for (int w = 0; w < kWarps; ++w) sum += partial[(w * kOutputsEach + k) * kInputsEach + lane()];
  const int place = of_weight ? (j + k) * layer.inputs + i : i * layer.outputs + j + k;
  const int64_t to = number * task.num_weights() + plan.first_weight + net * plan.num_weights + layer.first + place;
  if (task.gradient) task.gradient[to] = sum;
  if (task.jacobians) task.jacobians[to] = static_cast<double>(sum);
}

template <Phase kPhase, typename Scalar>
RLEKF_DEVICE void run_phase(const NetworkTask<Scalar>& task, int64_t index) {
  if (kPhase == Phase::kNodes) predict_nodes(task, index);
  else if (kPhase == Phase::kAtoms) predict_atom(task, index);
  else if (kPhase == Phase::kForces) sum_forces(task, index);
  else if (kPhase == Phase::kVirials) sum_virials(task, index);
  else if (kPhase == Phase::kFactors) find_factors(task, index);
  else if (kPhase == Phase::kAtomsBack) atom_back(task, index);
  else if (kPhase == Phase::kNodesBack) nodes_back(task, index);
  else by_weights(task, index);
}

}  // namespace rlekf::cuda
