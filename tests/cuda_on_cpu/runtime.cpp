// The scheduler behind the header beside this file, and what the tests steer it with.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

enum class State { kReady, kInBarrier, kInExchange, kDone };

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kLanes = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  uint64_t brought, received;
  int source, line;
  unsigned mask;
};

enum class Order { kForward, kReverse, kRandom };

Order order = Order::kForward;
std::mt19937 randomness;
std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
unsigned fiber_count = 0, running = 0;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::string error;

void wait() { swapcontext(&fibers[running]->context, &scheduler); }

void run_thread() {
  (*body)();
  fibers[running]->state = State::kDone;
  wait();
}

std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> indices(count);
  for (unsigned i = 0; i < count; ++i) indices[i] = order == Order::kReverse ? count - 1 - i : i;
  if (order == Order::kRandom) std::shuffle(indices.begin(), indices.end(), randomness);
  return indices;
}

void resume(unsigned index) {
  running = index;
  threadIdx = dim3(index, 0, 0);
  swapcontext(&scheduler, &fibers[index]->context);
}

void set_error(const std::string& what) {
  if (error.empty())
    error = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(running) + ")";
}

// Lets the lanes of a warp go that all have come to the exchange they wait for.
bool release_warp(unsigned first) {
  const unsigned count = std::min(kLanes, fiber_count - first);
  bool released = false;
  for (unsigned l = 0; l < count; ++l) {
    Fiber& fiber = *fibers[first + l];
    if (fiber.state != State::kInExchange) continue;
    bool complete = true;
    for (unsigned m = 0; m < kLanes && complete; ++m) {
      if (!(fiber.mask >> m & 1)) continue;
      running = first + l;
      if (m >= count || fibers[first + m]->state == State::kDone) return set_error("a lane of the mask does not take part in the shuffle"), false;
      const Fiber& other = *fibers[first + m];
      complete = other.state == State::kInExchange;
      if (complete && (other.mask != fiber.mask || other.line != fiber.line))
        return set_error("lanes of a warp meet in different shuffles"), false;
    }
    if (!complete) continue;
    for (unsigned m = 0; m < count; ++m) {
      if (!(fiber.mask >> m & 1)) continue;
      Fiber& member = *fibers[first + m];
      running = first + m;
      if (!(fiber.mask >> member.source & 1)) return set_error("a shuffle reads a lane that is not in its mask"), false;
      member.received = fibers[first + unsigned(member.source)]->brought;
    }
    const unsigned mask = fiber.mask;
    for (unsigned m = 0; m < count; ++m)
      if (mask >> m & 1) fibers[first + m]->state = State::kReady;
    released = true;
  }
  return released;
}

bool release_barrier() {
  unsigned waiting = 0, live = 0;
  int line = 0;
  for (unsigned i = 0; i < fiber_count; ++i) {
    const Fiber& fiber = *fibers[i];
    live += fiber.state != State::kDone;
    if (fiber.state != State::kInBarrier) continue;
    running = i;
    if (waiting != 0 && fiber.line != line) return set_error("threads wait in different barriers"), false;
    line = fiber.line;
    ++waiting;
  }
  if (waiting == 0 || waiting != live) return false;
  for (unsigned i = 0; i < fiber_count; ++i)
    if (fibers[i]->state == State::kInBarrier) fibers[i]->state = State::kReady;
  return true;
}

