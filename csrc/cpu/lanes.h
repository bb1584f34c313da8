// Eight float32 lanes and the conversions of stored formats to and from them, where the processor has AVX2 and F16C.
//
// The rules of rules.h are templates, and Lanes is a type they can be instantiated with: what they ask of a number is an
// operator or one of the functions below. Every operation is correctly rounded, so results are those of the scalar text.
// The conversions give the bits of formats.h but for the payload of float16's NaN, which comes out quiet. A compiler's own
// vector code for them takes about twice as long: it shuffles across lanes and shifts where a blend would do.
#pragma once

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FUSED_LANES 1

#include <immintrin.h>

#include <cstdint>

#include "../formats.h"

namespace fused {
namespace FUSED_ISA {
namespace {

// ---- a number to the rules ----

// What rules call by name is a friend, found for arguments of this type alone: beside the scalar functions it would hide them.
struct Lanes {
  __m256 x;

  Lanes() = default;
  FUSED_HD Lanes(__m256 value) : x(value) {}
  FUSED_HD explicit Lanes(double value) : x(_mm256_set1_ps(float(value))) {}

  FUSED_HD __m256i bits() const { return _mm256_castps_si256(x); }

  friend FUSED_HD Lanes operator+(Lanes a, Lanes b) { return _mm256_add_ps(a.x, b.x); }
  friend FUSED_HD Lanes operator-(Lanes a, Lanes b) { return _mm256_sub_ps(a.x, b.x); }
  friend FUSED_HD Lanes operator*(Lanes a, Lanes b) { return _mm256_mul_ps(a.x, b.x); }
  friend FUSED_HD Lanes operator/(Lanes a, Lanes b) { return _mm256_div_ps(a.x, b.x); }
  friend FUSED_HD Lanes operator-(Lanes a) { return _mm256_xor_ps(a.x, _mm256_set1_ps(-0.0f)); }
  FUSED_HD Lanes& operator*=(Lanes b) { return *this = *this * b; }
  FUSED_HD Lanes& operator+=(Lanes b) { return *this = *this + b; }

  friend FUSED_HD Lanes choose(__m256 condition, Lanes a, Lanes b) { return _mm256_blendv_ps(b.x, a.x, condition); }
  friend FUSED_HD __m256 below(Lanes a, Lanes b) { return _mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ); }
  friend FUSED_HD __m256 is_nan(Lanes a) { return _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q); }

  friend FUSED_HD Lanes fma_(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a.x, b.x, c.x); }
  friend FUSED_HD Lanes quotient(Lanes x, Lanes divisor, Lanes) { return x / divisor; }
  friend FUSED_HD Lanes sqrt_(Lanes a) { return _mm256_sqrt_ps(a.x); }

  friend FUSED_HD Lanes if_nonzero(Lanes value, Lanes a, Lanes b) {
    return choose(_mm256_cmp_ps(value.x, _mm256_setzero_ps(), _CMP_NEQ_UQ), a, b);
  }

  friend FUSED_HD Lanes lerp(Lanes start, Lanes end, Lanes weight) {
    const __m256 low = below(weight, Lanes(0.5));
    return fma_(choose(low, weight, weight - Lanes(1.0)), end - start, choose(low, start, end));
  }

  friend FUSED_HD Lanes max_nan(Lanes a, Lanes b) { return choose(_mm256_or_ps(below(b, a), is_nan(a)), a, b); }

  friend FUSED_HD Lanes clamp_nan(Lanes a, Lanes limit) {
    const Lanes raised = choose(below(a, -limit), -limit, a);
    return choose(below(limit, raised), limit, raised);
  }

  friend FUSED_HD Lanes sign(Lanes a) {
    return choose(below(Lanes(0.0), a), Lanes(1.0), choose(below(a, Lanes(0.0)), Lanes(-1.0), a));
  }
};

FUSED_HD Lanes lanes_of(__m256i bits) { return _mm256_castsi256_ps(bits); }

// ---- sixteen elements at a time ----

