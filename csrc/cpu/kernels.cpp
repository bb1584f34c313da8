// load -> rule -> store on blocks that stay in the first-level cache. Compiled once per instruction set: FUSED_ISA names it.
//
// A float32 operand is used in place; any other is converted into a block buffer and back, so formats and rules add up
// instead of multiplying: one instance per rule and arithmetic type.
#include "kernels.h"

#include <algorithm>
#include <cmath>

#include "../formats.h"
#include "../rules.h"
#include "adafactor_kernels.h"
#include "storage.h"

namespace fused {
namespace FUSED_ISA {
namespace {

// ---- the update ----

template <class Rule, class T>
void apply_rule(T* __restrict p, const T* __restrict g, T* const* s, int64_t n, T factor,
                const typename Rule::template Constants<T>& constants) {
  constexpr int S = Rule::kStates;
  const auto c = constants;
  T* __restrict s0 = S > 0 ? s[0] : nullptr;
  T* __restrict s1 = S > 1 ? s[1] : nullptr;
  T* __restrict s2 = S > 2 ? s[2] : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    T x = p[i];
    T v[S > 0 ? S : 1];
    if constexpr (S > 0) v[0] = s0[i];
    if constexpr (S > 1) v[1] = s1[i];
    if constexpr (S > 2) v[2] = s2[i];
    Rule::apply(x, g[i] * factor, v, c);
    p[i] = x;
    if constexpr (S > 0) s0[i] = v[0];
    if constexpr (S > 1) s1[i] = v[1];
    if constexpr (S > 2) s2[i] = v[2];
  }
}

template <class Rule>
void update_float(const TensorRow& row, const GroupRow& group, int64_t begin, int64_t end, const UpdateContext& context) {
  const auto constants = Rule::template constants<float>(group.hyper, context.step);
  const float factor = float(context.grad_factor * group.grad_sign);
  Buffers<float> buffer;
  bool in_place = row.param_format == kFloat32 && row.grad_format == kFloat32;
  for (int k = 0; k < Rule::kStates; ++k) in_place = in_place && row.state_format[k] == kFloat32;
  const int64_t block = in_place ? end - begin : kBlock;
  for (int64_t b = begin; b < end; b += block) {
    const int64_t n = std::min(block, end - b);
    float* p = const_cast<float*>(load_param(row, b, n, buffer.param));
    const float* g = load(row.grad_format, row.grad, b, n, buffer.grad);
    float* s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) s[k] = const_cast<float*>(load_state(row, k, b, n, buffer.state[k]));
    apply_rule<Rule, float>(p, g, s, n, factor, constants);
    if (in_place) continue;
    for (int k = -1; k < Rule::kStates; ++k) {
      const uint32_t* random = random_for(row, k, context, b, n, buffer.random);
      if (k < 0) {
        store_param(row, b, n, p, random);
      } else {
        store_state(row, k, b, n, s[k], random, uint32_t(context.step));
      }
    }
  }
}

// float64 parameters: float64 states and arithmetic, gradients of any format.
template <class Rule>
void update_double(const TensorRow& row, const GroupRow& group, int64_t begin, int64_t end, const UpdateContext& context) {
  const auto constants = Rule::template constants<double>(group.hyper, context.step);
  const double factor = context.grad_factor * group.grad_sign;
  alignas(64) double buffer[kBlock];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t n = std::min(kBlock, end - b);
    double* s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) s[k] = static_cast<double*>(row.state[k]) + b;
    apply_rule<Rule, double>(static_cast<double*>(row.param) + b, load(row.grad_format, row.grad, b, n, buffer), s, n, factor,
                             constants);
  }
}

void update(const TensorRow& row, const GroupRow& group, int64_t begin, int64_t end, const UpdateContext& context) {
  using Update = void (*)(const TensorRow&, const GroupRow&, int64_t, int64_t, const UpdateContext&);
  static constexpr Update in_float[] = {
#define X(name, ...) &update_float<__VA_ARGS__>,
      FUSED_RULES(X)
#undef X
  };
  static constexpr Update in_double[] = {
#define X(name, ...) &update_double<__VA_ARGS__>,
      FUSED_RULES(X)
#undef X
  };
  (row.param_format == kFloat64 ? in_double : in_float)[row.rule](row, group, begin, end, context);
}

// ---- the norm ----

// Sixteen accumulators in float64 and a fixed tree: the same bits for every instruction set and thread count.
template <class T>
Reduction reduce_block(const T* __restrict g, int64_t n, bool maximum) {
  constexpr int kLanes = 16;
  double lane[kLanes] = {};
  double poison = 0.0;  // 0 * x is NaN for an infinite or NaN x
  const int64_t full = n - n % kLanes;
  if (maximum) {
    for (int64_t i = 0; i < full; i += kLanes)
      for (int l = 0; l < kLanes; ++l) lane[l] = max_nan(double(std::fabs(g[i + l])), lane[l]);
    for (int64_t i = full; i < n; ++i) lane[i - full] = max_nan(double(std::fabs(g[i])), lane[i - full]);
  } else {
    for (int64_t i = 0; i < full; i += kLanes)
      for (int l = 0; l < kLanes; ++l) lane[l] += double(g[i + l]) * double(g[i + l]);
    for (int64_t i = full; i < n; ++i) lane[i - full] += double(g[i]) * double(g[i]);
  }
  if constexpr (sizeof(T) == 8) {
    for (int64_t i = 0; i < n; ++i) poison += 0.0 * double(g[i]);  // a square may overflow where the element does not
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] = maximum ? max_nan(lane[l], lane[l + width]) : lane[l] + lane[l + width];
  const bool finite = sizeof(T) == 8 ? poison == 0.0 : std::isfinite(lane[0]);
  return {lane[0], !finite};
}

template <class T>
Reduction reduce_range(const TensorRow& row, int64_t begin, int64_t end, bool maximum) {
  alignas(64) T buffer[kBlock];
  Reduction total = {0.0, false};
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t n = std::min(kBlock, end - b);
    const Reduction part = reduce_block(load(row.grad_format, row.grad, b, n, buffer), n, maximum);
    total.value = maximum ? max_nan(part.value, total.value) : total.value + part.value;
    total.nonfinite |= part.nonfinite;
  }
  return total;
}

Reduction reduce(const TensorRow& row, int64_t begin, int64_t end, bool maximum) {
  return row.grad_format == kFloat64 ? reduce_range<double>(row, begin, end, maximum)
                                     : reduce_range<float>(row, begin, end, maximum);
}

}  // namespace

extern const Kernels kernels;
#define FUSED_STRING(x) #x
#define FUSED_NAME(x) FUSED_STRING(x)
const Kernels kernels = {FUSED_NAME(FUSED_ISA), &update, &reduce,
                         {&adafactor_stats, &adafactor_combine, &adafactor_norm, &adafactor_apply}};

}  // namespace FUSED_ISA
}  // namespace fused
