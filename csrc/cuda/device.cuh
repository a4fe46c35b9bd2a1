// What the kernels need of a GPU, by name. csrc/tests/gpu_on_cpu.h has the same names for a CPU.

#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#define RLEKF_DEVICE __device__ __forceinline__
#define RLEKF_PHASE __device__ __forceinline__
#define RLEKF_CONSTANT __device__
#define RLEKF_UNROLL _Pragma("unroll")
#define RLEKF_UNROLL_BY_4 _Pragma("unroll 4")
#define RLEKF_NO_UNROLL _Pragma("unroll 1")

namespace rlekf::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBeforeHopper = true;
#else
constexpr bool kBeforeHopper = false;
#endif

RLEKF_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
RLEKF_DEVICE int cta() { return static_cast<int>(blockIdx.x); }
RLEKF_DEVICE int num_ctas() { return static_cast<int>(gridDim.x); }
RLEKF_DEVICE void sync_threads() { __syncthreads(); }
RLEKF_DEVICE void sync_warp() { __syncwarp(); }
RLEKF_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }
RLEKF_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

RLEKF_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

/// Starts a copy of 16 bytes into shared memory.
RLEKF_DEVICE void copy_async(void* shared, const void* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

RLEKF_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `stages` - 1 of the groups committed by this thread are still in flight.
RLEKF_DEVICE void copy_wait(int64_t stages) {
  switch (stages) {
    case 1:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
  }
}

}  // namespace rlekf::cuda
