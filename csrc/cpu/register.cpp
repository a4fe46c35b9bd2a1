// The ops on CPU tensors: torch's threads, and scratch memory that each calling thread allocates once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "../neighbors.h"
#include "../ops.h"
#include "../table.h"

namespace rlekf {
namespace {

cpu::Parallel torch_threads() {
  return {torch::stable::get_num_threads(), [](int64_t count, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

/// At least `size` doubles, which the calling thread keeps until it ends.
double* scratch(int64_t size) {
  thread_local std::vector<double> memory;
  if (memory.size() < static_cast<size_t>(size)) memory.resize(static_cast<size_t>(size));
  return memory.data();
}

int64_t gram_size(const Covariance& p, const Measurements& m) { return 2 * p.num_blocks * m.count * m.count; }

std::tuple<Tensor, Tensor> project(const Tensor& tiles, const Tensor& pending, const Tensor& state,
                                   const Tensor& layout, const Tensor& jacobian) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian);
  const auto parallel = torch_threads();
  Tensor cross = torch::stable::new_empty(jacobian, {m.count, p.num_weights});
  Tensor gram = torch::stable::new_empty(jacobian, {2, p.num_blocks, m.count, m.count});
  cpu::project(p, m, projection_of(p, m, cross, gram), scratch(cpu::scratch_size(p, m.count, parallel.num_workers)),
               parallel);
  return {cross, gram};
}

Tensor multiply_tiles(const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout,
                      const Tensor& jacobian) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian);
  const auto parallel = torch_threads();
  Tensor z = torch::stable::new_empty(jacobian, {m.count, p.num_weights});
  cpu::multiply_tiles(p, m, static_cast<double*>(z.mutable_data_ptr()),
                      scratch(cpu::scratch_size(p, m.count, parallel.num_workers)), parallel);
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
  double* memory = scratch(cross_size + gram_size(p, m) + cpu::scratch_size(p, m.count, parallel.num_workers));
  const Projection projection{memory, memory + cross_size};
  cpu::project(p, m, projection, memory + cross_size + gram_size(p, m), parallel);
  cpu::correct(w, p, m, projection, parallel);
}

template <typename Scalar>
Scalar* data_of(const Tensor& tensor) {
  return static_cast<Scalar*>(tensor.mutable_data_ptr());
}

template <typename Scalar>
Edges<Scalar> edges_of(const Tensor& first_edge, const Tensor& place, const Tensor& values, const Tensor& slopes,
                       const Tensor& rows, const Tensor& jacobian, int64_t num_types, int64_t num_nodes) {
  return {first_edge.size(0) - 1,
          num_types,
          num_nodes,
          place.size(0),
          data_of<int64_t>(first_edge),
          data_of<int64_t>(place),
          data_of<Scalar>(values),
          data_of<Scalar>(slopes),
          data_of<Scalar>(rows),
          data_of<Scalar>(jacobian)};
}

/// Calls function with a value of the type of the tensor's numbers.
template <typename Function>
void with_scalar(const Tensor& tensor, const Function& function) {
  using torch::headeronly::ScalarType;
  const bool single = tensor.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || tensor.scalar_type() == ScalarType::Double, "rlekf: edges should be float64 or float32.");
  if (single) function(float{});
  else function(double{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tabulate(const Tensor& edges, const Tensor& first_edge,
                                                                    const Tensor& neighbor, const Tensor& center,
                                                                    const Tensor& davg, const Tensor& dstd,
                                                                    const Tensor& sel, int64_t num_nodes, double rcut,
                                                                    double rcut_smth, double last) {
  const int64_t num_edges = edges.size(0), num_atoms = first_edge.size(0) - 1, num_types = sel.size(0);
  STD_TORCH_CHECK(num_nodes >= kStencil, "rlekf: a table should have at least ", kStencil, " nodes but has ", num_nodes,
                  ".");
  Tensor coefficients = torch::stable::new_empty(edges, {num_atoms, 4, num_types, num_nodes});
  Tensor place = torch::stable::new_empty(neighbor, {num_edges});
  Tensor values = torch::stable::new_empty(edges, {num_edges, kStencil});
  Tensor slopes = torch::stable::new_empty(edges, {num_edges, kStencil});
  Tensor rows = torch::stable::new_empty(edges, {num_edges, 4});
  Tensor jacobian = torch::stable::new_empty(edges, {num_edges, 5, 3});
  with_scalar(edges, [&](auto zero) {
    using Scalar = decltype(zero);
    const EdgeInputs<Scalar> inputs{data_of<Scalar>(edges),
                                    data_of<int64_t>(neighbor),
                                    data_of<int64_t>(center),
                                    data_of<Scalar>(davg),
                                    data_of<Scalar>(dstd),
                                    data_of<int64_t>(sel),
                                    rcut,
                                    rcut_smth,
                                    last};
    cpu::tabulate(edges_of<Scalar>(first_edge, place, values, slopes, rows, jacobian, num_types, num_nodes), inputs,
                  data_of<Scalar>(coefficients), torch_threads());
  });
  return {coefficients, place, values, slopes, rows, jacobian};
}

Tensor by_edge(const Tensor& by_coefficient, const Tensor& first_edge, const Tensor& place, const Tensor& values,
               const Tensor& slopes, const Tensor& rows, const Tensor& jacobian) {
  Tensor result = torch::stable::new_empty(rows, {place.size(0), 3});
  with_scalar(rows, [&](auto zero) {
    using Scalar = decltype(zero);
    cpu::by_edge(edges_of<Scalar>(first_edge, place, values, slopes, rows, jacobian, by_coefficient.size(2),
                                  by_coefficient.size(3)),
                 data_of<Scalar>(by_coefficient), data_of<Scalar>(result), torch_threads());
  });
  return result;
}

Tensor along(const Tensor& direction, const Tensor& first_edge, const Tensor& place, const Tensor& values,
             const Tensor& slopes, const Tensor& rows, const Tensor& jacobian, int64_t num_types, int64_t num_nodes) {
  Tensor result = torch::stable::new_empty(rows, {first_edge.size(0) - 1, 4, num_types, num_nodes});
  with_scalar(rows, [&](auto zero) {
    using Scalar = decltype(zero);
    cpu::along(edges_of<Scalar>(first_edge, place, values, slopes, rows, jacobian, num_types, num_nodes),
               data_of<Scalar>(direction), data_of<Scalar>(result), torch_threads());
  });
  return result;
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

}  // namespace
}  // namespace rlekf

STABLE_TORCH_LIBRARY_IMPL(rlekf, CPU, m) {
  m.impl("project", TORCH_BOX(&rlekf::project));
  m.impl("multiply_tiles", TORCH_BOX(&rlekf::multiply_tiles));
  m.impl("finish_projection", TORCH_BOX(&rlekf::finish_projection));
  m.impl("correct", TORCH_BOX(&rlekf::correct));
  m.impl("step", TORCH_BOX(&rlekf::step));
  m.impl("tabulate", TORCH_BOX(&rlekf::tabulate));
  m.impl("by_edge", TORCH_BOX(&rlekf::by_edge));
  m.impl("along", TORCH_BOX(&rlekf::along));
  m.impl("place_neighbors", TORCH_BOX(&rlekf::place_neighbors));
}