void run_block() {
  for (unsigned i = 0; i < fiber_count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
  }
  for (;;) {
    // A warp runs as far as it can before the next one does: warps that run ahead show where a barrier is missing.
    bool progress = false;
    for (const unsigned warp : in_order((fiber_count + kLanes - 1) / kLanes)) {
      const unsigned first = warp * kLanes;
      do {
        for (const unsigned lane : in_order(std::min(kLanes, fiber_count - first))) {
          if (fibers[first + lane]->state != State::kReady) continue;
          progress = true;
          resume(first + lane);
          if (!error.empty()) return;
        }
      } while (release_warp(first));
      if (!error.empty()) return;
    }
    if (progress || release_barrier()) continue;
    if (!error.empty()) return;
    for (unsigned i = 0; i < fiber_count; ++i) {
      running = i;
      if (fibers[i]->state != State::kDone) return set_error("a thread waits for others that never come");
    }
    return;
  }
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  fiber_count = config.blockDim.x;
  if (gridDim.x == 0 || fiber_count == 0 || fiber_count > 1024) return cudaErrorInvalidValue;
  while (fibers.size() < fiber_count) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = std::make_unique<char[]>(kStack);
  }
  body = &thread;
  error.clear();
  for (const unsigned b : in_order(gridDim.x)) {
    blockIdx = dim3(b, 0, 0);
    run_block();
    if (!error.empty()) {
      fibers.clear();  // their stacks were left in the middle of things
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

cudaStream_t captured_stream = nullptr;
bool capturing = false;
std::vector<std::pair<cudaLaunchConfig_t, std::function<void()>>> graph;
int64_t launches = 0;
int refused = 0;

}  // namespace

void fail(const char* what) {
  set_error(what);
  for (;;) wait();
}

uint64_t exchange(unsigned mask, uint64_t value, int source, int line) {
  Fiber& self = *fibers[running];
  if (!(mask >> (running % kLanes) & 1)) fail("a lane is not in its own mask");
  self.state = State::kInExchange;
  self.brought = value;
  self.source = source;
  self.mask = mask;
  self.line = line;
  wait();
  return self.received;
}

void barrier(int line) {
  fibers[running]->state = State::kInBarrier;
  fibers[running]->line = line;
  wait();
}

cudaError_t enqueue(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  if (capturing && config.stream == captured_stream) {
    graph.emplace_back(config, std::move(thread));
    return cudaSuccess;
  }
  ++launches;
  return run(config, thread);
}

}  // namespace cuda_on_cpu

// ---- what tests call ----

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace cuda_on_cpu;

// 0: threads and blocks in rising order, 1: falling, else: at random from this seed.
EXPORT void cuda_on_cpu_order(int which) {
  order = which == 0 ? Order::kForward : which == 1 ? Order::kReverse : Order::kRandom;
  randomness.seed(unsigned(which));
}
EXPORT void cuda_on_cpu_begin_capture() {
  graph.clear();
  capturing = true;
}
EXPORT int cuda_on_cpu_end_capture() {
  capturing = false;
  return int(graph.size());
}
EXPORT int cuda_on_cpu_replay() {
  for (const auto& [config, thread] : graph)
    if (const cudaError_t error = run(config, thread)) return int(error);
  return 0;
}
EXPORT int64_t cuda_on_cpu_launches() { return launches; }
// The next calls for memory find none.
EXPORT void cuda_on_cpu_refuse_memory(int calls) { refused = calls; }

// ---- host functions ----

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorLaunchFailure ? error.c_str() : code == cudaSuccess ? "no error" : "invalid value";
}
const char* cudaGetErrorName(cudaError_t code) { return code == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : code == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  const char* pretended = std::getenv("CUDA_ON_CPU_DRIVER");
  return *version = pretended != nullptr ? std::atoi(pretended) : 13000, cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = which == cudaDevAttrComputeCapabilityMajor ? 7 : 0, cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return std::getenv("CUDA_ON_CPU_NO_KERNEL_IMAGE") != nullptr ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  return *attributes = {std::getenv("CUDA_ON_CPU_HOST_POINTERS") != nullptr ? cudaMemoryTypeHost : cudaMemoryTypeDevice, 0}, cudaSuccess;
}
cudaError_t cudaMalloc(void** address, size_t size) {
  if (refused > 0) return --refused, cudaErrorMemoryAllocation;
  *address = std::malloc(size);
  if (*address == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*address, 0xcd, size);  // nobody may count on zeros
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static char other;
  return *stream = reinterpret_cast<cudaStream_t>(&other), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = capturing && stream == captured_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
