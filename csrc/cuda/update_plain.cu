// The update where everything is float32: the path that has to run at the memory's speed.
#include "update_chunk.h"

namespace fused::cuda {
namespace {

// Vectors of every operand that a thread has under way at once: few operands need more of them to fill the memory.
template <class Rule>
constexpr int kInFlight = Rule::kStates >= 2 ? 1 : 2;

template <class Rule, bool WHOLE>
using Plain = Direct<Rule, float, 4, WHOLE ? kInFlight<Rule> : 1, WHOLE, true>;

template <class Rule>
__device__ __forceinline__ bool takes_vectors(const Plain<Rule, true>& storage) {
  uintptr_t addresses = reinterpret_cast<uintptr_t>(storage.param) | reinterpret_cast<uintptr_t>(storage.grad);
#pragma unroll
  for (int k = 0; k < Rule::kStates; ++k) addresses |= reinterpret_cast<uintptr_t>(storage.state[k]);
  return all_aligned(addresses);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads) update_plain(UpdateArgs args) {
  Chunk<Rule, float> chunk;
  chunk.open(args);
  if (chunk.skip) return;
  const Plain<Rule, true> storage(chunk);
  if (takes_vectors<Rule>(storage) && chunk.n % storage.kElements == 0) update_chunk(chunk, storage);
  else update_chunk(chunk, Plain<Rule, false>(chunk));
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
