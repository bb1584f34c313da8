// 8-bit blocks on the device. ../blocks8.h defines them; this is how a thread gets to the same bits in less than half the
// instructions, without which the update would wait for instructions and not for memory.
//
// A thread holds kVector elements, kBlockLanes neighbouring lanes a block. What is rare (NaN, infinities, values outside the
// reach of a scale, vectors that are not whole) is looked for once per thread, and left to the definition. Divisions
// are a rough reciprocal and one correction where that is known to give the same bits: tests/cuda_on_cpu/conversions.cpp tries
// every operand that matters.
#pragma once

#include "../blocks8.h"
#include "memory.h"

namespace fused::cuda {

constexpr int kBlockLanes = kBlock8 / kVector;
constexpr int kCodeWords = kVector / 4;
static_assert(kWarp % kBlockLanes == 0 && kVector % 4 == 0, "");

using Codes = uint32_t[kCodeWords];

constexpr uint32_t kAllLanes = 0xffffffffu;

// Without a sign a division by a power of two is a shift.
__device__ __forceinline__ uint64_t block_of(const Place& at) { return uint64_t(at.begin) / kBlock8; }

// Combines a value over the lanes that hold one block. All lanes of a warp take part, also those past the end of the
// tensor, which have nothing to contribute.
template <class T, class Join>
__device__ __forceinline__ T over_block(T value, Join join) {
#pragma unroll
  for (int lanes = kBlockLanes / 2; lanes > 0; lanes /= 2)
    value = join(value, __shfl_xor_sync(kAllLanes, value, lanes, kBlockLanes));
  return value;
}

template <class T>
__device__ __forceinline__ T smaller(T a, T b) { return a < b ? a : b; }
template <class T>
__device__ __forceinline__ T larger(T a, T b) { return a > b ? a : b; }
template <class T>
__device__ __forceinline__ T plus(T a, T b) { return a + b; }

// The larger of two that have no sign, or NaN. In one instruction, which C++ has no name for.
__device__ __forceinline__ float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return max_nan(a, b);
#endif
}

// 1 / x to within an ulp; neither x nor the result is denormal.
__device__ __forceinline__ float rough_reciprocal(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __rcp_approx(x);
#endif
}

// n / d. The quotient before its last rounding is within 2^-45 of the true one: rounded correctly unless that is as near to
// the middle between two floats.
__device__ __forceinline__ float ratio(float n, float d) {
  const float y = rough_reciprocal(d);
  const float q = n * y;
  return fma_(fma_(-q, d, n), y, q);
}

// ---- bytes ----

__device__ __forceinline__ uint32_t byte_of(const Codes& code, int j) {
  return __byte_perm(code[j / 4], 0u, 0x4440u + uint32_t(j % 4));
}

// A byte b as a float that is b * 2^-133, in one permutation: bits 16 to 23 count in that unit, within denormals and beyond.
__device__ __forceinline__ float tiny_byte(const Codes& code, int j) {
  return float_of(__byte_perm(code[j / 4], 0u, 0x4044u + (uint32_t(j % 4) << 8)));
}

// The low bytes of the words.
__device__ __forceinline__ void pack(const uint32_t (&word)[kVector], Codes& code) {
#pragma unroll
  for (int w = 0; w < kCodeWords; ++w) {
    const uint32_t low = __byte_perm(word[4 * w], word[4 * w + 1], 0x0040u), high = __byte_perm(word[4 * w + 2], word[4 * w + 3], 0x0040u);
    code[w] = __byte_perm(low, high, 0x5410u);
  }
}

constexpr uint32_t kLowBits = 0x01010101u, kHighBits = 0x80808080u;

// In the high bits of the bytes: whether any byte is zero. Above one that is, others may be taken for it.
__device__ __forceinline__ uint32_t zero_bytes(uint32_t word) { return (word - kLowBits) & ~word & kHighBits; }

// The same for bytes that are 0 or 255: 255 is the zero of the complement.
__device__ __forceinline__ uint32_t ends_of_bytes(uint32_t word) {
  const uint32_t low = word - kLowBits, high = ~word - kLowBits;
  return ((low & ~word) | (high & word)) & kHighBits;
}

// ---- signed: codes to values ----

// What belongs to a curve, chosen: worked out from a curve that is not known before, it would be a division.
template <class T>
__device__ __forceinline__ T of_curve(uint32_t curve, T flat, T steep, T root) {
  return curve == 0u ? flat : (curve == 1u ? steep : root);
}

constexpr Curve8 kFlat = curve8(0), kSteep = curve8(1), kRoot = curve8(2);
static_assert(kRoot.reach == curve8(3).reach && kRoot.bend == 1.0f && curve8(3).bend == 1.0f && kSteep.halvings == 0u, "");

