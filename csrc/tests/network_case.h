// A random network on random atoms, for the tests of the network on a table.

#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "../network.h"
#include "threads.h"

namespace rlekf::tests {

constexpr int64_t kAtoms = 21, kTypes = 2, kNodes = 32, kSlots = kAtoms - 1, kStructures = 2;
constexpr double kCutoff = 3.5;

/// Random atoms in two structures, all others of its structure being the neighbours of each, and a random network.
template <typename Scalar>
struct Case {
  std::vector<double> positions;
  std::vector<Scalar> edges, davg, dstd, weights, coefficients;
  std::vector<Edge<Scalar>> records;
  std::vector<uint8_t> near;
  std::vector<int64_t> types, structure, neighbors, order, first_atom, first_edge, neighbor, first_incoming, incoming;
  Network<Scalar> network;
  Geometry<Scalar> geometry{};
  std::vector<Scalar> energies, forces, virials, saved, scratch;

  /// With nets of pairs or of neighbours alone, and wide or narrow ones.
  explicit Case(bool one_sided = false, bool wide = false)
      : weights(wide ? 250000 : 2000), energies(kAtoms), forces(3 * kAtoms), virials(9 * kStructures) {
    std::mt19937_64 random(1);
    std::uniform_real_distribution<double> uniform(0, 4);
    std::normal_distribution<double> normal;
    for (int64_t a = 0; a < kAtoms; ++a) {
      // On a coarse grid, so that no two come too close.
      for (int64_t axis = 0; axis < 3; ++axis) {
        const int64_t at = axis == 0 ? a % 3 : axis == 1 ? a / 3 % 3 : a / 9;
        positions.push_back(1.6 * static_cast<double>(at) + 0.15 * uniform(random));
      }
      types.push_back(a * 7 % 5 < 3 ? 0 : 1);
      structure.push_back(a < 12 ? 0 : 1);
    }
    for (int64_t i = 0; i < 4 * kTypes; ++i) {
      davg.push_back(static_cast<Scalar>(i % 4 == 0 ? 0.05 : 0));
      dstd.push_back(static_cast<Scalar>(0.1 + 0.01 * static_cast<double>(i)));
    }
    for (Scalar& w : weights) w = static_cast<Scalar>((wide ? 0.1 : 0.4) * normal(random));
    network.normalization = {davg.data(), dstd.data(), {14, 9}, 1.2};
    network.axis = 2;
    // 1 -> 3 -> 6 -> 6 with shortcuts and time steps; 12 -> 7 -> 7 -> 1 with a shortcut. Wide: time steps in all nets.
    const std::vector<int64_t> embedding = wide ? std::vector<int64_t>{1, 20, 40} : std::vector<int64_t>{1, 3, 6, 6};
    const std::vector<int64_t> fitting =
        wide ? std::vector<int64_t>{80, 300, 300, 1} : std::vector<int64_t>{12, 7, 7, 1};
    const int64_t num_embeddings = one_sided ? kTypes : kTypes * kTypes;
    for (int64_t i = 0; i < num_embeddings; ++i) network.embeddings.push_back(net(embedding, true, false));
    for (int64_t t = 0; t < kTypes; ++t) network.fittings.push_back(net(fitting, wide, true));
    weights.resize(static_cast<size_t>(network.num_weights));
    build();
  }

  Net<Scalar> net(const std::vector<int64_t>& widths, bool timesteps, bool output) {
    Net<Scalar> layers;
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      const int64_t inputs = widths[l], outputs = widths[l + 1];
      const bool hidden = !output || l + 2 < widths.size();
      const int64_t copies = hidden && (outputs == inputs || outputs == 2 * inputs) ? outputs / inputs : 0;
      const bool timestep = timesteps && copies > 0;
      Scalar* start = weights.data() + network.num_weights;
      layers.push_back({inputs, outputs, hidden, copies, start, start + inputs * outputs,
                        timestep ? start + (inputs + 1) * outputs : nullptr, network.num_weights});
      network.num_weights += (inputs + (timestep ? 2 : 1)) * outputs;
    }
    return layers;
  }

