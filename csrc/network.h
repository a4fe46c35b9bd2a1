// The network on a table, as pointers and sizes: no torch, no Python. rlekf_ext/potential/table.py has the formulas,
// rlekf_ext/ops/network_reference.py says the same in torch.
//
// n atoms in the order of their elements, E edges in the order of the atoms that they start from, B structures, T
// elements, K nodes per net, M outputs of an embedding net, M_< of them on the right of the descriptor, N weights.
// Scalar is float or double.

#pragma once

#include <cstdint>
#include <vector>

#include "step.h"

namespace rlekf {

constexpr int kStencil = 8;       // nodes per interpolation
constexpr int kNodesAtOnce = 16;  // K is a multiple of it

/// An edge, and where it stands on the table. 64 or 32 bytes.
template <typename Scalar>
struct Edge {
  Scalar direction[3], length;  // length in Å
  Scalar ratio, slope;          // s / length and ds/dlength, 1/Å²
  Scalar where;                 // s in units of the distance of two nodes, from the first node of its stencil
  Scalar place;                 // t K + the first node of the stencil
};

/// What a frame is made from. A slot with an edge of rcut or longer is empty.
template <typename Scalar>
struct FrameInputs {
  int64_t num_atoms;
  const Scalar* edges;       // (n, slots, 3), Å, in the order of the frame
  const int64_t* neighbors;  // (n, slots)
  const int64_t* types;      // (n)
  uint8_t* near;             // (n, slots), filled in by sort_atoms(): whether a slot has an edge
  std::vector<int64_t> slots;
  double rcut, rcut_smth;
};

/// How a descriptor's numbers are made from environment matrices.
template <typename Scalar>
struct Normalization {
  const Scalar *davg, *dstd;  // (T, 4)
  std::vector<int64_t> sel;   // (T)
  double last;                // s at the last node
};

/// A frame as the network on a table takes it.
template <typename Scalar>
struct Geometry {
  int64_t num_atoms, num_types, num_nodes, num_edges, num_structures;
  int64_t* order;            // (n), where the sorted atoms are in the frame
  int64_t* first_atom;       // (T + 1), of each element
  int64_t* first_edge;       // (n + 1), of each atom
  Edge<Scalar>* edges;       // (E)
  int64_t* neighbor;         // (E), place in the frame
  int64_t* first_incoming;   // (n + 1), of each atom of the frame
  int64_t* incoming;         // (E), the edges in the order of the atoms of the frame that they point to
  Scalar* coefficients;      // (n, 4, T, K), C
  const int64_t* structure;  // (n), of the atoms of the frame
};

/// y = h idt + shortcut, h = tanh(x W + b) or, unless hidden, x W + b.
template <typename Scalar>
struct Layer {
  int64_t inputs, outputs;
  bool hidden;
  int64_t copies;          // of the input in the shortcut
  const Scalar* weight;    // (inputs, outputs)
  const Scalar* bias;      // (outputs)
  const Scalar* timestep;  // (outputs), or null
  int64_t first;           // place of W in a gradient, as (outputs, inputs), which bias and time step follow
};

template <typename Scalar>
using Net = std::vector<Layer<Scalar>>;

template <typename Scalar>
struct Network {
  Normalization<Scalar> normalization;
  std::vector<Net<Scalar>> embeddings;  // of center c and neighbour t: [t T + c], or [t]
  std::vector<Net<Scalar>> fittings;    // (T)
  int64_t axis = 0;                     // M_<
  int64_t num_weights = 0;

