// 8-bit blocks in AVX2, bit for bit as ../blocks8.h has them. What belongs to a block (its scale and what follows from
// it) is one lane of a vector, eight blocks to a vector, and a curve's constants are looked up by a permutation. Every link of
// a block's chain (magnitudes, scale, codes) is a loop over all blocks, so that the processor works on many at a time.
// Blocks with rare contents (NaN, infinities, values outside the reach of their scale) are left to the portable code.
#pragma once

#include <immintrin.h>

#include <limits>

#include "../blocks8.h"

namespace fused {
namespace FUSED_ISA {
namespace {

constexpr int kVectors8 = kBlock8 / 8;
constexpr int kLanes8 = 8;
static_assert(kBlocks8 % kLanes8 == 0 && kCurves <= kLanes8, "blocks fill the lanes of vectors, curves fit into one");

inline __m256i bits256(__m256 x) { return _mm256_castps_si256(x); }
inline __m256 float256(__m256i x) { return _mm256_castsi256_ps(x); }
inline __m256i all(uint32_t x) { return _mm256_set1_epi32(int32_t(x)); }
inline __m256i blend(__m256i no, __m256i yes, __m256i mask) { return _mm256_blendv_epi8(no, yes, mask); }
inline __m256i magnitude256(const float* x) { return _mm256_and_si256(bits256(_mm256_loadu_ps(x)), all(kMagnitude)); }
inline bool any(__m256i mask) { return _mm256_movemask_epi8(mask) != 0; }
inline unsigned mask_bits(__m256i mask) { return unsigned(_mm256_movemask_ps(float256(mask))); }

template <class T>
inline void put(T* to, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), x); }
inline void put(float* to, __m256 x) { _mm256_store_ps(to, x); }

inline __m256i load_scales(const uint16_t* scales) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
}

inline void store_scales(uint16_t* to, __m256i words) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

// Lane i of the result combines the lanes of v[i].
template <class Join>
inline __m256i over_lanes(const __m256i* v, Join join) {
  __m256i w[4], y[2];
  for (int i = 0; i < 4; ++i) w[i] = join(_mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 2; ++i) y[i] = join(_mm256_unpacklo_epi64(w[2 * i], w[2 * i + 1]), _mm256_unpackhi_epi64(w[2 * i], w[2 * i + 1]));
  return join(_mm256_permute2x128_si256(y[0], y[1], 0x20), _mm256_permute2x128_si256(y[0], y[1], 0x31));
}

inline int padded(int blocks) { return (blocks + kLanes8 - 1) / kLanes8 * kLanes8; }

// The four vectors of a block after narrowing to bytes within 128-bit halves, in the order of the elements.
inline __m256i in_order(__m256i bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// ---- signed ----

struct CurveTable {
  alignas(32) uint32_t bits[kLanes8] = {}, first[kLanes8] = {}, halvings[kLanes8] = {}, bias[kLanes8] = {};
  alignas(32) float bend[kLanes8] = {}, reach[kLanes8] = {};

  constexpr CurveTable() {
    for (uint32_t c = 0; c < kCurves; ++c) {
      const Curve8 curve = curve8(c);
      halvings[c] = curve.halvings, bias[c] = curve.bias, bend[c] = curve.bend, reach[c] = curve.reach;
      bits[c] = curve_bits(c), first[c] = curve_first(c);
    }
  }
};

// Made by the compiler: code of this instruction set must not run where the module is only loaded.
constexpr CurveTable kCurveTable;

inline __m256i look_up(const uint32_t* table, __m256i curve) {
  return _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)), curve);
}
inline __m256 look_up(const float* table, __m256i curve) { return _mm256_permutevar8x32_ps(_mm256_load_ps(table), curve); }

inline __m256i curves_of(__m256i words) {
  const __m256i low = _mm256_and_si256(words, all(0xffu));
  return blend(_mm256_sub_epi32(_mm256_srli_epi32(low, 5), all(4u)), _mm256_srli_epi32(low, 7), _mm256_cmpgt_epi32(all(192u), low));
}