constexpr int64_t kPair = 16;

// In order: a has the first eight elements. By parity: a has the even elements, b the odd ones, as 16-bit formats lie in
// 32-bit words, and no shuffle is needed.
struct Pair {
  Lanes a, b;
};

FUSED_HD __m256i load16(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
FUSED_HD void store16(void* at, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(at), value); }

// Two times eight 32-bit values that fit in 16 bits, in order.
FUSED_HD __m256i pack_unsigned(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }
FUSED_HD __m256i pack_signed(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }

// The high halves of words by parity, and of 32-bit words the low halves.
FUSED_HD __m256i high_halves(__m256i even, __m256i odd) { return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa); }
FUSED_HD __m256i low_halves(__m256i even, __m256i odd) { return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa); }

FUSED_HD __m256i magnitude_of(__m256i bits) { return _mm256_and_si256(bits, _mm256_set1_epi32(int32_t(kMagnitude))); }
FUSED_HD Lanes canonical(Lanes a) { return choose(is_nan(a), lanes_of(_mm256_set1_epi32(0x7fc00000)), a); }
FUSED_HD __m256i canonical_bits(Lanes a) { return canonical(a).bits(); }

// NaN is rare, and a branch that is not taken cheaper than replacing none.
FUSED_HD bool any_nan(Pair v) { return __builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(v.a.x, v.b.x, _CMP_UNORD_Q)), 0) != 0; }
FUSED_HD Pair canonical(Pair v) {
  if (any_nan(v)) v = {canonical(v.a), canonical(v.b)};
  return v;
}

// ---- float32 ----

FUSED_HD Pair load_float_in_order(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }

FUSED_HD void store_float_in_order(float* at, Pair v) {
  _mm256_storeu_ps(at, v.a.x);
  _mm256_storeu_ps(at + 8, v.b.x);
}

FUSED_HD Pair load_float_by_parity(const float* at) {
  const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)), _mm_loadu_ps(at + 8), 1);
  const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at + 4)), _mm_loadu_ps(at + 12), 1);
  return {_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)};
}

FUSED_HD void store_float_by_parity(float* at, Pair v) {
  const __m256 a = _mm256_unpacklo_ps(v.a.x, v.b.x), b = _mm256_unpackhi_ps(v.a.x, v.b.x);
  _mm_storeu_ps(at, _mm256_castps256_ps128(a));
  _mm_storeu_ps(at + 4, _mm256_castps256_ps128(b));
  _mm_storeu_ps(at + 8, _mm256_extractf128_ps(a, 1));
  _mm_storeu_ps(at + 12, _mm256_extractf128_ps(b, 1));
}

// ---- bfloat16 ----

FUSED_HD Pair load_bf16_by_parity(const uint16_t* at) {
  const __m256i words = load16(at);
  return {lanes_of(_mm256_slli_epi32(words, 16)), lanes_of(_mm256_blend_epi16(words, _mm256_setzero_si256(), 0x55))};
}

FUSED_HD Pair load_bf16_in_order(const uint16_t* at) {
  const __m256i zero = _mm256_setzero_si256(), words = _mm256_permute4x64_epi64(load16(at), 0xd8);
  return {lanes_of(_mm256_unpacklo_epi16(zero, words)), lanes_of(_mm256_unpackhi_epi16(zero, words))};
}

// To nearest even in the high half; not for NaN. What an even result needs less than an odd one comes from a comparison.
FUSED_HD __m256i round_bf16(Lanes a) {
  const __m256i u = a.bits();
  const __m256i even = _mm256_cmpeq_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x10000)), _mm256_setzero_si256());
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x8000)), even);
}

FUSED_HD __m256i round_bf16_stochastic(Lanes a, __m256i random) {
  const __m256i u = canonical_bits(a);
  const __m256i infinity = _mm256_set1_epi32(int32_t(kInfinity));
  const __m256i finite = _mm256_cmpgt_epi32(infinity, magnitude_of(u));
  return _mm256_add_epi32(u, _mm256_and_si256(finite, _mm256_srli_epi32(random, 16)));
}

