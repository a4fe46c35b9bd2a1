// The filter step as pointers and sizes: no torch, no Python. The same names in rlekf::cpu and rlekf::cuda.
//
//     project   cross = (P / scale) H^T and its inner products with H: all traffic on P; folds pending vectors if due
//     correct   M scalar updates from these, exact and in order: weights, pending vectors, scalars; O(N)
//     step      both
//
// project is also there in two parts, for processes that share the tiles: each calls multiply_tiles with its own, and
// finish_projection with the sum of what all found.

#pragma once

#include <cstdint>
#include <functional>

#include "covariance.h"

namespace rlekf {

enum class Storage { kFloat32, kFloat64 };

/// The covariance and its scalars. N = num_weights. Tiles may be a part of P's for multiply_tiles, from any tile on:
/// `first_tile` of a block counts from the first of these, and may be negative or beyond the last.
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

/// What project() passes on to correct(): cross (M, N), whose rows are z_k; gram (2, num_blocks, M, M), which holds
/// h_j^T z_k, then h_j^T h_k, of each block.
struct Projection {
  double* cross;
  double* gram;
};

namespace cpu {

/// Calls task(0) ... task(count - 1), in any order and on any thread, and returns when all have finished.
struct Parallel {
  int64_t num_workers;
  std::function<void(int64_t count, const std::function<void(int64_t)>& task)> run;
};

/// Size of the scratch memory of project() and multiply_tiles(), in doubles. Its contents do not matter.
int64_t scratch_size(const Covariance& covariance, int num_measurements, int64_t num_workers);

void project(const Covariance& covariance, const Measurements& measurements, const Projection& projection,
             double* scratch, const Parallel& parallel);

/// z (M, N) = S h of the tiles given, into which pending vectors are folded first if due. The state stays as it is.
void multiply_tiles(const Covariance& covariance, const Measurements& measurements, double* z, double* scratch,
                    const Parallel& parallel);

/// With S h of all tiles in projection.cross: adds the shift and the pending vectors, computes the inner products, and
/// updates the state after a fold. Reads no tile.
void finish_projection(const Covariance& covariance, const Measurements& measurements, const Projection& projection,
                       const Parallel& parallel);

void correct(double* weights, const Covariance& covariance, const Measurements& measurements,
             const Projection& projection, const Parallel& parallel);

}  // namespace cpu

namespace cuda {

/// The compute capabilities that this build has code for, such as "80-real 90".
const char* architectures();

// These are queued on `stream`, a cudaStream_t of the covariance's GPU, and return without waiting. If a launch fails,
// they throw a std::runtime_error that names the kernel and the sizes.

/// Size of the scratch memory of each of the three, in doubles. Its contents do not matter.
int64_t scratch_size(const Covariance& covariance, const Measurements& measurements);

void project(const Covariance& covariance, const Measurements& measurements, const Projection& projection,
             double* scratch, void* stream);

void correct(double* weights, const Covariance& covariance, const Measurements& measurements,
             const Projection& projection, double* scratch, void* stream);

void step(double* weights, const Covariance& covariance, const Measurements& measurements, double* scratch,
          void* stream);

/// Sizes of the scratch memory of the two below.
int64_t multiply_scratch_size(const Covariance& covariance, const Measurements& measurements);
int64_t finish_scratch_size(const Covariance& covariance, const Measurements& measurements);

/// As in rlekf::cpu.
void multiply_tiles(const Covariance& covariance, const Measurements& measurements, double* z, double* scratch,
                    void* stream);

void finish_projection(const Covariance& covariance, const Measurements& measurements, const Projection& projection,
                       double* scratch, void* stream);

}  // namespace cuda

}  // namespace rlekf