inline __m256 tops_of(__m256i words, __m256i curves) {
  const __m256i bits = look_up(kCurveTable.bits, curves);
  const __m256i mask = _mm256_sub_epi32(_mm256_sllv_epi32(all(1u), bits), all(1u));
  const __m256i mantissa = _mm256_sllv_epi32(_mm256_and_si256(words, mask), _mm256_sub_epi32(all(23u), bits));
  return float256(_mm256_or_si256(_mm256_slli_epi32(_mm256_srli_epi32(words, 8), 23), mantissa));
}

struct DecodeSigned {
  static constexpr bool kSigned = true;
  alignas(32) uint32_t halvings[kBlocks8], bias[kBlocks8];
  alignas(32) float reach[kBlocks8], unit[kBlocks8];

  DecodeSigned(const uint16_t* scales, int blocks) {
    for (int b = 0; b < blocks; b += kLanes8) {
      const __m256i words = load_scales(scales + b), curves = curves_of(words);
      put(halvings + b, look_up(kCurveTable.halvings, curves));
      put(bias + b, look_up(kCurveTable.bias, curves));
      put(reach + b, look_up(kCurveTable.reach, curves));
      put(unit + b, _mm256_div_ps(tops_of(words, curves), look_up(kCurveTable.bend, curves)));
    }
  }
};

// Whether there is no NaN among the codes of block b, and its values.
inline bool decode(const DecodeSigned& group, int b, const uint8_t* code, float* out) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
  if (any(_mm256_cmpeq_epi8(codes, _mm256_set1_epi8(char(kSignedNan))))) return false;
  const __m256 reach = _mm256_set1_ps(group.reach[b]), unit = _mm256_set1_ps(group.unit[b]), sign = _mm256_set1_ps(-0.0f);
  const auto values = [&](auto power) {
    for (int v = 0; v < kVectors8; ++v) {
      const __m256i c = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + 8 * v)));
      const __m256 level = _mm256_cvtepi32_ps(c);
      const __m256 z = _mm256_div_ps(level, _mm256_sub_ps(reach, _mm256_andnot_ps(sign, level)));
      _mm256_storeu_ps(out + 8 * v, _mm256_mul_ps(power(z), unit));
    }
  };
  if (group.halvings[b] == 0u) {  // most blocks
    values([](__m256 z) { return z; });
    return true;
  }
  const __m256i halvings = all(group.halvings[b]), bias = all(group.bias[b]);
  values([&](__m256 z) {
    const __m256i root = _mm256_sub_epi32(bits256(_mm256_andnot_ps(sign, z)), bias);
    const __m256i x = _mm256_sllv_epi32(_mm256_max_epi32(root, _mm256_setzero_si256()), halvings);
    return _mm256_or_ps(float256(x), _mm256_and_ps(z, sign));
  });
  return true;
}

inline __m256i scales_signed(__m256i largest, __m256i curves) {
  const __m256i bounded = _mm256_min_epi32(_mm256_max_epi32(largest, all(kSmallestScale)), all(kLargestScale));
  const __m256i bits = look_up(kCurveTable.bits, curves), dropped = _mm256_sub_epi32(all(23u), bits), one = all(1u);
  const __m256i half = _mm256_sllv_epi32(one, _mm256_sub_epi32(dropped, one));
  const __m256i top = _mm256_srlv_epi32(_mm256_add_epi32(bounded, half), dropped);
  const __m256i mask = _mm256_sub_epi32(_mm256_sllv_epi32(one, bits), one);
  const __m256i low = _mm256_or_si256(look_up(kCurveTable.first, curves), _mm256_and_si256(top, mask));
  const __m256i word = _mm256_or_si256(_mm256_slli_epi32(_mm256_srlv_epi32(top, bits), 8), low);
  return _mm256_andnot_si256(_mm256_cmpeq_epi32(largest, _mm256_setzero_si256()), word);
}

constexpr int kZeroShift = 15;
static_assert((kBlock8 - 1) * kDeficitLimit < 1 << kZeroShift, "the largest magnitude has no deficit");

// The high half of each lane, less one, twice.
inline __m256i high_halves_less_one(__m256i v) {
  const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(v, 16), v, 0xaa);
  return _mm256_sub_epi16(high, _mm256_set1_epi16(1));
}

