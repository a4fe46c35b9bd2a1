// The step in two ops for processes that share the tiles, on a GPU: see part.cuh.

#include "device.cuh"
#include "host.cuh"
#include "part.cuh"

namespace rlekf::cuda {
namespace {

template <typename Scalar, int kM>
__global__ void __launch_bounds__(kThreads, ctas_per_sm(kM)) rlekf_multiply_tiles(const __grid_constant__ Task task) {
  multiply_part<Scalar, kM>(task);
}

template <int kM>
__global__ void __launch_bounds__(kThreads, ctas_per_sm(kM))
    rlekf_finish_projection(const __grid_constant__ Task task) {
  finish_part<kM>(task);
}

template <typename Scalar>
const void* multiply_instance(int num_measurements) {
  switch (num_measurements) {
    case 1:
      return reinterpret_cast<const void*>(&rlekf_multiply_tiles<Scalar, 1>);
    case 2:
      return reinterpret_cast<const void*>(&rlekf_multiply_tiles<Scalar, 2>);
    case 4:
      return reinterpret_cast<const void*>(&rlekf_multiply_tiles<Scalar, 4>);
    default:
      return reinterpret_cast<const void*>(&rlekf_multiply_tiles<Scalar, kMaxMeasurements>);
  }
}

const void* multiply_instance(Storage storage, int num_measurements) {
  return storage == Storage::kFloat64 ? multiply_instance<double>(num_measurements)
                                      : multiply_instance<float>(num_measurements);
}

const void* finish_instance(Storage, int num_measurements) {
  switch (num_measurements) {
    case 1:
      return reinterpret_cast<const void*>(&rlekf_finish_projection<1>);
    case 2:
      return reinterpret_cast<const void*>(&rlekf_finish_projection<2>);
    case 4:
      return reinterpret_cast<const void*>(&rlekf_finish_projection<4>);
    default:
      return reinterpret_cast<const void*>(&rlekf_finish_projection<kMaxMeasurements>);
  }
}

const Kernel kMultiply{"rlekf_multiply_tiles", multiply_instance, true};
const Kernel kFinish{"rlekf_finish_projection", finish_instance, false};

int64_t scratch_size(const Kernel& kernel, const Covariance& p, const Measurements& m) {
  const Current current(p.device);
  return workspace_in(nullptr, plan_for(kernel, p, m), p).size;
}

void run(const Kernel& kernel, const Covariance& p, const Measurements& m, const Projection& projection,
         double* scratch, void* stream) {
  const Current current(p.device);
  const Launch plan = plan_for(kernel, p, m);
  Task task{0, p, m, projection, nullptr, plan, workspace_in(scratch, plan, p)};
  launch(kernel, task, stream);
}

}  // namespace

int64_t multiply_scratch_size(const Covariance& p, const Measurements& m) { return scratch_size(kMultiply, p, m); }

int64_t finish_scratch_size(const Covariance& p, const Measurements& m) { return scratch_size(kFinish, p, m); }

void multiply_tiles(const Covariance& p, const Measurements& m, double* z, double* scratch, void* stream) {
  run(kMultiply, p, m, {z, nullptr}, scratch, stream);
}

void finish_projection(const Covariance& p, const Measurements& m, const Projection& projection, double* scratch,
                       void* stream) {
  run(kFinish, p, m, projection, scratch, stream);
}

}  // namespace rlekf::cuda
