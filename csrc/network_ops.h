// From the tensors of the network's ops to its pointers, for every device.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "network.h"
#include "ops.h"

namespace rlekf {

template <typename Number>
Number* data_of(const Tensor& tensor) {
  return static_cast<Number*>(tensor.mutable_data_ptr());
}

template <typename Number>
constexpr ScalarType kType = std::is_same_v<Number, double>  ? ScalarType::Double
                             : std::is_same_v<Number, float> ? ScalarType::Float
                                                             : ScalarType::Long;

/// The numbers of a tensor that is as it should be, on this device (-1: CPU).
template <typename Number>
Number* checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, int device) {
  check(tensor, name, shape, kType<Number>, device);
  return data_of<Number>(tensor);
}

/// Calls function with a value of the type of the tensor's numbers.
template <typename Function>
auto with_scalar(const Tensor& tensor, const Function& function) {
  const bool single = tensor.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || tensor.scalar_type() == ScalarType::Double, "rlekf: edges should be float64 or float32.");
  return single ? function(float{}) : function(double{});
}

using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

enum Part { kOrder, kFirstAtom, kFirstEdge, kEdges, kNeighbor, kFirstIncoming, kIncoming, kCoefficients, kStructure };

template <typename Scalar>
Geometry<Scalar> geometry_of(const Tensors& parts, int64_t num_structures) {
  const Tensor& coefficients = parts[kCoefficients];
  for (const Tensor& part : parts) {
    STD_TORCH_CHECK(device_of(part) == device_of(coefficients),
                    "rlekf: all parts of a geometry should be on one device but are not; move them there.");
  }
  return {coefficients.size(0),
          coefficients.size(2),
          coefficients.size(3),
          parts[kEdges].size(0),
          num_structures,
          data_of<int64_t>(parts[kOrder]),
          data_of<int64_t>(parts[kFirstAtom]),
          data_of<int64_t>(parts[kFirstEdge]),
          data_of<Edge<Scalar>>(parts[kEdges]),
          data_of<int64_t>(parts[kNeighbor]),
          data_of<int64_t>(parts[kFirstIncoming]),
          data_of<int64_t>(parts[kIncoming]),
          data_of<Scalar>(coefficients),
          parts.size() > kStructure ? data_of<int64_t>(parts[kStructure]) : nullptr};
}

template <typename Scalar>
Normalization<Scalar> normalization_of(const Tensors& normal, const Sizes& sel, double last, int device) {
  const auto num_types = static_cast<int64_t>(sel.size());
  return {checked<Scalar>(normal[0], "davg", {num_types, 4}, device),
          checked<Scalar>(normal[1], "dstd", {num_types, 4}, device), sel, last};
}

/// The layers of a net, whose parameters start at `next`; both it and `first` move on to those of the net after it.
template <typename Scalar>
Net<Scalar> net_of(const Tensors& parameters, int device, int64_t num_layers, bool timesteps, bool output, size_t& next,
                   int64_t& first) {
  Net<Scalar> net;
  for (int64_t l = 0; l < num_layers; ++l) {
    STD_TORCH_CHECK(next + 2 <= parameters.size(), "rlekf: the network has more parameters than the ",
                    parameters.size(), " given.");
    const Tensor &weight = parameters[next], &bias = parameters[next + 1];
    check(weight, "weight", {kAny, kAny}, kType<Scalar>, device);
    const int64_t inputs = weight.size(0), outputs = weight.size(1);
    const bool hidden = !output || l + 1 < num_layers;
    const int64_t copies = hidden && (outputs == inputs || outputs == 2 * inputs) ? outputs / inputs : 0;
    const bool timestep = timesteps && copies > 0;
    STD_TORCH_CHECK(!timestep || next + 3 <= parameters.size(), "rlekf: a time step is missing.");
    net.push_back({inputs, outputs, hidden, copies, data_of<Scalar>(weight),
                   checked<Scalar>(bias, "bias", {outputs}, device),
                   timestep ? checked<Scalar>(parameters[next + 2], "time step", {outputs}, device) : nullptr, first});
    next += timestep ? 3 : 2;
    first += (inputs + (timestep ? 2 : 1)) * outputs;
  }
  return net;
}

template <typename Scalar>
Network<Scalar> network_of(const Tensors& parameters, const Normalization<Scalar>& normalization, const Sizes& sizes,
                           const std::vector<bool>& timesteps, int device) {
  Network<Scalar> network{normalization, {}, {}, sizes[3], 0};
  size_t next = 0;
  for (int64_t i = 0; i < sizes[0]; ++i) {
    network.embeddings.push_back(
        net_of<Scalar>(parameters, device, sizes[1], timesteps[0], false, next, network.num_weights));
  }
  for (size_t t = 0; t < normalization.sel.size(); ++t) {
    network.fittings.push_back(
        net_of<Scalar>(parameters, device, sizes[2], timesteps[1], true, next, network.num_weights));
  }
  return network;
}

