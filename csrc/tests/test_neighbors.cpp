// Frames of random pairs against a sort of all neighbours at once; the search for pairs against all images in turn.

#include <algorithm>
#include <array>
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

using Pair = std::array<double, 6>;  // i, j, distance, and the vector from i to j

/// Every pair in one direction, the one whose vector is above its opposite.
Pair directed(int64_t i, int64_t j, const double* v) {
  const double r = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
  const bool turn = i > j || (i == j && (v[0] < 0 || (v[0] == 0 && (v[1] < 0 || (v[1] == 0 && v[2] < 0)))));
  const double sign = turn ? -1 : 1;
  return {
      static_cast<double>(turn ? j : i), static_cast<double>(turn ? i : j), r, sign * v[0], sign * v[1], sign * v[2]};
}

void search(int64_t num_atoms, const double* cell, double spread, double cutoff, double smooth, int images) {
  std::mt19937_64 random(2);
  std::uniform_real_distribution<double> uniform(-spread, spread);
  constexpr int64_t kTypes = 2;
  std::vector<double> points(3 * num_atoms);
  std::vector<int64_t> types(num_atoms);
  for (double& x : points) x = uniform(random);
  for (int64_t a = 0; a < num_atoms; ++a) types[a] = a % kTypes;

  std::vector<Pair> wanted;
  std::vector<int64_t> counts(num_atoms * kTypes);
  double sums[kTypes][3] = {}, least = std::numeric_limits<double>::infinity();
  const int range = cell != nullptr ? images : 0;
  for (int64_t i = 0; i < num_atoms; ++i) {
    for (int64_t j = 0; j < num_atoms; ++j) {
      for (int a = -range; a <= range; ++a) {
        for (int b = -range; b <= range; ++b) {
          for (int c = -range; c <= range; ++c) {
            double v[3];
            for (int k = 0; k < 3; ++k) {
              v[k] = points[3 * j + k] - points[3 * i + k];
              if (cell != nullptr) v[k] += a * cell[k] + b * cell[3 + k] + c * cell[6 + k];
            }
            const double r = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
            if (r >= cutoff || (i == j && a == 0 && b == 0 && c == 0)) continue;
            if (const Pair pair = directed(i, j, v); pair[0] != pair[1] ? i < j : std::equal(v, v + 3, &pair[3])) {
              wanted.push_back(pair);
            }
            ++counts[i * kTypes + types[j]];
            least = std::min(least, r);
            const double u = std::clamp((r - smooth) / (cutoff - smooth), 0.0, 1.0);
            const double s = (u * u * u * (-6 * u * u + 15 * u - 10) + 1) / r;
            sums[types[i]][0] += s;
            sums[types[i]][1] += s * s;
            sums[types[i]][2] += s * (v[0] + v[1] + v[2]) / r;
          }
        }
      }
    }
  }

  cpu::Search found(points.data(), num_atoms, cell, cutoff);
  std::vector<int64_t> atoms;
  std::vector<double> vectors;
  if (!found.feasible()) expect_close("feasible", 0, 1, 0);
  cpu::find_pairs(found, num_atoms, atoms, vectors);
  std::vector<Pair> got;
  for (size_t p = 0; p < atoms.size() / 2; ++p)
    got.push_back(directed(atoms[2 * p], atoms[2 * p + 1], &vectors[3 * p]));
  expect_close("number of pairs", static_cast<double>(got.size()), static_cast<double>(wanted.size()), 0);
  const auto before = [](const Pair& p, const Pair& q) {
    return std::lexicographical_compare(p.begin(), p.end(), q.begin(), q.end(),
                                        [](double x, double y) { return x < y - 1e-9; });
  };
  std::sort(got.begin(), got.end(), before);
  std::sort(wanted.begin(), wanted.end(), before);
  for (size_t p = 0; p < std::min(got.size(), wanted.size()); ++p) {
    for (int k = 0; k < 6; ++k) expect_close("pair", got[p][k], wanted[p][k], 1e-12);
  }

  int64_t slots[kTypes];
  double own[kTypes][3];
  const double shortest =
      cpu::survey(points.data(), cell, types.data(), num_atoms, kTypes, cutoff, smooth, slots, own[0]);
  if (shortest != least) expect_close("shortest distance of a survey", shortest, least, 1e-12);
  for (int64_t t = 0; t < kTypes; ++t) {
    int64_t most = 0;
    for (int64_t a = 0; a < num_atoms; ++a) most = std::max(most, counts[a * kTypes + t]);
    expect_close("slots of a survey", static_cast<double>(slots[t]), static_cast<double>(most), 0);
    for (int k = 0; k < 3; ++k) expect_close("sum of a survey", own[t][k], sums[t][k], 1e-10 * (1 + sums[t][1]));
  }
}

void refuse(std::vector<double> points, std::vector<double> cell) {
  const cpu::Search search(points.data(), static_cast<int64_t>(points.size() / 3), cell.data(), 4);
  expect_close("feasible", search.feasible(), 0, 0);
}

}  // namespace

int main() {
  check(1, 1, 0);
  check(1, 2, 9);
  check(3, 2, 1);
  check(7, 3, 60);
  check(20, 3, 3000);
  const double small[] = {2.5, 0, 0, 0.4, 2.2, 0, -0.7, 0.9, 3}, left_handed[] = {0, 7, 0, 9, 0, 1, 0.5, 0, 8};
  const double flat[] = {30, 0, 0, 0, 3, 0, 0, 0, 3}, wide[] = {20, 0, 0, 5, 19, 0, -5, 4, 21};
  search(3, small, 9, 4.5, 0.5, 12);
  search(20, left_handed, 6, 4, 3.9, 7);
  search(20, flat, 2, 4, 1, 4);
  search(200, wide, 25, 3.7, 0.5, 5);
  search(40, nullptr, 5, 3, 1, 0);
  search(40, nullptr, 300, 3, 1, 0);
  search(2, nullptr, 1e5, 3, 1, 0);
  search(1, nullptr, 1, 3, 1, 0);
  refuse({0, 0, NAN}, {9, 0, 0, 0, 9, 0, 0, 0, 9});
  refuse({0, 0, 0}, {9, 0, 0, 0, INFINITY, 0, 0, 0, 9});
  refuse({0, 0, 0}, {9, 0, 0, 9, 0, 0, 0, 0, 9});
  refuse({0, 0, 0, 1, 1, 1}, {0.03, 0, 0, 0, 0.03, 0, 0, 0, 0.03});
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
