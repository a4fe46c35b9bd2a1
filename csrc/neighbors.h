// From pairs of atoms to the padded arrays of a frame, as pointers and sizes: no torch, no Python.
// rlekf_ext/potential/neighbors.py says what a frame is.
//
// n atoms, T elements, P pairs, K slots.

#pragma once

#include <cstdint>

namespace rlekf {

/// All pairs within the cutoff, each once: of i, j and j, i only one. An atom and its own image are a pair, too.
struct Pairs {
  int64_t num_atoms, num_types, num_pairs;
  double cutoff;
  const int64_t* atoms;   // (P, 2), i and j, below n
  const double* vectors;  // (P, 3), from i to j
  const int64_t* types;   // (n), element of each atom, below T
};

namespace cpu {

/// slots (T): the most neighbours of each element that an atom has. They add up to K.
void count_slots(const Pairs& pairs, int64_t* slots);

/// Fills edges (n, K, 3) and neighbors (n, K) and returns the shortest distance, infinite without pairs.
/// Neighbours of one element are sorted by distance, then by index, then as the pairs are.
double place_neighbors(const Pairs& pairs, const int64_t* slots, double* edges, int64_t* neighbors);

}  // namespace cpu

}  // namespace rlekf
