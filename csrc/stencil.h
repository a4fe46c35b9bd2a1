// The polynomials of an interpolation on the table, for every device.

#pragma once

#include "network.h"

namespace rlekf {

static_assert(kStencil == 8);  // a vector of 64 bytes
constexpr double kMiddle = (kStencil - 1) / 2.0;

/// [d][j]: the coefficient of u^d in the polynomial that is 1 at node j and 0 at the other ones; u = where - kMiddle.
struct Polynomials {
  alignas(64) double coefficient[kStencil][kStencil] = {};
  constexpr Polynomials() {
    for (int j = 0; j < kStencil; ++j) {
      double product[kStencil + 1] = {1}, denominator = 1;
      int degree = 0;
      for (int i = 0; i < kStencil; ++i) {
        if (i == j) continue;
        denominator *= j - i;
        ++degree;
        for (int d = degree; d >= 0; --d) product[d] = (d > 0 ? product[d - 1] : 0) - (i - kMiddle) * product[d];
      }
      for (int d = 0; d < kStencil; ++d) coefficient[d][j] = product[d] / denominator;
    }
  }
};

}  // namespace rlekf
