// Every block adds up a fixed span of one gradient in a fixed order; the last block of a row to finish adds up the row's
// spans, and the very last one the rows, in a fixed order too: the result is the same to the bit from run to run, whatever
// the order blocks run in.
#include "reduce.h"

#include "block.h"
#include "memory.h"
#include "squares.h"

namespace fused::cuda {
namespace {

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

// Gradients are read with the usual caching: the update reads them again. A thread asks for kAtOnce vectors before it looks
// at the first: 64 bytes, and four blocks to a multiprocessor 64 KB; see fetch.h for what it takes.
constexpr int kAtOnce = 4;

// Adds up elements of storage type T, which `convert` makes numbers of type N, two vectors at a time.
template <class Sum, class N, class T, class Convert>
__device__ __forceinline__ double accumulate(const void* base, int64_t begin, int n, double& poison, Convert convert) {
  constexpr int V = 16 / int(sizeof(T)), kStride = kThreads * V;
  static_assert(kSpan % (kAtOnce * kStride) == 0 && kAtOnce % 2 == 0, "");
  const T* grad = static_cast<const T*>(base) + begin;
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  Sum sum;
  for (int round = int(threadIdx.x) * V; round < n; round += kAtOnce * kStride) {
    T raw[kAtOnce][V];
    const T* first = grad + round;
    const int left = n - round;
    if (aligned && left >= (kAtOnce - 1) * kStride + V) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) load_vector<Reuse::kAgain>(first + u * kStride, raw[u]);
    } else {
      FUSED_RARE();
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) load_raw<Reuse::kAgain>(first + u * kStride, count_of<V>(left - u * kStride), raw[u]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; u += 2) {
      N x[2 * V];
#pragma unroll
      for (int j = 0; j < 2 * V; ++j) {
        x[j] = convert(raw[u + j / V][j % V]);
        if constexpr (sizeof(N) == 8) poison += 0.0 * x[j];  // a square may overflow where the element does not
      }
      sum.add(x);
    }
  }
  return sum.value();
}

template <class Sum, class WideSum>
__device__ __forceinline__ double accumulate(uint8_t format, const void* base, int64_t begin, int n, double& poison) {
  switch (format) {
    case kFloat32: return accumulate<Sum, float, float>(base, begin, n, poison, [](float x) { return x; });
    case kFloat64: return accumulate<WideSum, double, double>(base, begin, n, poison, [](double x) { return x; });
    case kBFloat16:
      return accumulate<Sum, float, unsigned short>(base, begin, n, poison, [](unsigned short x) { return bf16_to_float(x); });
    default:
      return accumulate<Sum, float, unsigned short>(base, begin, n, poison, [](unsigned short x) { return fp16_to_float(x); });
  }
}

// One span of a gradient; the last block of a row adds up the row.
__device__ __forceinline__ void reduce_span(const ReduceArgs& args, const Piece& span) {
  const DeviceRow& row = args.rows[span.row];
  const int64_t begin = int64_t(span.index) * kSpan;
  const int64_t left = row.tensor.numel - begin;
  const int n = left < kSpan ? int(left) : kSpan;
  const void* grad = args.grads[span.row];
  const uint8_t format = row.tensor.grad_format;
  double poison = 0.0;
  double value = args.maximum ? accumulate<Largest<float>, Largest<double>>(format, grad, begin, n, poison)
                              : accumulate<SumOfSquares, SumOfWideSquares>(format, grad, begin, n, poison);
  value = join_block(value, args.maximum);
  if (format == kFloat64) poison = join_block(poison, false);
  bool nonfinite = !is_finite(format == kFloat64 ? poison : value);  // as far as thread 0 knows

  const unsigned spans = unsigned((row.tensor.numel + kSpan - 1) / kSpan);
  if (spans > 1u) {
    if (threadIdx.x == 0) {
      args.partials[blockIdx.x] = value;
      if (nonfinite) args.flags[span.row] = 1u;
    }
    if (!is_last(args.arrived + span.row, spans)) return;
    value = 0.0;
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < spans; i += kThreads)
      value = join(value, __ldcg(args.partials + row.first_span + i), args.maximum);
    value = join_block(value, args.maximum);
    if (threadIdx.x == 0) {
      nonfinite = __ldcg(args.flags + span.row) != 0u;
      args.flags[span.row] = args.arrived[span.row] = 0u;
    }
  }
  if (threadIdx.x == 0) {
    args.row_values[2 * row.index] = value;
    args.row_values[2 * row.index + 1] = nonfinite ? 1.0 : 0.0;
  }
}

}  // namespace

__global__ void __launch_bounds__(kThreads) reduce(ReduceArgs args) {
  if (args.spans != nullptr) reduce_span(args, args.spans[blockIdx.x]);
  if (!is_last(args.counter, gridDim.x)) return;

  double value = 0.0, nonfinite = 0.0;
#pragma unroll 4
  for (int64_t r = threadIdx.x; r < args.row_count; r += kThreads) {
    if (args.rows[r].tensor.numel == 0) continue;
    value = join(value, __ldcg(args.row_values + 2 * args.rows[r].index), args.maximum);
    nonfinite += __ldcg(args.row_values + 2 * args.rows[r].index + 1);
  }
  value = join_block(value, args.maximum);
  nonfinite = join_block(nonfinite, false);
  if (threadIdx.x == 0) {
    args.total[0] = value;
    args.total[1] = nonfinite;
    *args.counter = 0u;
  }
}

}  // namespace fused::cuda
