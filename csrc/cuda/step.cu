// The filter step on a GPU: from the pointers of step.h to one cooperative launch.

#include "device.cuh"
#include "host.cuh"
#include "kernels.cuh"

#define RLEKF_TEXT(x) #x
#define RLEKF_EXPAND(x) RLEKF_TEXT(x)

namespace rlekf::cuda {
namespace {

template <typename Scalar, int kM>
__global__ void __launch_bounds__(kThreads, ctas_per_sm(kM)) rlekf_filter_step(const __grid_constant__ Task task) {
  filter_step<Scalar, kM>(task);
}

template <typename Scalar>
const void* kernel_for(int num_measurements) {
  switch (num_measurements) {
    case 1:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, 1>);
    case 2:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, 2>);
    case 4:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, 4>);
    default:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, kMaxMeasurements>);
  }
}

const void* instance(Storage storage, int num_measurements) {
  return storage == Storage::kFloat64 ? kernel_for<double>(num_measurements) : kernel_for<float>(num_measurements);
}

const Kernel kStep{"rlekf_filter_step", instance, false};

void run(int phases, double* weights, const Covariance& p, const Measurements& m, const Projection* projection,
         double* scratch, void* stream) {
  const Current current(p.device);
  const Launch plan = plan_for(kStep, p, m);
  const Workspace workspace = workspace_in(scratch, plan, p);
  Task task{phases, p, m, projection ? *projection : workspace.projection, weights, plan, workspace};
  launch(kStep, task, stream);
}

}  // namespace

const char* architectures() { return RLEKF_EXPAND(RLEKF_CUDA_ARCHITECTURES); }

int64_t scratch_size(const Covariance& p, const Measurements& m) {
  const Current current(p.device);
  return workspace_in(nullptr, plan_for(kStep, p, m), p).size;
}

void project(const Covariance& p, const Measurements& m, const Projection& projection, double* scratch, void* stream) {
  run(kProject, nullptr, p, m, &projection, scratch, stream);
}

void correct(double* weights, const Covariance& p, const Measurements& m, const Projection& projection, double* scratch,
             void* stream) {
  run(kCorrect, weights, p, m, &projection, scratch, stream);
}

void step(double* weights, const Covariance& p, const Measurements& m, double* scratch, void* stream) {
  run(kProject | kCorrect, weights, p, m, nullptr, scratch, stream);
}

}  // namespace rlekf::cuda