__device__ __forceinline__ float reach_of(uint32_t curve) { return of_curve(curve, kFlat.reach, kSteep.reach, kRoot.reach); }

// Bits of a magnitude's pattern that its scale does not have.
__device__ __forceinline__ uint32_t dropped_bits(uint32_t curve) { return 16u + smaller(curve, 2u); }

struct Root {
  uint32_t halvings, bias;
};

// Of the curves that have roots.
__device__ __forceinline__ Root root_of(uint32_t curve) {
  return curve == 2u ? Root{curve8(2).halvings, curve8(2).bias} : Root{curve8(3).halvings, curve8(3).bias};
}

struct SignedValues {
  float reach, unit;  // a 64th of the reach, as of the levels
  Root root;
};

// top / bend as a sum of two products, which rounds once: 4/3 is not a float, and 1/2 and 1 need no second one.
constexpr float kUnitHigh = float(4.0 / 3.0), kUnitLow = float(4.0 / 3.0 - double(kUnitHigh));
static_assert(kFlat.bend == 0.75f && kSteep.bend == 2.0f, "");

__device__ __forceinline__ SignedValues signed_values_of(uint32_t scale, uint32_t curve) {
  const float top = float_of(((scale << 15) & kInfinity) | ((scale << dropped_bits(curve)) & 0x7f0000u));
  const float high = of_curve(curve, kUnitHigh, 0.5f, 1.0f), low = of_curve(curve, kUnitLow, 0.0f, 0.0f);
  const float reach = of_curve(curve, kFlat.reach / 64.0f, kSteep.reach / 64.0f, kRoot.reach / 64.0f);
  return {reach, fma_(top, high, top * low), root_of(curve)};
}

template <bool ROOT>
__device__ __forceinline__ void signed_values(const Codes& biased, const SignedValues& block, float (&x)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float level = fma_(tiny_byte(biased, j), 0x1p127f, -2.0f);  // its 64th
    const float z = ratio(level, block.reach - fabsf(level));
    if (!ROOT) {
      x[j] = z * block.unit;
    } else {
      const int32_t root = int32_t(bits_of(fabsf(z)) - block.root.bias);
      const float r = float_of(uint32_t(root < 0 ? 0 : root) << block.root.halvings);
      x[j] = float_of(bits_of(r * block.unit) | (bits_of(z) & ~kMagnitude));
    }
  }
}

__device__ __forceinline__ void decode_signed(const Codes& code, uint16_t scale, float (&x)[kVector]) {
  static_assert(kVector == 8 && kSignedNan == 0x80u && curve_first(1) == 0x80u && curve_first(2) == 0xc0u, "");
  const Codes biased = {code[0] ^ kHighBits, code[1] ^ kHighBits};  // level + 128, and 0 for NaN
  if ((scale & 0xc0u) != 0xc0u) {  // most blocks
    signed_values<false>(biased, signed_values_of(scale, (scale >> 7) & 1u), x);
  } else {
    FUSED_RARE();
    signed_values<true>(biased, signed_values_of(scale, curve_of(scale)), x);
  }
  if ((zero_bytes(biased[0]) | zero_bytes(biased[1])) == 0u) return;
  FUSED_RARE();
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = byte_of(biased, j) == 0u ? float_of(kNan) : x[j];
}

// ---- signed: values to codes ----

__device__ __forceinline__ uint16_t portable_signed(const Place& at, const float (&x)[kVector], Codes& code) {
  FUSED_RARE();
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) largest = larger(largest, j < at.count ? block8_magnitude(x[j]) : 0u);
  largest = over_block(largest, larger<uint32_t>);
  int32_t deficit = 0, nonzero = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t a = (j < at.count ? block8_magnitude(x[j]) : 0u) >> 16;
    deficit += block8_deficit(a, largest >> 16);
    nonzero += int32_t(a != 0u);
  }
  deficit = over_block(deficit, plus<int32_t>);
  nonzero = over_block(nonzero, plus<int32_t>);
  const uint16_t scale = block8_scale_signed(largest, block8_curve(deficit, nonzero));
  const Block8Signed block = block8_signed(scale);
  uint32_t word[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) word[j] = block8_encode(x[j], block);
  pack(word, code);
  return scale;
}

constexpr uint32_t kHalves = 0x00010001u, kMagnitudes = 0x7fffu * kHalves;
constexpr uint32_t kCountShift = 20;  // of elements, above the sum of their deficits
static_assert(kBlock8 * kDeficitLimit < 1 << kCountShift && kBlock8 * kDeficitLimit / 2 < 1 << 16, "halves do not run over");

