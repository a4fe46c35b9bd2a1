// The filter step on a GPU: from the pointers of step.h to one cooperative launch.

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

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
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

Device limits(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "asking GPU " + std::to_string(device) + " for its limits");
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

/// What a GPU can hold of a kernel. Asked for once: it depends on nothing else, and a step has no time for questions.
struct Fit {
  Device limits;
  int resident;  // thread blocks on a processor at once
};

Fit fit_of(const Covariance& p, const Measurements& m, const Launch& launch, const Device& own) {
  const void* kernel = kernel_for(p.storage, launch.num_measurements);
  int resident = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared_bytes));
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads,
                                                          static_cast<size_t>(launch.shared_bytes));
  }
  if (error != cudaSuccess) check(error, "planning " + sizes_text(p, m, launch));
  if (resident == 0) {
    throw std::runtime_error("rlekf: no thread block fits on GPU " + std::to_string(p.device) + " for " +
                             sizes_text(p, m, launch) + ".");
  }
  return {own, resident};
}

/// The plan for this GPU. No more thread blocks than can be resident at once: a grid barrier waits for all.
Launch plan_for(const Covariance& p, const Measurements& m) {
  const int64_t bytes_each = p.storage == Storage::kFloat64 ? 8 : 4;
  static std::mutex mutex;
  static std::map<std::tuple<int, Storage, int>, Fit> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(p.device, p.storage, rounded_up(m.count));
  const auto place = known.find(key);
  const Device own = place == known.end() ? limits(p.device) : place->second.limits;
  Launch launch = plan_launch(own, m.count, bytes_each, p.num_tiles, p.num_weights, p.num_blocks);
  if (launch.stages == 0) {
    throw std::runtime_error("rlekf: GPU " + std::to_string(p.device) + " gives a thread block " +
                             std::to_string(own.shared_per_block) + " bytes of shared memory, too little for " +
                             std::to_string(m.count) + " measurements a pass; pass fewer at once.");
  }
  const Fit fit = place == known.end() ? known.emplace(key, fit_of(p, m, launch, own)).first->second : place->second;
  deal(launch, std::min(launch.workers, fit.resident * own.processors), p.num_tiles, p.num_weights, p.num_blocks);
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
  const cudaError_t error = cudaLaunchCooperativeKernel(
      kernel_for(p.storage, launch.num_measurements), dim3(static_cast<unsigned>(launch.workers)), dim3(kThreads),
      arguments, static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) check(error, "the launch of " + sizes_text(p, m, launch));
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