// What block8_deficit counts, summed over a block, and from bit kZeroShift on the number of zeros. The high halves of two vectors
// are worked on together; a zero's half, less one, is past every other. `top` is that of the largest magnitude in every lane.
inline __m256i deficits(const float* in, __m256i top) {
  const __m256i one = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
  __m256i deficit[2], zeros[2];
  for (int v = 0; v < 2; ++v) {
    const __m256i low = bits256(_mm256_loadu_ps(in + 16 * v)), high = bits256(_mm256_loadu_ps(in + 16 * v + 8));
    const __m256i halves = _mm256_and_si256(_mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xaa), _mm256_set1_epi16(0x7fff));
    const __m256i below = _mm256_subs_epu16(top, _mm256_sub_epi16(halves, one));
    deficit[v] = _mm256_min_epi16(below, _mm256_set1_epi16(int16_t(kDeficitLimit)));
    zeros[v] = _mm256_cmpeq_epi16(halves, zero);
  }
  const __m256i each_zero = _mm256_set1_epi16(std::numeric_limits<int16_t>::min());  // times -1
  return _mm256_add_epi32(_mm256_madd_epi16(_mm256_add_epi16(deficit[0], deficit[1]), one),
                          _mm256_madd_epi16(_mm256_add_epi16(zeros[0], zeros[1]), each_zero));
}

inline __m256i curves_for(__m256i deficits_and_zeros) {
  const __m256i deficit = _mm256_and_si256(deficits_and_zeros, all((1u << kZeroShift) - 1u));
  const __m256i count = _mm256_sub_epi32(all(kBlock8), _mm256_srli_epi32(deficits_and_zeros, kZeroShift));
  __m256i curves = _mm256_setzero_si256();
  for (const int32_t mean : {kSteeper, kSquareRoot, kFourthRoot})
    curves = _mm256_sub_epi32(curves, _mm256_cmpgt_epi32(deficit, _mm256_mullo_epi32(count, all(uint32_t(mean)))));
  return curves;
}

inline __m256i largest_of(const float* in) {
  return _mm256_max_epu32(_mm256_max_epu32(magnitude256(in), magnitude256(in + 8)),
                          _mm256_max_epu32(magnitude256(in + 16), magnitude256(in + 24)));
}

// Returns the blocks, as bits, that hold what this code does not know.
inline uint32_t encode_signed(const float* in, int count, uint8_t* out, uint16_t* scales) {
  const auto sum = [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); };
  const auto maximum = [](__m256i a, __m256i b) { return _mm256_max_epu32(a, b); };
  alignas(32) uint32_t top[kBlocks8], top_half[kBlocks8];
  alignas(32) uint32_t halvings[kBlocks8], bias[kBlocks8];
  alignas(32) float gain[kBlocks8], reach[kBlocks8];
  __m256i v[kBlocks8];
  uint32_t rare = 0;
  for (int b = 0; b < count; ++b) v[b] = largest_of(in + b * kBlock8);
  for (int b = count; b < padded(count); ++b) v[b] = _mm256_setzero_si256();
  for (int b = 0; b < count; b += kLanes8) {
    const __m256i largest = over_lanes(v + b, maximum);
    put(top + b, largest);
    put(top_half + b, high_halves_less_one(largest));
  }
  for (int b = 0; b < count; ++b) v[b] = deficits(in + b * kBlock8, all(top_half[b]));
  for (int b = 0; b < count; b += kLanes8) {
    const __m256i largest = _mm256_load_si256(reinterpret_cast<const __m256i*>(top + b));
    const __m256i curves = curves_for(over_lanes(v + b, sum));
    const __m256i words = scales_signed(largest, curves);
    const __m256 tops = tops_of(words, curves);
    store_scales(scales + b, words);
    const __m256 there = _mm256_cmp_ps(tops, _mm256_setzero_ps(), _CMP_GT_OQ);
    put(gain + b, _mm256_and_ps(_mm256_div_ps(look_up(kCurveTable.bend, curves), tops), there));
    put(reach + b, look_up(kCurveTable.reach, curves));
    put(halvings + b, look_up(kCurveTable.halvings, curves));
    put(bias + b, look_up(kCurveTable.bias, curves));
    rare |= mask_bits(_mm256_cmpgt_epi32(largest, all(kInfinity - 1u))) << b;
  }
  const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
  for (int b = 0; b < count; ++b) {
    const __m256 up = _mm256_set1_ps(gain[b]), most = _mm256_set1_ps(reach[b]);
    __m256i level[kVectors8];
    const auto levels = [&](auto root) {
      for (int i = 0; i < kVectors8; ++i) {
        const __m256 z = root(_mm256_mul_ps(_mm256_loadu_ps(in + b * kBlock8 + 8 * i), up));
        level[i] = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_mul_ps(most, z), _mm256_add_ps(one, _mm256_andnot_ps(sign, z))));
      }
    };
    if (halvings[b] == 0u) {  // most blocks
      levels([](__m256 r) { return r; });
    } else {
      const __m256i times = all(halvings[b]), back = all(bias[b]);
      levels([&](__m256 r) {
        const __m256i z = _mm256_add_epi32(_mm256_srlv_epi32(bits256(_mm256_andnot_ps(sign, r)), times), back);
        return _mm256_or_ps(float256(z), _mm256_and_ps(r, sign));
      });
    }
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(level[0], level[1]), _mm256_packs_epi32(level[2], level[3]));
    const __m256i codes = _mm256_max_epi8(in_order(packed), _mm256_set1_epi8(-kSignedLevels));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b * kBlock8), codes);
  }
  return rare;
}