FUSED_HD void store_bf16_by_parity(uint16_t* at, Pair v) {
  v = canonical(v);
  store16(at, high_halves(round_bf16(v.a), round_bf16(v.b)));
}

FUSED_HD void store_high_halves_in_order(uint16_t* at, __m256i a, __m256i b) {
  store16(at, pack_unsigned(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16)));
}

FUSED_HD void store_bf16_in_order(uint16_t* at, Pair v) {
  v = canonical(v);
  store_high_halves_in_order(at, round_bf16(v.a), round_bf16(v.b));
}

FUSED_HD void store_bf16_stochastic_in_order(uint16_t* at, Pair v, const uint32_t* random) {
  store_high_halves_in_order(at, round_bf16_stochastic(v.a, load16(random)), round_bf16_stochastic(v.b, load16(random + 8)));
}

// ---- bfloat16 with a remainder of 16 bits (join16_bf16, split16_bf16) ----

FUSED_HD Pair join_bf16(__m256i p, __m256i l) {
  const __m256i borrow = _mm256_srai_epi16(l, 15);
  const __m256i zero = _mm256_cmpeq_epi16(_mm256_slli_epi16(p, 1), _mm256_setzero_si256());
  const __m256i high = _mm256_add_epi16(p, _mm256_andnot_si256(zero, borrow));
  const __m256i rest = _mm256_andnot_si256(_mm256_and_si256(zero, borrow), l);
  return {lanes_of(_mm256_blend_epi16(_mm256_slli_epi32(high, 16), rest, 0x55)),
          lanes_of(_mm256_blend_epi16(high, _mm256_srli_epi32(rest, 16), 0x55))};
}

FUSED_HD Pair join_bf16_by_parity(const uint16_t* param, const int16_t* low) { return join_bf16(load16(param), load16(low)); }

FUSED_HD void split_bf16_by_parity(uint16_t* param, int16_t* low, Pair v) {
  v = canonical(v);
  const __m256i a = v.a.bits(), b = v.b.bits(), half = _mm256_set1_epi32(0x8000);
  store16(param, high_halves(_mm256_add_epi32(a, half), _mm256_add_epi32(b, half)));
  store16(low, low_halves(a, b));
}

// ---- bfloat16 with a remainder of 8 bits (join8_bf16, split8_bf16): the same with zeros below ----

// What is added before the low 8 bits are dropped.
struct Rounding {
  __m256i a, b;
};

FUSED_HD Rounding nearest8() { return {_mm256_set1_epi32(0x80), _mm256_set1_epi32(0x80)}; }

FUSED_HD Rounding random8_in_order(const uint32_t* random) {
  return {_mm256_srli_epi32(load16(random), 24), _mm256_srli_epi32(load16(random + 8), 24)};
}

FUSED_HD Rounding random8_by_parity(const uint32_t* random) {
  const Pair r = load_float_by_parity(reinterpret_cast<const float*>(random));
  return {_mm256_srli_epi32(r.a.bits(), 24), _mm256_srli_epi32(r.b.bits(), 24)};
}

FUSED_HD Pair join8_bf16_by_parity(const uint16_t* param, const int8_t* low) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  return join_bf16(load16(param), _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 8));
}

// Not for NaN other than the canonical one: its low 8 bits, and those of infinity, are zero, so that nothing carries into others.
FUSED_HD __m256i keep24(Lanes a, __m256i round) {
  return _mm256_andnot_si256(_mm256_set1_epi32(0xff), _mm256_add_epi32(a.bits(), round));
}

FUSED_HD void split8_bf16_by_parity(uint16_t* param, int8_t* low, Pair v, Rounding round) {
  v = canonical(v);
  const __m256i a = keep24(v.a, round.a), b = keep24(v.b, round.b), half = _mm256_set1_epi32(0x8000);
  store16(param, high_halves(_mm256_add_epi32(a, half), _mm256_add_epi32(b, half)));
  const __m256i rest = _mm256_srli_epi16(low_halves(a, b), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low),
                   _mm_packus_epi16(_mm256_castsi256_si128(rest), _mm256_extracti128_si256(rest, 1)));
}