// The sum of block8_deficit over a thread's elements, and how many are not zero. Two elements at a time, as if none were; it is
// done over where some are.
__device__ __forceinline__ uint32_t deficits(const float (&x)[kVector], uint32_t largest) {
  const uint32_t top = (largest >> 16) * kHalves;
  uint32_t sums = 0, nonzero = kAllLanes;
#pragma unroll
  for (int j = 0; j < kVector; j += 2) {
    const uint32_t a = __byte_perm(bits_of(x[j]), bits_of(x[j + 1]), 0x7632u) & kMagnitudes;
    sums += __vminu2(top - a, uint32_t(kDeficitLimit) * kHalves);
    nonzero &= a + kMagnitudes;  // carries into the high bits
  }
  if ((~nonzero & (0x8000u * kHalves)) == 0u) return (sums & 0xffffu) + (sums >> 16) + (uint32_t(kVector) << kCountShift);
  FUSED_RARE();
  sums = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t a = (bits_of(x[j]) & kMagnitude) >> 16;
    sums += uint32_t(block8_deficit(a, largest >> 16)) + (uint32_t(a != 0u) << kCountShift);
  }
  return sums;
}

// block8_scale_signed, and what it stands for.
struct SignedScale {
  uint16_t word;
  float top;
};

__device__ __forceinline__ SignedScale signed_scale(uint32_t largest, uint32_t curve) {
  const uint32_t dropped = dropped_bits(curve);
  const uint32_t top = (larger(largest, kSmallestScale) + (1u << (dropped - 1u))) >> dropped << dropped;
  const uint32_t word = ((top >> 15) & 0xff00u) | curve_first(curve) | ((top & 0x7fffffu) >> dropped);
  return {uint16_t(largest == 0u ? 0u : word), float_of(top)};
}

__device__ __forceinline__ float signed_gain(float top, uint32_t curve) {
  return ratio(of_curve(curve, kFlat.bend, kSteep.bend, kRoot.bend), top);
}

// Levels in low bytes. A block's own scale leaves nothing that would be rounded to a level above the last.
template <bool ROOT>
__device__ __forceinline__ void signed_codes(const float (&x)[kVector], float top, uint32_t curve, Codes& code) {
  const float reach = reach_of(curve), gain = signed_gain(top, curve);
  const Root root = root_of(curve);
  uint32_t word[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    float z = x[j] * gain;
    if (ROOT) z = float_of(((bits_of(fabsf(z)) >> root.halvings) + root.bias) | (bits_of(x[j]) & ~kMagnitude));
    word[j] = bits_of(ratio(reach * z, 1.0f + fabsf(z)) + 0x1.8p23f);  // to nearest even
  }
  pack(word, code);
}

constexpr float kHuge = 0x1p100f;  // the reciprocals of scales above may be denormal

__device__ __forceinline__ uint16_t encode_signed(const Place& at, const float (&x)[kVector], Codes& code) {
  float most = fabsf(x[0]);
#pragma unroll
  for (int j = 1; j < kVector; ++j) most = larger_or_nan(most, fabsf(x[j]));
  most = over_block(most, larger_or_nan);
  if (__any_sync(kAllLanes, at.count < kVector || !(most < kHuge))) return portable_signed(at, x, code);
  const uint32_t largest = bits_of(most);
  const uint32_t sums = over_block(deficits(x, largest), plus<uint32_t>);
  const uint32_t deficit = sums & ((1u << kCountShift) - 1u), count = sums >> kCountShift;
  if (deficit <= uint32_t(kSquareRoot) * count) {  // most blocks
    const uint32_t curve = deficit > uint32_t(kSteeper) * count;
    const SignedScale scale = signed_scale(largest, curve);
    signed_codes<false>(x, scale.top, curve, code);
    return scale.word;
  }
  FUSED_RARE();
  const uint32_t curve = block8_curve(int32_t(deficit), int32_t(count));
  const SignedScale scale = signed_scale(largest, curve);
  signed_codes<true>(x, scale.top, curve, code);
  return scale.word;
}

// ---- unsigned: codes to values ----

__device__ __forceinline__ void decode_unsigned(const Codes& code, uint16_t scale, float (&x)[kVector]) {
  static_assert(kVector == 8 && kUnsignedNan == 255u, "");
  const Block8Unsigned block = block8_unsigned(scale);
  const uint32_t before = block.low - uint32_t(block.step);
  const bool finite = before + uint32_t(kUnsignedLevels * block.step) < kInfinity;
  if (finite && (ends_of_bytes(code[0]) | ends_of_bytes(code[1])) == 0u) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = float_of(byte_of(code, j) * uint32_t(block.step) + before);
  } else {
    FUSED_RARE();
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = block8_decode(uint8_t(byte_of(code, j)), block);
  }
}

// ---- unsigned: values to codes ----