// ---- unsigned ----

inline __m256i lows_of(__m256i words) { return _mm256_slli_epi32(_mm256_srli_epi32(words, 6), kLowShift); }

inline __m256i steps_of(__m256i words) {
  const __m256i mantissa = _mm256_or_si256(_mm256_and_si256(words, all(7u)), all(8u));
  return _mm256_sllv_epi32(mantissa, _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(words, 3), all(7u)), all(11u)));
}

struct DecodeUnsigned {
  static constexpr bool kSigned = false;
  alignas(32) int32_t step[kBlocks8], before[kBlocks8];

  DecodeUnsigned(const uint16_t* scales, int blocks) {
    for (int b = 0; b < blocks; b += kLanes8) {
      const __m256i words = load_scales(scales + b), steps = steps_of(words);
      put(step + b, steps);
      put(before + b, _mm256_sub_epi32(lows_of(words), steps));
    }
  }
};

inline bool decode(const DecodeUnsigned& group, int b, const uint8_t* code, float* out) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
  if (any(_mm256_cmpeq_epi8(codes, _mm256_set1_epi8(char(kUnsignedNan))))) return false;
  const __m256i step = all(uint32_t(group.step[b])), before = all(uint32_t(group.before[b])), most = all(kInfinity - 1u);
  for (int v = 0; v < kVectors8; ++v) {
    const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + 8 * v)));
    // As unsigned numbers: the last level of a range that ends at the largest values may lie above 2^31.
    const __m256i u = _mm256_min_epu32(_mm256_add_epi32(_mm256_mullo_epi32(c, step), before), most);
    const __m256i zero = _mm256_cmpeq_epi32(c, _mm256_setzero_si256());
    _mm256_storeu_ps(out + 8 * v, float256(_mm256_andnot_si256(zero, u)));
  }
  return true;
}

inline __m256i scales_unsigned(__m256i smallest, __m256i largest) {
  const __m256i zero = _mm256_setzero_si256(), one = all(1u);
  const __m256i reach = _mm256_add_epi32(_mm256_sub_epi32(largest, all(kWidestRange)), all((1u << kLowShift) - 1u));
  const __m256i bound = _mm256_max_epi32(_mm256_srai_epi32(reach, kLowShift), all(4u));
  const __m256i low = _mm256_max_epi32(_mm256_srli_epi32(smallest, kLowShift), bound);
  const __m256i width = _mm256_max_epi32(_mm256_sub_epi32(largest, _mm256_slli_epi32(low, kLowShift)), one);
  const __m256 step = _mm256_mul_ps(_mm256_cvtepi32_ps(width), _mm256_set1_ps(1.0f / 253.0f));
  const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits256(step), all(0xfffffu)), kStepShift);
  const __m256i index = _mm256_min_epi32(_mm256_max_epi32(_mm256_sub_epi32(number, all(kSmallestStep)), zero), all(63u));
  return _mm256_andnot_si256(_mm256_cmpeq_epi32(largest, zero), _mm256_or_si256(_mm256_slli_epi32(low, 6), index));
}