FUSED_HD void split8_bf16_by_parity(uint16_t* param, int8_t* low, Pair v) { split8_bf16_by_parity(param, low, v, nearest8()); }

// ---- float16 ----

FUSED_HD Lanes float_of_fp16(__m128i halves) { return _mm256_cvtph_ps(halves); }

FUSED_HD Pair load_fp16_in_order(const uint16_t* at) {
  const __m128i* from = reinterpret_cast<const __m128i*>(at);
  return {float_of_fp16(_mm_loadu_si128(from)), float_of_fp16(_mm_loadu_si128(from + 1))};
}

// To nearest even; of a NaN only the quiet bit and the sign are kept.
FUSED_HD __m256i round_fp16_in_order(Pair v) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i h = _mm256_set_m128i(_mm256_cvtps_ph(v.b.x, kNearest), _mm256_cvtps_ph(v.a.x, kNearest));
  if (!any_nan(v)) return h;
  const __m256i magnitude = _mm256_and_si256(h, _mm256_set1_epi16(0x7fff));
  const __m256i nan = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x7c00));
  return _mm256_andnot_si256(_mm256_srli_epi16(nan, 7), h);
}

FUSED_HD __m256i round_fp16_stochastic(Lanes a, __m256i random) {
  const __m256i m = magnitude_of(a.bits()), denormals = _mm256_set1_epi32(0x38800000);
  const Lanes scaled = lanes_of(_mm256_min_epi32(m, denormals)) * Lanes(0x1p24);
  const __m256i whole = _mm256_cvttps_epi32(scaled.x);
  const Lanes fraction = scaled - Lanes(_mm256_cvtepi32_ps(whole));
  const Lanes threshold = Lanes(_mm256_cvtepi32_ps(_mm256_srli_epi32(random, 8))) * Lanes(0x1p-24);
  const __m256i denormal = _mm256_sub_epi32(whole, _mm256_cmpgt_epi32(fraction.bits(), threshold.bits()));
  const __m256i shifted = _mm256_add_epi32(_mm256_sub_epi32(m, _mm256_set1_epi32(112 << 23)), _mm256_srli_epi32(random, 19));
  const __m256i finite = _mm256_blendv_epi8(_mm256_srli_epi32(shifted, 13), denormal, _mm256_cmpgt_epi32(denormals, m));
  const __m256i special = choose(is_nan(a), lanes_of(_mm256_set1_epi32(0x7e00)), lanes_of(_mm256_set1_epi32(0x7c00))).bits();
  const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x47800000), m);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(a.bits(), 16), _mm256_set1_epi32(0x8000));
  return _mm256_or_si256(_mm256_blendv_epi8(special, finite, inside), sign);
}

FUSED_HD void store_fp16_in_order(uint16_t* at, Pair v) { store16(at, round_fp16_in_order(v)); }

FUSED_HD void store_fp16_stochastic_in_order(uint16_t* at, Pair v, const uint32_t* random) {
  store16(at, pack_unsigned(round_fp16_stochastic(v.a, load16(random)), round_fp16_stochastic(v.b, load16(random + 8))));
}

// ---- float16 with a remainder (join16_fp16, split16_fp16, join8_fp16, split8_fp16) ----

FUSED_HD __m256i below_normal_fp16(__m256i magnitude) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(0x38800000), magnitude); }

// `normal` counts float32 spacings, `fixed` the units below the normal range.
FUSED_HD Lanes join_fp16(__m128i half, __m256i normal, __m256i fixed, double unit) {
  const __m256i h = float_of_fp16(half).bits(), a = magnitude_of(h), sign = _mm256_xor_si256(h, a);
  const __m256i denormal = below_normal_fp16(a);
  const __m256i finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(kInfinity)), a);
  const Lanes small = lanes_of(_mm256_and_si256(a, denormal)) + Lanes(_mm256_cvtepi32_ps(fixed)) * Lanes(unit);
  const __m256i large = _mm256_add_epi32(a, _mm256_and_si256(normal, finite));
  return lanes_of(_mm256_xor_si256(sign, _mm256_blendv_epi8(large, small.bits(), denormal)));
}

