#include "prologue.h"

#include <cuda_runtime.h>

#include <cstring>

#include "../formats.h"
#include "../prologue.h"

namespace fused::cuda {
namespace {

template <class Rule>
__device__ __forceinline__ void derive(const double* hyper, double step, bool in_double, RowWork& work) {
  if (in_double) {
    const auto c = Rule::template constants<double>(hyper, step);
    memcpy(work.constants, &c, sizeof c);
  } else {
    const auto c = Rule::template constants<float>(hyper, step);
    memcpy(work.constants, &c, sizeof c);
  }
}

}  // namespace

__global__ void __launch_bounds__(kThreads) prologue(const __grid_constant__ PrologueArgs args) {
  const int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  StepControl control = args.control;
  if (r != 0) {  // every thread decides, one reports
    control.grad_norm = control.skipped = nullptr;
    control.unscale = nullptr;
  }
  const StepDecision decision = decide(control);
  if (r >= args.row_count) return;
  RowWork& work = args.work[r];
  work.skip = decision.skip;
  if (decision.skip) return;

  const TensorRow& row = args.rows[r].tensor;
  double step = 2.0;  // a rule without a count has history: not the first step
  if (row.step != nullptr) {
    *row.step += 1.0f;
    step = double(*row.step);
  }
  const GroupRow& group = args.groups != nullptr ? args.groups[row.group] : args.inline_groups[row.group];
  double hyper[kMaxHypers];
  read_hypers(group, hyper);
  const bool in_double = row.param_format == kFloat64;
  const double factor = decision.grad_factor * group.grad_sign;
  work.factor = in_double ? factor : double(float(factor));
  work.step = uint32_t(step);
  int rule = 0;
#define X(name, ...) \
  if (row.rule == rule++) derive<__VA_ARGS__>(hyper, step, in_double, work);
  FUSED_RULES(X)
#undef X
}

}  // namespace fused::cuda
