// The update of float64 parameters: float64 states and arithmetic, gradients of any format.
#include "update_chunk.h"

namespace fused::cuda {
namespace {

template <class Rule>
__global__ void __launch_bounds__(kThreads) update_double(UpdateArgs args) {
  Chunk<Rule, double> chunk;
  chunk.open(args);
  if (!chunk.skip) update_chunk(chunk, Direct<Rule, double, 2, 1, false, false>(chunk));
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
