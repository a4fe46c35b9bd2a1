// The kernels of the network's table: coefficients against their definition, and the two derivatives against each other
// and against finite differences.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../table.h"
#include "expect.h"
#include "threads.h"

namespace {

using namespace rlekf;

using tests::expect_close;
using tests::failures;

constexpr int64_t kAtoms = 5, kTypes = 2, kNodes = 24, kEdgesEach = 7, kEdges = kAtoms * kEdgesEach;
constexpr int64_t kStride = kTypes * kNodes;

/// Random atoms with random neighbours, and everything that tabulate() makes of them.
template <typename Scalar>
struct Case {
  std::vector<Scalar> edges, davg, dstd, values, slopes, rows, jacobian, coefficients;
  std::vector<int64_t> first_edge, neighbor, center, place, sel{9, 8};

  explicit Case(double stretch = 0) {
    std::mt19937_64 random(1);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t e = 0; e <= kAtoms; ++e) first_edge.push_back(e * kEdgesEach);
    for (int64_t e = 0; e < kEdges; ++e) {
      double edge[3], norm = 0;
      for (double& x : edge) norm += (x = uniform(random)) * x;
      const double r = 1.2 + 3.2 * std::abs(uniform(random));
      for (const double x : edge) edges.push_back(static_cast<Scalar>((1 + stretch) * x * r / std::sqrt(norm)));
      neighbor.push_back(e % kTypes);
    }
    for (int64_t a = 0; a < kAtoms; ++a) center.push_back(a % kTypes);
    for (int64_t i = 0; i < 4 * kTypes; ++i) {
      davg.push_back(static_cast<Scalar>(i % 4 == 0 ? 0.05 : 0));
      dstd.push_back(static_cast<Scalar>(0.1 + 0.01 * static_cast<double>(i)));
    }
    place.resize(kEdges);
    values.resize(kEdges * kStencil);
    slopes.resize(kEdges * kStencil);
    rows.resize(kEdges * 4);
    jacobian.resize(kEdges * 15);
    coefficients.assign(kAtoms * 4 * kStride, static_cast<Scalar>(NAN));
  }

  Edges<Scalar> all() {
    return {kAtoms,       kTypes,        kNodes,        kEdges,      first_edge.data(),
            place.data(), values.data(), slopes.data(), rows.data(), jacobian.data()};
  }

  void tabulate(int64_t num_workers) {
    const EdgeInputs<Scalar> inputs{
        edges.data(), neighbor.data(), center.data(), davg.data(), dstd.data(), sel.data(), 4.0, 0.5, 1.0};
    cpu::tabulate(all(), inputs, coefficients.data(), tests::std_threads(num_workers));
  }
};

template <typename Scalar>
void check(int64_t num_workers, double tolerance) {
  Case<Scalar> made;
  made.tabulate(num_workers);
  const auto parallel = tests::std_threads(num_workers);

  // The sum over the nodes is that of the rows, with the empty slots: polynomials add up to 1.
  for (int64_t a = 0; a < kAtoms; ++a) {
    for (int64_t c = 0; c < 4; ++c) {
      double got = 0, wanted = 0;
      for (int64_t k = 0; k < kStride; ++k) got += static_cast<double>(made.coefficients[(a * 4 + c) * kStride + k]);
      for (int64_t e = a * kEdgesEach; e < (a + 1) * kEdgesEach; ++e)
        wanted += static_cast<double>(made.rows[4 * e + c]);
      const auto davg = static_cast<double>(made.davg[4 * (a % kTypes) + c]);
      wanted -= davg / static_cast<double>(made.dstd[4 * (a % kTypes) + c]) / 17 * (17 - kEdgesEach);
      expect_close("sum of coefficients", got, wanted, tolerance);
    }
  }

  // by_edge is the transpose of along.
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  std::vector<Scalar> y(kAtoms * 4 * kStride), direction(kEdges * 3), moved(y.size(), static_cast<Scalar>(NAN)),
      back(kEdges * 3);
  for (Scalar& x : y) x = static_cast<Scalar>(normal(random));
  for (Scalar& x : direction) x = static_cast<Scalar>(normal(random));
  cpu::along(made.all(), direction.data(), moved.data(), parallel);
  cpu::by_edge(made.all(), y.data(), back.data(), parallel);
  double one = 0, other = 0;
  for (size_t i = 0; i < y.size(); ++i) one += static_cast<double>(y[i]) * static_cast<double>(moved[i]);
  for (size_t i = 0; i < back.size(); ++i) other += static_cast<double>(back[i]) * static_cast<double>(direction[i]);
  expect_close("transpose", one, other, tolerance * 1e2);

  // along is the derivative of the coefficients: all edges become longer.
  if (sizeof(Scalar) == 8) {
    Case<Scalar> longer(1e-6), shorter(-1e-6);
    longer.tabulate(num_workers);
    shorter.tabulate(num_workers);
    cpu::along(made.all(), made.edges.data(), moved.data(), parallel);
    for (size_t i = 0; i < y.size(); ++i) {
      const double slope = static_cast<double>(longer.coefficients[i] - shorter.coefficients[i]) / 2e-6;
      expect_close("derivative", static_cast<double>(moved[i]), slope, 1e-6);
    }
  }
}

}  // namespace

int main() {
  for (const int64_t num_workers : {1, 3}) {
    check<double>(num_workers, 1e-12);
    check<float>(num_workers, 1e-5);
  }
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
