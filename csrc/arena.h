// Memory in pieces of whole vectors, for every device.

#pragma once

#include <cstdint>

namespace rlekf {

/// Numbers of type Scalar in a vector of 64 bytes.
template <typename Scalar>
constexpr int64_t kWidth = 64 / static_cast<int64_t>(sizeof(Scalar));

template <typename Scalar>
constexpr int64_t padded(int64_t size) {
  return (size + kWidth<Scalar> - 1) / kWidth<Scalar> * kWidth<Scalar>;
}

/// Hands out memory from a start, or only counts if there is none.
template <typename Scalar>
struct Arena {
  Scalar* start;
  int64_t used = 0;
  Scalar* take(int64_t size) {
    Scalar* taken = start ? start + used : nullptr;
    used += padded<Scalar>(size);
    return taken;
  }
};

}  // namespace rlekf
