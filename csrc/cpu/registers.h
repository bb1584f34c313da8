// The update in one loop: sixteen elements at a time are loaded, converted, updated, rounded and stored without a buffer
// between. A low-precision step has half the bytes of a float32 one to move, and conversions through buffers would take longer
// than the memory does.
//
// The usual low-precision layouts have loops of their own. Of others with 16-bit parameters and states, one loop looks at the
// formats as it goes, by branches that are always foreseen: an instance each would make hundreds. Every other layout and the last
// few elements go through kernels.cpp's blocks, which give the same bits; with mostly float32 to move they are as fast or faster.
#pragma once

#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace fused {
namespace FUSED_ISA {
namespace {

#if defined(FUSED_LANES)

// ---- operands: `load` and `store` sixteen elements from element i on; those of one layout agree on the order in the lanes ----

struct Stored {
  void* at;
  void* rest;  // float32 master or remainders, by rest_format
  uint8_t format, rest_format;
};

template <Pair (*LOAD)(const float*), void (*STORE)(float*, Pair)>
struct FloatOperand {
  float* at;
  FloatOperand(const Stored& x) : at(static_cast<float*>(x.at)) {}
  FUSED_HD Pair load(int64_t i) const { return LOAD(at + i); }
  FUSED_HD void store(int64_t i, Pair v) const { STORE(at + i, v); }
};

template <Pair (*LOAD)(const uint16_t*), void (*STORE)(uint16_t*, Pair)>
struct HalfOperand {
  uint16_t* at;
  HalfOperand(const Stored& x) : at(static_cast<uint16_t*>(x.at)) {}
  FUSED_HD Pair load(int64_t i) const { return LOAD(at + i); }
  FUSED_HD void store(int64_t i, Pair v) const { STORE(at + i, v); }
};

template <class Low, Pair (*JOIN)(const uint16_t*, const Low*), void (*SPLIT)(uint16_t*, Low*, Pair)>
struct SplitOperand {
  uint16_t* at;
  Low* low;
  SplitOperand(const Stored& x) : at(static_cast<uint16_t*>(x.at)), low(static_cast<Low*>(x.rest)) {}
  FUSED_HD Pair load(int64_t i) const { return JOIN(at + i, low + i); }
  FUSED_HD void store(int64_t i, Pair v) const { SPLIT(at + i, low + i, v); }
};

struct Bf16Layout {
  using Half = HalfOperand<load_bf16_by_parity, store_bf16_by_parity>;
  using Split = SplitOperand<int16_t, join_bf16_by_parity, split_bf16_by_parity>;
  using Split8 = SplitOperand<int8_t, join8_bf16_by_parity, split8_bf16_by_parity>;
  using Float = FloatOperand<load_float_by_parity, store_float_by_parity>;
};

struct Fp16Layout {
  using Half = HalfOperand<load_fp16_in_order, store_fp16_in_order>;
  using Split = SplitOperand<int16_t, join_fp16_in_order, split_fp16_in_order>;
  using Split8 = SplitOperand<int8_t, join8_fp16_in_order, split8_fp16_in_order>;
  using Float = FloatOperand<load_float_in_order, store_float_in_order>;
};

// A parameter or gradient of any format that its layout can read.
template <class Layout>
struct AnyOperand {
  using Half = typename Layout::Half;
  using Float = typename Layout::Float;
  using Split = typename Layout::Split;
  using Split8 = typename Layout::Split8;
  Stored x;
  AnyOperand(const Stored& stored) : x(stored) {}

  FUSED_HD Float master() const { return Stored{x.rest, nullptr, kFloat32, kNone}; }

  FUSED_HD Pair load(int64_t i) const {
    if (x.rest_format == kFloat32) return master().load(i);
    if (x.rest_format == kRemainder16) return Split(x).load(i);
    if (x.rest_format == kRemainder8) return Split8(x).load(i);
    return x.format == kFloat32 ? Float(x).load(i) : Half(x).load(i);
  }

  FUSED_HD void store(int64_t i, Pair v) const {
    if (x.rest_format == kRemainder16) return Split(x).store(i, v);
    if (x.rest_format == kRemainder8) return Split8(x).store(i, v);
    if (x.rest_format == kFloat32) master().store(i, v);
    Half(x).store(i, v);
  }
};

// ---- the loop ----

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
void update_in_registers(const TensorRow& row, const typename Rule::template Constants<float>& constants, float grad_factor,
                         int64_t begin, int64_t end) {
  constexpr int S = Rule::kStates;
  const auto c = broadcast<Rule>(constants);
  const Lanes factor(grad_factor);
  const Param param(Stored{row.param, row.master, row.param_format, row.master_format});
  const Grad grad(Stored{const_cast<void*>(row.grad), nullptr, row.grad_format, kNone});
  const auto stored_state = [&](int k) { return Stored{row.state[k], nullptr, row.state_format[k], kNone}; };
  const State state[] = {stored_state(0), stored_state(1), stored_state(2)};
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
using UpdateInRegisters = void (*)(const TensorRow&, const typename Rule::template Constants<float>&, float, int64_t, int64_t);

template <class Rule, class Layout>
UpdateInRegisters<Rule> in_registers(bool split, bool float_states) {
  using Half = typename Layout::Half;
  using Split = typename Layout::Split;
  using Float = typename Layout::Float;
  if (float_states)
    return split ? &update_in_registers<Rule, Split, Half, Float> : &update_in_registers<Rule, Half, Half, Float>;
  return split ? &update_in_registers<Rule, Split, Half, Half> : &update_in_registers<Rule, Half, Half, Half>;
}

template <class Rule, class Layout>
UpdateInRegisters<Rule> any_in_registers() {
  using Any = AnyOperand<Layout>;
  return &update_in_registers<Rule, Any, Any, typename Layout::Half>;
}

// The loop for a row; null where there is none.
template <class Rule>
UpdateInRegisters<Rule> loop_for(const TensorRow& row) {
  const uint8_t format = row.param_format;
  const bool bf16 = format == kBFloat16;
  if ((!bf16 && format != kFloat16) || row.stochastic) return nullptr;
  bool all_half = true, all_float = Rule::kStates > 0;
  for (int k = 0; k < Rule::kStates; ++k) {
    all_half = all_half && row.state_format[k] == format;
    all_float = all_float && row.state_format[k] == kFloat32;
  }
  const bool split = row.master_format == kRemainder16;
  if (row.grad_format == format && (split || row.master_format == kNone) && (all_half || all_float))
    return (bf16 ? in_registers<Rule, Bf16Layout> : in_registers<Rule, Fp16Layout>)(split, all_float);
  if (!all_half || (row.grad_format != format && row.grad_format != kFloat32)) return nullptr;
  return bf16 ? any_in_registers<Rule, Bf16Layout>() : any_in_registers<Rule, Fp16Layout>();
}

#endif

// Updates as many elements from `begin` on as are kept in registers; returns the first one that is left.
template <class Rule>
int64_t update_registers(const TensorRow& row, const typename Rule::template Constants<float>& constants, float grad_factor,
                         int64_t begin, int64_t end) {
#if defined(FUSED_LANES)
  const auto update = loop_for<Rule>(row);
  if (update == nullptr) return begin;
  const int64_t whole = begin + (end - begin) / kPair * kPair;
  update(row, constants, grad_factor, begin, whole);
  return whole;
#else
  (void)row, (void)constants, (void)grad_factor, (void)end;
  return begin;
#endif
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
