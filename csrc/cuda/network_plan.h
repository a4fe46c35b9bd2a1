// The network on a table, on a GPU: the launches of an op, and where the numbers of each atom and node lie. Computed from
// plain numbers: no device is queried.
//
//     row       an atom, in the order of elements, or a node of the table of a pair: (center T + neighbour) K + node
//     passed    what a row keeps of a forward pass through its net: x and h of each layer
//     bar       the derivatives of a result by y and z of each layer, z = x W + b, by the time steps, and by the first x
//     dot       x and z of each layer along a direction, after the bars
//
// Everything lies in global memory, and thread blocks are small: one for an atom, or for four nodes. So nets of any size
// fit, and what a thread block has just written is in its first-level cache.

#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../arena.h"
#include "../network.h"
#include "launch.h"

namespace rlekf::cuda {

constexpr int kMaxLayers = 8;
constexpr int kNodesEach = 4;             // of a thread block: kNodesAtOnce is a multiple of it
constexpr int kEdgesAtOnce = 64;          // in shared memory, or fewer
constexpr int kEdgeNumbers = 25;          // of each
constexpr int kInputsEach = 32;           // of a thread block, of the derivatives by weights
constexpr int kOutputsEach = 8;           // likewise
constexpr int kPointersAtOnce = 384;      // parameters that a launch hands over
constexpr int64_t kSharedNumbers = 2048;  // of 8 bytes, of every thread block
static_assert(kNodesAtOnce % kNodesEach == 0);
static_assert(kNodesEach * kThreads <= kSharedNumbers && kEdgesAtOnce * kEdgeNumbers <= kSharedNumbers &&
              kWarps * kOutputsEach * kInputsEach <= kSharedNumbers && kWarps * kNodesEach * 32 <= kSharedNumbers);

struct LayerPlan {
  int inputs, outputs, copies;
  bool hidden, timestep;
  int pointer;                     // among those of a net; that of the bias follows, then that of the time step
  int first;                       // of its derivatives among those of a net
  int x, h;                        // places in `passed`
  int y_bar, z_bar, timestep_bar;  // and in the bars
  int x_dot, z_dot;                // likewise

  RLEKF_INLINE_HD int columns() const { return inputs + (timestep ? 2 : 1); }  // of derivatives: W, b, time step
  RLEKF_INLINE_HD int tiles_across() const { return (columns() + kInputsEach - 1) / kInputsEach; }
  RLEKF_INLINE_HD int tiles() const { return tiles_across() * ((outputs + kOutputsEach - 1) / kOutputsEach); }
};

/// All nets of a kind: they have the same layers.
struct NetPlan {
  int num_nets, num_layers;
  int num_pointers, num_weights, num_tiles;  // of one
  int64_t first_pointer, first_weight;       // of the first one
  int passed_size, bar_size, bars_size;      // of a row; bars_size without the dots
  int x_bar;                                 // place of the derivatives by the first x
  LayerPlan layers[kMaxLayers];
};

struct UpdatePlan {
  Kind kind;
  bool along;  // whether it has factors of forces or virials
  const int64_t* atoms;
  int64_t num_atoms;
};

/// The arguments of a launch. U updates, E edges at most, R = T T K rows of nodes, C = T K columns of the coefficients.
template <typename Scalar>
struct NetworkTask {
  NetPlan embedding, fitting;
  Geometry<Scalar> frame;
  const Scalar *davg, *dstd;
  double last, num_slots;
  int num_values, axis, edges_at_once;
  bool one_sided;

  const Scalar** parameters;

  // What predict() saves; the last two with forces.
  Scalar* nodes;       // (R, passed_size)
  Scalar* values;      // (R, M), N
  Scalar* atoms;       // (n, passed_size)
  Scalar* moments;     // (n, 4, M), T
  Scalar* back;        // (n, bars_size), of the sum of all energies
  Scalar* by_moments;  // (n, 4, M), likewise

  Scalar *energies, *forces, *virials;  // (n), (n, 3), (B, 3, 3): the results; the last two may be null
  Scalar* by_coefficients;              // (n, 4, C)
  Scalar* by_edges;                     // (E, 3)
  double* virials_of_atoms;             // (n, 9)

  Labels<Scalar> labels;
  int num_updates;
  UpdatePlan updates[kUpdatesAtOnce];
  double* errors;                                // (U)
  Scalar *by_energies, *by_forces, *by_virials;  // (U, n), (U, n, 3), (U, B, 9): the factors
  Scalar* coefficients_dot;                      // (U, n, 4, C)
  Scalar *moments_dot, *moments_bar;             // (U, n, 4, M)
  Scalar* atoms_bar;                             // (U, n, bar_size)
  Scalar* nodes_bar;                             // (U, R, bars_size)
  Scalar* gradient;                              // (U, N), or null
  double* jacobians;                             // (U, N), or null

