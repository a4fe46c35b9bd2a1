// The filter step on a GPU: from the pointers of step.h to one cooperative launch.

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "device.cuh"
#include "kernels.cuh"

#define RLEKF_TEXT(x) #x
#define RLEKF_EXPAND(x) RLEKF_TEXT(x)

namespace rlekf::cuda {
namespace {

template <typename Scalar, int kM>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(kM))
    rlekf_filter_step(const __grid_constant__ Task task) {
  filter_step<Scalar, kM>(task);
}

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of a call is told once; it should not meet the next one
  throw std::runtime_error("rlekf: " + what + " failed: " + cudaGetErrorString(error) + ".");
}

/// Makes a GPU the current one, and the one before it again.
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~Current() { cudaSetDevice(before_); }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
};

Device limits(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "asking for the limits of GPU " + std::to_string(device));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

template <typename Scalar>
const void* kernel_for(int num_measurements) {
  switch (num_measurements) {
    case 1:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, 1>);
    case 2:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, 2>);
    case 4:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, 4>);
    default:
      return reinterpret_cast<const void*>(&rlekf_filter_step<Scalar, kMaxMeasurements>);
  }
}

const void* kernel_for(Storage storage, int num_measurements) {
  return storage == Storage::kFloat64 ? kernel_for<double>(num_measurements) : kernel_for<float>(num_measurements);
}

std::string sizes_text(const Covariance& p, const Measurements& m, const Launch& launch) {
  std::ostringstream text;
  text << "rlekf_filter_step<" << (p.storage == Storage::kFloat64 ? "float64" : "float32") << ", "
       << launch.num_measurements << "> for " << p.num_weights << " weights in " << p.num_blocks << " blocks, "
       << p.num_tiles << " tiles, " << m.count << " measurements, with " << launch.workers << " thread blocks of "
       << kThreads << " threads and " << launch.shared_bytes << " bytes of shared memory each";
  return text.str();
}

/// The plan for this GPU. No more thread blocks than can be resident at once: a grid barrier waits for all.
Launch plan_for(const Covariance& p, const Measurements& m) {
  const int64_t bytes_each = p.storage == Storage::kFloat64 ? 8 : 4;
  const Device own = limits(p.device);
  Launch launch = plan_launch(own, m.count, bytes_each, p.num_tiles, p.num_weights, p.num_blocks);
  if (launch.stages == 0) {
    throw std::runtime_error("rlekf: GPU " + std::to_string(p.device) + " gives a thread block " +
                             std::to_string(own.shared_per_block) + " bytes of shared memory, too little for " +
                             std::to_string(m.count) + " measurements a pass; pass fewer at once.");
  }
  const void* kernel = kernel_for(p.storage, launch.num_measurements);
  int resident = 0;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared_bytes)),
      "asking for shared memory for " + sizes_text(p, m, launch));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads,
                                                      static_cast<size_t>(launch.shared_bytes)),
        "planning " + sizes_text(p, m, launch));
  if (resident == 0) {
    throw std::runtime_error("rlekf: no thread block fits on GPU " + std::to_string(p.device) + " for " +
                             sizes_text(p, m, launch) + ".");
  }
  deal(launch, std::min(launch.workers, resident * own.processors), p.num_tiles, p.num_weights, p.num_blocks);
  return launch;
}

void run(int phases, double* weights, const Covariance& p, const Measurements& m, const Projection* projection,
         double* scratch, void* stream) {
  const Current current(p.device);
  const Launch launch = plan_for(p, m);
  const Workspace places = workspace_layout(launch, p.num_tiles, p.num_weights, p.num_blocks, p.capacity);
  const Projection own{scratch + places.cross, scratch + places.gram};
  Task task{phases, p, m, projection ? *projection : own, weights, scratch, launch, places};
  void* arguments[] = {&task};
  check(cudaLaunchCooperativeKernel(kernel_for(p.storage, launch.num_measurements),
                                    dim3(static_cast<unsigned>(launch.workers)), dim3(kThreads), arguments,
                                    static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream)),
        "the launch of " + sizes_text(p, m, launch));
}

}  // namespace

const char* architectures() { return RLEKF_EXPAND(RLEKF_CUDA_ARCHITECTURES); }

int64_t scratch_size(const Covariance& p, const Measurements& m) {
  const Current current(p.device);
  return workspace_layout(plan_for(p, m), p.num_tiles, p.num_weights, p.num_blocks, p.capacity).size;
}

void project(const Covariance& p, const Measurements& m, const Projection& projection, double* scratch, void* stream) {
  run(kProject, nullptr, p, m, &projection, scratch, stream);
}

void correct(double* weights, const Covariance& p, const Measurements& m, const Projection& projection, double* scratch,
             void* stream) {
  run(kCorrect, weights, p, m, &projection, scratch, stream);
}

void step(double* weights, const Covariance& p, const Measurements& m, double* scratch, void* stream) {
  run(kProject | kCorrect, weights, p, m, nullptr, scratch, stream);
}

}  // namespace rlekf::cuda
