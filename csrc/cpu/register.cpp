// The ops on CPU tensors: torch's threads, and scratch memory that each calling thread allocates once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../ops.h"

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

}  // namespace
}  // namespace rlekf

STABLE_TORCH_LIBRARY_IMPL(rlekf, CPU, m) {
  m.impl("project", TORCH_BOX(&rlekf::project));
  m.impl("multiply_tiles", TORCH_BOX(&rlekf::multiply_tiles));
  m.impl("finish_projection", TORCH_BOX(&rlekf::finish_projection));
  m.impl("correct", TORCH_BOX(&rlekf::correct));
  m.impl("step", TORCH_BOX(&rlekf::step));
}
