// Code for several instruction sets: kernels are templates on the width of the registers, in bytes, and on_widest() calls
// the one of 64 (AVX-512), of 32 (AVX2) or of 16, as the processor at hand has them.

#pragma once

#include <cstdlib>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLEKF_HAS_ISAS
#define RLEKF_ISA(name) __attribute__((target("arch=" name)))
#endif
#define RLEKF_INLINE inline __attribute__((always_inline))
#define RLEKF_INLINED __attribute__((always_inline))  // after the parameters of a lambda

namespace rlekf::cpu {

/// The width of the registers in bytes. RLEKF_REGISTERS=32 or 16 in the environment asks for narrower ones, for tests.
inline int register_bytes() {
  static const int found = [] {
    int widest = 16;
#ifdef RLEKF_HAS_ISAS
    widest = __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
#endif
    const char* given = std::getenv("RLEKF_REGISTERS");
    const int asked = given ? std::atoi(given) : widest;
    return asked < widest && (asked == 32 || asked == 16) ? asked : widest;
  }();
  return found;
}

#ifdef RLEKF_HAS_ISAS
template <typename Function>
RLEKF_ISA("x86-64-v4")
void call_v4(const Function& function) {
  function.template operator()<64>();
}
template <typename Function>
RLEKF_ISA("x86-64-v3")
void call_v3(const Function& function) {
  function.template operator()<32>();
}
#endif

/// function.operator()<kBytes>(), compiled for the registers of that width. It is a lambda, and so is all that it calls,
/// inlined: [&]<int kBytes>() RLEKF_INLINED { ... }.
template <typename Function>
void on_widest(const Function& function) {
#ifdef RLEKF_HAS_ISAS
  if (register_bytes() == 64) return call_v4(function);
  if (register_bytes() == 32) return call_v3(function);
#endif
  function.template operator()<16>();
}

}  // namespace rlekf::cpu