// Thresholds of a thread's elements.
struct Thresholds {
  uint32_t start, narrow;

  __device__ __forceinline__ Thresholds(const Place& at, uint32_t step)
      : start(block8_phase(uint32_t(block_of(at)), step) + uint32_t(at.begin) % kBlock8 * kLanePhase),
        narrow(block8_narrow(step)) {}

  __device__ __forceinline__ float operator[](int j) const { return block8_threshold(start, narrow, uint32_t(j)); }
};

__device__ __forceinline__ uint16_t portable_unsigned(const Place& at, const float (&x)[kVector], Codes& code, uint32_t step) {
  FUSED_RARE();
  uint32_t smallest = kMagnitude, largest = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t a = j < at.count ? block8_magnitude(x[j]) : 0u;
    smallest = a != 0u ? smaller(a, smallest) : smallest;
    largest = larger(a, largest);
  }
  smallest = over_block(smallest, smaller<uint32_t>);
  largest = over_block(largest, larger<uint32_t>);
  const uint16_t scale = block8_scale_unsigned(smallest, largest);
  const Block8Unsigned block = block8_unsigned(scale);
  const Thresholds threshold(at, step);
  uint32_t word[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) word[j] = block8_encode(x[j], block, threshold[j]);
  pack(word, code);
  return scale;
}

// Of nonnegative values, the least pattern that is not zero.
__device__ __forceinline__ uint32_t smallest_nonzero(const float (&x)[kVector]) {
  FUSED_RARE();
  uint32_t smallest = kMagnitude;
#pragma unroll
  for (int j = 0; j < kVector; ++j) smallest = bits_of(x[j]) == 0u ? smallest : smaller(smallest, bits_of(x[j]));
  return smallest;
}

struct UnsignedLevels {
  uint32_t low;
  float inverse;
};

template <class Threshold>
__device__ __forceinline__ void unsigned_codes(const float (&x)[kVector], const UnsignedLevels& block, Codes& code,
                                               Threshold threshold) {
  uint32_t word[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float level = float(int32_t(bits_of(x[j]) - block.low)) * block.inverse + threshold(j);
    word[j] = bits_of(__fadd_rz(level, 0x1p23f));  // cuts off what comes after the point
  }
  pack(word, code);
}

// With any threshold below 2, a level up to here is none above the last.
constexpr float kSurelyLevels = float(kUnsignedLevels) - 1.0f - 0x1p-7f;

__device__ __forceinline__ uint16_t encode_unsigned(const Place& at, const float (&x)[kVector], Codes& code, uint32_t step) {
  uint32_t smallest = bits_of(x[0]), largest = smallest;  // as numbers without a sign: what is negative is large
#pragma unroll
  for (int j = 1; j < kVector; ++j) {
    smallest = smaller(smallest, bits_of(x[j]));
    largest = larger(largest, bits_of(x[j]));
  }
  const bool zeros = smallest == 0u;
  if (zeros) smallest = smallest_nonzero(x);
  smallest = over_block(smallest, smaller<uint32_t>);
  largest = over_block(largest, larger<uint32_t>);
  const uint32_t low = smallest >> kLowShift << kLowShift;
  const int32_t width = int32_t(largest - low);
  const float range = float(larger(width, 1));
  // A step is its scale's number as a float: what block8_scale_unsigned takes from one, and block8_unsigned puts into one.
  const int32_t number = int32_t((bits_of(range * (1.0f / 253.0f)) + 0xfffffu) >> kStepShift);
  const uint32_t bounded = uint32_t(clamp(number, int32_t(kSmallestStep), int32_t(kSmallestStep) + 63));
  const float inverse = ratio(1.0f, float_of(bounded << kStepShift));
  const bool inside = largest < kInfinity && smallest >= 4u << kLowShift && range * inverse < kSurelyLevels;
  if (__any_sync(kAllLanes, at.count < kVector || !inside)) return portable_unsigned(at, x, code, step);
  const UnsignedLevels block = {low, inverse};
  const Thresholds threshold(at, step);
  if (threshold.narrow == 0u) {  // for all but the first steps
    unsigned_codes(x, block, code, [&](int j) { return block8_threshold(threshold.start, 0u, uint32_t(j)); });
  } else {
    FUSED_RARE();
    unsigned_codes(x, block, code, [&](int j) { return threshold[j]; });
  }
  if (zeros) {
    FUSED_RARE();
#pragma unroll
    for (int j = 0; j < kVector; ++j) code[j / 4] &= bits_of(x[j]) == 0u ? ~(0xffu << (8 * (j % 4))) : kAllLanes;
  }
  return uint16_t(largest == 0u ? 0u : (smallest >> kLowShift << 6) | (bounded - kSmallestStep));
}

}  // namespace fused::cuda
