// 8-bit blocks: optimizer moments as one byte per element and one 16-bit scale per block of 32.
//
// Both codes count equal steps in the *bit pattern* of a float32, which is a piecewise linear logarithm, so the same integer
// operations and correctly rounded float operations give the same bytes on every backend. No element needs a division.
//
// Second moments (unsigned): 254 levels between the block's smallest and largest nonzero value, evenly spaced in the pattern.
// The relative precision is the same at both ends, and nothing but zero is stored as zero. Two things matter more than the
// error of one rounding, because a slow average (beta2 = 0.999) is rounded again at every step. The ends move in quarters of
// an octave, so that the levels mostly stay where they are from step to step. And values are rounded up or down in proportion
// to their distance, by a sequence that is even over the steps: rounded to nearest, an average that moves by less than half a
// level per step would never move. In the first steps averages move by more than that, so rounding starts as to nearest.
//
// First moments (signed): they pass through zero, so the smallest magnitude in a block says nothing. The magnitude r,
// relative to the scale, is companded as the pattern of 1 + mu * r, with one knee in the steps per level where mu is small.
// Among eight such curves the mean logarithm of the magnitudes, relative to the largest, chooses: nearly even levels where the
// magnitudes are of one order, a logarithm where a block holds gradients of many orders.
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
constexpr uint32_t kLowShift = 21;         // the range begins at a quarter of an octave
constexpr uint32_t kSmallestStep = 564;    // as a quarter-octave number: steps of 2^14 patterns per level
constexpr uint32_t kWidestRange = 253u * (7u << 19);  // 110 octaves; what lies below is raised to the lower end

// High 11 bits: where the range begins; low 5 bits: the patterns per level, (4 + i % 4) * 2^(12 + i / 4). `smallest` is that
// of the nonzero magnitudes and has no meaning where `largest` is 0.
FUSED_HD uint16_t block8_scale_unsigned(uint32_t smallest, uint32_t largest) {
  const uint32_t bound = largest > kWidestRange ? (largest - kWidestRange + (1u << kLowShift) - 1u) >> kLowShift : 4u;
  const uint32_t begin = smallest >> kLowShift;
  const uint32_t raised = bound < 4u ? 4u : bound;  // the smallest normal number
  const uint32_t low = begin > raised ? begin : raised;
  const int32_t width = int32_t(largest) - int32_t(low << kLowShift);
  const float step = float(width < 1 ? 1 : width) * (1.0f / 253.0f);
  const int32_t index = int32_t((bits_of(step) + 0x1fffffu) >> kLowShift) - int32_t(kSmallestStep);
  return uint16_t(largest == 0u ? 0u : (low << 5) | uint32_t(clamp(index, 0, 31)));
}

struct Block8Unsigned {
  uint32_t low;
  int32_t step;   // bit patterns per level
  float inverse;  // levels per bit pattern
};

