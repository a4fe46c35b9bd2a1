// Frames of random pairs against a sort of all neighbours at once.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "../neighbors.h"
#include "expect.h"

namespace {

using namespace rlekf;

using tests::expect_close;
using tests::failures;

constexpr double kCutoff = 4;

/// Vectors of whole numbers: many are equally long, and some pairs have the same atoms.
void check(int64_t num_atoms, int64_t num_types, int64_t num_pairs) {
  std::mt19937_64 random(1);
  std::vector<int64_t> types, atoms;
  std::vector<double> vectors;
  for (int64_t a = 0; a < num_atoms; ++a) types.push_back(static_cast<int64_t>(random() % num_types));
  for (int64_t p = 0; p < num_pairs; ++p) {
    for (int side = 0; side < 2; ++side) atoms.push_back(static_cast<int64_t>(random() % num_atoms));
    vectors.push_back(1 + static_cast<double>(random() % 2));
    for (int axis = 1; axis < 3; ++axis) vectors.push_back(static_cast<double>(random() % 5) - 2);
  }
  const Pairs pairs{num_atoms, num_types, num_pairs, kCutoff, atoms.data(), vectors.data(), types.data()};

  std::vector<int64_t> slots(num_types, -1);
  cpu::count_slots(pairs, slots.data());
  const int64_t num_slots = std::accumulate(slots.begin(), slots.end(), int64_t{0});
  std::vector<double> edges(3 * num_atoms * num_slots, NAN);
  std::vector<int64_t> neighbors(num_atoms * num_slots, -1);
  const double shortest = cpu::place_neighbors(pairs, slots.data(), edges.data(), neighbors.data());

  // Center, element, square of the distance, neighbour, pair, direction.
  std::vector<std::tuple<int64_t, int64_t, double, int64_t, int64_t, int>> wanted;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t p = 0; p < num_pairs; ++p) {
    const double* v = &vectors[3 * p];
    const double square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
    const int64_t i = atoms[2 * p], j = atoms[2 * p + 1];
    wanted.emplace_back(i, types[j], square, j, p, 0);
    wanted.emplace_back(j, types[i], square, i, p, 1);
    least = std::min(least, std::sqrt(square));
  }
  std::sort(wanted.begin(), wanted.end());
  if (shortest != least) expect_close("shortest distance", shortest, least, 0);

  auto next = wanted.begin();
  std::vector<int64_t> most(num_types, 0);
  for (int64_t atom = 0; atom < num_atoms; ++atom) {
    int64_t slot = atom * num_slots;
    for (int64_t t = 0; t < num_types; ++t) {
      int64_t count = 0;
      for (const int64_t end = slot + slots[t]; slot < end; ++slot) {
        const bool filled = next != wanted.end() && std::get<0>(*next) == atom && std::get<1>(*next) == t;
        const int64_t pair = filled ? std::get<4>(*next) : 0;
        const double sign = filled && std::get<5>(*next) ? -1 : 1;
        expect_close("neighbour", static_cast<double>(neighbors[slot]),
                     static_cast<double>(filled ? std::get<3>(*next) : atom), 0);
        for (int axis = 0; axis < 3; ++axis) {
          const double empty = axis == 0 ? 2 * kCutoff : 0;
          expect_close("edge", edges[3 * slot + axis], filled ? sign * vectors[3 * pair + axis] : empty, 0);
        }
        count += filled;
        next += filled;
      }
      most[t] = std::max(most[t], count);
    }
  }
  expect_close("neighbours without a slot", static_cast<double>(wanted.end() - next), 0, 0);
  for (int64_t t = 0; t < num_types; ++t) {
    expect_close("slots", static_cast<double>(slots[t]), static_cast<double>(most[t]), 0);
  }
}

}  // namespace

int main() {
  check(1, 1, 0);
  check(1, 2, 9);
  check(3, 2, 1);
  check(7, 3, 60);
  check(20, 3, 3000);
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
