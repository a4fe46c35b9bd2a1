// From a kernel and sizes to a cooperative launch, and its errors as exceptions.

#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "task.cuh"

namespace rlekf::cuda {

/// A kernel for all of its (Scalar, M): its name, its instance for these measurements, and whether it takes a part of the
/// tiles.
struct Kernel {
  const char* name;
  const void* (*instance)(Storage storage, int num_measurements);
  bool part;
};

inline void check(cudaError_t error, const std::string& what) {
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

inline Device limits(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "querying the limits of GPU " + std::to_string(device));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

inline std::string sizes_text(const Kernel& kernel, const Covariance& p, const Measurements& m, const Launch& launch) {
  std::ostringstream text;
  text << kernel.name << "<" << (p.storage == Storage::kFloat64 ? "float64" : "float32") << ", "
       << launch.num_measurements << "> for " << p.num_weights << " weights in " << p.num_blocks << " blocks, "
       << p.num_tiles << " tiles, " << m.count << " measurements, with " << launch.ctas << " thread blocks of "
       << kThreads << " threads and " << launch.shared_bytes << " bytes of shared memory each";
  return text.str();
}

/// Thread blocks of a kernel that an SM can hold with this much shared memory each.
inline int resident_of(const Kernel& kernel, const Covariance& p, const Measurements& m, const Launch& launch,
                       const Device& own) {
  const void* instance = kernel.instance(p.storage, launch.num_measurements);
  int resident = 0;
  // The most that a thread block may have: other plans of the same kernel may need more than this one.
  cudaError_t error =
      cudaFuncSetAttribute(instance, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(own.shared_per_cta));
  if (error == cudaSuccess) {  // the driver would choose this anyway; the fold's cache is planned for what is left
    error =
        cudaFuncSetAttribute(instance, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, instance, kThreads,
                                                          static_cast<size_t>(launch.shared_bytes));
  }
  if (error != cudaSuccess) check(error, "planning " + sizes_text(kernel, p, m, launch));
  if (resident == 0) {
    throw std::runtime_error("rlekf: no thread block fits on GPU " + std::to_string(p.device) + " for " +
                             sizes_text(kernel, p, m, launch) + ".");
  }
  return resident;
}

/// The plan for this GPU. All thread blocks must be resident at once: they meet at grid barriers. What a GPU answers is
/// remembered, as questions would slow every step.
inline Launch plan_for(const Kernel& kernel, const Covariance& p, const Measurements& m) {
  const int64_t bytes_each = p.storage == Storage::kFloat64 ? 8 : 4;
  static std::mutex mutex;
  static std::map<int, Device> devices;
  static std::map<std::tuple<const void*, int, int64_t>, int> residents;
  const std::lock_guard<std::mutex> lock(mutex);
  if (devices.count(p.device) == 0) devices[p.device] = limits(p.device);
  const Device own = devices[p.device];
  Launch launch = plan_launch(own, m.count, bytes_each, p.num_tiles, p.num_weights, p.num_blocks, kernel.part);
  if (launch.stages == 0) {
    throw std::runtime_error("rlekf: GPU " + std::to_string(p.device) + " gives a thread block " +
                             std::to_string(own.shared_per_cta) + " bytes of shared memory, too little for " +
                             std::to_string(m.count) + " measurements per pass; pass fewer at once.");
  }
  const auto key = std::make_tuple(kernel.instance(p.storage, launch.num_measurements), p.device, launch.shared_bytes);
  if (residents.count(key) == 0) residents[key] = resident_of(kernel, p, m, launch, own);
  assign(launch, std::min(launch.ctas, residents[key] * own.sms), p.num_tiles, p.num_weights, p.num_blocks);
  return launch;
}

inline void launch(const Kernel& kernel, Task& task, void* stream) {
  void* arguments[] = {&task};
  const Launch& plan = task.launch;
  const cudaError_t error = cudaLaunchCooperativeKernel(
      kernel.instance(task.p.storage, plan.num_measurements), dim3(static_cast<unsigned>(plan.ctas)), dim3(kThreads),
      arguments, static_cast<size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) check(error, "the launch of " + sizes_text(kernel, task.p, task.m, plan));
}

}  // namespace rlekf::cuda