  RLEKF_INLINE_HD int64_t num_columns() const { return frame.num_types * frame.num_nodes; }
  RLEKF_INLINE_HD int64_t num_rows() const { return frame.num_types * num_columns(); }
  RLEKF_INLINE_HD int64_t num_weights() const {
    return fitting.first_weight + int64_t{fitting.num_nets} * fitting.num_weights;
  }
};

template <typename Scalar>
NetPlan plan_of(const std::vector<Net<Scalar>>& nets, int64_t first_pointer) {
  const Net<Scalar>& net = nets[0];
  if (net.size() > kMaxLayers) {
    throw std::runtime_error("rlekf: on a GPU a net should have at most " + std::to_string(kMaxLayers) +
                             " layers but has " + std::to_string(net.size()) + ".");
  }
  NetPlan plan{};
  plan.num_nets = static_cast<int>(nets.size());
  plan.num_layers = static_cast<int>(net.size());
  plan.first_pointer = first_pointer;
  plan.first_weight = net[0].first;
  const auto take = [](int& used, int numbers) {
    used += numbers;
    return used - numbers;
  };
  for (int l = 0; l < plan.num_layers; ++l) {
    const Layer<Scalar>& from = net[static_cast<size_t>(l)];
    LayerPlan& layer = plan.layers[l];
    layer.inputs = static_cast<int>(from.inputs);
    layer.outputs = static_cast<int>(from.outputs);
    layer.copies = static_cast<int>(from.copies);
    layer.hidden = from.hidden;
    layer.timestep = from.timestep != nullptr;
    layer.pointer = take(plan.num_pointers, layer.timestep ? 3 : 2);
    layer.first = take(plan.num_weights, layer.columns() * layer.outputs);
    layer.x = take(plan.passed_size, layer.inputs);
    layer.h = take(plan.passed_size, layer.outputs);
    layer.y_bar = take(plan.bars_size, layer.outputs);
    layer.z_bar = take(plan.bars_size, layer.outputs);
    layer.timestep_bar = take(plan.bars_size, layer.timestep ? layer.outputs : 0);
    plan.num_tiles += layer.tiles();
  }
  plan.x_bar = take(plan.bars_size, plan.layers[0].inputs);
  plan.bar_size = plan.bars_size;
  for (int l = 0; l < plan.num_layers; ++l) {
    plan.layers[l].x_dot = take(plan.bar_size, plan.layers[l].inputs);
    plan.layers[l].z_dot = take(plan.bar_size, plan.layers[l].outputs);
  }
  return plan;
}

template <typename Scalar>
NetworkTask<Scalar> task_of(const Network<Scalar>& network, const Geometry<Scalar>& geometry) {
  NetworkTask<Scalar> task{};
  task.embedding = plan_of(network.embeddings, 0);
  task.fitting = plan_of(network.fittings, int64_t{task.embedding.num_nets} * task.embedding.num_pointers);
  task.frame = geometry;
  task.davg = network.normalization.davg;
  task.dstd = network.normalization.dstd;
  task.last = network.normalization.last;
  for (const int64_t sel : network.normalization.sel) task.num_slots += static_cast<double>(sel);
  task.num_values = static_cast<int>(network.num_values());
  task.axis = static_cast<int>(network.axis);
  task.edges_at_once = kEdgesAtOnce;
  task.one_sided = network.embeddings.size() == network.fittings.size();
  return task;
}

template <typename Scalar>
void set_results(NetworkTask<Scalar>& task, const Prediction<Scalar>& result) {
  task.energies = result.energies;
  task.forces = result.forces;
  task.virials = result.virials;
}

/// Of which the phases write those that find_factors() finds.
template <typename Scalar>
void set_factors(NetworkTask<Scalar>& task, const Factors<Scalar>& factors) {
  task.by_energies = const_cast<Scalar*>(factors.energies);
  task.by_forces = const_cast<Scalar*>(factors.forces);
  task.by_virials = const_cast<Scalar*>(factors.virials);
}

/// All parameters, in the order of their pointers.
template <typename Scalar>
std::vector<const Scalar*> pointers_of(const Network<Scalar>& network) {
  std::vector<const Scalar*> pointers;
  for (const auto* nets : {&network.embeddings, &network.fittings}) {
    for (const Net<Scalar>& net : *nets) {
      for (const Layer<Scalar>& layer : net) {
        pointers.push_back(layer.weight);
        pointers.push_back(layer.bias);
        if (layer.timestep) pointers.push_back(layer.timestep);
      }
    }
  }
  return pointers;
}

/// What gradients() needs of predict(). Returns the size, in numbers of type Scalar.
template <typename Scalar>
int64_t place_saved(NetworkTask<Scalar>& task, bool forces, Scalar* memory) {
  Arena<Scalar> pieces{memory};
  const int64_t n = task.frame.num_atoms, moments = 4 * n * task.num_values;
  task.nodes = pieces.take(task.num_rows() * task.embedding.passed_size);
  task.values = pieces.take(task.num_rows() * task.num_values);
  task.atoms = pieces.take(n * task.fitting.passed_size);
  task.moments = pieces.take(moments);
  task.back = pieces.take(forces ? n * task.fitting.bars_size : 0);
  task.by_moments = pieces.take(forces ? moments : 0);
  return pieces.used;
}

/// Scratch memory of predict() with forces, and of gradients() for U updates, in doubles; contents do not matter.
template <typename Scalar>
int64_t place_scratch(NetworkTask<Scalar>& task, int64_t num_updates, double* memory) {
  Arena<double> doubles{memory};
  const int64_t n = task.frame.num_atoms, columns = 4 * n * task.num_columns(), moments = 4 * n * task.num_values;
  const int64_t num_pointers = int64_t{task.fitting.num_nets} * task.fitting.num_pointers + task.fitting.first_pointer;
  task.parameters = reinterpret_cast<const Scalar**>(doubles.take(num_pointers));
  task.virials_of_atoms = doubles.take(9 * n);
  Scalar* rest = reinterpret_cast<Scalar*>(doubles.take(0));
  Arena<Scalar> pieces{rest};
  task.by_coefficients = pieces.take(columns);
  task.by_edges = pieces.take(3 * task.frame.num_edges);
  task.coefficients_dot = pieces.take(num_updates * columns);
  task.moments_dot = pieces.take(num_updates * moments);
  task.moments_bar = pieces.take(num_updates * moments);
  task.atoms_bar = pieces.take(num_updates * n * task.fitting.bar_size);
  task.nodes_bar = pieces.take(num_updates * task.num_rows() * task.embedding.bars_size);
  return doubles.used + (pieces.used * static_cast<int64_t>(sizeof(Scalar)) + 7) / 8;
}

/// The launches, in order.
enum class Phase { kNodes, kAtoms, kForces, kVirials, kFactors, kAtomsBack, kNodesBack, kWeights };

template <Phase kPhase>
using PhaseConstant = std::integral_constant<Phase, kPhase>;

/// function(PhaseConstant<phase>{}).
template <typename Function>
void with_constant(Phase phase, const Function& function) {
  switch (phase) {
    case Phase::kNodes:
      return function(PhaseConstant<Phase::kNodes>{});
    case Phase::kAtoms:
      return function(PhaseConstant<Phase::kAtoms>{});
    case Phase::kForces:
      return function(PhaseConstant<Phase::kForces>{});
    case Phase::kVirials:
      return function(PhaseConstant<Phase::kVirials>{});
    case Phase::kFactors:
      return function(PhaseConstant<Phase::kFactors>{});
    case Phase::kAtomsBack:
      return function(PhaseConstant<Phase::kAtomsBack>{});
    case Phase::kNodesBack:
      return function(PhaseConstant<Phase::kNodesBack>{});
    case Phase::kWeights:
      return function(PhaseConstant<Phase::kWeights>{});
  }
}

/// launch(phase, number of thread blocks) for the results, for the errors, and for the derivatives.
template <typename Scalar, typename Launcher>
void predict_phases(const NetworkTask<Scalar>& task, const Launcher& launch) {
  launch(Phase::kNodes, task.num_rows() / kNodesEach);
  launch(Phase::kAtoms, task.frame.num_atoms);
  if (task.forces) launch(Phase::kForces, (task.frame.num_atoms + kWarps - 1) / kWarps);
  if (task.virials) launch(Phase::kVirials, task.frame.num_structures);
}

template <typename Scalar, typename Launcher>
void gradient_phases(const NetworkTask<Scalar>& task, const Launcher& launch) {
  launch(Phase::kAtomsBack, task.num_updates * task.frame.num_atoms);
  launch(Phase::kNodesBack, task.num_updates * (task.num_rows() / kNodesEach));
  const int64_t tiles = int64_t{task.embedding.num_nets} * task.embedding.num_tiles +
                        int64_t{task.fitting.num_nets} * task.fitting.num_tiles;
  launch(Phase::kWeights, task.num_updates * tiles);
}

}  // namespace rlekf::cuda
