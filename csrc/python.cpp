// rlekf_ext._C: facts of this build, and the packed layout of covariance.h. No torch in here.

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "covariance.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace rlekf;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = RLEKF_VERSION;
  info["compiler"] = RLEKF_COMPILER;
  info["torch"] = RLEKF_BUILT_WITH_TORCH;
  info["cuda_architectures"] = RLEKF_CUDA_ARCHITECTURES;
  info["cuda_compiler"] = RLEKF_CUDA_COMPILER;
  return info;
}

std::string cpu_isa() {
#ifdef RLEKF_HAS_ISAS
  const int bytes = cpu::register_bytes();
  return bytes == 64 ? "x86-64-v4 (AVX-512)" : bytes == 32 ? "x86-64-v3 (AVX2)" : "x86-64 baseline";
#else
  return "the compiler's default";
#endif
}

/// Rows of the layout tensor for blocks of these sizes: first weight, size, first tile.
std::vector<std::array<int64_t, 3>> layout(const std::vector<int64_t>& sizes) {
  std::vector<std::array<int64_t, 3>> rows;
  int64_t weight = 0, tile = 0;
  for (const int64_t size : sizes) {
    rows.push_back({weight, size, tile});
    weight += size;
    tile += num_tiles(size);
  }
  return rows;
}

/// Asks the kernel to back this memory with huge pages; false if it refuses. Advice only: nothing depends on it.
bool advise_huge_pages(uintptr_t address, size_t num_bytes) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + num_bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

py::dict state_indices() {
  py::dict indices;
  for (int i = 0; i < kNumState; ++i) indices[kStateNames[i].name] = i;
  return indices;
}

py::set state_counters() {
  py::set counters;
  for (const StateName& scalar : kStateNames) {
    if (std::string(scalar.type) == "Count") counters.add(scalar.name);
  }
  return counters;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts of this build, and the packed layout of the covariance (csrc/covariance.h).";
  m.attr("TILE") = kTile;
  m.attr("MAX_MEASUREMENTS") = kMaxMeasurements;
  m.attr("LARGEST_SCALE") = kLargestScale;
  m.attr("LEAST_VARIANCE") = kLeastVariance;
  m.attr("STATE") = state_indices();
  m.attr("COUNTERS") = state_counters();
  m.def("build_info", &build_info, "Versions, compiler and CUDA architectures of this build.");
  m.def("cpu_isa", &cpu_isa, "The instruction set that the CPU kernels use on this machine.");
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("num_bytes"),
        "Ask for huge pages for memory that has not been touched yet; return whether the kernel agreed.");
  m.def("num_tiles", &num_tiles, py::arg("size"), "Number of tiles of a block of `size` weights.");
  m.def("layout", &layout, py::arg("sizes"), "(first weight, size, first tile) of each block.");
}
