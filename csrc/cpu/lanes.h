// Vectors of 64 bytes, and code for several instruction sets of which the loader picks one. `Vector` is of the type of
// its numbers; `Lanes` are eight doubles, which are float in memory where that is their type.

#pragma once

#include <cstdint>

// Not with the thread sanitizer, which is not yet running when the loader picks an instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define RLEKF_HAS_ISAS
#define RLEKF_EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RLEKF_EVERY_ISA
#endif
#define RLEKF_INLINE inline __attribute__((always_inline))

namespace rlekf::cpu {

/// 64 bytes of float or double.
template <typename Scalar>
struct Vectors;
template <>
struct Vectors<double> {
  using Aligned = double __attribute__((vector_size(64)));
  using Anywhere = double __attribute__((vector_size(64), aligned(8), may_alias));
  using Bits = int64_t __attribute__((vector_size(64)));
};
template <>
struct Vectors<float> {
  using Aligned = float __attribute__((vector_size(64)));
  using Anywhere = float __attribute__((vector_size(64), aligned(4), may_alias));
  using Bits = int32_t __attribute__((vector_size(64)));
};
template <typename Scalar>
using Vector = typename Vectors<Scalar>::Aligned;

template <typename Scalar>
RLEKF_INLINE Vector<Scalar> read(const Scalar* from) {
  return *reinterpret_cast<const typename Vectors<Scalar>::Anywhere*>(from);
}

template <typename Scalar>
RLEKF_INLINE void write(Scalar* to, const Vector<Scalar>& from) {
  *reinterpret_cast<typename Vectors<Scalar>::Anywhere*>(to) = from;
}

constexpr int kLanes = 8;

using Lanes = double __attribute__((vector_size(kLanes * sizeof(double))));
using LanesUnaligned = Vectors<double>::Anywhere;
using FloatLanesUnaligned = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

/// Vectors of kWidth doubles: in registers, and in memory as double or float.
template <int kWidth>
struct VectorOf;
template <>
struct VectorOf<4> {
  using Value = double __attribute__((vector_size(32)));
  using Stored = double __attribute__((vector_size(32), aligned(8), may_alias));
  using Floats = float __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct VectorOf<8> {
  using Value = Lanes;
  using Stored = LanesUnaligned;
  using Floats = FloatLanesUnaligned;
};

template <int kWidth>
RLEKF_INLINE typename VectorOf<kWidth>::Value load_vector(const double* from) {
  return *reinterpret_cast<const typename VectorOf<kWidth>::Stored*>(from);
}
template <int kWidth>
RLEKF_INLINE typename VectorOf<kWidth>::Value load_vector(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const typename VectorOf<kWidth>::Floats*>(from),
                                 typename VectorOf<kWidth>::Value);
}
template <int kWidth>
RLEKF_INLINE void store_vector(double* to, const typename VectorOf<kWidth>::Value& from) {
  *reinterpret_cast<typename VectorOf<kWidth>::Stored*>(to) = from;
}
template <int kWidth>
RLEKF_INLINE void store_vector(float* to, const typename VectorOf<kWidth>::Value& from) {
  *reinterpret_cast<typename VectorOf<kWidth>::Floats*>(to) =
      __builtin_convertvector(from, typename VectorOf<kWidth>::Floats);
}

RLEKF_INLINE double sum(const Lanes& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

}  // namespace rlekf::cpu
