#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

STABLE_TORCH_LIBRARY(rlekf, m) {
  m.def(
      "project(Tensor(a!) tiles, Tensor(b!) pending, Tensor(c!) state, Tensor layout, Tensor jacobian)"
      " -> (Tensor cross, Tensor gram)");
  m.def("multiply_tiles(Tensor(a!) tiles, Tensor pending, Tensor state, Tensor layout, Tensor jacobian) -> Tensor z");
  m.def(
      "finish_projection(Tensor(a!) z, Tensor pending, Tensor(b!) state, Tensor layout, Tensor jacobian)"
      " -> Tensor gram");
  m.def(
      "correct(Tensor(a!) weights, Tensor(b!) pending, Tensor(c!) state, Tensor layout, Tensor cross, Tensor gram,"
      " Tensor jacobian, Tensor innovation) -> ()");
  m.def(
      "step(Tensor(a!) weights, Tensor(b!) tiles, Tensor(c!) pending, Tensor(d!) state, Tensor layout, Tensor jacobian,"
      " Tensor innovation) -> ()");
  // The network on a table: network.h. `geometry` is what tabulate returns, then the structure of each atom; `normal` is
  // davg and dstd, (T, 4) each; `sizes` are embedding nets, layers of each, layers of a fitting net, M_<; `timesteps` says
  // which of the two kinds of net have them.
  m.def(
      "tabulate(Tensor edges, Tensor neighbors, Tensor types, int[] slots, Tensor[] normal, int[] sel, int num_nodes,"
      " float rcut, float rcut_smth, float last) -> Tensor[]");
  m.def(
      "predict(Tensor[] parameters, Tensor[] geometry, Tensor[] normal, int[] sel, float last, int[] sizes,"
      " bool[] timesteps, int num_structures, bool forces, bool virials)"
      " -> (Tensor energies, Tensor forces, Tensor virials, Tensor saved)");
  m.def(
      "gradients(Tensor[] parameters, Tensor[] geometry, Tensor[] normal, int[] sel, float last, int[] sizes,"
      " bool[] timesteps, Tensor saved, Tensor by_energies, Tensor? by_forces, Tensor? by_virials) -> Tensor");
  // Updates at the same weights, by kind (0 energy, 1 force, 2 virial), and for each the atoms of its group, if it has
  // one; `bias` is the energy of an atom of each element.
  m.def(
      "measure(Tensor[] parameters, Tensor[] geometry, Tensor[] normal, int[] sel, float last, int[] sizes,"
      " bool[] timesteps, Tensor bias, Tensor types, Tensor num_atoms, Tensor? energy, Tensor? forces, Tensor? virial,"
      " int[] kinds, Tensor[] atoms) -> (Tensor errors, Tensor jacobians)");
  // Neighbour lists: neighbors.h. `survey` takes structures of the same atoms, points (B, n, 3) and cells (B, 3, 3).
  m.def("find_pairs(Tensor points, Tensor? cell, float cutoff) -> (Tensor pairs, Tensor vectors, Tensor feasible)");
  m.def(
      "survey(Tensor points, Tensor? cells, Tensor types, int num_types, float cutoff, float smooth)"
      " -> (Tensor slots, Tensor shortest, Tensor sums)");
  m.def(
      "place_neighbors(Tensor pairs, Tensor vectors, Tensor types, int num_types, float cutoff)"
      " -> (Tensor edges, Tensor neighbors, Tensor slots, Tensor shortest)");
}

