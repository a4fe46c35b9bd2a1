// The packed form of the block diagonal covariance, and the scalars that go with it. The only owner of both.
//
//     P = scale * (S + shift * I - sum_i u_i u_i^T)        block by block
//
// S is symmetric, so a block of n weights keeps only the lower triangle of its kTile x kTile tiles, row by row:
// (0,0) (1,0) (1,1) (2,0) ... Each tile is contiguous and row-major; tiles on the diagonal are stored whole. The tiles
// of all blocks follow one another in one buffer. Rows and columns past a block's end are padding and stay zero. All
// vectors (weights, Jacobians, u_i) have one entry per weight and no padding.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RLEKF_HOST_DEVICE __host__ __device__
#else
#define RLEKF_HOST_DEVICE
#endif

namespace rlekf {

constexpr int64_t kTile = 64;
constexpr int64_t kTileSize = kTile * kTile;

/// The largest number of measurements in one pass over S.
constexpr int kMaxMeasurements = 8;

/// A whole number, held in a double.
using Count = double;

// The filter's scalars, as F(type, name). Whatever lists them, here or in Python, is made from this list or checked
// against it.
#define RLEKF_STATE(F)                                                                                 \
  F(double, forgetting)        /* 1 - lambda: lambda, rounded near 1, would be off by 1e-13 forever */ \
  F(double, forgetting_rate)   /* nu */                                                                \
  F(double, measurement_noise) /* alpha^2 R of the paper */                                            \
  F(double, process_noise)     /* q, added to the diagonal of P after every update */                  \
  F(double, scale)             /* beta */                                                              \
  F(double, shift)             /* delta */                                                             \
  F(double, largest)           /* no entry of the diagonal of S is larger; renewed now and then */     \
  F(Count, num_pending)        /* vectors u_i not yet folded into S */                                 \
  F(double, variance)          /* H^T P H of the last measurement used */                              \
  F(double, rank_one)          /* a beta of the last measurement used */                               \
  F(Count, num_updates)        /* measurements used so far */                                          \
  F(Count, skipped_innovation) /* measurements skipped because the innovation was not finite */        \
  F(Count, skipped_jacobian)   /* ... because H or H^T P H was not finite */                           \
  F(Count, skipped_variance)   /* ... because H^T P H was negative */                                  \
  F(Count, skipped_in_a_row)   /* measurements skipped since the last one that was used */

/// The `state` tensor: these scalars, float64, in this order.
struct State {
#define RLEKF_MEMBER(type, name) type name;
  RLEKF_STATE(RLEKF_MEMBER)
#undef RLEKF_MEMBER
};

constexpr int kNumState = sizeof(State) / sizeof(double);

struct StateName {
  const char* type;
  const char* name;
};

constexpr StateName kStateNames[kNumState] = {
#define RLEKF_NAME(type, name) {#type, #name},
    RLEKF_STATE(RLEKF_NAME)
#undef RLEKF_NAME
};

/// A fold moves a larger scale into S, by a power of two (exact), so that the scale cannot overflow.
constexpr double kLargestScale = 1099511627776.0;  // 2^40

/// H^T P H stays above this times H^T H times a bound on P, where rounding cannot make it negative: see recursion.h.
constexpr double kLeastVariance = 0x1p-40;

/// One block of P. A row of the `layout` tensor, (L, 3) int64.
struct Block {
  int64_t first_weight;
  int64_t size;
  int64_t first_tile;
};

RLEKF_HOST_DEVICE constexpr int64_t tile_rows(int64_t size) { return (size + kTile - 1) / kTile; }

RLEKF_HOST_DEVICE constexpr int64_t num_tiles(int64_t size) { return tile_rows(size) * (tile_rows(size) + 1) / 2; }

/// Index of tile (row, col), col <= row, among the tiles of its block.
RLEKF_HOST_DEVICE constexpr int64_t tile_index(int64_t row, int64_t col) { return row * (row + 1) / 2 + col; }

/// Row of the tile at `index` among the tiles of its block; its column is index - tile_index(row, 0).
RLEKF_HOST_DEVICE inline int64_t tile_row(int64_t index) {
  // For an index beyond 2^52 the square root may be off by a row; the two loops correct it.
  auto row = static_cast<int64_t>((__builtin_sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (tile_index(row, 0) > index) --row;
  while (tile_index(row + 1, 0) <= index) ++row;
  return row;
}

}  // namespace rlekf
