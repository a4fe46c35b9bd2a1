// A comparison that counts what fails.

#pragma once

#include <cmath>
#include <cstdio>

namespace rlekf::tests {

inline int failures = 0;

inline void expect_close(const char* what, double got, double wanted, double tolerance) {
  if (std::abs(got - wanted) <= tolerance) return;
  std::printf("FAILED %s: got %.17g, wanted %.17g, tolerance %g\n", what, got, wanted, tolerance);
  ++failures;
}

}  // namespace rlekf::tests
