// Launching kernels and reporting what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "driver.h"

namespace fused::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes a device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline void synchronize_unless_capturing(cudaStream_t stream, const char* name) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), name);
  if (status == cudaStreamCaptureStatusNone) check(cudaStreamSynchronize(stream), name);
}

// kernel<<<blocks, threads, 0, stream>>>(args...), spelled as a call.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks), 1, 1);
  config.blockDim = dim3(unsigned(threads), 1, 1);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
  if (debugging()) synchronize_unless_capturing(stream, name);
}

}  // namespace fused::cuda
