// load -> rule -> store on blocks that stay in the first-level cache. Compiled once per instruction set: FUSED_ISA names it.
//
// A float32 operand is used in place; any other is converted into a block buffer and back, so formats and rules add up
// instead of multiplying: one instance per rule and arithmetic type.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../formats.h"
#include "../rules.h"
#include "adafactor_kernels.h"
#include "ahead.h"
#include "gradients.h"
#include "registers.h"
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

template <class Rule, class T>
typename Rule::template Constants<T> constants_for(const GroupRow& group, const UpdateContext& context) {
  using Constants = typename Rule::template Constants<T>;
  ConstantsCache& cache = *context.constants;
  static_assert(std::is_trivially_copyable_v<Constants> && sizeof(Constants) <= sizeof cache.bytes);
  constexpr bool kWide = sizeof(T) == 8;
  Constants constants;
  if (cache.group == &group && cache.step == context.step && cache.wide == kWide) {  // a group has one rule
    std::memcpy(&constants, cache.bytes, sizeof constants);
    return constants;
  }
  constants = Rule::template constants<T>(group.hyper, context.step);
  std::memcpy(cache.bytes, &constants, sizeof constants);
  cache.group = &group;
  cache.step = context.step;
  cache.wide = kWide;
  return constants;
}

template <class Rule>
void update_float(const TensorRow& row, const GroupRow& group, int64_t begin, int64_t end, const UpdateContext& context) {
  const auto constants = constants_for<Rule, float>(group, context);
  const float factor = float(context.grad_factor * group.grad_sign);
  begin = update_registers<Rule>(row, constants, factor, begin, end);
  if (begin == end) return;
  Buffers<float> buffer;
  bool in_place = row.param_format == kFloat32 && row.grad_format == kFloat32;
  for (int k = 0; k < Rule::kStates; ++k) in_place = in_place && row.state_format[k] == kFloat32;
  const int64_t block = in_place ? end - begin : kBlock;
  for (int64_t b = begin; b < end; b += block) {
    const int64_t n = std::min(block, end - b);
    Ahead ahead(row, b + n, in_place ? 0 : std::min(block, end - b - n), 2 * Rule::kStates + 1);
    float* p = const_cast<float*>(load_param(row, b, n, buffer.param));
    const float* g = load(row.grad_format, row.grad, b, n, buffer.grad);
    float* s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) {
      ahead.fetch();
      s[k] = const_cast<float*>(load_state(row, k, b, n, buffer.state[k]));
    }
    apply_rule<Rule, float>(p, g, s, n, factor, constants);
    if (in_place) continue;
    for (int k = -1; k < Rule::kStates; ++k) {
      ahead.fetch();
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
  const auto constants = constants_for<Rule, double>(group, context);
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

}  // namespace

extern const Kernels kernels;
#define FUSED_STRING(x) #x
#define FUSED_NAME(x) FUSED_STRING(x)
const Kernels kernels = {FUSED_NAME(FUSED_ISA), &update, &reduce, &scale, &clamp, &accumulate,
                         {&adafactor_stats, &adafactor_combine, &adafactor_norm, &adafactor_apply}};

}  // namespace FUSED_ISA
}  // namespace fused
