// 8-bit blocks: optimizer moments as one byte per element and one 16-bit scale per block of 32.
//
// Everything is an integer operation on bit patterns or a correctly rounded float operation, which gives the same bytes on
// every backend.
//
// Second moments (unsigned): 254 levels between the block's smallest and largest nonzero value, evenly spaced in the bit
// pattern, which is a piecewise linear logarithm. The relative precision is the same at both ends, and nothing but zero is
// stored as zero. Two things matter more than the error of one rounding, because a slow average (beta2 = 0.999) is rounded
// again at every step. The lower end moves in quarters of an octave, so that the levels mostly stay where they are from step to
// step. And values are rounded up or down in proportion to their distance, by a sequence that is even over the steps: rounded
// to nearest, an average that moves by less than half a level per step would never move. In the first steps averages move by
// more than that, so rounding starts as nearly to nearest.
//
// First moments (signed): they pass through zero, so the smallest magnitude in a block says nothing. A magnitude r, relative to
// the scale, has the level 127 * (1 + bend) * z / (1 + bend * z), where z is r, its square root or its fourth root: nearly even
// levels where the magnitudes are of one order, nearly a logarithm where a block holds gradients of many orders. The mean
// logarithm of the magnitudes, relative to the largest, chooses one of four such curves. The flatter the curve, the more
// precise the scale: the largest magnitude has the coarsest levels around it, and gains from lying on one.
//
// Infinities and NaN become NaN, and do not touch the other elements of their block.
#pragma once

#include "formats.h"