FUSED_HD Block8Unsigned block8_unsigned(uint16_t scale) {
  const uint32_t index = scale & 31u;
  const int32_t step = int32_t((4u + (index & 3u)) << (12u + (index >> 2)));
  return {uint32_t(scale >> 5) << kLowShift, step, 1.0f / float(step)};
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

// Where the elements of a block round up at a step: evenly spread over any run of steps and over the lanes of a block, and
// unrelated between blocks.
struct Block8Threshold {
  uint32_t phase;
  float spread;  // grows to the whole width of a level over 32 steps
};

constexpr uint32_t kLanePhase = 0xC13FA9A9u;

FUSED_HD Block8Threshold block8_threshold(uint32_t block, uint32_t step) {
  uint32_t h = block * 0x9E3779B1u;
  h = (h ^ (h >> 15)) * 0x85EBCA6Bu;
  return {h + step * 0x9E3779B9u, float(int32_t(step < 32u ? step : 32u)) * 0x1p-28f};
}

FUSED_HD float block8_threshold(const Block8Threshold& t, uint32_t lane) {
  return float(int32_t(t.phase + lane * kLanePhase) >> 9) * t.spread + 1.5f;
}

// ---- signed ----

constexpr uint32_t kSignedNan = 0x80;
constexpr int32_t kSignedLevels = 127;
constexpr uint32_t kSmallestScale = 0x0d80u;  // 2^-100, as a high half: what lies far below becomes zero
constexpr uint32_t kLargestScale = 0x7e80u;   // 2^126: what lies above becomes 2^126
constexpr int32_t kDeficitLimit = 20 * 128;
constexpr uint32_t kCurves = 8;

// How far a magnitude lies below the block's largest, in 1/128 octaves; both as the high halves of their patterns.
FUSED_HD int32_t block8_deficit(uint32_t magnitude, uint32_t largest) {
  const int32_t deficit = int32_t(largest) - int32_t(magnitude);
  return magnitude == 0u ? 0 : (deficit > kDeficitLimit ? kDeficitLimit : deficit);
}

FUSED_HD int32_t pick(uint32_t i, int32_t a, int32_t b, int32_t c, int32_t d, int32_t e, int32_t f, int32_t g, int32_t h) {
  return i < 4u ? (i < 2u ? (i == 0u ? a : b) : (i == 2u ? c : d)) : (i < 6u ? (i == 4u ? e : f) : (i == 6u ? g : h));
}

// Mean deficits beyond which the next curve is the better one.
FUSED_HD int32_t curve_limit(uint32_t i) { return pick(i, 350, 372, 416, 474, 576, 666, 794, kDeficitLimit); }

// Which curve, by the sum of the deficits of the `count` nonzero magnitudes.
FUSED_HD uint32_t block8_curve(int32_t deficit, int32_t count) {
  uint32_t curve = 0;
  for (uint32_t i = 0; i + 1u < kCurves; ++i) curve += uint32_t(deficit > curve_limit(i) * count);
  return curve;
}

// Bits of the scale's mantissa: the flatter the curve, the more of them show in the error.
FUSED_HD uint32_t curve_bits(uint32_t curve) { return curve < 2u ? 7u - curve : (curve < 4u ? 4u : 3u); }

// The first of the low bytes that name a curve: 128 + 64 + 2 x 16 + 4 x 8 of them.
FUSED_HD uint32_t curve_first(uint32_t curve) {
  return curve < 2u ? curve * 128u : (curve < 4u ? curve * 16u + 160u : curve * 8u + 192u);
}

// High byte: the exponent of the largest magnitude. Low byte: the curve and its bits of the mantissa.
FUSED_HD uint16_t block8_scale_signed(uint32_t largest, uint32_t curve) {
  const uint32_t high = (largest + 0x8000u) >> 16;
  const uint32_t bounded = high < kSmallestScale ? kSmallestScale : (high > kLargestScale ? kLargestScale : high);
  const uint32_t bits = curve_bits(curve);
  const uint32_t dropped = 7u - bits;
  const uint32_t top = (bounded + (1u << dropped) - 1u) >> dropped;
  return uint16_t(high == 0u ? 0u : (top >> bits << 8) | curve_first(curve) | (top & ((1u << bits) - 1u)));
}

FUSED_HD uint32_t curve_of(uint16_t scale) {
  const uint32_t low = scale & 0xffu;
  return low < 192u ? low >> 7 : (low < 224u ? (low >> 4) - 10u : (low >> 3) - 24u);
}

FUSED_HD float top_of(uint16_t scale, uint32_t curve) {
  const uint32_t bits = curve_bits(curve);
  return float_of((uint32_t(scale >> 8) << 23) | ((scale & ((1u << bits) - 1u)) << (23u - bits)));
}

// Level l stands for the pattern of 1 + mu * r that lies max(l * near, l * far - fold) above that of 1.
struct Curve8 {
  int32_t near, far, fold;
  float mu, inverse_mu;
  float near_inverse, far_inverse, lift;  // the level of a pattern p above: min(p * near_inverse, p * far_inverse + lift)
};

FUSED_HD Curve8 curve8(uint32_t curve) {
  // mu of about 1.5, 2.5, 6, 16, 60, 320, 1536, 32768
  const int32_t near = pick(curve, 66052, 107885, 151369, 245975, 390120, 545187, 693611, 990782);
  const int32_t far = pick(curve, 99078, 161827, 227054, 368963, 390120, 545187, 693611, 990782);
  const int32_t knee = pick(curve, 64, 109, 76, 104, 0, 0, 0, 0);
  Curve8 c;
  c.near = near;
  c.far = far;
  c.fold = knee * (far - near);
  c.mu = float_of(kOne + uint32_t(kSignedLevels * far - c.fold)) - 1.0f;
  c.inverse_mu = 1.0f / c.mu;
  c.near_inverse = 1.0f / float(near);
  c.far_inverse = 1.0f / float(far);
  c.lift = float(knee) - float(knee * near) * c.far_inverse;
  return c;
}

struct Block8Signed {
  Curve8 curve;
  float gain;  // of a magnitude, to mu * r
  float unit;  // of mu * r, to a magnitude
};

FUSED_HD Block8Signed block8_signed(uint16_t scale, const Curve8& curve) {
  const float top = top_of(scale, curve_of(scale));
  return {curve, top > 0.0f ? curve.mu / top : 0.0f, top * curve.inverse_mu};
}

FUSED_HD Block8Signed block8_signed(uint16_t scale) { return block8_signed(scale, curve8(curve_of(scale))); }

FUSED_HD float block8_decode(uint8_t code, const Block8Signed& block) {
  const int32_t level = code < 128 ? code : 256 - code;
  const int32_t near = level * block.curve.near, far = level * block.curve.far - block.curve.fold;
  const float x = (float_of(kOne + uint32_t(near > far ? near : far)) - 1.0f) * block.unit;
  return float_of(code == kSignedNan ? kNan : bits_of(x) | (uint32_t(code & 0x80u) << 24));
}

FUSED_HD uint8_t block8_encode(float x, const Block8Signed& block) {
  const uint32_t a = bits_of(x) & kMagnitude;
  const float above = float(int32_t(bits_of(1.0f + float_of(a) * block.gain) - kOne));
  const float near = above * block.curve.near_inverse, far = above * block.curve.far_inverse + block.curve.lift;
  const float y = near < far ? near : far;
  const float bounded = y < float(kSignedLevels) ? y : float(kSignedLevels);
  const uint32_t level = bits_of(bounded + 0x1.8p23f) & 0x7fu;  // to nearest even
  return uint8_t(a >= kInfinity ? kSignedNan : (bits_of(x) >> 31 ? 0u - level : level));
}

}  // namespace fused
