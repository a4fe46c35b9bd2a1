// The CUDA kernels' own source on an emulated GPU, against a dense filter; the launch plan and the work list for real
// GPUs. None of it needs a GPU or nvcc.

#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "filters.h"
// clang-format off: gpu_on_cpu.h must come before the kernels
#include "gpu_on_cpu.h"
#include "../cuda/kernels.cuh"
#include "../cuda/part.cuh"
// clang-format on

namespace {

using namespace rlekf;
using namespace rlekf::tests;
using namespace rlekf::cuda;

void expect(bool right, const char* what, int64_t a = 0, int64_t b = 0) {
  if (right) return;
  std::printf("FAILED %s (%ld, %ld)\n", what, static_cast<long>(a), static_cast<long>(b));
  ++failures;
}

constexpr Device kH200{132, 232448, 233472};
constexpr Device kA100{108, 166912, 167936};
constexpr Device kL4{58, 101376, 102400};

std::vector<Block> layout_of(const std::vector<int64_t>& sizes, int64_t& tiles, int64_t& weights) {
  std::vector<Block> blocks;
  tiles = weights = 0;
  for (const int64_t size : sizes) {
    blocks.push_back({weights, size, tiles});
    weights += size;
    tiles += num_tiles(size);
  }
  return blocks;
}

/// Every tile once, by the thread block that the slots of its sums expect.
void check_walk(const std::vector<int64_t>& sizes, Width width, int64_t num_ctas) {
  int64_t tiles, weights;
  const std::vector<Block> blocks = layout_of(sizes, tiles, weights);
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  num_ctas = std::min(num_ctas, std::max<int64_t>(1, tiles >> width.log2));
  const Runs runs = runs_of(tiles, num_ctas);
  std::vector<int> seen(static_cast<size_t>(tiles), 0);
  std::set<int64_t> row_slots, column_slots;
  std::map<std::pair<int64_t, int64_t>, std::set<int64_t>> ctas;
  for (int cta = 0; cta < num_ctas; ++cta) {
    Walk at = run_of(blocks.data(), num_blocks, width, runs, cta);
    expect(at.left > 0, "a thread block without a tile", cta, num_ctas);
    std::set<std::pair<int64_t, int64_t>> panels;
    bool begins = true;
    while (at.left > 0) {
      ++seen[static_cast<size_t>(at.tile())];
      expect(at.col <= at.row && at.col >> width.log2 == at.panel, "a tile outside its panel", at.row, at.col);
      expect(!begins || at.col == at.panel << width.log2, "a run that begins inside a segment", at.row, at.col);
      begins = at.ends_segment(width);
      if (begins) {
        const int64_t slot = row_slot(blocks[static_cast<size_t>(at.block)], at.block, width, at.row, at.panel);
        expect(row_slots.insert(slot).second, "two segments with one slot", slot);
        expect(slot >= 0 && slot < num_row_slots(tiles, weights, num_blocks, width), "row slot", slot);
      }
      panels.insert({at.block, at.panel});
      at.advance(width);
    }
    expect(begins, "a run that ends inside a segment", cta);
    for (const auto& panel : panels) {
      ctas[panel].insert(cta);
      const int64_t slot = column_slot(blocks[static_cast<size_t>(panel.first)], panel.first, width, panel.second, cta);
      expect(column_slots.insert(slot).second, "two columns with one slot", slot);
      expect(slot >= 0 && slot < num_column_slots(weights, num_blocks, width, num_ctas), "column slot", slot);
    }
  }
  for (const int count : seen) expect(count == 1, "a tile visited other than once", count);
  for (const auto& [panel, who] : ctas) {
    const CtaRange said = ctas_of_panel(blocks[static_cast<size_t>(panel.first)], width, runs, panel.second);
    expect(said.first == *who.begin() && said.last == *who.rbegin() &&
               said.last - said.first + 1 == static_cast<int64_t>(who.size()),
           "the thread blocks of a panel", said.first, said.last);
  }
  for (const int log2 : {kTileLog2, kDotLog2}) {
    std::set<int64_t> slots;
    for (int64_t i = 0; i < num_blocks; ++i) {
      const Block& block = blocks[static_cast<size_t>(i)];
      for (int64_t part = 0; part << log2 < block.size; ++part) {
        const int64_t slot = first_slot(block, i, log2) + part;
        expect(slots.insert(slot).second && slot < num_slots(weights, num_blocks, log2), "slot", slot);
        expect(block_of_slot(blocks.data(), num_blocks, slot, log2) == i, "block of a slot", slot, i);
        for (const int64_t before : {int64_t{-1}, int64_t{0}, i}) {
          expect(next_block_of_slot(blocks.data(), num_blocks, slot, log2, before) == i, "next block", slot, before);
        }
      }
    }
  }
}

void check_walks() {
  std::mt19937 random(3);
  std::vector<std::vector<int64_t>> plans = {{1},     {64},          {65, 1, 1, 1, 700},      {1350, 10240, 9810, 5151},
                                             {65536}, {130, 5, 200}, {1000, 24, 24, 24, 4096}};
  for (int i = 0; i < 30; ++i) {
    plans.emplace_back();
    for (unsigned n = 1 + random() % 6; n > 0; --n) plans.back().push_back(1 + random() % (i % 3 ? 300 : 3000));
  }
  for (const auto& sizes : plans) {
    for (const int log2 : {0, 1, 2}) {
      for (const int64_t ctas : {1, 2, 7, 132, 264}) check_walk(sizes, {log2}, ctas);
    }
  }
}

void check_launches() {
  const std::vector<int64_t> paper = {1350, 10240, 9810, 5151};
  int64_t tiles, weights;
  layout_of(paper, tiles, weights);
  for (const Device& device : {kH200, kA100, kL4}) {
    for (int count = 1; count <= kMaxMeasurements; ++count) {
      for (const int64_t bytes : {4, 8}) {
        const Launch launch = plan_launch(device, count, bytes, tiles, weights, 4);
        const int m = launch.num_measurements;
        expect(m >= count && m <= 8 && (m & (m - 1)) == 0, "rounded number of measurements", count, m);
        expect(launch.stages >= 1 && launch.stages <= kMaxStages, "stages", count, launch.stages);
        expect(launch.shared_bytes <= device.shared_per_cta, "shared memory of a block", launch.shared_bytes);
        const int64_t resident = launch.ctas / device.sms;
        expect(resident >= 1 && launch.ctas % device.sms == 0, "thread blocks", launch.ctas);
        expect(resident * (launch.shared_bytes + kReservedShared) <= device.shared_per_sm, "shared memory of an SM",
               launch.shared_bytes, resident);
        expect(reduce_shared(m).size <= launch.shared_bytes, "shared memory of the reduction", m);
        expect(recursion_shared(m).size <= launch.shared_bytes, "shared memory of the recursion", m);
        Covariance p{};
        p.num_tiles = tiles, p.num_weights = weights, p.num_blocks = 4, p.capacity = 32;
        const Workspace workspace = workspace_in(nullptr, launch, p);
        const double share = 8.0 * static_cast<double>(workspace.size) / static_cast<double>(tiles * kTileSize * bytes);
        if (count == 1) expect(share < 0.05, "workspace in percent of P", static_cast<int64_t>(100 * share), bytes);
      }
    }
  }
  // What docs/performance.md says of an H200: two thread blocks per SM, each with 64 KB in flight.
  const Launch launch = plan_launch(kH200, 1, 8, tiles, weights, 4);
  expect(launch.ctas == 264 && launch.width.columns() == 4 && launch.stages == 2, "plan for an H200", launch.ctas,
         launch.stages);
  for (const int count : {1, 2, 4, 8}) {
    expect(plan_launch(kH200, count, 8, tiles, weights, 4).width.columns() == 4, "width on an H200", count);
  }
  expect(plan_launch(kH200, 1, 8, 3396, 26551, 26).width.columns() == 1, "panels of small blocks");
  expect(plan_launch({1, 1000, 1000}, 1, 8, tiles, weights, 4).stages == 0, "a GPU with no shared memory");
}

template <typename Scalar>
struct GpuFilter : PackedFilter<Scalar> {
  Launch launch;
  unsigned seed;
  bool apart;

