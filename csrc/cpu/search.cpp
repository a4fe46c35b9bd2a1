// The search for neighbours. Atoms are moved into the cell; their images are all those that lie, along each cell
// vector, within the cutoff of the cell. Bins divide that space in the same three directions.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../neighbors.h"

namespace rlekf::cpu {
namespace {

constexpr double kMostPairs = 2e7, kMostImages = 1e7;  // some GB
constexpr double kPi = 3.14159265358979323846;

bool all_finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double x) { return std::isfinite(x); });
}

/// The rows are the cell vectors: what turns a vector into its parts along them, by columns, and the distances of
/// opposite faces. Returns the volume.
double invert(const double* cell, double* inverse, double* heights) {
  double volume = 0;
  for (int k = 0; k < 3; ++k) {
    const double *b = cell + 3 * ((k + 1) % 3), *c = cell + 3 * ((k + 2) % 3);
    const double face[3] = {b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]};
    if (k == 0) volume = cell[0] * face[0] + cell[1] * face[1] + cell[2] * face[2];
    heights[k] = std::abs(volume) / std::sqrt(face[0] * face[0] + face[1] * face[1] + face[2] * face[2]);
    for (int axis = 0; axis < 3; ++axis) inverse[3 * axis + k] = face[axis] / volume;
  }
  return std::abs(volume);
}

}  // namespace

Search::Search(const double* points, int64_t num_atoms, const double* cell, double cutoff) : cutoff_(cutoff) {
  if (!all_finite(points, 3 * num_atoms) || (cell != nullptr && !all_finite(cell, 9))) return;
  double box[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1}, low[3] = {0, 0, 0};
  if (cell != nullptr) {
    std::copy_n(cell, 9, box);
  } else {
    for (int k = 0; k < 3; ++k) {
      double least = points[k], most = points[k];
      for (int64_t i = 1; i < num_atoms; ++i) {
        least = std::min(least, points[3 * i + k]);
        most = std::max(most, points[3 * i + k]);
      }
      low[k] = least;
      box[4 * k] = std::max(most - least, cutoff);
    }
  }
  double inverse[9], heights[3], margin[3], images = static_cast<double>(num_atoms), bins = 1;
  const double volume = invert(box, inverse, heights);
  if (!(volume > 0) || !std::isfinite(volume)) return;
  for (int k = 0; k < 3; ++k) {
    margin[k] = cell != nullptr ? cutoff / heights[k] : 0;
    images *= 1 + 2 * margin[k];
  }
  if (cell != nullptr &&
      static_cast<double>(num_atoms * num_atoms) * 4 / 3 * kPi * cutoff * cutoff * cutoff / volume > kMostPairs)
    return;
  if (!(images < kMostImages)) return;
  double wanted[3];
  for (int k = 0; k < 3; ++k) {
    wanted[k] = std::max(1.0, std::floor((1 + 2 * margin[k]) * heights[k] / cutoff));
    bins *= wanted[k];
  }
  // More bins than images would be pointless: they are widened, starting with the longest direction.
  for (double enough = 2 * images + 64; bins > enough;) {
    double& longest = *std::max_element(wanted, wanted + 3);
    bins /= longest;
    longest = std::max(1.0, std::floor(std::max(enough / bins, longest / 8)));
    bins *= longest;
  }
  for (int k = 0; k < 3; ++k) {
    num_bins_[k] = static_cast<int64_t>(wanted[k]);
    first_[k] = -margin[k];
    per_width_[k] = wanted[k] / (1 + 2 * margin[k]);
  }

  home_.resize(3 * num_atoms);
  fractions_.resize(3 * num_atoms);
  for (int64_t i = 0; i < num_atoms; ++i) {
    const double v[3] = {points[3 * i] - low[0], points[3 * i + 1] - low[1], points[3 * i + 2] - low[2]};
    double moved[3] = {points[3 * i], points[3 * i + 1], points[3 * i + 2]};
    for (int k = 0; k < 3; ++k) {
      double fraction = v[0] * inverse[k] + v[1] * inverse[3 + k] + v[2] * inverse[6 + k];
      if (cell != nullptr) {
        const double whole = std::floor(fraction);
        if (!std::isfinite(fraction)) return;
        fraction -= whole;
        for (int axis = 0; axis < 3; ++axis) moved[axis] -= whole * box[3 * k + axis];
      }
      fractions_[3 * i + k] = fraction;
    }
    std::copy_n(moved, 3, &home_[3 * i]);
  }

  // Images in the order of their atoms, which are then sorted into bins.
  Images found;
  std::vector<int64_t> bin_of_image;
  for (int64_t i = 0; i < num_atoms; ++i) {
    const double *f = &fractions_[3 * i], *p = &home_[3 * i];
    int64_t from[3] = {0, 0, 0}, to[3] = {0, 0, 0};
    for (int k = 0; k < 3 && cell != nullptr; ++k) {
      from[k] = static_cast<int64_t>(std::ceil(-margin[k] - f[k]));
      to[k] = static_cast<int64_t>(std::floor(1 + margin[k] - f[k]));
    }
    for (int64_t a = from[0]; a <= to[0]; ++a) {
      for (int64_t b = from[1]; b <= to[1]; ++b) {
        for (int64_t c = from[2]; c <= to[2]; ++c) {
          const double shift[3] = {static_cast<double>(a), static_cast<double>(b), static_cast<double>(c)};
          double at[3], place[3];
          for (int axis = 0; axis < 3; ++axis) {
            at[axis] = p[axis] + shift[0] * box[axis] + shift[1] * box[3 + axis] + shift[2] * box[6 + axis];
            place[axis] = f[axis] + shift[axis];
          }
          found.x.push_back(at[0]);
          found.y.push_back(at[1]);
          found.z.push_back(at[2]);
          const bool far_side = a > 0 || (a == 0 && (b > 0 || (b == 0 && c > 0)));
          found.rank.push_back(2 * i + (far_side ? 1 : 0));
          bin_of_image.push_back(bin_of(place));
        }
      }
    }
  }
  const auto count = static_cast<int64_t>(bin_of_image.size());
  begin_.assign(num_bins_[0] * num_bins_[1] * num_bins_[2] + 1, 0);
  for (const int64_t bin : bin_of_image) ++begin_[bin + 1];
  std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
  std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
  for (auto* values : {&images_.x, &images_.y, &images_.z}) values->resize(count);
  images_.rank.resize(count);
  for (int64_t image = 0; image < count; ++image) {
    const int64_t place = next[bin_of_image[image]]++;
    images_.x[place] = found.x[image];
    images_.y[place] = found.y[image];
    images_.z[place] = found.z[image];
    images_.rank[place] = found.rank[image];
  }
  feasible_ = true;
}