  int64_t num_types() const { return static_cast<int64_t>(fittings.size()); }
  int64_t num_values() const { return embeddings[0].back().outputs; }
  const Net<Scalar>& embedding(int64_t center, int64_t neighbor) const {
    const bool one_sided = embeddings.size() == fittings.size();
    return embeddings[static_cast<size_t>(one_sided ? neighbor : neighbor * num_types() + center)];
  }
};

template <typename Scalar>
struct Prediction {
  Scalar* energies;          // (n), without bias, in the order of the frame
  Scalar *forces, *virials;  // (n, 3) and (B, 3, 3), or null
  Scalar* saved;             // (saved_size()), for gradients()
};

/// The factors of energies, forces and virials in a sum whose derivatives by the weights are wanted.
template <typename Scalar>
struct Factors {
  const Scalar* energies;          // (n)
  const Scalar *forces, *virials;  // (n, 3) and (B, 3, 3), or both null
};

enum class Kind : int64_t { kEnergy, kForce, kVirial };

/// An update: what it measures and, for forces, the atoms of its group.
struct FrameUpdate {
  Kind kind;
  const int64_t* atoms;
  int64_t num_atoms;
};

/// What a frame's energies are made of, and its labels; those that no update measures may be null.
template <typename Scalar>
struct Labels {
  const double* bias;             // (T), energy of an atom of each element
  const int64_t* types;           // (n)
  const Scalar* num_atoms;        // (B)
  const double* energy;           // (B)
  const Scalar *forces, *virial;  // (n, 3), (B, 3, 3)
};

/// Adds to the error a part |predicted - label| share. Returns its derivative by `predicted`, times -1.
RLEKF_HOST_DEVICE inline double add_error(double predicted, double label, double share, double& error) {
  const double difference = predicted - label;
  error += (difference < 0 ? -difference : difference) * share;
  return difference > 0 ? -share : difference < 0 ? share : difference;  // 0, or NaN
}

namespace cpu {

/// Orders the atoms by element and finds their edges: order, first_atom, first_edge, and inputs.near.
template <typename Scalar>
void sort_atoms(const FrameInputs<Scalar>& inputs, const Geometry<Scalar>& geometry);

/// The rest of the geometry.
template <typename Scalar>
void tabulate(const FrameInputs<Scalar>& inputs, const Normalization<Scalar>& normalization,
              const Geometry<Scalar>& geometry, const Parallel& parallel);

// The sizes of memory below are in numbers of type Scalar. Contents of scratch memory do not matter.

template <typename Scalar>
int64_t saved_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, bool forces);

template <typename Scalar>
int64_t scratch_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, int64_t num_workers);

template <typename Scalar>
void predict(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Prediction<Scalar>& result,
             Scalar* scratch, const Parallel& parallel);

/// gradient (N) of a sum, from what predict() saved with forces if the sum has factors of forces.
template <typename Scalar>
void gradients(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Scalar* saved,
               const Factors<Scalar>& factors, Scalar* gradient, Scalar* scratch, const Parallel& parallel);

/// For updates at the same weights: errors (U) and jacobians (U, N) = -dε/dw of ε, the mean absolute error (Algorithm 2,
/// lines 1 to 7): of energies and virials per atom, of the forces of a group of atoms per component.
template <typename Scalar>
void measure(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Labels<Scalar>& labels,
             const std::vector<FrameUpdate>& updates, double* errors, double* jacobians, const Parallel& parallel);

}  // namespace cpu

namespace cuda {

constexpr int kUpdatesAtOnce = 16;

/// Where launches go: they return at once, and all pointers belong to this GPU.
struct Stream {
  int device;
  void* stream;
};

// The same on a GPU: the sizes of saved memory are in numbers of type Scalar, of scratch memory in doubles.

template <typename Scalar>
int64_t saved_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, bool forces);

template <typename Scalar>
int64_t scratch_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, int64_t num_updates);

template <typename Scalar>
void predict(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Prediction<Scalar>& result,
             double* scratch, const Stream& on);

/// gradient (U, N) of U <= kUpdatesAtOnce sums with factors (U, n), (U, n, 3) and (U, B, 3, 3).
template <typename Scalar>
void gradients(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Scalar* saved,
               const Factors<Scalar>& factors, int64_t num_updates, Scalar* gradient, double* scratch,
               const Stream& on);

/// For U <= kUpdatesAtOnce updates. `result` and `factors` (U, ...) are scratch memory, of forces and virials if any update
/// measures them.
template <typename Scalar>
void measure(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Labels<Scalar>& labels,
             const FrameUpdate* updates, int64_t num_updates, const Prediction<Scalar>& result,
             const Factors<Scalar>& factors, double* errors, double* jacobians, double* scratch, const Stream& on);

}  // namespace cuda

}  // namespace rlekf