  GpuFilter(const DenseFilter& dense, int64_t capacity, const Launch& launch, unsigned seed, bool apart = false)
      : PackedFilter<Scalar>(dense, capacity), launch(launch), seed(seed), apart(apart) {}

  void run(const Task& task) {
    const auto kernel = [&] {
      switch (launch.num_measurements) {
        case 1:
          return filter_step<Scalar, 1>(task);
        case 2:
          return filter_step<Scalar, 2>(task);
        case 4:
          return filter_step<Scalar, 4>(task);
        default:
          return filter_step<Scalar, 8>(task);
      }
    };
    Gpu::launch(launch.ctas, kThreads, launch.shared_bytes, seed, kernel);
  }

  void step(Vector& weights, const Vector& jacobian, const Vector& innovation) {
    const Covariance& p = this->p;
    const Measurements m{static_cast<int>(innovation.size()), jacobian.data(), innovation.data()};
    Vector memory(static_cast<size_t>(workspace_in(nullptr, launch, p).size), NAN);
    const Workspace workspace = workspace_in(memory.data(), launch, p);
    if (apart) {
      Vector cross(jacobian.size(), NAN), gram(static_cast<size_t>(2 * p.num_blocks * m.count * m.count), NAN);
      const Projection projection{cross.data(), gram.data()};
      run({kProject, p, m, projection, nullptr, launch, workspace});
      std::fill(memory.begin(), memory.end(), NAN);
      run({kCorrect, p, m, projection, weights.data(), launch, workspace});
    } else {
      run({kProject | kCorrect, p, m, workspace.projection, weights.data(), launch, workspace});
    }
  }
};

Launch launch_of(const std::vector<int64_t>& sizes, int count, int64_t ctas, Width width, int stages, int64_t bytes,
                 int64_t part = -1) {
  int64_t tiles, weights;
  layout_of(sizes, tiles, weights);
  Launch launch{};
  if (part >= 0) tiles = part, launch.part = true;
  launch.num_measurements = rounded_up(count);
  launch.width = width;
  launch.stages = stages;
  launch.shared_bytes = visit_shared(launch.num_measurements, width, stages, bytes).size;
  assign(launch, ctas, tiles, weights, static_cast<int64_t>(sizes.size()));
  return launch;
}

template <typename Scalar>
void check_filter(const std::vector<int64_t>& sizes, int64_t capacity, int count, int64_t ctas, Width width, int stages,
                  double q, int steps) {
  const Launch launch = launch_of(sizes, count, ctas, width, stages, sizeof(Scalar));
  const DenseFilter start(sizes, q);
  DenseFilter dense = start;
  GpuFilter<Scalar> one(start, capacity, launch, 1);
  compare(sizes, one, dense, steps, count, sizeof(Scalar) == 8 ? 1e-12 : 1e-5);

  // Other orders of the threads, and the two ops apart: the same bits.
  for (const bool apart : {false, true}) {
    GpuFilter<Scalar> other(start, capacity, launch, 2 + apart, apart);
    DenseFilter again = start;
    compare(sizes, other, again, steps, count, sizeof(Scalar) == 8 ? 1e-12 : 1e-5);
    const bool same = std::memcmp(one.tiles.data(), other.tiles.data(), one.tiles.size() * sizeof(Scalar)) == 0 &&
                      std::memcmp(&one.state, &other.state, sizeof(State)) == 0 &&
                      std::memcmp(one.pending.data(), other.pending.data(), one.pending.size() * 8) == 0;
    expect(same, "the same bits in another order of the threads", count, apart);
  }
  for (const Block& block : one.blocks) {
    for (int64_t row = 0; row < tile_rows(block.size); ++row) {
      const Scalar* tile = one.tiles.data() + (block.first_tile + tile_index(row, row)) * kTileSize;
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t j = 0; j < i; ++j) {
          expect(tile[i * kTile + j] == tile[j * kTile + i], "a diagonal tile that is not symmetric", i, j);
          if (row * kTile + i >= block.size) expect(tile[i * kTile + j] == 0, "padding that is not zero", i, j);
        }
      }
    }
  }
}

