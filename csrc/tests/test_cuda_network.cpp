// The CUDA source of the network on a table, on an emulated GPU, against the CPU's: results, derivatives and errors. Needs
// neither nvcc nor a GPU.

#include <cstdlib>
#include <cstring>
#include <vector>

#include "expect.h"
#include "network_case.h"
// clang-format off: gpu_on_cpu.h must come before the kernels
#include "gpu_on_cpu.h"
#include "../cuda/network.cuh"
// clang-format on

namespace {

using namespace rlekf;
using namespace rlekf::tests;
using namespace rlekf::cuda;

constexpr int64_t kUpdates = 3;

/// What a GPU finds, from memory full of NaN.
template <typename Scalar>
struct Device {
  NetworkTask<Scalar> task;
  std::vector<const Scalar*> pointers;
  std::vector<Scalar> energies, forces, virials, saved, gradient, by_energies, by_forces, by_virials;
  std::vector<double> scratch, errors, jacobians;
  unsigned seed;

  Device(const Case<Scalar>& made, bool with_forces, int edges_at_once, unsigned which)
      : task(task_of(made.network, made.geometry)), pointers(pointers_of(made.network)), seed(which) {
    const auto nan = static_cast<Scalar>(NAN);
    task.edges_at_once = edges_at_once;
    energies.assign(kAtoms, nan);
    forces.assign(3 * kAtoms, nan);
    virials.assign(9 * kStructures, nan);
    saved.assign(static_cast<size_t>(place_saved<Scalar>(task, with_forces, nullptr)), nan);
    scratch.assign(static_cast<size_t>(place_scratch<Scalar>(task, kUpdates, nullptr)), NAN);
    place_saved(task, with_forces, saved.data());
    place_scratch(task, kUpdates, scratch.data());
    std::copy(pointers.begin(), pointers.end(), task.parameters);
    set_results<Scalar>(task, {energies.data(), with_forces ? forces.data() : nullptr,
                               with_forces ? virials.data() : nullptr, nullptr});
  }

  /// One thread block after another, from the last to the first: none may need another one of its launch.
  void operator()(Phase phase, int64_t num_ctas) {
    for (int64_t index = num_ctas - 1; index >= 0; --index) {
      rlekf::cuda::Gpu::launch(1, kThreads, 8 * kSharedNumbers, seed, [&] {
        with_constant(phase, [&](auto constant) { run_phase<decltype(constant)::value>(task, index); });
      });
    }
  }

  void predict() {
    predict_phases(task, [this](Phase phase, int64_t count) { (*this)(phase, count); });
  }

  void differentiate() {
    gradient_phases(task, [this](Phase phase, int64_t count) { (*this)(phase, count); });
  }

