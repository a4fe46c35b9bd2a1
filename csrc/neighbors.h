// From atoms to all pairs of neighbours, and from these to the padded arrays of a frame, as pointers and sizes: no
// torch, no Python. rlekf_ext/potential/neighbors.py says what a frame is.
//
// n atoms, T elements, P pairs, K slots.

#pragma once

#include <cstdint>
#include <vector>

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

/// The atoms of a structure and those of their periodic images that are within the cutoff of its cell, in bins as wide
/// as the cutoff or wider: the pairs of an atom are found in its own bin and the 26 around it.
class Search {
 public:
  /// points (n, 3); cell (3, 3), its rows the cell vectors, or null without periodic boundaries.
  Search(const double* points, int64_t num_atoms, const double* cell, double cutoff);

  /// Whether it can be searched: numbers are finite, the cell has a volume, and pairs and images are not too many.
  bool feasible() const { return feasible_; }

  /// Finds the pairs of atom i with atoms above i, and with its own images on one side of it, so that each pair is found
  /// once. They replace those of the last call. Returns how many there are.
  int64_t look_around(int64_t i);

  // What `look_around` has found; the rest is spare room.
  std::vector<int64_t> others;
  std::vector<double> vectors;  // 3 for each: from i to the other atom

 private:
  struct Images {
    std::vector<double> x, y, z;
    std::vector<int64_t> rank;  // 2 for each atom before, and 1 for an image that is on the far side of its atom
  };

  int64_t bin_of(const double* fractions) const;

  double cutoff_;
  bool feasible_ = false;
  int64_t num_bins_[3] = {1, 1, 1};
  double first_[3] = {0, 0, 0}, per_width_[3] = {0, 0, 0};  // where the bins begin, and how many there are in a unit
  std::vector<int64_t> begin_;                              // of each bin, among the images
  Images images_;
  std::vector<double> home_, fractions_;  // (n, 3), of the atoms, moved into the cell
};

/// Appends all pairs of a structure.
void find_pairs(Search& search, int64_t num_atoms, std::vector<int64_t>& atoms, std::vector<double>& vectors);

/// What a structure says without being made: slots (T), as in count_slots; the sums over all neighbours of all atoms of
/// each element (T, 3) of s(r), of s(r)^2 and of s(r) (x + y + z) / r, where s falls from 1/r at `smooth` to 0 at the
/// cutoff. Returns the shortest distance, infinite without pairs, NaN if it cannot be searched.
double survey(const double* points, const double* cell, const int64_t* types, int64_t num_atoms, int64_t num_types,
              double cutoff, double smooth, int64_t* slots, double* sums);

/// slots (T): the most neighbours of each element that an atom has. They add up to K.
void count_slots(const Pairs& pairs, int64_t* slots);

/// Fills edges (n, K, 3) and neighbors (n, K) and returns the shortest distance, infinite without pairs.
/// Neighbours of one element are sorted by distance, then by index, then as the pairs are.
double place_neighbors(const Pairs& pairs, const int64_t* slots, double* edges, int64_t* neighbors);

}  // namespace cpu

}  // namespace rlekf