inline __m256i phases_of(uint32_t number, uint32_t step) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i h = _mm256_mullo_epi32(_mm256_add_epi32(all(number), lane), all(0x9E3779B1u));
  h = _mm256_mullo_epi32(_mm256_xor_si256(h, _mm256_srli_epi32(h, 15)), all(0x85EBCA6Bu));
  return _mm256_add_epi32(h, all(step * 0x9E3779B9u));
}

inline uint32_t encode_unsigned(const float* in, int count, uint8_t* out, uint16_t* scales, uint32_t number, uint32_t step) {
  const __m256i one = all(1u), zero = _mm256_setzero_si256();
  const auto maximum = [](__m256i a, __m256i b) { return _mm256_max_epu32(a, b); };
  const auto minimum = [](__m256i a, __m256i b) { return _mm256_min_epu32(a, b); };
  __m256i top[kBlocks8], least[kBlocks8];
  alignas(32) int32_t low[kBlocks8], phase[kBlocks8];
  alignas(32) float inverse[kBlocks8];
  uint32_t rare = 0;
  for (int b = 0; b < count; ++b) {
    const float* x = in + b * kBlock8;
    top[b] = largest_of(x);
    // Less one: zeros come last.
    const __m256i low01 = _mm256_min_epu32(_mm256_sub_epi32(magnitude256(x), one), _mm256_sub_epi32(magnitude256(x + 8), one));
    const __m256i low23 = _mm256_min_epu32(_mm256_sub_epi32(magnitude256(x + 16), one), _mm256_sub_epi32(magnitude256(x + 24), one));
    least[b] = _mm256_min_epu32(low01, low23);
  }
  for (int b = count; b < padded(count); ++b) top[b] = least[b] = zero;
  for (int b = 0; b < count; b += kLanes8) {
    const __m256i largest = over_lanes(top + b, maximum), smallest = _mm256_add_epi32(over_lanes(least + b, minimum), one);
    const __m256i words = scales_unsigned(smallest, largest), lows = lows_of(words), empty = _mm256_cmpeq_epi32(largest, zero);
    store_scales(scales + b, words);
    put(low + b, blend(lows, all(kInfinity), empty));  // zeros are below every range
    put(phase + b, phases_of(number + uint32_t(b), step));
    put(inverse + b, _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_cvtepi32_ps(steps_of(words))));
    const __m256i below = _mm256_andnot_si256(empty, _mm256_cmpgt_epi32(lows, smallest));
    rare |= mask_bits(_mm256_or_si256(_mm256_cmpgt_epi32(largest, all(kInfinity - 1u)), below)) << b;
  }
  const __m256i lanes = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), all(kLanePhase));
  const uint32_t narrow = block8_narrow(step);
  const __m256i first = all(block8_least_threshold(narrow));
  const __m128i shift = _mm_cvtsi32_si128(int(9u + narrow));
  for (int b = 0; b < count; ++b) {
    const __m256i begin = all(uint32_t(low[b])), start = _mm256_add_epi32(lanes, all(uint32_t(phase[b])));
    const __m256 levels = _mm256_set1_ps(inverse[b]);
    __m256i level[kVectors8];
    for (int i = 0; i < kVectors8; ++i) {
      const __m256i turn = _mm256_srl_epi32(_mm256_add_epi32(start, all(uint32_t(8 * i) * kLanePhase)), shift);
      const __m256 up = float256(_mm256_add_epi32(turn, first));
      const __m256i above = _mm256_sub_epi32(magnitude256(in + b * kBlock8 + 8 * i), begin);
      // Of a zero this is less than one, which narrows to the code of zero.
      level[i] = _mm256_cvttps_epi32(_mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(above), levels), up));
    }
    const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(level[0], level[1]), _mm256_packs_epi32(level[2], level[3]));
    const __m256i codes = _mm256_min_epu8(in_order(packed), _mm256_set1_epi8(char(kUnsignedLevels)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b * kBlock8), codes);
  }
  return rare;
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
