// CUDA as far as csrc/cuda uses it, played by the CPU: for tests only.
//
// The kernels' own source is compiled by the host compiler against this header. Each thread of a block is a fiber that runs
// until it has to wait for others; one operating-system thread plays all of them, in an order that the test chooses.
// What a GPU would forgive or hide is an error here: misaligned vectors, shuffles with lanes that are absent or not in the
// mask, lanes that meet in different shuffles, threads that wait in different barriers or for one that never comes.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

// The value that lane `source` of the warp brought to the same exchange.
uint64_t exchange(unsigned mask, uint64_t value, int source, int line);
void barrier(int line);
[[noreturn]] void fail(const char* what);  // ends the kernel with an error

template <class T>
void require_aligned(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("misaligned access");
}

template <class T>
T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

// ---- device functions ----

template <class T>
T __ldcs(const T* address) {
  cuda_on_cpu::require_aligned(address);
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return __ldcs(address);
}
template <class T>
void __stcs(T* address, T value) {
  cuda_on_cpu::require_aligned(address);
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  __stcs(address, value);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
  const int lane = int(threadIdx.x % 32), other = lane ^ lane_mask;
  return cuda_on_cpu::shuffle(mask, value, other / width == lane / width ? other : lane, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = int(threadIdx.x % 32), other = lane + int(delta);
  return cuda_on_cpu::shuffle(mask, value, other / width == lane / width ? other : lane, line);
}

inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  for (int lanes = 16; lanes > 0; lanes /= 2) predicate |= __shfl_xor_sync(mask, predicate, lanes, 32, line);
  return predicate != 0;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  return result;
}

inline unsigned __vminu2(unsigned a, unsigned b) {
  const unsigned high = a >> 16 < b >> 16 ? a : b, low = (a & 0xffffu) < (b & 0xffffu) ? a : b;
  return (high & 0xffff0000u) | (low & 0xffffu);
}

inline float __fadd_rz(float a, float b) {
  volatile float x = a, y = b;  // the compiler does not know of rounding modes
  const int mode = std::fegetround();
  std::fesetround(FE_TOWARDZERO);
  volatile float sum = x + y;
  std::fesetround(mode);
  return sum;
}

// rcp.approx.ftz.f32, which may be off by an ulp; here it is by one that changes from argument to argument, or as a test asks.
namespace cuda_on_cpu {
constexpr int kAnyUlp = 100;
inline int reciprocal_ulps = kAnyUlp;
}  // namespace cuda_on_cpu

inline float __rcp_approx(float x) {
  const float y = 1.0f / x;
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int ulps = cuda_on_cpu::reciprocal_ulps;
  int result;
  std::memcpy(&result, &y, sizeof result);
  result += ulps == cuda_on_cpu::kAnyUlp ? int((bits * 0x9E3779B1u) >> 16) % 3 - 1 : ulps;
  float moved;
  std::memcpy(&moved, &result, sizeof moved);
  return moved;
}

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}

// ---- host functions ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorLaunchFailure = 719 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
constexpr unsigned cudaStreamNonBlocking = 1;

struct cudaStream;
using cudaStream_t = cudaStream*;
struct cudaFuncAttributes {};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t);
const char* cudaGetErrorName(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaRuntimeGetVersion(int*);
cudaError_t cudaDriverGetVersion(int*);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes*, const void*);
cudaError_t cudaMalloc(void**, size_t);
cudaError_t cudaFree(void*);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*);

namespace cuda_on_cpu {
cudaError_t enqueue(const cudaLaunchConfig_t& config, std::function<void()> thread);
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "kernel arguments hold 4 KB");
  // Arguments are taken by value when the kernel is queued.
  return cuda_on_cpu::enqueue(*config, [kernel, values = std::tuple<Params...>(args...)] { std::apply(kernel, values); });
}