int64_t Search::bin_of(const double* fractions) const {
  int64_t bin = 0;
  for (int k = 0; k < 3; ++k) {
    const auto place = static_cast<int64_t>((fractions[k] - first_[k]) * per_width_[k]);
    bin = bin * num_bins_[k] + std::clamp<int64_t>(place, 0, num_bins_[k] - 1);
  }
  return bin;
}

int64_t Search::look_around(int64_t i) {
  const double x = home_[3 * i], y = home_[3 * i + 1], z = home_[3 * i + 2], limit = cutoff_ * cutoff_;
  const int64_t own = bin_of(&fractions_[3 * i]), *n = num_bins_;
  const int64_t at[3] = {own / (n[1] * n[2]), own / n[2] % n[1], own % n[2]};
  const int64_t* rank = images_.rank.data();
  int64_t found = 0;
  for (int64_t a = std::max<int64_t>(at[0] - 1, 0); a <= std::min(at[0] + 1, n[0] - 1); ++a) {
    for (int64_t b = std::max<int64_t>(at[1] - 1, 0); b <= std::min(at[1] + 1, n[1] - 1); ++b) {
      for (int64_t c = std::max<int64_t>(at[2] - 1, 0); c <= std::min(at[2] + 1, n[2] - 1); ++c) {
        const int64_t bin = (a * n[1] + b) * n[2] + c, end = begin_[bin + 1];
        const int64_t begin = std::upper_bound(rank + begin_[bin], rank + end, 2 * i) - rank;  // ranks ascend in a bin
        if (const auto room = static_cast<size_t>(found + end - begin); room > others.size()) {
          others.resize(2 * room);
          vectors.resize(6 * room);
        }
        for (int64_t k = begin; k < end; ++k) {  // without a branch: what is too far is written over
          const double dx = images_.x[k] - x, dy = images_.y[k] - y, dz = images_.z[k] - z;
          const double square = dx * dx + dy * dy + dz * dz;
          others[found] = rank[k] / 2;
          vectors[3 * found] = dx;
          vectors[3 * found + 1] = dy;
          vectors[3 * found + 2] = dz;
          found += static_cast<int64_t>(square < limit);
        }
      }
    }
  }
  return found;
}

void find_pairs(Search& search, int64_t num_atoms, std::vector<int64_t>& atoms, std::vector<double>& vectors) {
  for (int64_t i = 0; i < num_atoms; ++i) {
    const int64_t found = search.look_around(i);
    for (int64_t k = 0; k < found; ++k) {
      atoms.push_back(i);
      atoms.push_back(search.others[k]);
    }
    vectors.insert(vectors.end(), search.vectors.begin(), search.vectors.begin() + 3 * found);
  }
}

double survey(const double* points, const double* cell, const int64_t* types, int64_t num_atoms, int64_t num_types,
              double cutoff, double smooth, int64_t* slots, double* sums) {
  std::fill_n(slots, num_types, 0);
  std::fill_n(sums, 3 * num_types, 0);
  Search search(points, num_atoms, cell, cutoff);
  if (!search.feasible()) return std::numeric_limits<double>::quiet_NaN();
  std::vector<int64_t> atoms;
  std::vector<double> vectors;
  find_pairs(search, num_atoms, atoms, vectors);
  const auto num_pairs = static_cast<int64_t>(atoms.size() / 2);
  count_slots({num_atoms, num_types, num_pairs, cutoff, atoms.data(), vectors.data(), types}, slots);
  double least = std::numeric_limits<double>::infinity();
  for (int64_t p = 0; p < num_pairs; ++p) {
    const double* v = &vectors[3 * p];
    const double r = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
    const double u = std::min(std::max((r - smooth) / (cutoff - smooth), 0.0), 1.0);
    const double s = (u * u * u * (-6 * u * u + 15 * u - 10) + 1) / r, along = s * (v[0] + v[1] + v[2]) / r;
    least = std::min(least, r);
    for (int end = 0; end < 2; ++end) {
      double* own = sums + 3 * types[atoms[2 * p + end]];
      own[0] += s;
      own[1] += s * s;
      own[2] += end == 0 ? along : -along;
    }
  }
  return least;
}

}  // namespace rlekf::cpu
