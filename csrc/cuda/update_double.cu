// The update of float64 parameters: float64 states and arithmetic, gradients of any format.
#include <type_traits>

#include "memory.h"
#include "update.h"

namespace fused::cuda {
namespace {

constexpr int kVector = 2;

template <class Rule>
__global__ void __launch_bounds__(kThreads) update_double(UpdateArgs args) {
  constexpr int S = Rule::kStates;
  using Constants = typename Rule::template Constants<double>;
  static_assert(sizeof(Constants) <= RowWork::kConstants && std::is_trivially_copyable<Constants>::value, "");
  const Piece chunk = args.chunks[blockIdx.x];
  const RowWork& work = args.work[chunk.row];
  if (work.skip) return;
  const TensorRow& row = args.rows[chunk.row].tensor;
  const void* grad = args.grads[chunk.row];
  const int64_t begin = int64_t(chunk.index) * kChunk;
  const int64_t left = row.numel - begin;
  const int n = left < kChunk ? int(left) : kChunk;
  Constants c;
  memcpy(&c, work.constants, sizeof c);
  const double factor = work.factor;

  for (int first = int(threadIdx.x) * kVector; first < n; first += kThreads * kVector) {
    const int64_t i = begin + first;
    const int count = n - first < kVector ? n - first : kVector;
    double p[kVector], g[kVector], s[S ? S : 1][kVector];
    load_raw<Reuse::kAgain>(static_cast<const double*>(row.param) + i, count, p);
    load<Reuse::kOnce>(row.grad_format, grad, i, count, g);
#pragma unroll
    for (int k = 0; k < S; ++k) load_raw<Reuse::kOnce>(static_cast<const double*>(row.state[k]) + i, count, s[k]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      double v[S ? S : 1];
#pragma unroll
      for (int k = 0; k < S; ++k) v[k] = s[k][j];
      Rule::apply(p[j], g[j] * factor, v, c);
#pragma unroll
      for (int k = 0; k < S; ++k) s[k][j] = v[k];
    }
    store_raw<Reuse::kAgain>(static_cast<double*>(row.param) + i, count, p);
#pragma unroll
    for (int k = 0; k < S; ++k) store_raw<Reuse::kOnce>(static_cast<double*>(row.state[k]) + i, count, s[k]);
  }
}

}  // namespace

UpdateKernel double_kernel(int rule) {
  static constexpr UpdateKernel kernels[] = {
#define X(name, ...) &update_double<__VA_ARGS__>,
      FUSED_RULES(X)
#undef X
  };
  return kernels[rule];
}

}  // namespace fused::cuda
