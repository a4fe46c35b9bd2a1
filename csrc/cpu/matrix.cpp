#include "matrix.h"

#include <type_traits>

#include "lanes.h"

namespace rlekf::cpu {
namespace {

/// How much of a product stays in registers: rows, and vectors of 64 bytes.
template <int kBytes>
constexpr int kRows = kBytes > 16 ? 6 : 2;
template <int kBytes>
constexpr int kVectors = kBytes > 32 ? 2 : 1;

/// `kR` rows and `kV` vectors of 64 bytes of the product.
template <int kBytes, int kR, int kV, typename Scalar>
RLEKF_INLINE void multiply_tile(const Product<Scalar>& p, int64_t row, int64_t vector) {
  using Values = Vector<Scalar, kBytes>;
  constexpr int kParts = 64 / kBytes, kN = kLanes<Scalar, kBytes>;
  Values sums[kR][kV][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    const Values initial = p.initial ? p.initial[row + r] - Values{} : Values{};
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) sums[r][v][i] = initial;
    }
  }
  const Scalar* a = p.a + row * p.a_row;
  const Scalar* b = p.b + vector * p.b_vector;
  for (int64_t k = 0; k < p.inner; ++k, a += p.a_inner, b += p.b_inner) {
    Values columns[kV][kParts];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) columns[v][i] = read<kBytes>(b + v * p.b_vector + i * kN);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const Values factor = a[r * p.a_row] - Values{};
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) sums[r][v][i] += factor * columns[v][i];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
      Scalar* out = p.out + (row + r) * p.out_row + (vector + v) * p.out_vector;
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i, out += kN) {
        write<kBytes>(out, p.accumulate ? read<kBytes>(out) + sums[r][v][i] : sums[r][v][i]);
      }
    }
  }
}

template <int kBytes, int kV, typename Scalar>
RLEKF_INLINE void multiply_vectors(const Product<Scalar>& p, int64_t vector) {
  int64_t row = 0;
  for (; row + kRows<kBytes> <= p.rows; row += kRows<kBytes>) multiply_tile<kBytes, kRows<kBytes>, kV>(p, row, vector);
  switch (p.rows - row) {
    case 5:
      return multiply_tile<kBytes, 5, kV>(p, row, vector);
    case 4:
      return multiply_tile<kBytes, 4, kV>(p, row, vector);
    case 3:
      return multiply_tile<kBytes, 3, kV>(p, row, vector);
    case 2:
      return multiply_tile<kBytes, 2, kV>(p, row, vector);
    case 1:
      return multiply_tile<kBytes, 1, kV>(p, row, vector);
    default:
      return;
  }
}

template <int kBytes, typename Scalar>
RLEKF_INLINE void multiply_all(const Product<Scalar>& p) {
  int64_t vector = 0;
  for (; vector + kVectors<kBytes> <= p.vectors; vector += kVectors<kBytes>) {
    multiply_vectors<kBytes, kVectors<kBytes>>(p, vector);
  }
  if (vector < p.vectors) multiply_vectors<kBytes, 1>(p, vector);
}

/// With t = exp(2x) - 1, tanh(x) = t / (t + 2). t to the last bit but one or two, also near 0: with 2x = k ln 2 + r and
/// q = exp(r) - 1, which is a polynomial, t = 2^k q + (2^k - 1). Values that are not finite stay so, or become ±1.
template <int kBytes, typename Scalar>
RLEKF_INLINE Vector<Scalar, kBytes> tanh_of(Vector<Scalar, kBytes> x) {
  using Values = Vector<Scalar, kBytes>;
  constexpr bool kDouble = sizeof(Scalar) == 8;
  using Bits = Vector<std::conditional_t<kDouble, int64_t, int32_t>, kBytes>;
  constexpr int kDegree = kDouble ? 13 : 8;
  constexpr Scalar kFar = 20;
  constexpr Scalar kRound = kDouble ? 6755399441055744.0 : 12582912.0;  // 1.5 times 2^52 or 2^23
  constexpr Scalar kLn2High = kDouble ? 0.693147180369123816490 : 0.693359375;
  constexpr Scalar kLn2Low = kDouble ? 1.90821492927058770002e-10 : -2.12194440e-4;
  x = x > kFar ? kFar - Values{} : x;
  x = x < -kFar ? -kFar - Values{} : x;
  const Values y = x + x;
  const Values shifted = y * static_cast<Scalar>(1.44269504088896340736) + kRound;
  const Values k = shifted - kRound;
  const Values r = (y - k * kLn2High) - k * kLn2Low;
  double factorial[kDegree + 1] = {1};
  for (int i = 1; i <= kDegree; ++i) factorial[i] = factorial[i - 1] * i;
  Values q = static_cast<Scalar>(1 / factorial[kDegree]) - Values{};
#pragma GCC unroll 16
  for (int i = kDegree - 1; i > 0; --i) q = q * r + static_cast<Scalar>(1 / factorial[i]);
  q *= r;
  const Bits exponent = (Bits)shifted + (kDouble ? 1023 : 127);
  const Values power = (Values)(exponent << (kDouble ? 52 : 23));
  const Values t = power * q + (power - 1);
  return t / (t + 2);
}

}  // namespace

template <typename Scalar>
void multiply(const Product<Scalar>& product) {
  on_widest([&]<int kBytes>() RLEKF_INLINED { multiply_all<kBytes>(product); });
}

template <typename Scalar>
void tanh_all(Scalar* x, int64_t size) {
  on_widest([&]<int kBytes>() RLEKF_INLINED {
    for (int64_t i = 0; i < size; i += kLanes<Scalar, kBytes>) {
      write<kBytes>(x + i, tanh_of<kBytes, Scalar>(read<kBytes>(x + i)));
    }
  });
}

template void multiply(const Product<double>&);
template void multiply(const Product<float>&);
template void tanh_all(double*, int64_t);
template void tanh_all(float*, int64_t);

}  // namespace rlekf::cpu
