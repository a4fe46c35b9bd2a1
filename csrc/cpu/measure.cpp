// Errors of a frame and their derivatives by the weights, on a CPU.

#include <algorithm>

#include "../network.h"
#include "scratch.h"

namespace rlekf::cpu {
template <typename Scalar>
void measure(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Labels<Scalar>& labels,
             const std::vector<FrameUpdate>& updates, double* errors, double* jacobians, const Parallel& parallel) {
  const int64_t n = geometry.num_atoms, num_structures = geometry.num_structures;
  bool forces = false, virials = false;
  for (const FrameUpdate& update : updates) {
    forces = forces || update.kind != Kind::kEnergy;
    virials = virials || update.kind == Kind::kVirial;
  }
  const int64_t results = 8 * n + 18 * num_structures;
  const int64_t saved = saved_size(network, geometry, forces);
  Memory<Scalar> memory(results + saved + network.num_weights + scratch_size(network, geometry, parallel.num_workers));
  Scalar* kept = memory.take(saved);
  Scalar* gradient = memory.take(network.num_weights);
  const Prediction<Scalar> found{memory.take(n), forces ? memory.take(3 * n) : nullptr,
                                 virials ? memory.take(9 * num_structures) : nullptr, kept};
  Scalar* by_energies = memory.take(n);
  Scalar* by_forces = memory.take(3 * n);
  Scalar* by_virials = memory.take(9 * num_structures);
  Scalar* scratch = memory.rest();
  predict(network, geometry, found, scratch, parallel);

  for (size_t i = 0; i < updates.size(); ++i) {
    const FrameUpdate& update = updates[i];
    double error = 0;
    std::fill_n(by_energies, n, Scalar{});
    std::fill_n(by_forces, 3 * n, Scalar{});
    std::fill_n(by_virials, 9 * num_structures, Scalar{});
    if (update.kind == Kind::kEnergy) {
      std::vector<double> energy(static_cast<size_t>(num_structures));
      for (int64_t a = 0; a < n; ++a) {
        energy[static_cast<size_t>(geometry.structure[a])] +=
            static_cast<double>(found.energies[a]) + labels.bias[labels.types[a]];
      }
      for (int64_t b = 0; b < num_structures; ++b) {
        double& predicted = energy[static_cast<size_t>(b)];
        const double share = 1 / (static_cast<double>(labels.num_atoms[b]) * static_cast<double>(num_structures));
        predicted = add_error(predicted, labels.energy[b], share, error);
      }
      for (int64_t a = 0; a < n; ++a) {
        by_energies[a] = static_cast<Scalar>(energy[static_cast<size_t>(geometry.structure[a])]);
      }
    } else if (update.kind == Kind::kForce) {
      const double share = 1 / static_cast<double>(3 * update.num_atoms);
      for (int64_t k = 0; k < 3 * update.num_atoms; ++k) {
        const int64_t at = 3 * update.atoms[k / 3] + k % 3;
        by_forces[at] += static_cast<Scalar>(
            add_error(static_cast<double>(found.forces[at]), static_cast<double>(labels.forces[at]), share, error));
      }
    } else {
      for (int64_t k = 0; k < 9 * num_structures; ++k) {
        const double share =
            1 / (static_cast<double>(labels.num_atoms[k / 9]) * static_cast<double>(9 * num_structures));
        by_virials[k] = static_cast<Scalar>(
            add_error(static_cast<double>(found.virials[k]), static_cast<double>(labels.virial[k]), share, error));
      }
    }
    errors[i] = error;
    const Factors<Scalar> factors{by_energies, forces ? by_forces : nullptr, forces ? by_virials : nullptr};
    gradients(network, geometry, kept, factors, gradient, scratch, parallel);
    std::copy_n(gradient, network.num_weights, jacobians + static_cast<int64_t>(i) * network.num_weights);
  }
}

#define RLEKF_INSTANTIATE(Scalar)                                                               \
  template void measure(const Network<Scalar>&, const Geometry<Scalar>&, const Labels<Scalar>&, \
                        const std::vector<FrameUpdate>&, double*, double*, const Parallel&);
RLEKF_INSTANTIATE(double)
RLEKF_INSTANTIATE(float)

}  // namespace rlekf::cpu