// The distance in the one or the other; `denormal` says in which.
FUSED_HD __m256i distance_fp16(Lanes master, __m128i half, double units, __m256i& denormal) {
  const __m256i h = magnitude_of(float_of_fp16(half).bits()), m = magnitude_of(master.bits());
  denormal = below_normal_fp16(h);
  const __m256i finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(kInfinity)), h);
  const Lanes difference = lanes_of(_mm256_and_si256((lanes_of(m) - lanes_of(h)).bits(), denormal)) * Lanes(units);
  const Lanes half_unit = choose(below(difference, Lanes(0.0)), Lanes(-0.5), Lanes(0.5));
  const __m256i fixed = _mm256_cvttps_epi32((difference + half_unit).x);
  return _mm256_and_si256(finite, _mm256_blendv_epi8(_mm256_sub_epi32(m, h), fixed, denormal));
}

FUSED_HD Pair join_fp16_in_order(const uint16_t* param, const int16_t* low) {
  const __m256i p = load16(param), l = load16(low);
  const __m256i a = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(l)), b = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(l, 1));
  return {join_fp16(_mm256_castsi256_si128(p), a, a, 0x1p-39), join_fp16(_mm256_extracti128_si256(p, 1), b, b, 0x1p-39)};
}

FUSED_HD void split_fp16_in_order(uint16_t* param, int16_t* low, Pair v) {
  const __m256i p = round_fp16_in_order(v);
  __m256i denormal;
  const __m256i a = distance_fp16(v.a, _mm256_castsi256_si128(p), 0x1p39, denormal);
  const __m256i b = distance_fp16(v.b, _mm256_extracti128_si256(p, 1), 0x1p39, denormal);
  store16(param, p);
  store16(low, pack_signed(a, b));  // saturates
}

FUSED_HD Pair join8_fp16_in_order(const uint16_t* param, const int8_t* low) {
  const __m256i p = load16(param);
  const __m128i l = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m256i a = _mm256_cvtepi8_epi32(l), b = _mm256_cvtepi8_epi32(_mm_srli_si128(l, 8));
  return {join_fp16(_mm256_castsi256_si128(p), _mm256_slli_epi32(a, 5), a, 0x1p-32),
          join_fp16(_mm256_extracti128_si256(p, 1), _mm256_slli_epi32(b, 5), b, 0x1p-32)};
}

FUSED_HD __m256i remainder8_fp16(Lanes master, __m128i half, __m256i round) {
  __m256i denormal;
  const __m256i distance = distance_fp16(master, half, 0x1p40, denormal);
  const __m256i fixed = _mm256_srai_epi32(_mm256_add_epi32(distance, round), 8);
  const __m256i normal = _mm256_srai_epi32(_mm256_add_epi32(distance, _mm256_srli_epi32(round, 3)), 5);
  return _mm256_blendv_epi8(normal, fixed, denormal);
}

FUSED_HD void split8_fp16_in_order(uint16_t* param, int8_t* low, Pair v, Rounding round) {
  const __m256i p = round_fp16_in_order(v);
  const __m256i rest = pack_signed(remainder8_fp16(v.a, _mm256_castsi256_si128(p), round.a),
                                   remainder8_fp16(v.b, _mm256_extracti128_si256(p, 1), round.b));
  store16(param, p);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low),
                   _mm_packs_epi16(_mm256_castsi256_si128(rest), _mm256_extracti128_si256(rest, 1)));  // both saturate
}

FUSED_HD void split8_fp16_in_order(uint16_t* param, int8_t* low, Pair v) { split8_fp16_in_order(param, low, v, nearest8()); }

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused

#endif