/// Processes that share the tiles, each with a run of them.
template <typename Scalar>
struct SharedFilter : PackedFilter<Scalar> {
  const std::vector<int64_t> sizes;
  int processes, stages;
  unsigned seed;

  SharedFilter(const DenseFilter& dense, int64_t capacity, int processes, int stages, unsigned seed)
      : PackedFilter<Scalar>(dense, capacity), sizes(dense.sizes), processes(processes), stages(stages), seed(seed) {}

  template <typename One, typename Two, typename Four, typename Eight>
  void run(const Launch& launch, One one, Two two, Four four, Eight eight) {
    const int m = launch.num_measurements;
    Gpu::launch(launch.ctas, kThreads, launch.shared_bytes, seed, [&] {
      m == 1 ? one() : m == 2 ? two() : m == 4 ? four() : eight();
    });
  }

  void step(Vector& weights, const Vector& jacobian, const Vector& innovation) {
    const Measurements m{static_cast<int>(innovation.size()), jacobian.data(), innovation.data()};
    Vector z(jacobian.size(), 0.0), gram(static_cast<size_t>(2 * this->p.num_blocks * m.count * m.count), NAN);
    const int64_t chunk = (this->p.num_tiles + processes - 1) / processes;
    for (int rank = 0; rank < processes; ++rank) {
      const int64_t first = std::min(rank * chunk, this->p.num_tiles);
      Covariance part = this->p;
      part.num_tiles = std::min(chunk, this->p.num_tiles - first);
      part.tiles = static_cast<Scalar*>(part.tiles) + first * kTileSize;
      std::vector<Block> blocks = this->blocks;
      for (Block& block : blocks) block.first_tile -= first;
      part.blocks = blocks.data();
      const Launch launch = launch_of(sizes, m.count, 3, {0}, stages, sizeof(Scalar), part.num_tiles);
      Vector own(jacobian.size(), NAN), memory(static_cast<size_t>(workspace_in(nullptr, launch, part).size), NAN);
      const Task task{0, part, m, {own.data(), nullptr}, nullptr, launch, workspace_in(memory.data(), launch, part)};
      run(
          launch, [&] { multiply_part<Scalar, 1>(task); }, [&] { multiply_part<Scalar, 2>(task); },
          [&] { multiply_part<Scalar, 4>(task); }, [&] { multiply_part<Scalar, 8>(task); });
      for (size_t i = 0; i < z.size(); ++i) z[i] += own[i];
    }
    const Covariance& p = this->p;
    const Launch launch = launch_of(sizes, m.count, 3, {0}, 1, sizeof(Scalar));
    Vector memory(static_cast<size_t>(workspace_in(nullptr, launch, p).size), NAN);
    const Workspace workspace = workspace_in(memory.data(), launch, p);
    const Task task{0, p, m, {z.data(), gram.data()}, nullptr, launch, workspace};
    run(
        launch, [&] { finish_part<1>(task); }, [&] { finish_part<2>(task); }, [&] { finish_part<4>(task); },
        [&] { finish_part<8>(task); });
    std::fill(memory.begin(), memory.end(), NAN);
    const Task last{kCorrect, p, m, {z.data(), gram.data()}, weights.data(), launch, workspace};
    run(
        launch, [&] { filter_step<Scalar, 1>(last); }, [&] { filter_step<Scalar, 2>(last); },
        [&] { filter_step<Scalar, 4>(last); }, [&] { filter_step<Scalar, 8>(last); });
  }
};

