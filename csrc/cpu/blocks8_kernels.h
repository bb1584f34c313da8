// 8-bit blocks <-> float32: what every processor can do, and AVX2 where it is.
#pragma once

#include <algorithm>
#include <cstring>

#include "../blocks8.h"

namespace fused {
namespace FUSED_ISA {
namespace {

constexpr int kBlocks8 = 32;  // at most so many are worked on together

template <class Block>
void decode_portable(const uint8_t* __restrict code, const Block& block, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = block8_decode(code[i], block);
}

uint16_t encode_signed_portable(const float* __restrict in, int64_t n, uint8_t* __restrict out) {
  uint32_t magnitude[kBlock8], largest = 0;
  for (int64_t i = 0; i < n; ++i) magnitude[i] = block8_magnitude(in[i]);
  for (int64_t i = 0; i < n; ++i) largest = magnitude[i] > largest ? magnitude[i] : largest;
  int32_t deficit = 0, nonzero = 0;
  for (int64_t i = 0; i < n; ++i) deficit += block8_deficit(magnitude[i] >> 16, largest >> 16);
  for (int64_t i = 0; i < n; ++i) nonzero += int32_t(magnitude[i] >> 16 != 0u);
  const uint16_t scale = block8_scale_signed(largest, block8_curve(deficit, nonzero));
  const Block8Signed block = block8_signed(scale);
  for (int64_t i = 0; i < n; ++i) out[i] = block8_encode(in[i], block);
  return scale;
}

// `number` counts the tensor's blocks, `step` the updates: they move the rounding.
uint16_t encode_unsigned_portable(const float* __restrict in, int64_t n, uint8_t* __restrict out, uint32_t number, uint32_t step) {
  uint32_t magnitude[kBlock8], before = ~0u, largest = 0;  // before: the smallest less one, by which zeros come last
  for (int64_t i = 0; i < n; ++i) magnitude[i] = block8_magnitude(in[i]);
  for (int64_t i = 0; i < n; ++i) before = magnitude[i] - 1u < before ? magnitude[i] - 1u : before;
  for (int64_t i = 0; i < n; ++i) largest = magnitude[i] > largest ? magnitude[i] : largest;
  const uint16_t scale = block8_scale_unsigned(before + 1u, largest);
  const Block8Unsigned block = block8_unsigned(scale);
  const uint32_t phase = block8_phase(number, step), narrow = block8_narrow(step);
  for (int64_t i = 0; i < n; ++i) out[i] = block8_encode(in[i], block, block8_threshold(phase, narrow, uint32_t(i)));
  return scale;
}

void decode_portable(bool is_signed, const uint8_t* code, uint16_t scale, int64_t n, float* out) {
  if (is_signed) return decode_portable(code, block8_signed(scale), n, out);
  decode_portable(code, block8_unsigned(scale), n, out);
}

uint16_t encode_portable(bool is_signed, const float* in, int64_t n, uint8_t* code, uint32_t number, uint32_t step) {
  return is_signed ? encode_signed_portable(in, n, code) : encode_unsigned_portable(in, n, code, number, step);
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused

#if defined(__AVX2__)
#include "blocks8_avx2.h"
#endif

namespace fused {
namespace FUSED_ISA {
namespace {

#if defined(__AVX2__)
// Decodes whole blocks, all but those that hold NaN.
template <class Decode>
void decode_known(const uint8_t* code, const uint16_t* scales, int blocks, float* out) {
  uint16_t padded_scales[kBlocks8] = {};
  std::memcpy(padded_scales, scales, size_t(blocks) * sizeof *scales);
  const Decode group(padded_scales, blocks);
  for (int b = 0; b < blocks; ++b)
    if (!decode(group, b, code + b * kBlock8, out + b * kBlock8))
      decode_portable(Decode::kSigned, code + b * kBlock8, scales[b], kBlock8, out + b * kBlock8);
}
#endif

// At most kBlocks8 blocks, of which the last may be a part of one.
void decode_blocks8(bool is_signed, const uint8_t* code, const uint16_t* scales, int64_t n, float* out) {
  int64_t at = 0;
#if defined(__AVX2__)
  const int whole = int(n / kBlock8);
  if (is_signed) decode_known<DecodeSigned>(code, scales, whole, out);
  else decode_known<DecodeUnsigned>(code, scales, whole, out);
  at = int64_t(whole) * kBlock8;
#endif
  for (; at < n; at += kBlock8) decode_portable(is_signed, code + at, scales[at / kBlock8], std::min<int64_t>(kBlock8, n - at), out + at);
}

void encode_blocks8(bool is_signed, const float* in, int64_t n, uint8_t* code, uint16_t* scales, uint32_t number, uint32_t step) {
  uint64_t left = ~uint64_t(0);  // blocks, as bits
#if defined(__AVX2__)
  const int whole = int(n / kBlock8);
  uint16_t words[kBlocks8];
  left = is_signed ? encode_signed(in, whole, code, words) : encode_unsigned(in, whole, code, words, number, step);
  std::memcpy(scales, words, size_t(whole) * sizeof *scales);
  left |= uint64_t(n % kBlock8 != 0) << whole;
#endif
  for (int64_t b = 0; b * kBlock8 < n && left >> b != 0; ++b) {
    if ((left >> b & 1u) == 0) continue;
    const int64_t at = b * kBlock8;
    scales[b] = encode_portable(is_signed, in + at, std::min<int64_t>(kBlock8, n - at), code + at, number + uint32_t(b), step);
  }
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
