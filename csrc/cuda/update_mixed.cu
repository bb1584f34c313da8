// The update in float32 arithmetic for every storage: low-precision parameters, masters and remainders, gradients of
// another dtype, 16-bit and 8-bit states.
#include <type_traits>

#include "operands.h"
#include "update.h"

namespace fused::cuda {
namespace {

// Blocks per multiprocessor to leave registers for: more keep more bytes in flight, until registers spill.
template <class Rule>
constexpr int kResident = Rule::kStates >= 3 ? 2 : 3;

template <class Rule>
__global__ void __launch_bounds__(kThreads, kResident<Rule>) update_mixed(UpdateArgs args) {
  constexpr int S = Rule::kStates;
  using Constants = typename Rule::template Constants<float>;
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
  const float factor = float(work.factor);

  // Every thread makes every round, with nothing to do past the end: lanes meet in shuffles.
  for (int round = 0; round < n; round += kThreads * kVector) {
    const int first = round + int(threadIdx.x) * kVector;
    const Place at = {begin + first, n - first < 0 ? 0 : n - first < kVector ? n - first : kVector};
    float p[kVector], g[kVector], s[S ? S : 1][kVector];
    load_param(row, at, p);
    load<Reuse::kOnce>(row.grad_format, grad, at.begin, at.count, g);
#pragma unroll
    for (int k = 0; k < S; ++k) load_state(row, k, at, s[k]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float v[S ? S : 1];
#pragma unroll
      for (int k = 0; k < S; ++k) v[k] = s[k][j];
      Rule::apply(p[j], g[j] * factor, v, c);
#pragma unroll
      for (int k = 0; k < S; ++k) s[k][j] = v[k];
    }
    round_param(row, at, p, args.seed, work.step);
#pragma unroll
    for (int k = 0; k < S; ++k) round_state(row, k, at, s[k], args.seed, work.step);
  }
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
