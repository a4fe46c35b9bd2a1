// The ops on CPU tensors: torch's threads, and scratch memory that each calling thread allocates once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../neighbors.h"
#include "../network_ops.h"
#include "scratch.h"

namespace rlekf {
namespace {

cpu::Parallel torch_threads() {
  return {torch::stable::get_num_threads(), [](int64_t count, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

int64_t gram_size(const Covariance& p, const Measurements& m) { return 2 * p.num_blocks * m.count * m.count; }

std::tuple<Tensor, Tensor> project(const Tensor& tiles, const Tensor& pending, const Tensor& state,
                                   const Tensor& layout, const Tensor& jacobian) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian);
  const auto parallel = torch_threads();
  Tensor cross = torch::stable::new_empty(jacobian, {m.count, p.num_weights});
  Tensor gram = torch::stable::new_empty(jacobian, {2, p.num_blocks, m.count, m.count});
  cpu::project(p, m, projection_of(p, m, cross, gram),
               cpu::scratch(cpu::scratch_size(p, m.count, parallel.num_workers)), parallel);
  return {cross, gram};
}

Tensor multiply_tiles(const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout,
                      const Tensor& jacobian) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian);
  const auto parallel = torch_threads();
  Tensor z = torch::stable::new_empty(jacobian, {m.count, p.num_weights});
  cpu::multiply_tiles(p, m, static_cast<double*>(z.mutable_data_ptr()),
                      cpu::scratch(cpu::scratch_size(p, m.count, parallel.num_workers)), parallel);
  return z;
}

Tensor finish_projection(const Tensor& z, const Tensor& pending, const Tensor& state, const Tensor& layout,
                         const Tensor& jacobian) {
  const Covariance p = covariance_without_tiles(pending, state, layout, jacobian);
  const Measurements m = measurements_of(p, jacobian);
  Tensor gram = torch::stable::new_empty(jacobian, {2, p.num_blocks, m.count, m.count});
  cpu::finish_projection(p, m, projection_of(p, m, z, gram), torch_threads());
  return gram;
}

void correct(const Tensor& weights, const Tensor& pending, const Tensor& state, const Tensor& layout,
             const Tensor& cross, const Tensor& gram, const Tensor& jacobian, const Tensor& innovation) {
  const Covariance p = covariance_without_tiles(pending, state, layout, jacobian);
  const Measurements m = measurements_of(p, jacobian, innovation);
  cpu::correct(weights_of(p, weights), p, m, projection_of(p, m, cross, gram), torch_threads());
}

void step(const Tensor& weights, const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout,
          const Tensor& jacobian, const Tensor& innovation) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian, innovation);
  double* w = weights_of(p, weights);
  const auto parallel = torch_threads();
  const int64_t cross_size = m.count * p.num_weights;
  double* memory = cpu::scratch(cross_size + gram_size(p, m) + cpu::scratch_size(p, m.count, parallel.num_workers));
  const Projection projection{memory, memory + cross_size};
  cpu::project(p, m, projection, memory + cross_size + gram_size(p, m), parallel);
  cpu::correct(w, p, m, projection, parallel);
}

/// Indices below `limit`.
int64_t* checked_indices(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, int64_t limit) {
  int64_t* indices = checked<int64_t>(tensor, name, shape, -1);
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < limit, "rlekf: ", name, " should lie in 0 ... ", limit - 1,
                    " but one is ", indices[i], ".");
  }
  return indices;
}

/// Without virials, structures are not read.
void check_structures(const Tensors& geometry, int64_t num_structures) {
  if (num_structures == 0) return;
  checked_indices(geometry[kStructure], "structure", {geometry[kCoefficients].size(0)}, num_structures);
}

