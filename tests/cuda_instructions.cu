// The update of float32 arithmetic and the norm with formats that the compiler knows, so that only what one of them runs is
// there.
// Compiled by test_cuda_instructions.py, never launched.
#include "cuda/operands.h"
#undef FUSED_RULES
#define FUSED_RULES(X) X(adam, Adam<false>)
#include "cuda/update_mixed.cu"
#include "cuda/reduce.cu"

namespace fused::cuda {

template <uint8_t PARAM, uint8_t MASTER, uint8_t FIRST, uint8_t SECOND>
__global__ void __launch_bounds__(kThreads, kResident<Adam<false>>) counted(UpdateArgs args) {
  __shared__ Chunk<Adam<false>, float> opened;
  if (threadIdx.x == 0) opened.open(args);
  __syncthreads();
  if (opened.skip) return;
  Chunk<Adam<false>, float> chunk = opened;
  chunk.constants.l2 = 0.0f;  // the compiler makes loops of their own for the other cases
  chunk.constants.weight1 = 0.1f;
  TensorRow row = *chunk.row;
  row.param_format = row.grad_format = PARAM;
  row.master_format = MASTER;
  row.state_format[0] = FIRST;
  row.state_format[1] = SECOND;
  row.stochastic = 0;
  const bool whole = true;
  update_chunk(chunk, Mixed<Adam<false>>{chunk, row, whole, args.seed});
}

#define COUNTED(...) template __global__ void counted<__VA_ARGS__>(UpdateArgs);
COUNTED(kFloat32, kNone, kFloat32, kFloat32)
COUNTED(kBFloat16, kNone, kBFloat16, kBFloat16)
COUNTED(kFloat16, kNone, kFloat16, kFloat16)
COUNTED(kBFloat16, kRemainder16, kBFloat16, kBFloat16)
COUNTED(kBFloat16, kRemainder16, kFloat32, kFloat32)
COUNTED(kFloat16, kRemainder16, kFloat16, kFloat16)
COUNTED(kFloat32, kNone, kBlock8Signed, kBlock8Unsigned)
COUNTED(kBFloat16, kRemainder8, kBlock8Signed, kBlock8Unsigned)

template <uint8_t FORMAT>
__global__ void __launch_bounds__(kThreads) counted_norm(const void* grad, int n, double* value) {
  double poison = 0.0;
  value[threadIdx.x] = accumulate<SumOfSquares, SumOfWideSquares>(FORMAT, grad, 0, n, poison);
}

template __global__ void counted_norm<kFloat32>(const void*, int, double*);
template __global__ void counted_norm<kBFloat16>(const void*, int, double*);
template __global__ void counted_norm<kFloat16>(const void*, int, double*);

}  // namespace fused::cuda
