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
__global__ void __launch_bounds__(kThreads, ctas_per_sm(kM)) rlekf_filter_step(const __grid_constant__ Task task) {
  filter_step<Scalar, kM>(task);
}

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it, or the next call would report it again
  throw std::runtime_error("rlekf: " + what + " failed: " + cudaGetErrorString(error) + ".");
}

/// Makes a GPU the current one and, at the end of the scope, restores the previous one.
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
    check(cudaDeviceGetAttribute(&value, which, device), "querying the limits of GPU " + std::to_string(device));
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
       << p.num_tiles << " tiles, " << m.count << " measurements, with " << launch.ctas << " thread blocks of "
       << kThreads << " threads and " << launch.shared_bytes << " bytes of shared memory each";
  return text.str();
}

/// How much of a kernel a GPU can hold. It depends on both alone and is queried once: queries would slow every step.
struct Fit {
  Device limits;
  int resident;  // thread blocks per SM
};

Fit fit_of(const Covariance& p, const Measurements& m, const Launch& launch, const Device& own) {
  const void* kernel = kernel_for(p.storage, launch.num_measurements);
  int resident = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared_bytes));
  if (error == cudaSuccess) {  // the driver would choose this anyway; the fold's cache is planned for what is left
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
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

/// The plan for this GPU. All thread blocks must be resident at once: they meet at grid barriers.
Launch plan_for(const Covariance& p, const Measurements& m) {
  const int64_t bytes_each = p.storage == Storage::kFloat64 ? 8 : 4;
  static std::mutex mutex;
  static std::map<std::tuple<int, Storage, int>, Fit> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(p.device, p.storage, rounded_up(m.count));
  const auto found = known.find(key);
  const Device own = found == known.end() ? limits(p.device) : found->second.limits;
  Launch launch = plan_launch(own, m.count, bytes_each, p.num_tiles, p.num_weights, p.num_blocks);
  if (launch.stages == 0) {
    throw std::runtime_error("rlekf: GPU " + std::to_string(p.device) + " gives a thread block " +
                             std::to_string(own.shared_per_cta) + " bytes of shared memory, too little for " +
                             std::to_string(m.count) + " measurements per pass; pass fewer at once.");
  }
  const Fit fit = found == known.end() ? known.emplace(key, fit_of(p, m, launch, own)).first->second : found->second;
  assign(launch, std::min(launch.ctas, fit.resident * own.sms), p.num_tiles, p.num_weights, p.num_blocks);
  return launch;
}

void run(int phases, double* weights, const Covariance& p, const Measurements& m, const Projection* projection,
         double* scratch, void* stream) {
  const Current current(p.device);
  const Launch launch = plan_for(p, m);
  const Workspace workspace = workspace_in(scratch, launch, p);
  Task task{phases, p, m, projection ? *projection : workspace.projection, weights, launch, workspace};
  void* arguments[] = {&task};
  const cudaError_t error = cudaLaunchCooperativeKernel(
      kernel_for(p.storage, launch.num_measurements), dim3(static_cast<unsigned>(launch.ctas)), dim3(kThreads),
      arguments, static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) check(error, "the launch of " + sizes_text(p, m, launch));
}

}  // namespace

const char* architectures() { return RLEKF_EXPAND(RLEKF_CUDA_ARCHITECTURES); }

int64_t scratch_size(const Covariance& p, const Measurements& m) {
  const Current current(p.device);
  return workspace_in(nullptr, plan_for(p, m), p).size;
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
