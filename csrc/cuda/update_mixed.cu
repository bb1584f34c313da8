// The update in float32 arithmetic for every storage: low-precision parameters, masters and remainders, gradients of
// another dtype, 16-bit and 8-bit states.
#include "operands.h"
#include "update_chunk.h"

namespace fused::cuda {
namespace {

// Blocks per multiprocessor to leave registers for: more keep more bytes in flight, until registers spill.
template <class Rule>
constexpr int kResident = Rule::kStates >= 3 ? 2 : 3;

template <class Rule>
struct Mixed {
  static constexpr int kElements = kVector, kAtOnce = 1, kStates = Rule::kStates;
  static constexpr bool kLanesMeet = true;  // in the shuffles of 8-bit blocks
  struct Operands {
    Fetched param, grad, state[kStates ? kStates : 1];
  };

  const Chunk<Rule, float>& chunk;
  const TensorRow& row;
  const bool& whole;
  uint64_t seed;

  __device__ __forceinline__ Place place(int first, int count) const { return {chunk.begin + first, count}; }

  template <bool WHOLE>
  __device__ __forceinline__ void fetch_all(const Place& at, Operands& to) const {
    fetch_param<WHOLE>(row, at, to.param);
    fetch_grad<WHOLE>(row, chunk.grad, at, to.grad);
#pragma unroll
    for (int k = 0; k < kStates; ++k) fetch_state<WHOLE>(row, k, at, to.state[k]);
  }

  __device__ __forceinline__ void fetch(int first, int count, Operands& to) const {
    if (whole) fetch_all<true>(place(first, count), to);
    else fetch_all<false>(place(first, count), to);
  }

  template <class States>
  __device__ __forceinline__ void convert(const Operands& from, float (&p)[kVector], float (&g)[kVector], States& s) const {
    param_to_float(row, from.param, p);
    to_float(row.grad_format, from.grad, g);
#pragma unroll
    for (int k = 0; k < kStates; ++k) state_to_float(row, k, from.state[k], s[k]);
  }

  template <class States>
  __device__ __forceinline__ void store(int first, int count, const float (&p)[kVector], const States& s) const {
    round_param(row, place(first, count), p, seed, chunk.step);
#pragma unroll
    for (int k = 0; k < kStates; ++k) round_state(row, k, place(first, count), s[k], seed, chunk.step);
  }
};

template <class Rule>
__global__ void __launch_bounds__(kThreads, kResident<Rule>) update_mixed(UpdateArgs args) {
  // Shared by the block: in registers it would leave fewer for what is under way.
  __shared__ Chunk<Rule, float> chunk;
  __shared__ TensorRow row;
  __shared__ bool whole;
  if (threadIdx.x == 0) {
    chunk.open(args);
    if (!chunk.skip) {
      row = *chunk.row;
      whole = takes_vectors(row, chunk.grad) && chunk.n % kVector == 0;
    }
  }
  __syncthreads();
  if (!chunk.skip) update_chunk(chunk, Mixed<Rule>{chunk, row, whole, args.seed});
}

}  // namespace

UpdateKernel mixed_kernel(int rule) {
  static constexpr UpdateKernel kernels[] = {
#define X(name, ...) &update_mixed<__VA_ARGS__>,
      FUSED_RULES(X)
#undef X
  };
  return kernels[rule];
}

}  // namespace fused::cuda
