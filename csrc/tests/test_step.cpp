// rlekf::cpu::project and correct against a dense filter, with std::thread instead of torch's threads.

#include <cstdlib>
#include <utility>

#include "filters.h"
#include "threads.h"

namespace {

using namespace rlekf;
using namespace rlekf::tests;

struct CpuFilter : PackedFilter<double> {
  cpu::Parallel parallel;
  bool shared;  // as two processes do that have half of the tiles each

  CpuFilter(const DenseFilter& dense, int64_t capacity, int64_t num_workers, bool shared)
      : PackedFilter(dense, capacity), parallel(std_threads(num_workers)), shared(shared) {}

  void multiply_by_halves(const Measurements& m, Vector& cross) {
    std::fill(cross.begin(), cross.end(), 0.0);
    const int64_t half = p.num_tiles / 2;
    for (const auto& [first, end] : {std::pair{int64_t{0}, half}, std::pair{half, p.num_tiles}}) {
      std::vector<Block> shifted = blocks;
      for (Block& block : shifted) block.first_tile -= first;
      Covariance part = p;
      part.blocks = shifted.data();
      part.num_tiles = end - first;
      part.tiles = tiles.data() + first * kTileSize;
      Vector z(cross.size(), NAN);
      Vector scratch(static_cast<size_t>(cpu::scratch_size(part, m.count, parallel.num_workers)), NAN);
      cpu::multiply_tiles(part, m, z.data(), scratch.data(), parallel);
      for (size_t i = 0; i < z.size(); ++i) cross[i] += z[i];
    }
  }

  void step(Vector& weights, const Vector& jacobian, const Vector& innovation) {
    const Measurements m{static_cast<int>(innovation.size()), jacobian.data(), innovation.data()};
    Vector cross(jacobian.size(), NAN), gram(static_cast<size_t>(2 * p.num_blocks * m.count * m.count), NAN);
    if (shared) {
      multiply_by_halves(m, cross);
      cpu::finish_projection(p, m, {cross.data(), gram.data()}, parallel);
    } else {
      Vector scratch(static_cast<size_t>(cpu::scratch_size(p, m.count, parallel.num_workers)), NAN);
      cpu::project(p, m, {cross.data(), gram.data()}, scratch.data(), parallel);
    }
    cpu::correct(weights.data(), p, m, {cross.data(), gram.data()}, parallel);
  }
};

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

void check(const std::vector<int64_t>& sizes, int64_t capacity, int64_t num_workers, int count, double q,
           int steps = 100) {
  for (const bool shared : {false, true}) {
    DenseFilter dense(sizes, q);
    CpuFilter packed(dense, capacity, num_workers, shared);
    compare(sizes, packed, dense, steps, count, 1e-12);
  }
}

}  // namespace

int main() {
  check_layout();
  for (const int64_t num_workers : {1, 2, 3, 7}) {
    check({1}, 4, num_workers, 1, 0);
    check({1, 63, 64, 65}, 8, num_workers, 3, 1e-3);
    check({130, 5, 200}, 1, num_workers, 1, 0);
  }
  for (const int count : {2, 4, 5, 8}) check({65, 5, 130}, 40, 2, count, 1e-3, 300 / (count + 2));
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
