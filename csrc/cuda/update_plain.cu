// The update where everything is float32: the path that has to run at the memory's speed.
#include <type_traits>

#include "memory.h"
#include "update.h"

namespace fused::cuda {
namespace {

constexpr int kVector = 4;
// Vectors of every operand that a thread has under way at once: few operands need more of them to fill the memory.
template <class Rule>
constexpr int kInFlight = Rule::kStates >= 2 ? 1 : 2;

template <class Rule>
struct Operands {
  static constexpr int kStates = Rule::kStates;
  float* param;
  const float* grad;
  float* state[kStates ? kStates : 1];
};

// ALIGNED: every address takes 16-byte accesses. `n` elements; a last one to three are left to `update_tail`.
template <class Rule, bool ALIGNED>
__device__ __forceinline__ void update_vectors(const Operands<Rule>& at, int n, float factor,
                                               const typename Rule::template Constants<float>& c) {
  constexpr int S = Rule::kStates, U = kInFlight<Rule>;
  for (int first = int(threadIdx.x) * kVector; first + kVector <= n; first += U * kThreads * kVector) {
    float p[U][kVector], g[U][kVector], s[U][S ? S : 1][kVector];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = first + u * kThreads * kVector;
      if (i + kVector > n) break;
      if constexpr (ALIGNED) {
        const auto take = [](float(&to)[kVector], const float4& from) { memcpy(to, &from, sizeof to); };
        take(p[u], __ldcg(reinterpret_cast<const float4*>(at.param + i)));
        take(g[u], __ldcs(reinterpret_cast<const float4*>(at.grad + i)));
#pragma unroll
        for (int k = 0; k < S; ++k) take(s[u][k], __ldcs(reinterpret_cast<const float4*>(at.state[k] + i)));
      } else {
        load_raw<Reuse::kAgain>(at.param + i, kVector, p[u]);
        load_raw<Reuse::kOnce>(at.grad + i, kVector, g[u]);
#pragma unroll
        for (int k = 0; k < S; ++k) load_raw<Reuse::kOnce>(at.state[k] + i, kVector, s[u][k]);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = first + u * kThreads * kVector;
      if (i + kVector > n) break;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float v[S ? S : 1];
#pragma unroll
        for (int k = 0; k < S; ++k) v[k] = s[u][k][j];
        Rule::apply(p[u][j], g[u][j] * factor, v, c);
#pragma unroll
        for (int k = 0; k < S; ++k) s[u][k][j] = v[k];
      }
      if constexpr (ALIGNED) {
        const auto give = [](float4* to, const float(&from)[kVector]) { __stcg(to, make_float4(from[0], from[1], from[2], from[3])); };
        give(reinterpret_cast<float4*>(at.param + i), p[u]);
#pragma unroll
        for (int k = 0; k < S; ++k)
          __stcs(reinterpret_cast<float4*>(at.state[k] + i), make_float4(s[u][k][0], s[u][k][1], s[u][k][2], s[u][k][3]));
      } else {
        store_raw<Reuse::kAgain>(at.param + i, kVector, p[u]);
#pragma unroll
        for (int k = 0; k < S; ++k) store_raw<Reuse::kOnce>(at.state[k] + i, kVector, s[u][k]);
      }
    }
  }
}

template <class Rule>
__device__ __forceinline__ void update_tail(const Operands<Rule>& at, int n, float factor,
                                            const typename Rule::template Constants<float>& c) {
  constexpr int S = Rule::kStates;
  const int i = n - n % kVector + int(threadIdx.x);
  if (i >= n) return;
  float v[S ? S : 1];
#pragma unroll
  for (int k = 0; k < S; ++k) v[k] = at.state[k][i];
  float p = at.param[i];
  Rule::apply(p, at.grad[i] * factor, v, c);
  at.param[i] = p;
#pragma unroll
  for (int k = 0; k < S; ++k) at.state[k][i] = v[k];
}

template <class Rule>
__global__ void __launch_bounds__(kThreads) update_plain(UpdateArgs args) {
  constexpr int S = Rule::kStates;
  using Constants = typename Rule::template Constants<float>;
  static_assert(sizeof(Constants) <= RowWork::kConstants && std::is_trivially_copyable<Constants>::value, "");
  const Piece chunk = args.chunks[blockIdx.x];
  const RowWork& work = args.work[chunk.row];
  if (work.skip) return;
  const TensorRow& row = args.rows[chunk.row].tensor;
  const int64_t begin = int64_t(chunk.index) * kChunk;
  const int64_t left = row.numel - begin;
  const int n = left < kChunk ? int(left) : kChunk;
  Constants c;
  memcpy(&c, work.constants, sizeof c);
  const float factor = float(work.factor);

  Operands<Rule> at;
  at.param = static_cast<float*>(row.param) + begin;
  at.grad = static_cast<const float*>(args.grads[chunk.row]) + begin;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(at.param) | reinterpret_cast<uintptr_t>(at.grad);
#pragma unroll
  for (int k = 0; k < S; ++k) {
    at.state[k] = static_cast<float*>(row.state[k]) + begin;
    addresses |= reinterpret_cast<uintptr_t>(at.state[k]);
  }
  if (addresses % sizeof(float4) == 0) {
    update_vectors<Rule, true>(at, n, factor, c);
  } else {
    update_vectors<Rule, false>(at, n, factor, c);
  }
  update_tail<Rule>(at, n, factor, c);
}

}  // namespace

UpdateKernel plain_kernel(int rule) {
  static constexpr UpdateKernel kernels[] = {
#define X(name, ...) &update_plain<__VA_ARGS__>,
      FUSED_RULES(X)
#undef X
  };
  return kernels[rule];
}

}  // namespace fused::cuda