template <typename Scalar>
void check_shared(const std::vector<int64_t>& sizes, int64_t capacity, int count, int processes, int stages, double q,
                  int steps) {
  const double tolerance = sizeof(Scalar) == 8 ? 1e-12 : 1e-5;
  const DenseFilter start(sizes, q);
  DenseFilter dense = start;
  SharedFilter<Scalar> one(start, capacity, processes, stages, 1);
  compare(sizes, one, dense, steps, count, tolerance);
  for (const unsigned seed : {2u, 3u}) {
    SharedFilter<Scalar> other(start, capacity, processes, stages, seed);
    DenseFilter again = start;
    compare(sizes, other, again, steps, count, tolerance);
    const bool same = std::memcmp(one.tiles.data(), other.tiles.data(), one.tiles.size() * sizeof(Scalar)) == 0 &&
                      std::memcmp(&one.state, &other.state, sizeof(State)) == 0 &&
                      std::memcmp(one.pending.data(), other.pending.data(), one.pending.size() * 8) == 0;
    expect(same, "the same bits of shared tiles in another order of the threads", count, processes);
  }
}

/// A measurement with a bad number is skipped and changes nothing else.
void check_guard() {
  const std::vector<int64_t> sizes = {70, 3};
  const DenseFilter dense(sizes);
  GpuFilter<double> met(dense, 7, launch_of(sizes, 2, 2, {0}, 2, 8), 5),
      never(dense, 7, launch_of(sizes, 1, 2, {0}, 2, 8), 5);
  Vector w(73, 0.0), wanted(73, 0.0), h(2 * 73), innovation{0.5, 0.25};
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  for (const double poison : std::vector<double>{NAN, INFINITY, 1e200}) {
    for (double& x : h) x = normal(random);
    const Vector good(h.begin() + 73, h.end());
    h[7] = poison;
    met.step(w, h, innovation);
    never.step(wanted, good, {0.25});
  }
  for (size_t i = 0; i < w.size(); ++i) expect_close("weight beside a bad measurement", w[i], wanted[i], 1e-14);
  expect(met.state.skipped_jacobian == 3 && met.state.num_updates == 3, "guard's counters");
}

