// The ops on CUDA tensors: torch's current stream, and scratch memory from torch's caching allocator.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../ops.h"

// Defined only in libtorch_cuda. A CPU-only torch lacks it, but then there are no CUDA tensors to call the ops with.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace rlekf {
namespace {

void* current_stream(const Covariance& p) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.tiles) % 16 == 0,
                  "rlekf: tiles should begin at a multiple of 16 bytes but do not; call .clone() on them.");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "rlekf: this torch has no CUDA streams; install one for GPUs.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(p.device, &stream));
  return stream;
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

}  // namespace
}  // namespace rlekf

STABLE_TORCH_LIBRARY_IMPL(rlekf, CUDA, m) {
  m.impl("project", TORCH_BOX(&rlekf::project));
  m.impl("correct", TORCH_BOX(&rlekf::correct));
  m.impl("step", TORCH_BOX(&rlekf::step));
  m.impl("multiply_tiles", TORCH_BOX(&rlekf::multiply_tiles));
  m.impl("finish_projection", TORCH_BOX(&rlekf::finish_projection));
}
