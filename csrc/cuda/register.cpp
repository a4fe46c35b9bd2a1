// The ops on CUDA tensors: torch's current stream, and scratch memory from torch's caching allocator.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../network_ops.h"

// Defined only in libtorch_cuda. A CPU-only torch lacks it, but then there are no CUDA tensors to call the ops with.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace rlekf {
namespace {

void* current_stream(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "rlekf: this torch has no CUDA streams; install one for GPUs.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void* current_stream(const Covariance& p) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.tiles) % 16 == 0,
                  "rlekf: tiles should begin at a multiple of 16 bytes but do not; call .clone() on them.");
  return current_stream(p.device);
}

Tensor scratch(const Covariance& p, const Measurements& m, const Tensor& like) {
  return torch::stable::new_empty(like, {cuda::scratch_size(p, m)});
}

double* numbers(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> project(const Tensor& tiles, const Tensor& pending, const Tensor& state,
                                   const Tensor& layout, const Tensor& jacobian) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian);
  Tensor cross = torch::stable::new_empty(jacobian, {m.count, p.num_weights});
  Tensor gram = torch::stable::new_empty(jacobian, {2, p.num_blocks, m.count, m.count});
  const Tensor memory = scratch(p, m, jacobian);
  cuda::project(p, m, projection_of(p, m, cross, gram), numbers(memory), current_stream(p));
  return {cross, gram};
}

void correct(const Tensor& weights, const Tensor& pending, const Tensor& state, const Tensor& layout,
             const Tensor& cross, const Tensor& gram, const Tensor& jacobian, const Tensor& innovation) {
  const Covariance p = covariance_without_tiles(pending, state, layout, jacobian);
  const Measurements m = measurements_of(p, jacobian, innovation);
  double* w = weights_of(p, weights);
  const Tensor memory = scratch(p, m, jacobian);
  cuda::correct(w, p, m, projection_of(p, m, cross, gram), numbers(memory), current_stream(p));
}

void step(const Tensor& weights, const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout,
          const Tensor& jacobian, const Tensor& innovation) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian, innovation);
  double* w = weights_of(p, weights);
  const Tensor memory = scratch(p, m, jacobian);
  cuda::step(w, p, m, numbers(memory), current_stream(p));
}

Tensor multiply_tiles(const Tensor& tiles, const Tensor& pending, const Tensor& state, const Tensor& layout,
                      const Tensor& jacobian) {
  const Covariance p = covariance_of(tiles, pending, state, layout);
  const Measurements m = measurements_of(p, jacobian);
  Tensor z = torch::stable::new_empty(jacobian, {m.count, p.num_weights});
  const Tensor memory = torch::stable::new_empty(jacobian, {cuda::multiply_scratch_size(p, m)});
  cuda::multiply_tiles(p, m, numbers(z), numbers(memory), current_stream(p));
  return z;
}

Tensor finish_projection(const Tensor& z, const Tensor& pending, const Tensor& state, const Tensor& layout,
                         const Tensor& jacobian) {
  const Covariance p = covariance_without_tiles(pending, state, layout, jacobian);
  const Measurements m = measurements_of(p, jacobian);
  Tensor gram = torch::stable::new_empty(jacobian, {2, p.num_blocks, m.count, m.count});
  const Tensor memory = torch::stable::new_empty(jacobian, {cuda::finish_scratch_size(p, m)});
  cuda::finish_projection(p, m, projection_of(p, m, z, gram), numbers(memory), current_stream(p));
  return gram;
}

template <typename Scalar>
cuda::Stream stream_of(const NetworkCall<Scalar>& call) {
  return {call.device, current_stream(call.device)};
}

template <typename Scalar>
Tensor scratch(const NetworkCall<Scalar>& call, const Tensor& like, int64_t num_updates) {
  const int64_t size = cuda::scratch_size(call.network, call.frame, num_updates);
  return torch::stable::new_empty(like, {size}, ScalarType::Double);
}

