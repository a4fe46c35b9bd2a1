#include "matrix.h"

#include "lanes.h"

namespace rlekf::cpu {
namespace {

constexpr int kRows = 6, kVectors = 2;  // of a product that stay in registers

/// `kR` rows and `kV` vectors of the product.
template <int kR, int kV, typename Scalar>
RLEKF_INLINE void multiply_tile(const Product<Scalar>& p, int64_t row, int64_t vector) {
  Vector<Scalar> sums[kR][kV];
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) sums[r][v] = p.initial ? p.initial[row + r] - Vector<Scalar>{} : Vector<Scalar>{};
  }
  const Scalar* a = p.a + row * p.a_row;
  const Scalar* b = p.b + vector * p.b_vector;
  for (int64_t k = 0; k < p.inner; ++k, a += p.a_inner, b += p.b_inner) {
    Vector<Scalar> columns[kV];
    for (int v = 0; v < kV; ++v) columns[v] = read(b + v * p.b_vector);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) sums[r][v] += a[r * p.a_row] * columns[v];
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) {
      Scalar* out = p.out + (row + r) * p.out_row + (vector + v) * p.out_vector;
      write<Scalar>(out, p.accumulate ? read(out) + sums[r][v] : sums[r][v]);
    }
  }
}

template <int kV, typename Scalar>
RLEKF_INLINE void multiply_vectors(const Product<Scalar>& p, int64_t vector) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) multiply_tile<kRows, kV>(p, row, vector);
  switch (p.rows - row) {
    case 5:
      return multiply_tile<5, kV>(p, row, vector);
    case 4:
      return multiply_tile<4, kV>(p, row, vector);
    case 3:
      return multiply_tile<3, kV>(p, row, vector);
    case 2:
      return multiply_tile<2, kV>(p, row, vector);
    case 1:
      return multiply_tile<1, kV>(p, row, vector);
    default:
      return;
  }
}

template <typename Scalar>
RLEKF_INLINE void multiply_all(const Product<Scalar>& p) {
  int64_t vector = 0;
  for (; vector + kVectors <= p.vectors; vector += kVectors) multiply_vectors<kVectors>(p, vector);
  if (vector < p.vectors) multiply_vectors<1>(p, vector);
}

/// With t = exp(2x) - 1, tanh(x) = t / (t + 2). t to the last bit but one or two, also near 0: with 2x = k ln 2 + r and
/// q = exp(r) - 1, which is a polynomial, t = 2^k q + (2^k - 1). Values that are not finite stay so, or become ±1.
template <typename Scalar>
RLEKF_INLINE Vector<Scalar> tanh_of(Vector<Scalar> x) {
  constexpr bool kDouble = sizeof(Scalar) == 8;
  using Bits = typename Vectors<Scalar>::Bits;
  constexpr int kDegree = kDouble ? 13 : 8;
  constexpr Scalar kFar = 20;
  constexpr Scalar kRound = kDouble ? 6755399441055744.0 : 12582912.0;  // 1.5 times 2^52 or 2^23
  constexpr Scalar kLn2High = kDouble ? 0.693147180369123816490 : 0.693359375;
  constexpr Scalar kLn2Low = kDouble ? 1.90821492927058770002e-10 : -2.12194440e-4;
  x = x > kFar ? kFar - Vector<Scalar>{} : x;
  x = x < -kFar ? -kFar - Vector<Scalar>{} : x;
  const Vector<Scalar> y = x + x;
  const Vector<Scalar> shifted = y * static_cast<Scalar>(1.44269504088896340736) + kRound;
  const Vector<Scalar> k = shifted - kRound;
  const Vector<Scalar> r = (y - k * kLn2High) - k * kLn2Low;
  double factorial[kDegree + 1] = {1};
  for (int i = 1; i <= kDegree; ++i) factorial[i] = factorial[i - 1] * i;
  Vector<Scalar> q = static_cast<Scalar>(1 / factorial[kDegree]) - Vector<Scalar>{};
#pragma GCC unroll 16
  for (int i = kDegree - 1; i > 0; --i) q = q * r + static_cast<Scalar>(1 / factorial[i]);
  q *= r;
  const Bits exponent = (Bits)shifted + (kDouble ? 1023 : 127);
  const Vector<Scalar> power = (Vector<Scalar>)(exponent << (kDouble ? 52 : 23));
  const Vector<Scalar> t = power * q + (power - 1);
  return t / (t + 2);
}

template <typename Scalar>
RLEKF_INLINE void tanh_each(Scalar* x, int64_t size) {
  for (int64_t i = 0; i < size; i += kWidth<Scalar>) write<Scalar>(x + i, tanh_of<Scalar>(read(x + i)));
}

}  // namespace

RLEKF_EVERY_ISA void multiply(const Product<double>& product) { multiply_all(product); }
RLEKF_EVERY_ISA void multiply(const Product<float>& product) { multiply_all(product); }
RLEKF_EVERY_ISA void tanh_all(double* x, int64_t size) { tanh_each(x, size); }
RLEKF_EVERY_ISA void tanh_all(float* x, int64_t size) { tanh_each(x, size); }

}  // namespace rlekf::cpu