  void set_updates(const std::vector<Kind>& kinds, bool with_forces) {
    task.num_updates = static_cast<int>(kinds.size());
    for (size_t i = 0; i < kinds.size(); ++i) {
      task.updates[i] = {kinds[i], with_forces && kinds[i] != Kind::kEnergy, nullptr, 0};
    }
    set_factors<Scalar>(task, {by_energies.data(), by_forces.data(), by_virials.data()});
  }
};

template <typename Scalar>
void expect_same(const char* what, const Scalar* got, const Scalar* wanted, size_t count, double tolerance) {
  double largest = 0;
  for (size_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(static_cast<double>(wanted[i])));
  for (size_t i = 0; i < count; ++i) expect_close(what, got[i], wanted[i], tolerance * largest);
}

/// Results, and derivatives of sums of them with random factors.
template <typename Scalar>
void check_results(bool one_sided, bool wide, bool with_forces, double tolerance, unsigned seed) {
  Case<Scalar> made(one_sided, wide);
  made.predict(with_forces);
  Device<Scalar> device(made, with_forces, wide ? kEdgesAtOnce : 5, seed);
  device.predict();
  expect_same("energies", device.energies.data(), made.energies.data(), kAtoms, tolerance);
  if (with_forces) {
    expect_same("forces", device.forces.data(), made.forces.data(), made.forces.size(), tolerance);
    expect_same("virials", device.virials.data(), made.virials.data(), made.virials.size(), tolerance);
  }
  device.by_energies = random_numbers<Scalar>(2 * kAtoms, 1);
  device.by_forces = random_numbers<Scalar>(2 * 3 * kAtoms, 2);
  device.by_virials = random_numbers<Scalar>(2 * 9 * kStructures, 3);
  device.set_updates({Kind::kForce, Kind::kForce}, with_forces);
  device.gradient.assign(2 * made.weights.size(), static_cast<Scalar>(NAN));
  device.task.gradient = device.gradient.data();
  device.differentiate();
  std::vector<Scalar> wanted(made.weights.size());
  for (int64_t u = 0; u < 2; ++u) {
    const Factors<Scalar> factors{device.by_energies.data() + u * kAtoms,
                                  with_forces ? device.by_forces.data() + u * 3 * kAtoms : nullptr,
                                  with_forces ? device.by_virials.data() + u * 9 * kStructures : nullptr};
    cpu::gradients(made.network, made.geometry, made.saved.data(), factors, wanted.data(), made.scratch.data(),
                   std_threads(1));
    expect_same("gradient", device.gradient.data() + u * static_cast<int64_t>(wanted.size()), wanted.data(),
                wanted.size(), tolerance);
  }
}

/// Errors and their derivatives; the same bits in another order of the threads.
template <typename Scalar>
void check_updates(double tolerance, unsigned seed) {
  Case<Scalar> made;
  made.predict(true);
  const std::vector<double> bias{-1.5, -0.5}, energy{-20, -12};
  const std::vector<Scalar> num_atoms{12, 9};
  std::vector<Scalar> forces = random_numbers<Scalar>(3 * kAtoms, 5),
                      virial = random_numbers<Scalar>(9 * kStructures, 6);
  const std::vector<int64_t> group{1, 4, 5, 11, 20};
  const Labels<Scalar> labels{bias.data(),   made.types.data(), num_atoms.data(),
                              energy.data(), forces.data(),     virial.data()};
  const std::vector<FrameUpdate> updates{{Kind::kVirial, nullptr, 0},
                                         {Kind::kForce, group.data(), static_cast<int64_t>(group.size())},
                                         {Kind::kEnergy, nullptr, 0}};
  std::vector<double> errors(kUpdates), jacobians(kUpdates * made.weights.size());
  cpu::measure(made.network, made.geometry, labels, updates, errors.data(), jacobians.data(), std_threads(1));
  std::vector<double> first;
  for (const unsigned other : {seed, seed + 1}) {
    Device<Scalar> device(made, true, 5, other);
    device.by_energies.assign(kUpdates * kAtoms, static_cast<Scalar>(NAN));
    device.by_forces.assign(kUpdates * 3 * kAtoms, static_cast<Scalar>(NAN));
    device.by_virials.assign(kUpdates * 9 * kStructures, static_cast<Scalar>(NAN));
    device.errors.assign(kUpdates, NAN);
    device.jacobians.assign(jacobians.size(), NAN);
    device.set_updates({Kind::kVirial, Kind::kForce, Kind::kEnergy}, true);
    device.task.updates[1].atoms = group.data();
    device.task.updates[1].num_atoms = static_cast<int64_t>(group.size());
    device.task.labels = labels;
    device.task.errors = device.errors.data();
    device.task.jacobians = device.jacobians.data();
    device.predict();
    device(Phase::kFactors, kUpdates);
    device.differentiate();
    expect_same("errors", device.errors.data(), errors.data(), errors.size(), tolerance);
    for (size_t u = 0; u < kUpdates; ++u) {
      expect_same("jacobian", device.jacobians.data() + u * made.weights.size(),
                  jacobians.data() + u * made.weights.size(), made.weights.size(), tolerance);
    }
    if (!first.empty() && std::memcmp(first.data(), device.jacobians.data(), 8 * first.size()) != 0) {
      std::printf("FAILED: other bits in another order of the threads\n");
      ++failures;
    }
    first = device.jacobians;
  }
  made.weights[3] = static_cast<Scalar>(NAN);
  Device<Scalar> device(made, true, 5, seed);
  device.predict();
  if (!std::isnan(device.energies[0]) || !std::isnan(device.forces[0])) {
    std::printf("FAILED: a weight that is not finite is not seen\n");
    ++failures;
  }
}

}  // namespace

/// Everything, or with any argument one case of each kind: for sanitizers, which are some ten times slower.
int main(int count_arguments, char**) {
  const bool few = count_arguments > 1;
  for (const unsigned seed : {1u, 2u}) {
    check_results<double>(seed == 1, false, true, 1e-11, seed);
    if (few && seed == 2) break;
    check_results<double>(seed == 2, false, true, 1e-11, seed);
    check_results<float>(false, false, true, 2e-4, seed);
    check_updates<double>(1e-11, seed);
    check_updates<float>(2e-4, seed);
  }
  check_results<double>(false, false, false, 1e-11, 1);
  if (!few) check_results<double>(true, true, true, 1e-11, 2);
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
