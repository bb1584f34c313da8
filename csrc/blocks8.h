// 8-bit blocks: optimizer moments as one byte per element and one 16-bit scale per block of 32.
//
// Both codes count equal steps in the *bit pattern* of a float32, which is a piecewise linear logarithm, so the same
// integer arithmetic and correctly rounded operations give the same bytes on every backend.
//
// Second moments (unsigned): 254 levels over the octaves between the block's smallest and largest nonzero value. The
// relative precision is the same at both ends, nothing but zero is stored as zero, and 0.25 octave is the widest step:
// a square root, and so a step of the optimizer, is off by a fifth at worst. Two things matter more than the error of
// one rounding, because a slow average (beta2 = 0.999) is rounded again at every step. The range ends at powers of two, so
// that the levels stay where they are from step to step. And values are rounded up or down in proportion to their distance,
// by a sequence that is even over the steps: rounded to nearest, an average that moves by less than half a level per step
// would never move.
//
// First moments (signed): they pass through zero, so the smallest magnitude in a block says nothing. The magnitude r,
// relative to the scale, is companded as log(1 + mu * s(r)) with the softsign-like s(r) = 1.75 r / (1 + 0.75 r).
// mu is 1 (which leaves s) where the magnitudes are of one order and grows to 2^14 as their mean logarithm falls behind the
// largest, so that gradients of many scales in one block all keep a relative precision.
//
// Infinities and NaN become NaN, and do not touch the other elements of their block.
#pragma once

#include "formats.h"