namespace rlekf {
namespace {

template <typename Sizes>
std::string shape_text(const Sizes& shape) {
  std::ostringstream text;
  text << "(";
  const char* comma = "";
  for (const int64_t size : shape) {
    text << comma << (size == kAny ? std::string("any") : std::to_string(size));
    comma = ", ";
  }
  text << ")";
  return text.str();
}

std::string device_text(int device) { return device < 0 ? "the CPU" : "GPU " + std::to_string(device); }

double* float64_of(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

const double* const_float64_of(const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); }

}  // namespace

int device_of(const Tensor& tensor) { return tensor.is_cuda() ? static_cast<int>(tensor.get_device_index()) : -1; }

void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype, int device) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    same = same && (size == kAny || tensor.size(dim) == size);
    ++dim;
  }
  STD_TORCH_CHECK(same, "rlekf: ", name, " should have shape ", shape_text(shape), " but has ",
                  shape_text(tensor.sizes()), ".");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "rlekf: ", name, " should be ",
                  dtype == ScalarType::Long    ? "int64"
                  : dtype == ScalarType::Float ? "float32"
                                               : "float64",
                  " but is not; convert it with .to(dtype).");
  STD_TORCH_CHECK(device_of(tensor) == device, "rlekf: ", name, " should be on ", device_text(device),
                  " as the others are, but is on ", device_text(device_of(tensor)), "; move it there.");
  STD_TORCH_CHECK(tensor.is_contiguous(), "rlekf: ", name, " should be contiguous; call .contiguous() on it.");
}

Covariance covariance_of(const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout) {
  const int device = device_of(tiles);
  check(layout, "layout", {kAny, 3}, ScalarType::Long, device);
  check(state, "state", {kNumState}, ScalarType::Double, device);
  check(pending, "pending", {kAny, kAny}, ScalarType::Double, device);
  STD_TORCH_CHECK(layout.size(0) > 0, "rlekf: layout should have at least one block but has none.");
  const bool single = tiles.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || tiles.scalar_type() == ScalarType::Double, "rlekf: tiles should be float64 or float32.");
  STD_TORCH_CHECK(tiles.dim() == 3 && tiles.size(1) == kTile && tiles.size(2) == kTile && tiles.is_contiguous(),
                  "rlekf: tiles should be contiguous with shape (any, ", kTile, ", ", kTile, ") but has ",
                  shape_text(tiles.sizes()), ".");
  return {device,
          tiles.mutable_data_ptr(),
          single ? Storage::kFloat32 : Storage::kFloat64,
          tiles.size(0),
          float64_of(pending),
          pending.size(0),
          static_cast<State*>(state.mutable_data_ptr()),
          static_cast<const Block*>(layout.const_data_ptr()),
          layout.size(0),
          pending.size(1)};
}

Covariance covariance_without_tiles(const Tensor& pending, const Tensor& state, const Tensor& layout,
                                    const Tensor& jacobian) {
  return covariance_of(torch::stable::new_empty(jacobian, {0, kTile, kTile}), pending, state, layout);
}

Measurements measurements_of(const Covariance& covariance, const Tensor& jacobian) {
  check(jacobian, "jacobian", {kAny, covariance.num_weights}, ScalarType::Double, covariance.device);
  const int64_t count = jacobian.size(0);
  STD_TORCH_CHECK(count >= 1 && count <= kMaxMeasurements, "rlekf: a pass takes 1 to ", kMaxMeasurements,
                  " measurements but jacobian has ", count, " rows; split them into several passes.");
  STD_TORCH_CHECK(count <= covariance.capacity, "rlekf: ", count, " measurements need at least as many rows in pending",
                  " but it has ", covariance.capacity, "; raise `max_pending`.");
  return {static_cast<int>(count), const_float64_of(jacobian), nullptr};
}

Measurements measurements_of(const Covariance& covariance, const Tensor& jacobian, const Tensor& innovation) {
  Measurements measurements = measurements_of(covariance, jacobian);
  check(innovation, "innovation", {measurements.count}, ScalarType::Double, covariance.device);
  measurements.innovation = const_float64_of(innovation);
  return measurements;
}

Projection projection_of(const Covariance& covariance, const Measurements& measurements, const Tensor& cross,
                         const Tensor& gram) {
  check(cross, "cross", {measurements.count, covariance.num_weights}, ScalarType::Double, covariance.device);
  check(gram, "gram", {2, covariance.num_blocks, measurements.count, measurements.count}, ScalarType::Double,
        covariance.device);
  return {float64_of(cross), float64_of(gram)};
}

double* weights_of(const Covariance& covariance, const Tensor& weights) {
  check(weights, "weights", {covariance.num_weights}, ScalarType::Double, covariance.device);
  return float64_of(weights);
}

}  // namespace rlekf