Tensors tabulate(const Tensor& edges, const Tensor& neighbors, const Tensor& types, Sizes slots, Tensors normal,
                 Sizes sel, int64_t num_nodes, double rcut, double rcut_smth, double last) {
  STD_TORCH_CHECK(num_nodes > 0 && num_nodes % kNodesAtOnce == 0,
                  "rlekf: the nodes of a table should be a multiple of ", kNodesAtOnce, " but are ", num_nodes, ".");
  const int64_t num_atoms = types.size(0), num_types = static_cast<int64_t>(sel.size());
  const int64_t num_slots = std::accumulate(slots.begin(), slots.end(), int64_t{0});
  STD_TORCH_CHECK(slots.size() == sel.size(), "rlekf: slots should be of ", num_types, " elements but are of ",
                  slots.size(), ".");
  std::vector<uint8_t> near(static_cast<size_t>(num_atoms * num_slots));
  Tensors parts;
  for (const int64_t size : {num_atoms, num_types + 1, num_atoms + 1}) {
    parts.push_back(torch::stable::new_empty(types, {size}));
  }
  return with_scalar(edges, [&](auto zero) {
    using Scalar = decltype(zero);
    const FrameInputs<Scalar> inputs{num_atoms,
                                     checked<Scalar>(edges, "edges", {num_atoms, num_slots, 3}, -1),
                                     checked_indices(neighbors, "neighbors", {num_atoms, num_slots}, num_atoms),
                                     checked_indices(types, "types", {num_atoms}, num_types),
                                     near.data(),
                                     slots,
                                     rcut,
                                     rcut_smth};
    Geometry<Scalar> sorted{};
    sorted.num_types = num_types;
    sorted.order = data_of<int64_t>(parts[kOrder]);
    sorted.first_atom = data_of<int64_t>(parts[kFirstAtom]);
    sorted.first_edge = data_of<int64_t>(parts[kFirstEdge]);
    cpu::sort_atoms(inputs, sorted);
    const int64_t num_edges = sorted.first_edge[num_atoms];
    parts.push_back(torch::stable::new_empty(edges, {num_edges, 8}));
    for (const int64_t size : {num_edges, num_atoms + 1, num_edges}) {
      parts.push_back(torch::stable::new_empty(types, {size}));
    }
    parts.push_back(torch::stable::new_empty(edges, {num_atoms, 4, num_types, num_nodes}));
    cpu::tabulate(inputs, normalization_of<Scalar>(normal, sel, last, -1), geometry_of<Scalar>(parts, 0),
                  torch_threads());
    return parts;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> predict(Tensors parameters, Tensors geometry, Tensors normal, Sizes sel,
                                                   double last, Sizes sizes, std::vector<bool> timesteps,
                                                   int64_t num_structures, bool forces, bool virials) {
  const Tensor& like = geometry[kCoefficients];
  const Outputs found(like, num_structures, forces, virials);
  return with_scalar(like, [&](auto zero) {
    using Scalar = decltype(zero);
    const NetworkCall<Scalar> call(parameters, geometry, normal, sel, last, sizes, timesteps, num_structures);
    check_structures(geometry, num_structures);
    const auto parallel = torch_threads();
    Tensor saved = torch::stable::new_empty(like, {cpu::saved_size(call.network, call.frame, forces)});
    const cpu::Memory<Scalar> scratch(cpu::scratch_size(call.network, call.frame, parallel.num_workers));
    cpu::predict(call.network, call.frame, found.pointers<Scalar>(saved), scratch.rest(), parallel);
    return std::make_tuple(found.energies, found.forces, found.virials, saved);
  });
}

Tensor gradients(Tensors parameters, Tensors geometry, Tensors normal, Sizes sel, double last, Sizes sizes,
                 std::vector<bool> timesteps, const Tensor& saved, const Tensor& by_energies,
                 std::optional<Tensor> by_forces, std::optional<Tensor> by_virials) {
  return with_scalar(saved, [&](auto zero) {
    using Scalar = decltype(zero);
    const int64_t count = by_energies.size(0), num_structures = by_virials ? by_virials->size(1) : 0;
    const NetworkCall<Scalar> call(parameters, geometry, normal, sel, last, sizes, timesteps, num_structures);
    const auto& [device, frame, network] = call;
    check_structures(geometry, num_structures);
    const auto parallel = torch_threads();
    const Factors<Scalar> factors = factors_of(call, by_energies, by_forces, by_virials);
    STD_TORCH_CHECK(saved.size(0) == cpu::saved_size(network, frame, by_forces.has_value()),
                    "rlekf: gradients should be given what predict saved with the same kinds of results.");
    Tensor result = torch::stable::new_empty(saved, {count, network.num_weights});
    for (int64_t i = 0; i < count; ++i) {
      cpu::gradients(network, frame, data_of<Scalar>(saved), factors_from(factors, call.frame, i),
                     data_of<Scalar>(result) + i * network.num_weights,
                     cpu::Memory<Scalar>(cpu::scratch_size(network, frame, parallel.num_workers)).rest(), parallel);
    }
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> place_neighbors(const Tensor& pairs, const Tensor& vectors,
                                                           const Tensor& types, int64_t num_types, double cutoff) {
  const int64_t num_atoms = types.size(0);
  const Pairs all{num_atoms,
                  num_types,
                  pairs.size(0),
                  cutoff,
                  data_of<int64_t>(pairs),
                  data_of<double>(vectors),
                  data_of<int64_t>(types)};
  Tensor slots = torch::stable::new_empty(types, {num_types});
  int64_t* counts = data_of<int64_t>(slots);
  cpu::count_slots(all, counts);
  const int64_t num_slots = std::accumulate(counts, counts + num_types, int64_t{0});
  Tensor edges = torch::stable::new_empty(vectors, {num_atoms, num_slots, 3});
  Tensor neighbors = torch::stable::new_empty(types, {num_atoms, num_slots});
  Tensor shortest = torch::stable::new_empty(vectors, {});
  *data_of<double>(shortest) = cpu::place_neighbors(all, counts, data_of<double>(edges), data_of<int64_t>(neighbors));
  return {edges, neighbors, slots, shortest};
}

std::tuple<Tensor, Tensor, Tensor> find_pairs(const Tensor& points, std::optional<Tensor> cell, double cutoff) {
  const int64_t num_atoms = points.size(0);
  cpu::Search search(data_of<double>(points), num_atoms, cell ? data_of<double>(*cell) : nullptr, cutoff);
  std::vector<int64_t> atoms;
  std::vector<double> vectors;
  if (search.feasible()) cpu::find_pairs(search, num_atoms, atoms, vectors);
  const auto count = static_cast<int64_t>(atoms.size() / 2);
  Tensor pairs = torch::stable::new_empty(points, {count, 2}, torch::headeronly::ScalarType::Long);
  std::copy(atoms.begin(), atoms.end(), data_of<int64_t>(pairs));
  Tensor between = torch::stable::new_empty(points, {count, 3});
  std::copy(vectors.begin(), vectors.end(), data_of<double>(between));
  Tensor feasible = torch::stable::new_empty(pairs, {});
  *data_of<int64_t>(feasible) = search.feasible() ? 1 : 0;
  return {pairs, between, feasible};
}

std::tuple<Tensor, Tensor, Tensor> survey(const Tensor& points, std::optional<Tensor> cells, const Tensor& types,
                                          int64_t num_types, double cutoff, double smooth) {
  const int64_t num_frames = points.size(0), num_atoms = points.size(1);
  Tensor slots = torch::stable::new_empty(types, {num_frames, num_types});
  Tensor shortest = torch::stable::new_empty(points, {num_frames});
  Tensor sums = torch::stable::new_empty(points, {num_frames, num_types, 3});
  torch_threads().run(num_frames, [&](int64_t i) {
    const double* cell = cells ? data_of<double>(*cells) + 9 * i : nullptr;
    data_of<double>(shortest)[i] =
        cpu::survey(data_of<double>(points) + 3 * num_atoms * i, cell, data_of<int64_t>(types), num_atoms, num_types,
                    cutoff, smooth, data_of<int64_t>(slots) + num_types * i, data_of<double>(sums) + 3 * num_types * i);
  });
  return {slots, shortest, sums};
}

std::tuple<Tensor, Tensor> measure(Tensors parameters, Tensors geometry, Tensors normal, Sizes sel, double last,
                                   Sizes sizes, std::vector<bool> timesteps, const Tensor& bias, const Tensor& types,
                                   const Tensor& num_atoms, std::optional<Tensor> energy, std::optional<Tensor> forces,
                                   std::optional<Tensor> virial, Sizes kinds, Tensors atoms) {
  const Tensor& like = geometry[kCoefficients];
  return with_scalar(like, [&](auto zero) {
    using Scalar = decltype(zero);
    const NetworkCall<Scalar> call(parameters, geometry, normal, sel, last, sizes, timesteps, num_atoms.size(0));
    const auto& [device, frame, network] = call;
    check_structures(geometry, num_atoms.size(0));
    checked_indices(types, "types", {frame.num_atoms}, static_cast<int64_t>(sel.size()));
    for (const Tensor& group : atoms) checked_indices(group, "atoms of a group", {kAny}, frame.num_atoms);
    const auto labels = labels_of(frame, device, bias, types, num_atoms, energy, forces, virial);
    const auto updates = updates_of(labels, device, kinds, atoms);
    const auto num_updates = static_cast<int64_t>(updates.size());
    Tensor errors = torch::stable::new_empty(bias, {num_updates});
    Tensor jacobians = torch::stable::new_empty(bias, {num_updates, network.num_weights});
    cpu::measure(network, frame, labels, updates, data_of<double>(errors), data_of<double>(jacobians), torch_threads());
    return std::make_tuple(errors, jacobians);
  });
}

}  // namespace
}  // namespace rlekf

STABLE_TORCH_LIBRARY_IMPL(rlekf, CPU, m) {
  m.impl("project", TORCH_BOX(&rlekf::project));
  m.impl("multiply_tiles", TORCH_BOX(&rlekf::multiply_tiles));
  m.impl("finish_projection", TORCH_BOX(&rlekf::finish_projection));
  m.impl("correct", TORCH_BOX(&rlekf::correct));
  m.impl("step", TORCH_BOX(&rlekf::step));
  m.impl("tabulate", TORCH_BOX(&rlekf::tabulate));
  m.impl("predict", TORCH_BOX(&rlekf::predict));
  m.impl("gradients", TORCH_BOX(&rlekf::gradients));
  m.impl("measure", TORCH_BOX(&rlekf::measure));
  m.impl("find_pairs", TORCH_BOX(&rlekf::find_pairs));
  m.impl("survey", TORCH_BOX(&rlekf::survey));
  m.impl("place_neighbors", TORCH_BOX(&rlekf::place_neighbors));
}
