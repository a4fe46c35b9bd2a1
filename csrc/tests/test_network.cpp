// The network on a table: forces and gradients against finite differences of its energies, whatever the number of
// workers, and values that are not finite.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "expect.h"
#include "network_case.h"

namespace {

using namespace rlekf;
using namespace rlekf::tests;

template <typename Scalar>
std::vector<Scalar> gradient_of(Case<Scalar>& made, const Factors<Scalar>& factors, int64_t num_workers) {
  std::vector<Scalar> gradient(made.weights.size(), static_cast<Scalar>(NAN));
  cpu::gradients(made.network, made.geometry, made.saved.data(), factors, gradient.data(), made.scratch.data(),
                 std_threads(num_workers));
  return gradient;
}

/// Forces, and gradients of everything, against finite differences.
void check_derivatives() {
  Case<double> made;
  made.predict(true);
  const std::vector<double> forces = made.forces;
  constexpr double kStep = 1e-5;
  for (const size_t i : {size_t{0}, size_t{10}, size_t{37}, size_t{62}}) {
    const double before = made.positions[i];
    double energy[2];
    for (int side = 0; side < 2; ++side) {
      made.positions[i] = before + (side == 0 ? kStep : -kStep);
      made.build();
      energy[side] = made.energy();
    }
    made.positions[i] = before;
    expect_close("force", forces[i], -(energy[0] - energy[1]) / (2 * kStep), 1e-7);
  }
  made.build();
  const auto by_energies = random_numbers<double>(kAtoms, 1), by_forces = random_numbers<double>(3 * kAtoms, 2),
             by_virials = random_numbers<double>(9 * kStructures, 3);
  made.predict(true);
  const auto all = gradient_of(made, {by_energies.data(), by_forces.data(), by_virials.data()}, 1);
  made.predict(false);
  const auto energies_alone = gradient_of<double>(made, {by_energies.data(), nullptr, nullptr}, 1);
  // A gradient has W as (outputs, inputs), the weights as (inputs, outputs): both change along a direction.
  for (int seed = 4; seed < 8; ++seed) {
    const auto direction = random_numbers<double>(made.weights.size(), seed);
    const auto before = made.weights;
    double value[2], energy[2];
    for (int side = 0; side < 2; ++side) {
      for (size_t i = 0; i < before.size(); ++i)
        made.weights[i] = before[i] + (side == 0 ? kStep : -kStep) * direction[i];
      made.predict(true);
      value[side] = made.total(by_energies, by_forces, by_virials);
      energy[side] = 0;
      for (size_t a = 0; a < kAtoms; ++a) energy[side] += by_energies[a] * made.energies[a];
    }
    made.weights = before;
    double slope = 0, energy_slope = 0;
    const auto add = [&](const Net<double>& net) {
      for (const auto& layer : net) {
        const double* along = direction.data() + (layer.weight - made.weights.data());
        for (int64_t o = 0; o < layer.outputs; ++o) {
          for (int64_t i = 0; i < layer.inputs; ++i) {
            const auto at = static_cast<size_t>(layer.first + o * layer.inputs + i);
            slope += all[at] * along[i * layer.outputs + o];
            energy_slope += energies_alone[at] * along[i * layer.outputs + o];
          }
        }
        for (int64_t k = layer.inputs * layer.outputs; k < (layer.inputs + (layer.timestep ? 2 : 1)) * layer.outputs;
             ++k) {
          slope += all[static_cast<size_t>(layer.first + k)] * along[k];
          energy_slope += energies_alone[static_cast<size_t>(layer.first + k)] * along[k];
        }
      }
    };
    for (const auto& net : made.network.embeddings) add(net);
    for (const auto& net : made.network.fittings) add(net);
    expect_close("gradient", slope, (value[0] - value[1]) / (2 * kStep), 1e-5 * std::abs(slope));
    expect_close("gradient of energies", energy_slope, (energy[0] - energy[1]) / (2 * kStep),
                 1e-5 * std::abs(energy_slope));
  }
}

/// The results of one worker from several, to rounding.
template <typename Scalar>
void check_workers(double tolerance) {
  const auto by_energies = random_numbers<Scalar>(kAtoms, 1), by_forces = random_numbers<Scalar>(3 * kAtoms, 2),
             by_virials = random_numbers<Scalar>(9 * kStructures, 3);
  Case<Scalar> one, many;
  one.predict(true);
  const Factors<Scalar> factors{by_energies.data(), by_forces.data(), by_virials.data()};
  const auto wanted = gradient_of(one, factors, 1);
  for (const int64_t num_workers : {2, 3, 7}) {
    many.build(num_workers);
    many.predict(true, num_workers);
    const auto got = gradient_of(many, factors, num_workers);
    for (size_t i = 0; i < one.forces.size(); ++i) expect_close("forces", many.forces[i], one.forces[i], tolerance);
    for (size_t i = 0; i < one.virials.size(); ++i) expect_close("virials", many.virials[i], one.virials[i], tolerance);
    for (size_t i = 0; i < wanted.size(); ++i) expect_close("gradients", got[i], wanted[i], 10 * tolerance);
  }
  many.weights[3] = static_cast<Scalar>(NAN);
  many.predict(true, 2);
  if (!std::isnan(many.energies[0])) {
    std::printf("FAILED: a weight that is not finite is not seen\n");
    ++failures;
  }
}

}  // namespace

int main() {
  check_derivatives();
  check_workers<double>(1e-11);
  check_workers<float>(1e-3);
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