/// As many as their scratch memory may have.
template <typename Scalar>
int64_t updates_at_once(const Geometry<Scalar>& frame) {
  constexpr int64_t kBytes = int64_t{1} << 28;
  const int64_t each = 4 * frame.num_atoms * frame.num_types * frame.num_nodes * static_cast<int64_t>(sizeof(Scalar));
  return std::clamp(kBytes / std::max<int64_t>(each, 1), int64_t{1}, int64_t{cuda::kUpdatesAtOnce});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> predict(Tensors parameters, Tensors geometry, Tensors normal, Sizes sel,
                                                   double last, Sizes sizes, std::vector<bool> timesteps,
                                                   int64_t num_structures, bool forces, bool virials) {
  const Tensor& like = geometry[kCoefficients];
  const Outputs found(like, num_structures, forces, virials);
  return with_scalar(like, [&](auto zero) {
    using Scalar = decltype(zero);
    const NetworkCall<Scalar> call(parameters, geometry, normal, sel, last, sizes, timesteps, num_structures);
    Tensor saved = torch::stable::new_empty(like, {cuda::saved_size(call.network, call.frame, forces)});
    const Tensor memory = scratch(call, like, 0);
    cuda::predict(call.network, call.frame, found.pointers<Scalar>(saved), numbers(memory), stream_of(call));
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
    const Factors<Scalar> factors = factors_of(call, by_energies, by_forces, by_virials);
    const int64_t wanted = cuda::saved_size(call.network, call.frame, by_forces.has_value());
    const Scalar* kept =
        checked<Scalar>(saved, "what predict saved with the same kinds of results", {wanted}, call.device);
    Tensor result = torch::stable::new_empty(saved, {count, call.network.num_weights});
    const int64_t at_once = updates_at_once(call.frame);
    const Tensor memory = scratch(call, saved, std::min(at_once, count));
    for (int64_t i = 0; i < count; i += at_once) {
      cuda::gradients(call.network, call.frame, kept, factors_from(factors, call.frame, i),
                      std::min(at_once, count - i), data_of<Scalar>(result) + i * call.network.num_weights,
                      numbers(memory), stream_of(call));
    }
    return result;
  });
}

std::tuple<Tensor, Tensor> measure(Tensors parameters, Tensors geometry, Tensors normal, Sizes sel, double last,
                                   Sizes sizes, std::vector<bool> timesteps, const Tensor& bias, const Tensor& types,
                                   const Tensor& num_atoms, std::optional<Tensor> energy, std::optional<Tensor> forces,
                                   std::optional<Tensor> virial, Sizes kinds, Tensors atoms) {
  const Tensor& like = geometry[kCoefficients];
  return with_scalar(like, [&](auto zero) {
    using Scalar = decltype(zero);
    const int64_t num_structures = num_atoms.size(0);
    const NetworkCall<Scalar> call(parameters, geometry, normal, sel, last, sizes, timesteps, num_structures);
    const auto labels = labels_of(call.frame, call.device, bias, types, num_atoms, energy, forces, virial);
    const auto updates = updates_of(labels, call.device, kinds, atoms);
    const auto count = static_cast<int64_t>(updates.size());
    const int64_t n = call.frame.num_atoms, at_once = std::min(updates_at_once(call.frame), count);
    const auto of_kind = [&](auto wanted) { return std::any_of(updates.begin(), updates.end(), wanted); };
    const bool moving = of_kind([](const FrameUpdate& update) { return update.kind != Kind::kEnergy; });
    const bool virials = of_kind([](const FrameUpdate& update) { return update.kind == Kind::kVirial; });
    const auto empty = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(like, shape); };
    Tensor errors = torch::stable::new_empty(bias, {count});
    Tensor jacobians = torch::stable::new_empty(bias, {count, call.network.num_weights});
    const Tensor results = empty({4 * n + 9 * num_structures}), factors = empty({at_once, 4 * n + 9 * num_structures});
    const Tensor saved = empty({cuda::saved_size(call.network, call.frame, moving)});
    const Tensor memory = scratch(call, like, at_once);
    Scalar *found = data_of<Scalar>(results), *by = data_of<Scalar>(factors);
    for (int64_t i = 0; i < count; i += at_once) {
      cuda::measure<Scalar>(
          call.network, call.frame, labels, updates.data() + i, std::min(at_once, count - i),
          {found, moving ? found + n : nullptr, virials ? found + 4 * n : nullptr, data_of<Scalar>(saved)},
          {by, by + at_once * n, by + at_once * 4 * n}, numbers(errors) + i,
          numbers(jacobians) + i * call.network.num_weights, numbers(memory), stream_of(call));
    }
    return std::make_tuple(errors, jacobians);
  });
}

}  // namespace
}  // namespace rlekf

STABLE_TORCH_LIBRARY_IMPL(rlekf, CUDA, m) {
  m.impl("project", TORCH_BOX(&rlekf::project));
  m.impl("correct", TORCH_BOX(&rlekf::correct));
  m.impl("step", TORCH_BOX(&rlekf::step));
  m.impl("multiply_tiles", TORCH_BOX(&rlekf::multiply_tiles));
  m.impl("finish_projection", TORCH_BOX(&rlekf::finish_projection));
  m.impl("predict", TORCH_BOX(&rlekf::predict));
  m.impl("gradients", TORCH_BOX(&rlekf::gradients));
  m.impl("measure", TORCH_BOX(&rlekf::measure));
}
