// Memory that a thread keeps from call to call: fresh pages cost more than what small kernels do with them.

#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace rlekf::cpu {

/// At least `size` doubles at the start of a cache line, which the calling thread keeps until it ends.
inline double* scratch(int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(double);
  thread_local std::vector<double> memory;
  const auto needed = static_cast<size_t>(size + kLine);
  if (memory.size() < needed) memory.resize(needed);
  return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

/// Parts of that memory, each at the start of a cache line, for at least `size` numbers in up to 16 parts.
template <typename Scalar>
class Memory {
 public:
  explicit Memory(int64_t size)
      : next_(reinterpret_cast<Scalar*>(
            scratch((size + 16 * kWidth<Scalar>)*static_cast<int64_t>(sizeof(Scalar)) / 8 + 1))) {}
  Scalar* take(int64_t size) {
    Scalar* taken = next_;
    next_ += padded<Scalar>(size);
    return taken;
  }
  Scalar* rest() const { return next_; }

 private:
  Scalar* next_;
};

}  // namespace rlekf::cpu
