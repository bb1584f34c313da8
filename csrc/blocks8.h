// 8-bit blocks: optimizer moments as one byte per element and one 32-bit scale per block of 64.
//
// Codes count equal steps in the *bit pattern* of a float32, which is a piecewise linear logarithm: integer arithmetic
// alone, the same bits on every backend, and a relative precision that does not depend on the magnitude.
#pragma once

#include "formats.h"

namespace fused {

constexpr int kBlock8 = 64;  // elements that share a scale

// The scale holds the block's range as the high halves of two float32 patterns: smallest nonzero magnitude (rounded down)
// in the low 16 bits, largest (rounded up) in the high 16 bits.
FUSED_HD uint32_t block8_scale(uint32_t smallest, uint32_t largest) {
  const uint32_t top = (largest + 0xffffu) >> 16;
  return (smallest >> 16) | ((top > 0x7f80u ? 0x7f80u : top) << 16);
}

struct Block8Range {
  uint32_t low;
  float step;     // bit patterns per code
  float inverse;  // codes per bit pattern
};

FUSED_HD Block8Range block8_range(uint32_t scale, float levels) {
  const uint32_t low = (scale & 0xffffu) << 16;
  const uint32_t high = scale & 0xffff0000u;
  const float width = float(int32_t(high - low));
  return {low, width / levels, width > 0.0f ? levels / width : 0.0f};
}

// Unsigned: code 0 is exactly zero, 1..255 the range.
FUSED_HD float block8_decode_unsigned(uint8_t code, const Block8Range& range) {
  const uint32_t u = range.low + uint32_t(int32_t(float(int32_t(code) - 1) * range.step + 0.5f));
  return code == 0 ? 0.0f : float_of(u);
}

FUSED_HD uint8_t block8_encode_unsigned(float x, const Block8Range& range) {
  const uint32_t a = bits_of(x) & kMagnitude;
  const int32_t code = 1 + int32_t(float(int32_t(a - range.low)) * range.inverse + 0.5f);
  return uint8_t(a == 0u ? 0 : clamp(code, 1, 255));
}

// Signed: the sign and 127 levels.
FUSED_HD float block8_decode_signed(uint8_t code, const Block8Range& range) {
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t u = range.low + uint32_t(int32_t(float(int32_t(magnitude) - 1) * range.step + 0.5f));
  return float_of((magnitude == 0u ? 0u : u) | (uint32_t(code & 0x80u) << 24));
}

FUSED_HD uint8_t block8_encode_signed(float x, const Block8Range& range) {
  const uint32_t a = bits_of(x) & kMagnitude;
  const int32_t magnitude = 1 + int32_t(float(int32_t(a - range.low)) * range.inverse + 0.5f);
  const uint32_t code = a == 0u ? 0u : uint32_t(clamp(magnitude, 1, 127));
  return uint8_t(code | ((bits_of(x) >> 24) & 0x80u));
}

}  // namespace fused
