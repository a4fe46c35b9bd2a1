// A GPU for the kernels of csrc/cuda/kernels.cuh, on one CPU thread: every GPU thread is a fiber that runs until it
// meets a barrier or a shuffle. Slow, but the very source that a GPU runs, so that its arithmetic, its addresses (under
// the sanitizers) and its barriers can be tested anywhere: fibers are taken in another order for every seed, and a
// result that changes with the seed has a barrier missing. What it cannot show: speed, and how a GPU orders memory.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define RLEKF_DEVICE inline
#define RLEKF_PHASE inline
#define RLEKF_CONSTANT
#define RLEKF_UNROLL
#define RLEKF_UNROLL_BY_4
#define RLEKF_NO_UNROLL

namespace rlekf::cuda {

constexpr bool kBeforeHopper = false;

class Gpu {
 public:
  /// Runs `kernel` on num_ctas blocks of num_threads threads; shared memory starts full of NaN.
  static void launch(int64_t num_ctas, int num_threads, int64_t shared_bytes, unsigned seed,
                     const std::function<void()>& kernel) {
    Gpu gpu(num_ctas, num_threads, shared_bytes, kernel);
    gpu.run(seed);
  }

  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  struct Barrier {
    int64_t size = 0, arrived = 0, generation = 0;
  };
  struct Warp {
    Barrier barrier;
    double values[2][32];
  };
  struct Cta {
    int index;
    Barrier barrier;
    std::vector<Warp> warps;
    std::unique_ptr<double[]> shared;
  };
  struct Fiber {
    int thread;
    Cta* cta;
    ucontext_t start;
    jmp_buf at;
    bool begun = false, ended = false;
    const Barrier* awaited = nullptr;
    int64_t generation = 0;
    int turn = 0;                             // of the two sets of shuffled values
    std::deque<std::vector<Copy>> copies{1};  // groups on their way, the last still open
    std::unique_ptr<char[]> stack;
  };

  static inline Gpu* current = nullptr;
  bool eager = false;  // whether copies arrive as early as they may, or as late
  Fiber* now = nullptr;
  Barrier grid;

  int num_ctas() const { return static_cast<int>(ctas_.size()); }

  /// Lets others run until all that share the barrier have come.
  void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    now->awaited = &barrier;
    now->generation = barrier.generation;
    if (_setjmp(now->at) == 0) _longjmp(scheduler_, 1);
  }

 private:
  Gpu(int64_t num_ctas, int num_threads, int64_t shared_bytes, const std::function<void()>& kernel)
      : kernel_(kernel), ctas_(static_cast<size_t>(num_ctas)) {
    grid.size = num_ctas * num_threads;
    for (Cta& cta : ctas_) {
      cta.index = static_cast<int>(&cta - ctas_.data());
      cta.barrier.size = num_threads;
      cta.warps.resize(static_cast<size_t>(num_threads / 32));
      for (Warp& warp : cta.warps) warp.barrier.size = 32;
      const auto numbers = static_cast<size_t>((shared_bytes + 7) / 8);
      cta.shared.reset(new double[numbers]);
      std::fill_n(cta.shared.get(), numbers, NAN);
      for (int thread = 0; thread < num_threads; ++thread) {
        fibers_.push_back(std::make_unique<Fiber>());
        fibers_.back()->thread = thread;
        fibers_.back()->cta = &cta;
      }
    }
  }

