// Vectors as wide as the registers. One that is wider would live in memory, which takes ten times as long and more.

#pragma once

#include <cstdint>

#include "isa.h"

namespace rlekf::cpu {

template <typename Scalar, int kBytes>
struct VectorOf {
  typedef Scalar Value __attribute__((vector_size(kBytes)));  // in registers; in memory at any address:
  typedef Scalar Stored __attribute__((vector_size(kBytes), aligned(sizeof(Scalar)), may_alias));
};

/// kBytes of float or double.
template <typename Scalar, int kBytes>
using Vector = typename VectorOf<Scalar, kBytes>::Value;

/// The numbers in it.
template <typename Scalar, int kBytes>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(Scalar));

template <int kBytes, typename Scalar>
RLEKF_INLINE Vector<Scalar, kBytes> read(const Scalar* from) {
  return *reinterpret_cast<const typename VectorOf<Scalar, kBytes>::Stored*>(from);
}

template <int kBytes, typename Scalar>
RLEKF_INLINE void write(Scalar* to, const Vector<Scalar, kBytes>& from) {
  *reinterpret_cast<typename VectorOf<Scalar, kBytes>::Stored*>(to) = from;
}

/// A vector of doubles, from memory of either type.
template <int kBytes>
RLEKF_INLINE Vector<double, kBytes> read_wide(const double* from) {
  return read<kBytes>(from);
}
template <int kBytes>
RLEKF_INLINE Vector<double, kBytes> read_wide(const float* from) {
  return __builtin_convertvector(read<kBytes / 2>(from), typename VectorOf<double, kBytes>::Value);
}
template <int kBytes>
RLEKF_INLINE void write_wide(double* to, const Vector<double, kBytes>& from) {
  write<kBytes>(to, from);
}
template <int kBytes>
RLEKF_INLINE void write_wide(float* to, const Vector<double, kBytes>& from) {
  write<kBytes / 2>(to, __builtin_convertvector(from, typename VectorOf<float, kBytes / 2>::Value));
}

/// The sums of as many vectors as they have numbers, as one vector.
RLEKF_INLINE Vector<double, 64> sums(const Vector<double, 64> (&v)[8]) {
  using Picks = Vector<int64_t, 64>;
  Vector<double, 64> pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], Picks{0, 8, 2, 10, 4, 12, 6, 14}) +
               __builtin_shuffle(v[2 * i], v[2 * i + 1], Picks{1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int i = 0; i < 2; ++i) {
    fours[i] = __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], Picks{0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], Picks{2, 3, 10, 11, 6, 7, 14, 15});
  }
  return __builtin_shuffle(fours[0], fours[1], Picks{0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(fours[0], fours[1], Picks{4, 5, 6, 7, 12, 13, 14, 15});
}

RLEKF_INLINE Vector<double, 32> sums(const Vector<double, 32> (&v)[4]) {
  using Picks = Vector<int64_t, 32>;
  Vector<double, 32> pairs[2];
  for (int i = 0; i < 2; ++i) {
    pairs[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], Picks{0, 4, 2, 6}) +
               __builtin_shuffle(v[2 * i], v[2 * i + 1], Picks{1, 5, 3, 7});
  }
  return __builtin_shuffle(pairs[0], pairs[1], Picks{0, 1, 4, 5}) +
         __builtin_shuffle(pairs[0], pairs[1], Picks{2, 3, 6, 7});
}

RLEKF_INLINE Vector<double, 16> sums(const Vector<double, 16> (&v)[2]) {
  using Picks = Vector<int64_t, 16>;
  return __builtin_shuffle(v[0], v[1], Picks{0, 2}) + __builtin_shuffle(v[0], v[1], Picks{1, 3});
}

template <typename Scalar, int kBytes>
RLEKF_INLINE Scalar sum(const typename VectorOf<Scalar, kBytes>::Value& v) {
  Scalar total{};
  for (int i = 0; i < kLanes<Scalar, kBytes>; ++i) total += v[i];
  return total;
}

}  // namespace rlekf::cpu