/// Few directions, and Jacobians that grow: rounding alone would make a variance negative.
void check_least_variance() {
  const std::vector<int64_t> sizes = {24, 6};
  GpuFilter<double> filter(DenseFilter(sizes), 7, launch_of(sizes, 2, 2, {0}, 2, 8), 5);
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  Vector w(30, 0.0), directions(3 * 30), h(2 * 30);
  for (double& x : directions) x = normal(random);
  for (int step = 0; step < 200; ++step) {
    for (size_t m = 0; m < 2; ++m) {
      const double at[] = {normal(random), normal(random), normal(random)};
      for (size_t i = 0; i < 30; ++i) {
        h[m * 30 + i] = 0;
        for (size_t k = 0; k < 3; ++k) h[m * 30 + i] += std::pow(10, step / 20.0) * at[k] * directions[k * 30 + i];
      }
    }
    filter.step(w, h, {1.0, 1.0});
  }
  expect(filter.state.skipped_variance == 0 && filter.state.num_updates == 400, "measurements of little variance");
}

}  // namespace

/// Everything, or with any argument a few cases of each kind: for sanitizers, which are some ten times slower.
int main(int count_arguments, char**) {
  const bool few = count_arguments > 1;
  check_launches();
  check_guard();
  check_least_variance();
  if (!few) check_walks();
  for (int count = 1; count <= 8; count += few ? 7 : 1) {
    check_filter<double>({130, 5, 200}, 11, count, 3, {2}, 2, count % 2 * 1e-3, few ? 3 : 12);
    check_filter<float>({65, 1, 63, 64}, 9, count, 2, {1}, 3, 0, few ? 3 : 9);
  }
  check_filter<double>({1}, 1, 1, 4, {2}, 1, 0, 5);
  check_filter<float>({260}, 5, 1, 2, {1}, 1, 0, few ? 3 : 7);  // each tile arrives where the one before it was
  check_filter<double>({9, 7, 1, 1, 30}, 4, 2, 2, {0}, 1, 1e-6, few ? 3 : 10);
  check_filter<double>(std::vector<int64_t>(20, 3), 10, 8, 3, {0}, 2, 0, few ? 2 : 4);  // many inner products
  if (!few) {
    check_filter<double>({600, 70}, 3, 1, 9, {2}, 4, 0, 8);
    check_filter<double>({300}, 40, 1, 5, {0}, 2, 0, 45);  // more vectors in a fold than shared memory takes at once
  }
  for (const int processes : {1, 2, 5}) {
    check_shared<double>({130, 5, 200}, 7, 1, processes, 2, 1e-3, few ? 3 : 9);
    if (!few) check_shared<double>({70, 300}, 9, 4, processes, 1, 0, 4);
  }
  check_shared<float>({260, 3}, 5, 2, 3, 1, 0, few ? 3 : 6);
  check_shared<double>({65, 1}, 9, 8, 9, 1, 0, 3);  // more processes than tiles
  if (!few) check_shared<double>(std::vector<int64_t>(20, 70), 12, 8, 3, 2, 0, 3);
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