  /// Thread blocks and their warps in the order of the seed, each as far as it can go: what no barrier holds back runs
  /// far ahead or behind.
  void run(unsigned seed) {
    current = this;
    eager = seed % 2 == 0;
    std::mt19937 random(seed);
    std::vector<std::vector<Fiber*>> warps(fibers_.size() / 32);
    for (size_t i = 0; i < fibers_.size(); ++i) warps[i / 32].push_back(fibers_[i].get());
    for (auto& warp : warps) std::shuffle(warp.begin(), warp.end(), random);
    std::shuffle(warps.begin(), warps.end(), random);
    std::vector<const Cta*> order;
    for (const Cta& cta : ctas_) order.push_back(&cta);
    std::shuffle(order.begin(), order.end(), random);
    const auto by_cta = [&](const auto& a, const auto& b) {
      const auto place = [&](const auto& warp) { return std::find(order.begin(), order.end(), warp[0]->cta); };
      return place(a) < place(b);
    };
    std::stable_sort(warps.begin(), warps.end(), by_cta);
    size_t left = fibers_.size();
    const auto run_warp = [&](const std::vector<Fiber*>& warp) {
      bool any = false;
      for (bool moved = true; moved; any = any || moved) {
        moved = false;
        for (Fiber* fiber : warp) {
          if (fiber->ended || (fiber->awaited && fiber->awaited->generation == fiber->generation)) continue;
          fiber->awaited = nullptr;
          moved = true;
          resume(*fiber);
          left -= fiber->ended;
        }
      }
      return any;
    };
    const auto warps_each = static_cast<size_t>(ctas_.front().warps.size());
    while (left > 0) {
      bool stuck = true;
      for (size_t first = 0; first < warps.size(); first += warps_each) {
        for (bool moved = true; moved; stuck = stuck && !moved) {
          moved = false;
          for (size_t w = first; w < first + warps_each; ++w) moved = run_warp(warps[w]) || moved;
        }
      }
      if (stuck) {
        std::printf("FAILED: every GPU thread waits at a barrier that others do not reach\n");
        std::exit(EXIT_FAILURE);
      }
    }
    current = nullptr;
  }

  void resume(Fiber& fiber) {
    now = &fiber;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, &Gpu::enter, 0);
    setcontext(&fiber.start);
  }

  static void enter() {
    current->kernel_();
    current->now->ended = true;
    _longjmp(current->scheduler_, 1);
  }

  static constexpr size_t kStack = 64 * 1024;
  const std::function<void()>& kernel_;
  std::vector<Cta> ctas_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
};

inline Gpu::Fiber& fiber() { return *Gpu::current->now; }
inline Gpu::Warp& own_warp() { return fiber().cta->warps[static_cast<size_t>(fiber().thread / 32)]; }

inline int thread() { return fiber().thread; }
inline int cta() { return fiber().cta->index; }
inline int num_ctas() { return Gpu::current->num_ctas(); }
inline void sync_threads() { Gpu::current->wait(fiber().cta->barrier); }
inline void sync_warp() { Gpu::current->wait(own_warp().barrier); }
inline void sync_grid() { Gpu::current->wait(Gpu::current->grid); }
inline char* shared_memory() { return reinterpret_cast<char*>(fiber().cta->shared.get()); }

inline double shuffle_xor(double value, int mask) {
  double* values = own_warp().values[fiber().turn];
  fiber().turn ^= 1;  // two sets: nobody can be two shuffles ahead
  values[fiber().thread % 32] = value;
  sync_warp();
  return values[(fiber().thread % 32) ^ mask];
}

inline void copy_async(void* shared, const void* global) {
  constexpr int kBytes = 16;
  if (reinterpret_cast<uintptr_t>(global) % kBytes != 0 || reinterpret_cast<uintptr_t>(shared) % kBytes != 0) {
    std::printf("FAILED: a copy of %d bytes from or to an address that is no multiple of it\n", kBytes);
    std::exit(EXIT_FAILURE);
  }
  if (Gpu::current->eager) std::memcpy(shared, global, kBytes);
  else fiber().copies.back().push_back({shared, global, kBytes});
}

inline void copy_commit() { fiber().copies.emplace_back(); }

/// By now everything arrives.
inline void copy_wait(int64_t stages) {
  auto& copies = fiber().copies;
  for (; static_cast<int64_t>(copies.size()) > stages; copies.pop_front()) {
    for (const Gpu::Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
}

}  // namespace rlekf::cuda
