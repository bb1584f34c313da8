// The update of the usual low-precision layouts in one loop: loaded, converted, updated, rounded and stored without a
// buffer between. Such a step has half the bytes of a float32 one to move, and conversions through buffers would take longer
// than the memory does. Every other layout goes through kernels.cpp's blocks, which give the same bits.
#pragma once

#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace fused {
namespace FUSED_ISA {
namespace {

#if defined(FUSED_LANES)

// Operands: `load` and `store` sixteen elements from element i on. Those of one layout agree on the order in the lanes.

template <Pair (*LOAD)(const float*), void (*STORE)(float*, Pair)>
struct FloatOperand {
  float* at;
  FloatOperand(void* stored, void*) : at(static_cast<float*>(stored)) {}
  FUSED_HD Pair load(int64_t i) const { return LOAD(at + i); }
  FUSED_HD void store(int64_t i, Pair v) const { STORE(at + i, v); }
};

template <Pair (*LOAD)(const uint16_t*), void (*STORE)(uint16_t*, Pair)>
struct HalfOperand {
  uint16_t* at;
  HalfOperand(void* stored, void*) : at(static_cast<uint16_t*>(stored)) {}
  FUSED_HD Pair load(int64_t i) const { return LOAD(at + i); }
  FUSED_HD void store(int64_t i, Pair v) const { STORE(at + i, v); }
};

template <Pair (*JOIN)(const uint16_t*, const int16_t*), void (*SPLIT)(uint16_t*, int16_t*, Pair)>
struct SplitOperand {
  uint16_t* at;
  int16_t* low;
  SplitOperand(void* stored, void* remainder) : at(static_cast<uint16_t*>(stored)), low(static_cast<int16_t*>(remainder)) {}
  FUSED_HD Pair load(int64_t i) const { return JOIN(at + i, low + i); }
  FUSED_HD void store(int64_t i, Pair v) const { SPLIT(at + i, low + i, v); }
};

FUSED_HD void store_fp16_in_order(uint16_t* at, Pair v) { store16(at, round_fp16_in_order(v)); }

struct Bf16Layout {
  using Half = HalfOperand<load_bf16_by_parity, store_bf16_by_parity>;
  using Split = SplitOperand<join_bf16_by_parity, split_bf16_by_parity>;
  using Float = FloatOperand<load_float_by_parity, store_float_by_parity>;
};

struct Fp16Layout {
  using Half = HalfOperand<load_fp16_in_order, store_fp16_in_order>;
  using Split = SplitOperand<join_fp16_in_order, split_fp16_in_order>;
  using Float = FloatOperand<load_float_in_order, store_float_in_order>;
};

// A rule's constants in every lane: both structs are made of numbers of one type alone.
template <class Rule>
FUSED_HD typename Rule::template Constants<Lanes> broadcast(const typename Rule::template Constants<float>& constants) {
  constexpr size_t kCount = sizeof constants / sizeof(float);
  typename Rule::template Constants<Lanes> all;
  static_assert(sizeof all == kCount * sizeof(Lanes));
  float one[kCount];
  Lanes many[kCount];
  std::memcpy(one, &constants, sizeof one);
  for (size_t k = 0; k < kCount; ++k) many[k] = _mm256_set1_ps(one[k]);
  std::memcpy(&all, many, sizeof all);
  return all;
}

// Elements [begin, end), a multiple of sixteen.
template <class Rule, class Param, class Grad, class State>
void update_in_registers(const TensorRow& row, const typename Rule::template Constants<float>& constants, double grad_factor,
                         int64_t begin, int64_t end) {
  constexpr int S = Rule::kStates;
  const auto c = broadcast<Rule>(constants);
  const Lanes factor(grad_factor);
  const Param param(row.param, row.master);
  const Grad grad(const_cast<void*>(row.grad), nullptr);
  const State state[] = {{row.state[0], nullptr}, {row.state[1], nullptr}, {row.state[2], nullptr}};
  static_assert(S <= 3, "one more state to name above");
  for (int64_t i = begin; i < end; i += kPair) {
    Pair p = param.load(i), g = grad.load(i);
    Lanes a[S > 0 ? S : 1], b[S > 0 ? S : 1];
    for (int k = 0; k < S; ++k) {
      const Pair s = state[k].load(i);
      a[k] = s.a;
      b[k] = s.b;
    }
    Rule::apply(p.a, g.a * factor, a, c);
    Rule::apply(p.b, g.b * factor, b, c);
    for (int k = 0; k < S; ++k) state[k].store(i, {a[k], b[k]});
    param.store(i, p);
  }
}

template <class Rule>
using UpdateInRegisters = void (*)(const TensorRow&, const typename Rule::template Constants<float>&, double, int64_t, int64_t);

template <class Rule, class Layout>
UpdateInRegisters<Rule> in_registers(bool split, bool float_states) {
  using Half = typename Layout::Half;
  using Split = typename Layout::Split;
  using Float = typename Layout::Float;
  if (float_states)
    return split ? &update_in_registers<Rule, Split, Half, Float> : &update_in_registers<Rule, Half, Half, Float>;
  return split ? &update_in_registers<Rule, Split, Half, Half> : &update_in_registers<Rule, Half, Half, Half>;
}

#endif

// Updates as many elements from `begin` on as can be kept in registers; returns the first one that is left.
template <class Rule>
int64_t update_registers(const TensorRow& row, const typename Rule::template Constants<float>& constants, double grad_sign,
                         int64_t begin, int64_t end, const UpdateContext& context) {
#if defined(FUSED_LANES)
  const uint8_t format = row.param_format;
  const bool split = row.master_format == kRemainder16;
  const bool same = row.grad_format == format && !row.stochastic && (split || row.master_format == kNone);
  bool all_half = true, all_float = Rule::kStates > 0;
  for (int k = 0; k < Rule::kStates; ++k) {
    all_half = all_half && row.state_format[k] == format;
    all_float = all_float && row.state_format[k] == kFloat32;
  }
  if (!same || !(all_half || all_float) || (format != kBFloat16 && format != kFloat16)) return begin;
  const int64_t whole = begin + (end - begin) / kPair * kPair;
  const auto update = (format == kBFloat16 ? in_registers<Rule, Bf16Layout> : in_registers<Rule, Fp16Layout>)(split, all_float);
  update(row, constants, context.grad_factor * grad_sign, begin, whole);
  return whole;
#else
  (void)row, (void)constants, (void)grad_sign, (void)end, (void)context;
  return begin;
#endif
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
