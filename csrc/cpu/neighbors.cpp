// The padded arrays of a frame, on a CPU. The pairs are sorted once, for all atoms together: into as many bins of
// distance as there are pairs, then within the bins. In that order each pair goes to the next free slot of its two
// atoms, whose neighbours are then sorted as well. The arrays are written last, from front to back: they are new memory.

#include "../neighbors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace rlekf::cpu {
namespace {

/// The pairs from the nearest on. squares (P): their distances, squared.
std::vector<int64_t> sorted(const Pairs& pairs, const std::vector<double>& squares) {
  const int64_t count = pairs.num_pairs;
  // Bins of equal width in r^2: in a bulk, whose pairs within r are as many as r^3, they hold 1.5 on average at most.
  const double bins_per_square = static_cast<double>(count) / (pairs.cutoff * pairs.cutoff);
  const auto bin = [&](int64_t p) { return std::min(static_cast<int64_t>(squares[p] * bins_per_square), count - 1); };

  std::vector<int64_t> order(count), first(count + 1);
  for (int64_t p = 0; p < count; ++p) ++first[bin(p) + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  for (int64_t p = 0; p < count; ++p) order[first[bin(p)]++] = p;

  // The lower atom first: then the neighbours of any one atom, lower and higher ones, follow in the order of their index.
  const auto nearer = [&](int64_t p, int64_t q) {
    if (squares[p] != squares[q]) return squares[p] < squares[q];
    const auto lower_and_higher = [&](int64_t k) { return std::minmax(pairs.atoms[2 * k], pairs.atoms[2 * k + 1]); };
    const auto of_p = lower_and_higher(p), of_q = lower_and_higher(q);
    return of_p != of_q ? of_p < of_q : p < q;
  };
  int64_t begin = 0;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t end = first[b];
    if (end - begin > 1) std::sort(order.begin() + begin, order.begin() + end, nearer);
    begin = end;
  }
  return order;
}

}  // namespace

void count_slots(const Pairs& pairs, int64_t* slots) {
  const int64_t num_types = pairs.num_types;
  std::vector<int64_t> counts(pairs.num_atoms * num_types);
  for (int64_t p = 0; p < pairs.num_pairs; ++p) {
    const int64_t i = pairs.atoms[2 * p], j = pairs.atoms[2 * p + 1];
    ++counts[i * num_types + pairs.types[j]];
    ++counts[j * num_types + pairs.types[i]];
  }
  std::fill_n(slots, num_types, 0);
  for (int64_t atom = 0; atom < pairs.num_atoms; ++atom) {
    for (int64_t t = 0; t < num_types; ++t) slots[t] = std::max(slots[t], counts[atom * num_types + t]);
  }
}

double place_neighbors(const Pairs& pairs, const int64_t* slots, double* edges, int64_t* neighbors) {
  std::vector<double> squares(pairs.num_pairs);
  for (int64_t p = 0; p < pairs.num_pairs; ++p) {
    const double* v = pairs.vectors + 3 * p;
    squares[p] = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
  }
  const std::vector<int64_t> order = sorted(pairs, squares);

  const int64_t num_types = pairs.num_types, num_slots = std::accumulate(slots, slots + num_types, int64_t{0});
  std::vector<int64_t> next(pairs.num_atoms * num_types);  // free slot, in all rows
  for (int64_t atom = 0; atom < pairs.num_atoms; ++atom) {
    std::exclusive_scan(slots, slots + num_types, &next[atom * num_types], atom * num_slots);
  }
  std::vector<int64_t> sources(pairs.num_atoms * num_slots, -1);  // 2 p for pair p, 2 p + 1 if seen from its end
  for (const int64_t p : order) {
    const int64_t i = pairs.atoms[2 * p], j = pairs.atoms[2 * p + 1];
    sources[next[i * num_types + pairs.types[j]]++] = 2 * p;
    sources[next[j * num_types + pairs.types[i]]++] = 2 * p + 1;
  }
  for (int64_t atom = 0; atom < pairs.num_atoms; ++atom) {
    for (int64_t slot = atom * num_slots; slot < (atom + 1) * num_slots; ++slot) {
      const int64_t source = sources[slot], p = source / 2;
      const bool empty = source < 0, from_end = source % 2 == 1;
      neighbors[slot] = empty ? atom : pairs.atoms[2 * p + (from_end ? 0 : 1)];
      for (int64_t axis = 0; axis < 3; ++axis) {
        const double x = empty ? (axis == 0 ? 2 * pairs.cutoff : 0) : pairs.vectors[3 * p + axis];
        edges[3 * slot + axis] = from_end ? -x : x;
      }
    }
  }
  return order.empty() ? std::numeric_limits<double>::infinity() : std::sqrt(squares[order[0]]);
}

}  // namespace rlekf::cpu
