// What the C++ tests share: Algorithm 2 on plain matrices, a packed filter with memory of its own, and a comparison.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "../step.h"
#include "expect.h"

namespace rlekf::tests {

using Vector = std::vector<double>;

/// Algorithm 2 on plain matrices.
struct DenseFilter {
  std::vector<int64_t> sizes;
  std::vector<Vector> blocks;
  double lambda = 0.98, nu = 0.9987, noise, q;

  explicit DenseFilter(const std::vector<int64_t>& sizes, double q = 0)
      : sizes(sizes), noise(static_cast<double>(sizes.size())), q(q) {
    for (const int64_t n : sizes) {
      blocks.emplace_back(static_cast<size_t>(n * n), 0.0);
      for (int64_t i = 0; i < n; ++i) blocks.back()[static_cast<size_t>(i * n + i)] = 1.0;
    }
  }

  void step(Vector& weights, const Vector& h, double innovation) {
    std::vector<Vector> gains;
    double variance = 0;
    int64_t first = 0;
    for (size_t l = 0; l < sizes.size(); first += sizes[l++]) {
      const auto n = static_cast<size_t>(sizes[l]);
      Vector k(n, 0.0);
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n; ++j) k[i] += blocks[l][i * n + j] * h[static_cast<size_t>(first) + j];
        variance += k[i] * h[static_cast<size_t>(first) + i];
      }
      gains.push_back(k);
    }
    const double a = 1 / (noise * lambda + variance);
    first = 0;
    for (size_t l = 0; l < sizes.size(); first += sizes[l++]) {
      const auto n = static_cast<size_t>(sizes[l]);
      for (size_t i = 0; i < n; ++i) {
        weights[static_cast<size_t>(first) + i] += a * innovation * gains[l][i];
        for (size_t j = 0; j < n; ++j) {
          double& p = blocks[l][i * n + j];
          p = (p - a * gains[l][i] * gains[l][j]) / lambda + (i == j ? q : 0.0);
        }
      }
    }
    lambda = nu * lambda + 1 - nu;
  }
};

/// The packed filter with memory of its own.
template <typename Scalar>
struct PackedFilter {
  std::vector<Block> blocks;
  std::vector<Scalar> tiles;
  std::vector<double> pending;
  State state{};
  Covariance p;

  PackedFilter(const PackedFilter&) = delete;  // p points into it
  PackedFilter(const DenseFilter& dense, int64_t capacity) {
    int64_t weight = 0, tile = 0;
    for (const int64_t size : dense.sizes) {
      blocks.push_back({weight, size, tile});
      weight += size;
      tile += num_tiles(size);
    }
    tiles.assign(static_cast<size_t>(tile * kTileSize), 0);
    for (const Block& block : blocks) {
      for (int64_t i = 0; i < block.size; ++i) entry(block, i, i) = 1;
    }
    pending.assign(static_cast<size_t>(capacity * weight), 0.0);
    state.forgetting = 1 - dense.lambda;
    state.forgetting_rate = dense.nu;
    state.measurement_noise = dense.noise;
    state.process_noise = dense.q;
    state.scale = 1;
    state.largest = 1;
    p = {-1,     tiles.data(),   sizeof(Scalar) == 8 ? Storage::kFloat64 : Storage::kFloat32,
         tile,   pending.data(), capacity,
         &state, blocks.data(),  static_cast<int64_t>(blocks.size()),
         weight};
  }

  Scalar& entry(const Block& block, int64_t i, int64_t j) {
    const int64_t tile = block.first_tile + tile_index(i / kTile, j / kTile);
    return tiles[static_cast<size_t>(tile * kTileSize + (i % kTile) * kTile + j % kTile)];
  }

  double covariance(const Block& block, int64_t i, int64_t j) {
    double value = entry(block, i, j) + (i == j ? state.shift : 0.0);
    for (int64_t k = 0; k < static_cast<int64_t>(state.num_pending); ++k) {
      const double* u = pending.data() + k * p.num_weights + block.first_weight;
      value -= u[i] * u[j];
    }
    return state.scale * value;
  }
};

/// `steps` passes of `count` measurements through both filters; the two must agree. Of every three passes one has whole
/// blocks of zeros in H, as for the nets of absent elements, and one has stretches of zeros inside blocks, too.
template <typename Filter>
void compare(const std::vector<int64_t>& sizes, Filter& packed, DenseFilter& dense, int steps, int count,
             double tolerance) {
  const auto num_weights = static_cast<size_t>(packed.p.num_weights);
  Vector wanted(num_weights, 0.0), got(num_weights, 0.0);
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  for (int t = 0; t < steps; ++t) {
    Vector h(num_weights * static_cast<size_t>(count)), innovation(static_cast<size_t>(count));
    for (double& x : h) x = normal(random);
    for (double& x : innovation) x = normal(random);
    if (t % 3 > 0) {
      for (const Block& block : packed.blocks) {
        const bool whole = random() % 2 == 0;
        const auto n = static_cast<size_t>(block.size), first = whole ? 0 : random() % n;
        const size_t last = whole ? n : t % 3 == 1 ? first : std::min(n, first + 1 + random() % 150);
        for (size_t k = 0; k < innovation.size(); ++k) {
          const auto own = h.begin() + static_cast<int64_t>(k * num_weights) + block.first_weight;
          std::fill(own + static_cast<int64_t>(first), own + static_cast<int64_t>(last), 0.0);
        }
      }
    }
    const Vector start = wanted;
    for (size_t k = 0; k < innovation.size(); ++k) {
      // M measurements of one w: each sees what those before it moved.
      const Vector row(h.begin() + static_cast<int64_t>(k * num_weights),
                       h.begin() + static_cast<int64_t>((k + 1) * num_weights));
      double left = innovation[k];
      for (size_t i = 0; i < num_weights; ++i) left -= row[i] * (wanted[i] - start[i]);
      dense.step(wanted, row, left);
    }
    packed.step(got, h, innovation);
  }
  double largest = 0;
  for (const double w : wanted) largest = std::max(largest, std::abs(w));
  for (size_t i = 0; i < num_weights; ++i) expect_close("weight", got[i], wanted[i], tolerance * largest);
  for (size_t l = 0; l < sizes.size(); ++l) {
    const int64_t n = sizes[l];
    double peak = 0;
    for (const double value : dense.blocks[l]) peak = std::max(peak, std::abs(value));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        expect_close("covariance", packed.covariance(packed.blocks[l], i, j),
                     dense.blocks[l][static_cast<size_t>(i * n + j)], tolerance * peak);
      }
    }
  }
}

}  // namespace rlekf::tests