namespace fused {

constexpr int kBlock8 = 32;  // elements that share a scale
constexpr uint32_t kOne = 0x3f800000u;
constexpr uint32_t kNan = 0x7fc00000u;

// The magnitude pattern as far as it takes part in a block's scale: that of nonzero finite values, else 0.
FUSED_HD uint32_t block8_magnitude(float x) {
  const uint32_t a = bits_of(x) & kMagnitude;
  return a >= kInfinity ? 0u : a;
}

// ---- unsigned ----

constexpr uint32_t kUnsignedNan = 255;
constexpr int32_t kUnsignedLevels = 254;
constexpr uint32_t kLowShift = 21;        // the range begins at a quarter of an octave
constexpr uint32_t kStepShift = 20;       // eight sizes of a level per octave
constexpr uint32_t kSmallestStep = 1128;  // as such a number: 2^14 patterns per level
constexpr uint32_t kWidestRange = 253u * (15u << 18);  // 118 octaves; what lies below is raised to the lower end

// High 10 bits: where the range begins; low 6 bits: the patterns per level, (8 + i % 8) * 2^(11 + i / 8). `smallest` is that
// of the nonzero magnitudes and has no meaning where `largest` is 0.
FUSED_HD uint16_t block8_scale_unsigned(uint32_t smallest, uint32_t largest) {
  const uint32_t bound = largest > kWidestRange ? (largest - kWidestRange + (1u << kLowShift) - 1u) >> kLowShift : 4u;
  const uint32_t begin = smallest >> kLowShift;
  const uint32_t raised = bound < 4u ? 4u : bound;  // the smallest normal number
  const uint32_t low = begin > raised ? begin : raised;
  const int32_t width = int32_t(largest) - int32_t(low << kLowShift);
  const float step = float(width < 1 ? 1 : width) * (1.0f / 253.0f);
  const int32_t index = int32_t((bits_of(step) + 0xfffffu) >> kStepShift) - int32_t(kSmallestStep);
  return uint16_t(largest == 0u ? 0u : (low << 6) | uint32_t(clamp(index, 0, 63)));
}

struct Block8Unsigned {
  uint32_t low;
  int32_t step;   // bit patterns per level
  float inverse;  // levels per bit pattern
};

FUSED_HD Block8Unsigned block8_unsigned(uint16_t scale) {
  const uint32_t index = scale & 63u;
  const int32_t step = int32_t((8u + (index & 7u)) << (11u + (index >> 3)));
  return {uint32_t(scale >> 6) << kLowShift, step, 1.0f / float(step)};
}

FUSED_HD float block8_decode(uint8_t code, const Block8Unsigned& block) {
  const uint32_t end = block.low + uint32_t((int32_t(code) - 1) * block.step);
  const uint32_t u = end < kInfinity ? end : kInfinity - 1u;  // the last level may lie above the largest finite value
  return float_of(code == 0 ? 0u : (code == kUnsignedNan ? kNan : u));
}

// `threshold` in [1, 2): 1.5 rounds to nearest. The code of the lowest level is 1.
FUSED_HD uint8_t block8_encode(float x, const Block8Unsigned& block, float threshold) {
  const uint32_t a = bits_of(x) & kMagnitude;
  const uint32_t above = (a > block.low ? a : block.low) - block.low;
  const int32_t level = int32_t(float(int32_t(above)) * block.inverse + threshold);
  const int32_t code = level > kUnsignedLevels ? kUnsignedLevels : level;
  return uint8_t(a == 0u ? 0 : (a >= kInfinity ? int32_t(kUnsignedNan) : code));
}

constexpr uint32_t kLanePhase = 0xC13FA9A9u;

// Where the elements of a block round up at a step: evenly spread over any run of steps and over the lanes of a block, and
// unrelated between blocks. The phase is that of the block's first element.
FUSED_HD uint32_t block8_phase(uint32_t block, uint32_t step) {
  uint32_t h = block * 0x9E3779B1u;
  h = (h ^ (h >> 15)) * 0x85EBCA6Bu;
  return h + step * 0x9E3779B9u;
}

// How often the width of the thresholds around 1.5 is halved: it grows to that of a level over the first 32 steps.
FUSED_HD uint32_t block8_narrow(uint32_t step) {
  return uint32_t(step < 2u) + uint32_t(step < 4u) + uint32_t(step < 8u) + uint32_t(step < 16u) + uint32_t(step < 32u);
}

FUSED_HD uint32_t block8_least_threshold(uint32_t narrow) { return kOne + (0x400000u - (0x400000u >> narrow)); }

FUSED_HD float block8_threshold(uint32_t phase, uint32_t narrow, uint32_t lane) {
  return float_of(((phase + lane * kLanePhase) >> (9u + narrow)) + block8_least_threshold(narrow));
}

// ---- signed ----

constexpr uint32_t kSignedNan = 0x80;
constexpr int32_t kSignedLevels = 127;
constexpr uint32_t kSmallestScale = 0x11000000u;  // 2^-93: what lies far below becomes zero, and no level is denormal
constexpr uint32_t kLargestScale = 0x7e800000u;   // 2^126: what lies above becomes 2^126
constexpr int32_t kDeficitLimit = 8 * 128;
constexpr uint32_t kCurves = 4;

// How far a magnitude lies below the block's largest, in 1/128 octaves; both as the high halves of their patterns.
FUSED_HD int32_t block8_deficit(uint32_t magnitude, uint32_t largest) {
  const int32_t deficit = int32_t(largest) - int32_t(magnitude);
  return magnitude == 0u ? 0 : (deficit > kDeficitLimit ? kDeficitLimit : deficit);
}

// Mean deficits beyond which the next curve is the better one.
constexpr int32_t kSteeper = 345, kSquareRoot = 512, kFourthRoot = 614;

// Which curve, by the sum of the deficits of the `count` nonzero magnitudes.
FUSED_HD uint32_t block8_curve(int32_t deficit, int32_t count) {
  return uint32_t(deficit > kSteeper * count) + uint32_t(deficit > kSquareRoot * count) + uint32_t(deficit > kFourthRoot * count);
}

// Bits of the scale's mantissa, and the first of the low bytes that name a curve: 128 + 64 + 32 + 32 of them.
FUSED_HD constexpr uint32_t curve_bits(uint32_t curve) { return curve < 2u ? 7u - curve : 5u; }
FUSED_HD constexpr uint32_t curve_first(uint32_t curve) { return curve < 2u ? curve * 128u : curve * 32u + 128u; }

// High byte: the exponent of the largest magnitude. Low byte: the curve and its bits of the mantissa, rounded.
FUSED_HD uint16_t block8_scale_signed(uint32_t largest, uint32_t curve) {
  const uint32_t bounded = largest < kSmallestScale ? kSmallestScale : (largest > kLargestScale ? kLargestScale : largest);
  const uint32_t bits = curve_bits(curve);
  const uint32_t top = (bounded + (1u << (22u - bits))) >> (23u - bits);
  return uint16_t(largest == 0u ? 0u : (top >> bits << 8) | curve_first(curve) | (top & ((1u << bits) - 1u)));
}

FUSED_HD uint32_t curve_of(uint16_t scale) {
  const uint32_t low = scale & 0xffu;
  return low < 192u ? low >> 7 : (low >> 5) - 4u;
}

FUSED_HD float top_of(uint16_t scale, uint32_t curve) {
  const uint32_t bits = curve_bits(curve);
  return float_of((uint32_t(scale >> 8) << 23) | ((scale & ((1u << bits) - 1u)) << (23u - bits)));
}

// Halving a pattern once or twice, and adding what keeps that of 1 in its place, takes a root.
struct Curve8 {
  uint32_t halvings, bias;
  float bend;   // 1 where there is a root, so that it need not be multiplied by it
  float reach;  // the level that the curve approaches, 127 * (1 + bend) / bend
};

FUSED_HD constexpr Curve8 curve8(uint32_t curve) {
  const uint32_t halvings = curve < 2u ? 0u : curve - 1u;
  const float bend = curve == 0u ? 0.75f : (curve == 1u ? 2.0f : 1.0f);
  return {halvings, kOne - (kOne >> halvings), bend, float(kSignedLevels) * (1.0f + bend) / bend};
}

struct Block8Signed {
  Curve8 curve;
  float gain;  // of a magnitude, to bend * r
  float unit;  // of bend * r, to a magnitude
};

FUSED_HD Block8Signed block8_signed(uint16_t scale) {
  const uint32_t curve = curve_of(scale);
  const float top = top_of(scale, curve);
  const Curve8 c = curve8(curve);
  return {c, top > 0.0f ? c.bend / top : 0.0f, top / c.bend};
}

FUSED_HD float block8_decode(uint8_t code, const Block8Signed& block) {
  const int32_t level = code < 128 ? code : 256 - code;
  const float z = float(level) / (block.curve.reach - float(level));
  const int32_t root = int32_t(bits_of(z) - block.curve.bias);
  const float x = float_of(uint32_t(root < 0 ? 0 : root) << block.curve.halvings) * block.unit;
  return float_of(code == kSignedNan ? kNan : bits_of(x) | (uint32_t(code & 0x80u) << 24));
}

FUSED_HD uint8_t block8_encode(float x, const Block8Signed& block) {
  const uint32_t a = bits_of(x) & kMagnitude;
  const float z = float_of((bits_of(float_of(a) * block.gain) >> block.curve.halvings) + block.curve.bias);
  const float y = block.curve.reach * z / (1.0f + z);
  const float bounded = y < float(kSignedLevels) ? y : float(kSignedLevels);
  const uint32_t level = bits_of(bounded + 0x1.8p23f) & 0x7fu;  // to nearest even
  return uint8_t(a >= kInfinity ? kSignedNan : (bits_of(x) >> 31 ? 0u - level : level));
}

}  // namespace fused
