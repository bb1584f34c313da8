// What the threads of a block do together, and blocks with one another.
#pragma once

#include <cuda_runtime.h>

#include "../rules.h"
#include "device_table.h"

namespace fused::cuda {

constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ double join(double a, double b, bool maximum) { return maximum ? max_nan(a, b) : a + b; }

// The block's values in one, valid in thread 0.
__device__ inline double join_block(double value, bool maximum = false) {
  __shared__ double of_warp[kWarps];
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value = join(value, __shfl_down_sync(0xffffffffu, value, lanes), maximum);
  __syncthreads();  // the last use of `of_warp` is over
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w) value = join(value, of_warp[w], maximum);
  return value;
}

// The sum of values that other blocks wrote, valid in thread 0.
__device__ inline double sum_parts(const double* parts, int64_t count) {
  double total = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) total += __ldcg(parts + i);
  return join_block(total);
}

// True in the whole block for the last of `count` blocks to come here; what the others wrote before is visible to it.
__device__ inline bool is_last(uint32_t* arrived, unsigned count) {
  __shared__ bool last;
  __syncthreads();  // what this block has to show is written, and nobody reads `last` any more
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == count - 1u;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace fused::cuda
