// The filter step as pointers and sizes: no torch, no Python. The same names in rlekf::cpu and rlekf::cuda.
//
//     project   cross = (P / scale) H^T and its inner products with H: all the traffic on P; folds waiting vectors if
//     need be correct   M scalar updates from these, exact and in order: weights, waiting vectors, scalars; O(N) step
//     both

#pragma once

#include <cstdint>
#include <functional>

#include "covariance.h"

namespace rlekf {

enum class Storage { kFloat32, kFloat64 };

/// The covariance and its scalars. N = num_weights.
struct Covariance {
  int device;       // number of the GPU that all pointers belong to; -1 for a CPU
  void* tiles;      // (num_tiles, kTile, kTile)
  Storage storage;  // dtype of tiles
  int64_t num_tiles;
  double* pending;  // (capacity, N), of which state->num_pending rows are in use
  int64_t capacity;
  State* state;
  const Block* blocks;  // (num_blocks)
  int64_t num_blocks;
  int64_t num_weights;
};

/// M measurements: jacobian (M, N), innovation (M). project() does not read the innovation.
struct Measurements {
  int count;
  const double* jacobian;
  const double* innovation;
};

/// What project() hands to correct(): cross (M, N); gram (2, num_blocks, M, M) holds h_j^T z_k, then h_j^T h_k, of each
/// block.
struct Projection {
  double* cross;
  double* gram;
};

namespace cpu {

/// Calls task(0) ... task(count - 1), in any order and on any thread, and returns when all have ended.
struct Parallel {
  int64_t num_workers;
  std::function<void(int64_t count, const std::function<void(int64_t)>& task)> run;
};

/// float64 numbers that project() needs as scratch, with any contents.
int64_t scratch_size(const Covariance& covariance, int num_measurements, int64_t num_workers);

void project(const Covariance& covariance, const Measurements& measurements, const Projection& projection,
             double* scratch, const Parallel& parallel);

void correct(double* weights, const Covariance& covariance, const Measurements& measurements,
             const Projection& projection, const Parallel& parallel);

}  // namespace cpu

namespace cuda {

/// The compute capabilities this build has code for, such as "80-real 90", as compiled into the library.
const char* architectures();

// All that follows is queued on `stream`, a cudaStream_t of the covariance's GPU, and not waited for.
// Throws std::runtime_error that names the kernel and the sizes where a launch fails.

/// float64 numbers that each of the three needs as scratch, with any contents.
int64_t scratch_size(const Covariance& covariance, const Measurements& measurements);

void project(const Covariance& covariance, const Measurements& measurements, const Projection& projection,
             double* scratch, void* stream);

void correct(double* weights, const Covariance& covariance, const Measurements& measurements,
             const Projection& projection, double* scratch, void* stream);

void step(double* weights, const Covariance& covariance, const Measurements& measurements, double* scratch,
          void* stream);

}  // namespace cuda

}  // namespace rlekf
