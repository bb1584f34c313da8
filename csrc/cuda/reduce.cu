// Every block adds up a fixed span of one gradient in a fixed order; the last block of a row to finish adds up the row's
// spans, and the very last one the rows, in a fixed order too: the result is the same to the bit from run to run, whatever
// the order blocks run in.
#include "reduce.h"

#include "block.h"
#include "memory.h"

namespace fused::cuda {
namespace {

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

// Gradients are read with the usual caching: the update reads them again. A thread asks for kAtOnce vectors before it looks
// at the first: 64 bytes, and four blocks to a multiprocessor 64 KB; see fetch.h for what it takes.
constexpr int kAtOnce = 4;

template <bool WHOLE, class T, int V>
__device__ __forceinline__ void fetch(const T* grad, int round, int n, T (&raw)[kAtOnce][V]) {
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const int first = round + u * kThreads * V, left = n - first;
    // Not load_elements of the one address that serves both: it takes registers.
    if constexpr (WHOLE) load_vector<Reuse::kAgain>(grad + (left > 0 ? first : 0), raw[u]);  // of none the first, for nothing
    else load_raw<Reuse::kAgain>(grad + first, count_of<V>(left), raw[u]);
  }
}

template <class T, int V, class Convert>
__device__ __forceinline__ double accumulate(const T* grad, int n, bool maximum, double& poison, Convert convert) {
  static_assert(V * sizeof(T) == 16 && kSpan % (kAtOnce * kThreads * V) == 0, "");
  double lane[V] = {};
  const bool whole = n % V == 0 && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  for (int round = int(threadIdx.x) * V; round < n; round += kAtOnce * kThreads * V) {
    T raw[kAtOnce][V];
    if (whole) fetch<true>(grad, round, n, raw);
    else fetch<false>(grad, round, n, raw);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (round + u * kThreads * V >= n) break;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const double x = double(convert(raw[u][j]));
        lane[j] = maximum ? max_nan(fabs(x), lane[j]) : fma_(x, x, lane[j]);
        if constexpr (sizeof(T) == 8) poison += 0.0 * x;  // a square may overflow where the element does not
      }
    }
  }
#pragma unroll
  for (int width = V / 2; width > 0; width /= 2)
#pragma unroll
    for (int j = 0; j < width; ++j) lane[j] = join(lane[j], lane[j + width], maximum);
  return lane[0];
}

// One span of a gradient; the last block of a row adds up the row.
__device__ __forceinline__ void reduce_span(const ReduceArgs& args, const Piece& span) {
  const DeviceRow& row = args.rows[span.row];
  const int64_t begin = int64_t(span.index) * kSpan;
  const int64_t left = row.tensor.numel - begin;
  const int n = left < kSpan ? int(left) : kSpan;
  const void* grad = args.grads[span.row];
  double value = 0.0, poison = 0.0;
  switch (row.tensor.grad_format) {
    case kFloat32:
      value = accumulate<float, 4>(static_cast<const float*>(grad) + begin, n, args.maximum, poison, [](float x) { return x; });
      break;
    case kFloat64:
      value = accumulate<double, 2>(static_cast<const double*>(grad) + begin, n, args.maximum, poison, [](double x) { return x; });
      break;
    case kBFloat16:
      value = accumulate<unsigned short, 8>(static_cast<const unsigned short*>(grad) + begin, n, args.maximum, poison,
                                            [](unsigned short x) { return bf16_to_float(x); });
      break;
    default:
      value = accumulate<unsigned short, 8>(static_cast<const unsigned short*>(grad) + begin, n, args.maximum, poison,
                                            [](unsigned short x) { return fp16_to_float(x); });
  }
  value = join_block(value, args.maximum);
  if (row.tensor.grad_format == kFloat64) poison = join_block(poison, false);
  bool nonfinite = !is_finite(row.tensor.grad_format == kFloat64 ? poison : value);  // as far as thread 0 knows

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
