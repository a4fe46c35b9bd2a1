// The network on a table, on a GPU: from the pointers of network.h to launches.

#include "device.cuh"
#include "host.cuh"
#include "network.cuh"

namespace rlekf::cuda {
namespace {

template <Phase kPhase, typename Scalar>
__global__ void __launch_bounds__(kThreads, 2) rlekf_network(const __grid_constant__ NetworkTask<Scalar> task) {
  run_phase<kPhase>(task, blockIdx.x);
}

struct Pointers {
  const void* at[kPointersAtOnce];
};

/// The addresses of parameters travel as arguments: a captured graph keeps these, where it would not keep host memory.
__global__ void rlekf_store_pointers(const __grid_constant__ Pointers pointers, const void** to, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = pointers.at[i];
}

template <typename Scalar>
auto launcher(const NetworkTask<Scalar>& task, void* stream) {
  return [&task, stream](Phase phase, int64_t num_ctas) {
    if (num_ctas == 0) return;
    with_constant(phase, [&](auto constant) {
      rlekf_network<decltype(constant)::value>
          <<<static_cast<unsigned>(num_ctas), kThreads, 8 * kSharedNumbers, static_cast<cudaStream_t>(stream)>>>(task);
    });
    check(cudaGetLastError(), "a launch of rlekf_network for " + std::to_string(task.frame.num_atoms) + " atoms and " +
                                  std::to_string(task.num_updates) + " updates");
  };
}

template <typename Scalar>
void store_pointers(const Network<Scalar>& network, const NetworkTask<Scalar>& task, void* stream) {
  const std::vector<const Scalar*> all = pointers_of(network);
  for (size_t first = 0; first < all.size(); first += kPointersAtOnce) {
    const size_t count = std::min(all.size() - first, static_cast<size_t>(kPointersAtOnce));
    Pointers pointers{};
    std::copy_n(all.begin() + static_cast<std::ptrdiff_t>(first), count, pointers.at);
    rlekf_store_pointers<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        pointers, reinterpret_cast<const void**>(task.parameters + first), static_cast<int>(count));
  }
}

}  // namespace

template <typename Scalar>
int64_t saved_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, bool forces) {
  NetworkTask<Scalar> task = task_of(network, geometry);
  return place_saved<Scalar>(task, forces, nullptr);
}

template <typename Scalar>
int64_t scratch_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, int64_t num_updates) {
  NetworkTask<Scalar> task = task_of(network, geometry);
  return place_scratch<Scalar>(task, num_updates, nullptr);
}

template <typename Scalar>
void predict(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Prediction<Scalar>& result,
             double* scratch, const Stream& on) {
  const Current current(on.device);
  NetworkTask<Scalar> task = task_of(network, geometry);
  place_saved(task, result.forces != nullptr, result.saved);
  place_scratch(task, 0, scratch);
  set_results(task, result);
  store_pointers(network, task, on.stream);
  predict_phases(task, launcher(task, on.stream));
}

template <typename Scalar>
void gradients(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Scalar* saved,
               const Factors<Scalar>& factors, int64_t num_updates, Scalar* gradient, double* scratch,
               const Stream& on) {
  const Current current(on.device);
  NetworkTask<Scalar> task = task_of(network, geometry);
  const bool along = factors.forces != nullptr;
  place_saved(task, along, const_cast<Scalar*>(saved));  // which is only read
  place_scratch(task, num_updates, scratch);
  task.num_updates = static_cast<int>(num_updates);
  std::fill_n(task.updates, num_updates, UpdatePlan{Kind::kForce, along, nullptr, 0});
  set_factors(task, factors);
  task.gradient = gradient;
  store_pointers(network, task, on.stream);
  gradient_phases(task, launcher(task, on.stream));
}

template <typename Scalar>
void measure(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Labels<Scalar>& labels,
             const FrameUpdate* updates, int64_t num_updates, const Prediction<Scalar>& result,
             const Factors<Scalar>& factors, double* errors, double* jacobians, double* scratch, const Stream& on) {
  const Current current(on.device);
  NetworkTask<Scalar> task = task_of(network, geometry);
  place_saved(task, result.forces != nullptr, result.saved);
  place_scratch(task, num_updates, scratch);
  set_results(task, result);
  task.labels = labels;
  task.num_updates = static_cast<int>(num_updates);
  for (int64_t i = 0; i < num_updates; ++i) {
    task.updates[i] = {updates[i].kind, updates[i].kind != Kind::kEnergy, updates[i].atoms, updates[i].num_atoms};
  }
  set_factors(task, factors);
  task.errors = errors;
  task.jacobians = jacobians;
  store_pointers(network, task, on.stream);
  const auto launch = launcher(task, on.stream);
  predict_phases(task, launch);
  launch(Phase::kFactors, num_updates);
  gradient_phases(task, launch);
}

#define RLEKF_INSTANTIATE(Scalar)                                                                                   \
  template int64_t saved_size(const Network<Scalar>&, const Geometry<Scalar>&, bool);                               \
  template int64_t scratch_size(const Network<Scalar>&, const Geometry<Scalar>&, int64_t);                          \
  template void predict(const Network<Scalar>&, const Geometry<Scalar>&, const Prediction<Scalar>&, double*,        \
                        const Stream&);                                                                             \
  template void gradients(const Network<Scalar>&, const Geometry<Scalar>&, const Scalar*, const Factors<Scalar>&,   \
                          int64_t, Scalar*, double*, const Stream&);                                                \
  template void measure(const Network<Scalar>&, const Geometry<Scalar>&, const Labels<Scalar>&, const FrameUpdate*, \
                        int64_t, const Prediction<Scalar>&, const Factors<Scalar>&, double*, double*, double*,      \
                        const Stream&);
RLEKF_INSTANTIATE(double)
RLEKF_INSTANTIATE(float)

}  // namespace rlekf::cuda
