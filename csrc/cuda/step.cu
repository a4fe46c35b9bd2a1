// The filter step on a GPU. Not written yet: this file holds the CUDA build together, so that every build that finds
// nvcc shows that it compiles and links beside any torch. No op is registered for CUDA.

#include "../step.h"

#define RLEKF_TEXT(x) #x
#define RLEKF_EXPAND(x) RLEKF_TEXT(x)

namespace rlekf::cuda {
namespace {

// Compiled for every architecture, called by none: the host function below keeps it in the library.
__global__ void probe(double* state) { state[kNumUpdates] += 0; }

}  // namespace

const char* architectures() {
  static const void* kept = reinterpret_cast<const void*>(&probe);
  return kept != nullptr ? RLEKF_EXPAND(RLEKF_CUDA_ARCHITECTURES) : "";
}

}  // namespace rlekf::cuda