/// What all ops of the network begin with.
template <typename Scalar>
struct NetworkCall {
  int device;
  Geometry<Scalar> frame;
  Network<Scalar> network;

  NetworkCall(const Tensors& parameters, const Tensors& geometry, const Tensors& normal, const Sizes& sel, double last,
              const Sizes& sizes, const std::vector<bool>& timesteps, int64_t num_structures)
      : device(device_of(geometry[kCoefficients])),
        frame(geometry_of<Scalar>(geometry, num_structures)),
        network(network_of(parameters, normalization_of<Scalar>(normal, sel, last, device), sizes, timesteps, device)) {
  }
};

/// Memory for what predict() returns: of n atoms in B structures, forces and virials only if wanted.
struct Outputs {
  bool with_forces, with_virials;
  Tensor energies, forces, virials;

  Outputs(const Tensor& like, int64_t num_structures, bool forces_wanted, bool virials_wanted)
      : with_forces(forces_wanted),
        with_virials(forces_wanted && virials_wanted),
        energies(torch::stable::new_empty(like, {like.size(0)})),
        forces(torch::stable::new_empty(like, {with_forces ? like.size(0) : 0, 3})),
        virials(torch::stable::new_empty(like, {with_virials ? num_structures : 0, 3, 3})) {}

  template <typename Scalar>
  Prediction<Scalar> pointers(const Tensor& saved) const {
    return {data_of<Scalar>(energies), with_forces ? data_of<Scalar>(forces) : nullptr,
            with_virials ? data_of<Scalar>(virials) : nullptr, data_of<Scalar>(saved)};
  }
};

/// The factors of M sums.
template <typename Scalar>
Factors<Scalar> factors_of(const NetworkCall<Scalar>& call, const Tensor& by_energies,
                           const std::optional<Tensor>& by_forces, const std::optional<Tensor>& by_virials) {
  STD_TORCH_CHECK(by_forces.has_value() == by_virials.has_value(),
                  "rlekf: factors of forces and virials should be given both, or none.");
  const int64_t count = by_energies.size(0), n = call.frame.num_atoms, num_structures = call.frame.num_structures;
  return {checked<Scalar>(by_energies, "factors of energies", {count, n}, call.device),
          by_forces ? checked<Scalar>(*by_forces, "factors of forces", {count, n, 3}, call.device) : nullptr,
          by_virials ? checked<Scalar>(*by_virials, "factors of virials", {count, num_structures, 3, 3}, call.device)
                     : nullptr};
}

/// Those of sum i and the ones after it.
template <typename Scalar>
Factors<Scalar> factors_from(const Factors<Scalar>& all, const Geometry<Scalar>& frame, int64_t i) {
  return {all.energies + i * frame.num_atoms, all.forces ? all.forces + 3 * i * frame.num_atoms : nullptr,
          all.virials ? all.virials + 9 * i * frame.num_structures : nullptr};
}

/// What an op is told of a frame's labels; those of kinds that are not given are null.
template <typename Scalar>
Labels<Scalar> labels_of(const Geometry<Scalar>& frame, int device, const Tensor& bias, const Tensor& types,
                         const Tensor& num_atoms, const std::optional<Tensor>& energy,
                         const std::optional<Tensor>& forces, const std::optional<Tensor>& virial) {
  const int64_t n = frame.num_atoms, count = frame.num_structures;
  return {checked<double>(bias, "energy bias", {frame.num_types}, device),
          checked<int64_t>(types, "types", {n}, device),
          checked<Scalar>(num_atoms, "num_atoms", {count}, device),
          energy ? checked<double>(*energy, "energy", {count}, device) : nullptr,
          forces ? checked<Scalar>(*forces, "forces", {n, 3}, device) : nullptr,
          virial ? checked<Scalar>(*virial, "virial", {count, 3, 3}, device) : nullptr};
}

template <typename Scalar>
std::vector<FrameUpdate> updates_of(const Labels<Scalar>& labels, int device, const Sizes& kinds,
                                    const Tensors& atoms) {
  const bool given[] = {labels.energy != nullptr, labels.forces != nullptr, labels.virial != nullptr};
  std::vector<FrameUpdate> updates;
  for (size_t i = 0; i < kinds.size(); ++i) {
    STD_TORCH_CHECK(kinds[i] >= 0 && kinds[i] < 3 && given[kinds[i]], "rlekf: update ", i, " needs labels of kind ",
                    kinds[i], ", which are not given.");
    updates.push_back({static_cast<Kind>(kinds[i]), checked<int64_t>(atoms[i], "atoms of a group", {kAny}, device),
                       atoms[i].size(0)});
  }
  return updates;
}

}  // namespace rlekf