  /// The geometry at the current positions.
  void build(int64_t num_workers = 1) {
    edges.clear();
    neighbors.clear();
    for (int64_t a = 0; a < kAtoms; ++a) {
      for (int64_t element = 0; element < kTypes; ++element) {
        for (int64_t b = 0; b < kAtoms; ++b) {
          if (b == a || types[static_cast<size_t>(b)] != element) continue;
          const bool apart = structure[static_cast<size_t>(a)] != structure[static_cast<size_t>(b)];
          for (int64_t axis = 0; axis < 3; ++axis) {
            const double difference =
                positions[static_cast<size_t>(3 * b + axis)] - positions[static_cast<size_t>(3 * a + axis)];
            edges.push_back(static_cast<Scalar>(apart ? 9 : difference));
          }
          neighbors.push_back(b);
        }
        // The atom's own element has a slot less to fill.
        if (types[static_cast<size_t>(a)] == element) {
          for (int axis = 0; axis < 3; ++axis) edges.push_back(9);
          neighbors.push_back(a);
        }
      }
    }
    std::vector<int64_t> slots(kTypes, 0);
    for (const int64_t type : types) ++slots[static_cast<size_t>(type)];
    near.resize(neighbors.size());
    const FrameInputs<Scalar> inputs{kAtoms,      edges.data(), neighbors.data(), types.data(),
                                     near.data(), slots,        kCutoff,          0.5};
    order.resize(kAtoms);
    first_atom.resize(kTypes + 1);
    first_edge.resize(kAtoms + 1);
    geometry.num_types = kTypes;
    geometry.order = order.data();
    geometry.first_atom = first_atom.data();
    geometry.first_edge = first_edge.data();
    cpu::sort_atoms(inputs, geometry);
    const int64_t num_edges = first_edge[kAtoms];
    records.resize(static_cast<size_t>(num_edges));
    neighbor.resize(static_cast<size_t>(num_edges));
    incoming.resize(static_cast<size_t>(num_edges));
    first_incoming.resize(kAtoms + 1);
    coefficients.assign(kAtoms * 4 * kTypes * kNodes, static_cast<Scalar>(NAN));
    geometry = {kAtoms,
                kTypes,
                kNodes,
                num_edges,
                kStructures,
                order.data(),
                first_atom.data(),
                first_edge.data(),
                records.data(),
                neighbor.data(),
                first_incoming.data(),
                incoming.data(),
                coefficients.data(),
                structure.data()};
    cpu::tabulate(inputs, network.normalization, geometry, std_threads(num_workers));
  }

  void predict(bool with_forces, int64_t num_workers = 1) {
    saved.assign(static_cast<size_t>(cpu::saved_size(network, geometry, with_forces)), static_cast<Scalar>(NAN));
    scratch.assign(static_cast<size_t>(cpu::scratch_size(network, geometry, num_workers)), static_cast<Scalar>(NAN));
    const Prediction<Scalar> result{energies.data(), with_forces ? forces.data() : nullptr,
                                    with_forces ? virials.data() : nullptr, saved.data()};
    cpu::predict(network, geometry, result, scratch.data(), std_threads(num_workers));
  }

  /// A sum of all results with these factors.
  double total(const std::vector<Scalar>& by_energies, const std::vector<Scalar>& by_forces,
               const std::vector<Scalar>& by_virials) const {
    const auto inner = [](const std::vector<Scalar>& a, const std::vector<Scalar>& b) {
      double sum = 0;
      for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
      return sum;
    };
    return inner(by_energies, energies) + inner(by_forces, forces) + inner(by_virials, virials);
  }

  double energy() {
    predict(false);
    double sum = 0;
    for (const Scalar e : energies) sum += static_cast<double>(e);
    return sum;
  }
};

template <typename Scalar>
std::vector<Scalar> random_numbers(size_t size, int seed) {
  std::mt19937_64 random(static_cast<uint64_t>(seed));
  std::normal_distribution<double> normal;
  std::vector<Scalar> numbers(size);
  for (Scalar& x : numbers) x = static_cast<Scalar>(normal(random));
  return numbers;
}

}  // namespace rlekf::tests
