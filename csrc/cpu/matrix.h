// Small dense products and what goes with them, of numbers that lie in vectors of 64 bytes.

#pragma once

#include <cstdint>

#include "../arena.h"

namespace rlekf::cpu {

/// out(r, v) = initial(r) + sum_k a(r, k) b(k, v) for vectors v, plus what is there already if `accumulate`.
template <typename Scalar>
struct Product {
  int64_t rows, inner, vectors;
  const Scalar* a;
  int64_t a_row, a_inner;  // strides
  const Scalar* b;
  int64_t b_inner, b_vector;
  Scalar* out;
  int64_t out_row, out_vector;
  const Scalar* initial = nullptr;  // (rows), or null
  bool accumulate = false;
};

template <typename Scalar>
void multiply(const Product<Scalar>& product);

/// x <- tanh(x), of whole vectors.
template <typename Scalar>
void tanh_all(Scalar* x, int64_t size);

}  // namespace rlekf::cpu
