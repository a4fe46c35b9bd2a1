// rlekf::cpu::project and correct against a dense filter, with std::thread in place of torch's threads.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../step.h"

namespace {

using namespace rlekf;
using Vector = std::vector<double>;

cpu::Parallel std_threads(int64_t num_workers) {
  return {num_workers, [num_workers](int64_t count, const std::function<void(int64_t)>& task) {
            std::vector<std::thread> threads;
            for (int64_t worker = 0; worker < num_workers; ++worker) {
              threads.emplace_back([=, &task] {
                for (int64_t i = worker; i < count; i += num_workers) task(i);
              });
            }
            for (std::thread& thread : threads) thread.join();
          }};
}

/// Algorithm 2 on plain matrices.
struct DenseFilter {
  std::vector<int64_t> sizes;
  std::vector<Vector> blocks;
  double lambda, nu, noise, q;

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
struct PackedFilter {
  std::vector<Block> blocks;
  std::vector<double> tiles, pending, state, cross, gram, scratch;
  Covariance p;

  PackedFilter(const DenseFilter& dense, int64_t capacity) : state(kNumState, 0.0) {
    int64_t weight = 0, tile = 0;
    for (const int64_t size : dense.sizes) {
      blocks.push_back({weight, size, tile});
      weight += size;
      tile += num_tiles(size);
    }
    tiles.assign(static_cast<size_t>(tile * kTileSize), 0.0);
    for (const Block& block : blocks) {
      for (int64_t i = 0; i < block.size; ++i) entry(block, i, i) = 1.0;
    }
    pending.assign(static_cast<size_t>(capacity * weight), 0.0);
    state[kForgetting] = 1 - dense.lambda;
    state[kForgettingRate] = dense.nu;
    state[kMeasurementNoise] = dense.noise;
    state[kProcessNoise] = dense.q;
    state[kProcessNoiseDecay] = 1;
    state[kDiagonalCeiling] = INFINITY;
    state[kScale] = 1;
    state[kLargestDiagonal] = 1;
    p = {tiles.data(),
         Storage::kFloat64,
         pending.data(),
         capacity,
         state.data(),
         blocks.data(),
         static_cast<int64_t>(blocks.size()),
         weight};
  }

  double& entry(const Block& block, int64_t i, int64_t j) {
    const int64_t tile = block.first_tile + tile_index(i / kTile, j / kTile);
    return tiles[static_cast<size_t>(tile * kTileSize + (i % kTile) * kTile + j % kTile)];
  }

  double covariance(const Block& block, int64_t i, int64_t j) {
    double value = entry(block, i, j) + (i == j ? state[kShift] : 0.0);
    for (int64_t k = 0; k < static_cast<int64_t>(state[kNumPending]); ++k) {
      const double* u = pending.data() + k * p.num_weights + block.first_weight;
      value -= u[i] * u[j];
    }
    return state[kScale] * value;
  }

  void step(Vector& weights, const Vector& jacobian, const Vector& innovation, const cpu::Parallel& parallel) {
    const Measurements m{static_cast<int>(innovation.size()), jacobian.data(), innovation.data()};
    cross.assign(jacobian.size(), NAN);
    gram.assign(static_cast<size_t>(2 * p.num_blocks * m.count * m.count), NAN);
    scratch.assign(static_cast<size_t>(cpu::scratch_size(p, m.count, parallel.num_workers)), NAN);
    cpu::project(p, m, {cross.data(), gram.data()}, scratch.data(), parallel);
    cpu::correct(weights.data(), p, m, {cross.data(), gram.data()}, parallel);
  }
};

int failures = 0;

void expect_close(const char* what, double got, double wanted, double tolerance) {
  if (std::abs(got - wanted) <= tolerance) return;
  std::printf("FAILED %s: got %.17g, wanted %.17g, tolerance %g\n", what, got, wanted, tolerance);
  ++failures;
}

void compare(const std::vector<int64_t>& sizes, int64_t capacity, int64_t num_workers, double q) {
  DenseFilter dense{sizes, {}, 0.98, 0.9987, static_cast<double>(sizes.size()), q};
  for (const int64_t n : sizes) {
    Vector identity(static_cast<size_t>(n * n), 0.0);
    for (int64_t i = 0; i < n; ++i) identity[static_cast<size_t>(i * n + i)] = 1.0;
    dense.blocks.push_back(identity);
  }
  PackedFilter packed(dense, capacity);
  const auto num_weights = static_cast<size_t>(packed.p.num_weights);
  Vector wanted(num_weights, 0.0), got(num_weights, 0.0), h(num_weights);
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  const auto parallel = std_threads(num_workers);
  for (int t = 0; t < 100; ++t) {
    for (double& x : h) x = normal(random);
    const double innovation = normal(random);
    dense.step(wanted, h, innovation);
    packed.step(got, h, {innovation}, parallel);
  }
  const double largest = std::abs(
      *std::max_element(wanted.begin(), wanted.end(), [](double a, double b) { return std::abs(a) < std::abs(b); }));
  for (size_t i = 0; i < num_weights; ++i) expect_close("weight", got[i], wanted[i], 1e-12 * largest);
  for (size_t l = 0; l < sizes.size(); ++l) {
    const int64_t n = sizes[l];
    double peak = 0;
    for (const double value : dense.blocks[l]) peak = std::max(peak, std::abs(value));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        expect_close("covariance", packed.covariance(packed.blocks[l], i, j),
                     dense.blocks[l][static_cast<size_t>(i * n + j)], 1e-12 * peak);
      }
    }
  }
}

void check_layout() {
  int64_t index = 0;
  for (int64_t row = 0; row < 400; ++row) {
    for (int64_t col = 0; col <= row; ++col, ++index) {
      expect_close("tile_index", static_cast<double>(tile_index(row, col)), static_cast<double>(index), 0);
      expect_close("tile_row", static_cast<double>(tile_row(index)), static_cast<double>(row), 0);
    }
  }
  const int64_t far = int64_t{1} << 31;  // rows of a block of 1.4e11 weights
  expect_close("tile_row", static_cast<double>(tile_row(tile_index(far, 0))), static_cast<double>(far), 0);
  expect_close("tile_row", static_cast<double>(tile_row(tile_index(far, 0) - 1)), static_cast<double>(far - 1), 0);
}

}  // namespace

int main() {
  check_layout();
  for (const int64_t num_workers : {1, 2, 3, 7}) {
    compare({1}, 4, num_workers, 0);
    compare({1, 63, 64, 65}, 8, num_workers, 1e-3);
    compare({130, 5, 200}, 1, num_workers, 0);
  }
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