namespace fused {

constexpr int kBlock8 = 32;  // elements that share a scale

// The magnitude pattern as far as it takes part in a block's scale: that of nonzero finite values, else 0.
FUSED_HD uint32_t block8_magnitude(float x) {
  const uint32_t a = bits_of(x) & kMagnitude;
  return a >= kInfinity ? 0u : a;
}

// ---- unsigned ----

constexpr uint32_t kUnsignedNan = 255;
constexpr int32_t kUnsignedLevels = 254;
constexpr uint32_t kUnsignedOctaves = 64;  // widest range of a block; what lies below is raised to its lower end

// Low byte: exponent at which the range begins; high byte: exponent at which it ends. `smallest` is that of the nonzero
// magnitudes and has no meaning where `largest` is 0.
FUSED_HD uint16_t block8_scale_unsigned(uint32_t smallest, uint32_t largest) {
  const uint32_t end = (largest >> 23) + 1u;
  const uint32_t begin = smallest >> 23 < 1u ? 1u : smallest >> 23;
  const uint32_t bound = end > kUnsignedOctaves ? end - kUnsignedOctaves : 1u;
  const uint32_t normal = end < 2u ? 2u : end;
  return uint16_t(largest == 0u ? 0u : (begin > bound ? begin : bound) | (normal << 8));
}

struct Block8Unsigned {
  uint32_t low;
  float step;     // bit patterns per level
  float inverse;  // levels per bit pattern
};

FUSED_HD Block8Unsigned block8_unsigned(uint16_t scale) {
  const uint32_t low = uint32_t(scale & 0xffu) << 23;
  const float width = float(int32_t((uint32_t(scale >> 8) << 23) - low));
  const float steps = float(kUnsignedLevels - 1);
  return {low, width / steps, width > 0.0f ? steps / width : 0.0f};
}

FUSED_HD float block8_decode(uint8_t code, const Block8Unsigned& block) {
  const uint32_t end = block.low + uint32_t(int32_t(float(int32_t(code) - 1) * block.step + 0.5f));
  const uint32_t u = end < kInfinity ? end : kInfinity - 1u;  // the last octave ends at infinity
  return float_of(code == 0 ? 0u : (code == kUnsignedNan ? 0x7fc00000u : u));
}

// `threshold` in [0, 1): 0.5 rounds to nearest.
FUSED_HD uint8_t block8_encode(float x, const Block8Unsigned& block, float threshold) {
  const uint32_t a = bits_of(x) & kMagnitude;
  const uint32_t above = (a > block.low ? a : block.low) - block.low;
  const int32_t level = int32_t(float(int32_t(above)) * block.inverse + threshold) + 1;
  const int32_t code = level > kUnsignedLevels ? kUnsignedLevels : level;
  return uint8_t(a == 0u ? 0 : (a >= kInfinity ? int32_t(kUnsignedNan) : code));
}

// The threshold of an element at a step: evenly spread over any run of steps, and unrelated between elements.
FUSED_HD float block8_threshold(uint32_t element, uint32_t step) {
  uint32_t h = element * 0x9E3779B1u;
  h = (h ^ (h >> 15)) * 0x85EBCA6Bu;
  h += step * 0x9E3779B9u;
  return float(int32_t(h >> 8)) * 0x1p-24f;
}

// ---- signed ----

constexpr uint32_t kSignedNan = 0x80;
constexpr int32_t kSignedLevels = 127;
constexpr uint32_t kSmallestScale = 0x0d800000u;  // 2^-100: what lies far below becomes zero
constexpr uint32_t kLargestScale = 0x7e800000u;   // 2^126: what lies above becomes 2^126
constexpr int32_t kDeficitLimit = 20 * 128;

// How far a nonzero magnitude lies below the block's largest, in 1/128 octaves.
FUSED_HD int32_t block8_deficit(uint32_t magnitude, uint32_t largest) {
  const int32_t deficit = int32_t(largest >> 16) - int32_t(magnitude >> 16);
  return magnitude == 0u ? 0 : (deficit > kDeficitLimit ? kDeficitLimit : deficit);
}

// High 13 bits: the largest magnitude rounded up to 5 bits of mantissa; low 3 bits: which mu, by the sum of the deficits of
// the `count` nonzero magnitudes.
FUSED_HD uint16_t block8_scale_signed(uint32_t largest, int32_t deficit, int32_t count) {
  const uint32_t bounded = largest < kSmallestScale ? kSmallestScale : (largest > kLargestScale ? kLargestScale : largest);
  const uint32_t top = (bounded + 0x3ffffu) >> 18;
  const uint32_t spread = uint32_t(deficit > 307 * count) + uint32_t(deficit > 371 * count) + uint32_t(deficit > 422 * count) +
                          uint32_t(deficit > 512 * count) + uint32_t(deficit > 627 * count) + uint32_t(deficit > 768 * count) +
                          uint32_t(deficit > 896 * count);
  return uint16_t(largest == 0u ? 0u : (top << 3) | spread);
}

struct Block8Signed {
  float scale, mu, inverse_mu;
  float step;     // bit patterns of 1 + mu * s per level
  float inverse;  // levels per bit pattern
};

FUSED_HD Block8Signed block8_signed(uint16_t scale) {
  const uint32_t spread = scale & 7u;
  const float mu = float_of(0x3f800000u + (spread * (spread + 9u) << 20));  // 1 2 6 24 96 448 2560 16384
  const float width = float(int32_t(bits_of(1.0f + mu) - 0x3f800000u));
  const float levels = float(kSignedLevels);
  return {float_of(uint32_t(scale >> 3) << 18), mu, 1.0f / mu, width / levels, levels / width};
}

FUSED_HD float block8_decode(uint8_t code, const Block8Signed& block) {
  const int32_t level = code & 0x7f;
  const float s = (float_of(0x3f800000u + uint32_t(int32_t(float(level) * block.step + 0.5f))) - 1.0f) * block.inverse_mu;
  const float x = block.scale * s / (1.75f - 0.75f * s);
  return float_of(code == kSignedNan ? 0x7fc00000u : bits_of(x) | (uint32_t(code & 0x80u) << 24));
}

FUSED_HD uint8_t block8_encode(float x, const Block8Signed& block) {
  const uint32_t a = bits_of(x) & kMagnitude;
  const float r = float_of(a) < block.scale ? float_of(a) : block.scale;
  const float s = block.scale > 0.0f ? 1.75f * r / (block.scale + 0.75f * r) : 0.0f;
  const float t = 1.0f + block.mu * s;
  const int32_t level = int32_t(float(int32_t(bits_of(t) - 0x3f800000u)) * block.inverse + 0.5f);
  const uint32_t code = uint32_t(level > kSignedLevels ? kSignedLevels : level);
  const uint32_t sign = (bits_of(x) >> 24) & 0x80u;
  return uint8_t(a >= kInfinity ? kSignedNan : (code == 0u ? 0u : code | sign));
}

}  // namespace fused
