// Storage formats <-> float32: conversions and rounding, for host and device.
//
// Everything is written in integer and select operations without branches, so that host compilers vectorize it and every
// backend gives the same bits. Nothing depends on the processor's denormal mode. Where a GPU has an instruction for a
// conversion, it takes the place of ten others; the bits are the same but for a NaN's, which become 0x7fff.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules.h"
#include "table.h"

namespace fused {

FUSED_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

FUSED_HD float float_of(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;

FUSED_HD uint32_t canonical_nan(uint32_t u) {
  return (u & kMagnitude) > kInfinity ? 0x7fc00000u : u;
}

// ---- bfloat16: the high half of a float32 ----

FUSED_HD float bf16_to_float(uint16_t h) { return float_of(uint32_t(h) << 16); }

FUSED_HD uint16_t float_to_bf16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & kMagnitude) > kInfinity ? 0x7fc0u : rounded);
#endif
}

// Rounds up with the probability of the distance: `random` is uniform over 32 bits. Inf and NaN are kept.
FUSED_HD uint16_t float_to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = canonical_nan(bits_of(x));
  return uint16_t((u + ((u & kMagnitude) >= kInfinity ? 0u : random >> 16)) >> 16);
}

// ---- float16 ----

FUSED_HD float fp16_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | kInfinity;
  const uint32_t denormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t u = magnitude < 0x400u ? denormal : (magnitude >= 0x7c00u ? special : normal);
  return float_of(u | (uint32_t(h & 0x8000u) << 16));
#endif
}

FUSED_HD uint16_t float_to_fp16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  const uint32_t u = bits_of(x);
  const uint32_t a = u & kMagnitude;
  const uint32_t special = a > kInfinity ? 0x7e00u : 0x7c00u;
  const uint32_t denormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;  // the ulp of 0.5 is half precision's smallest step
  const uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t h = a >= 0x47800000u ? special : (a < 0x38800000u ? denormal : normal);
  return uint16_t(h | ((u >> 16) & 0x8000u));
#endif
}

FUSED_HD uint16_t float_to_fp16_stochastic(float x, uint32_t random) {
  const uint32_t u = bits_of(x);
  const uint32_t a = u & kMagnitude;
  const uint32_t special = a > kInfinity ? 0x7e00u : 0x7c00u;
  // Below the normal range the spacing is fixed: compare the fraction of the spacing with 24 random bits. Both are positive
  // floats, so the difference of their bits has the sign of theirs. Arithmetic in place of choices: of those compilers make branches.
  const float scaled = float_of(a < 0x38800000u ? a : 0x38800000u) * 0x1p24f;
  const int32_t whole = int32_t(scaled);
  const float fraction = scaled - float(whole);
  const uint32_t up = (bits_of(float(int32_t(random >> 8)) * 0x1p-24f) - bits_of(fraction)) >> 31;
  const uint32_t denormal = uint32_t(whole) + up;
  const uint32_t normal = (a - (112u << 23) + (random >> 19)) >> 13;
  const uint32_t below = uint32_t(int32_t(a - 0x38800000u) >> 31);
  const uint32_t inside = uint32_t(int32_t(a - 0x47800000u) >> 31);
  const uint32_t finite = normal ^ ((normal ^ denormal) & below);
  const uint32_t h = special ^ ((special ^ finite) & inside);
  return uint16_t(h | ((u >> 16) & 0x8000u));
}

// ---- a float32 master as a low-precision parameter and a remainder ----
//
// bfloat16: the parameter is the master rounded to nearest, ties away from zero, and the remainder is the master's low 16
// bits: exact for every value. With ties to even 65,537 masters would share an even parameter and 16 bits could not tell
// them apart. An 8-bit remainder is the same scheme for the master rounded to 24 bits.
//
// float16: the parameter is the master rounded to nearest even; the remainder counts the distance from the parameter to
// the master in units of the master's float32 spacing (exact for normal halves), and in units of 2^-39 below them.

struct Split16 {
  uint16_t param;
  int16_t remainder;
};

struct Split8 {
  uint16_t param;
  int8_t remainder;
};

// Adding the borrow back: the parameter was rounded up where the remainder's top bit is set. A zero that somebody wrote
// into the parameter beside an old remainder must not borrow: it would decode to NaN.
FUSED_HD uint32_t high_half(uint16_t param, bool borrow) {
  return uint32_t(param) - uint32_t(borrow && (param & 0x7fffu) != 0u);
}

FUSED_HD Split16 split16_bf16(float master) {
  const uint32_t u = canonical_nan(bits_of(master));
  return {uint16_t((u + 0x8000u) >> 16), int16_t(uint16_t(u))};
}

FUSED_HD float join16_bf16(uint16_t param, int16_t remainder) {
  const uint32_t low = uint16_t(remainder);
  const bool stale = low >= 0x8000u && (param & 0x7fffu) == 0u;
  return float_of((high_half(param, low >= 0x8000u) << 16) | (stale ? 0u : low));
}

// `round` is added to the bits before the low 8 are dropped: 0x80 rounds to nearest, a random byte rounds stochastically.
FUSED_HD Split8 split8_bf16(float master, uint32_t round) {
  const uint32_t u = canonical_nan(bits_of(master));
  const uint32_t kept = (u & kMagnitude) >= kInfinity ? u : (u + round) & ~0xffu;
  return {uint16_t((kept + 0x8000u) >> 16), int8_t(uint8_t(kept >> 8))};
}

FUSED_HD float join8_bf16(uint16_t param, int8_t remainder) {
  const uint32_t low = uint8_t(remainder);
  const bool stale = low >= 0x80u && (param & 0x7fffu) == 0u;
  return float_of((high_half(param, low >= 0x80u) << 16) | (stale ? 0u : low << 8));
}

FUSED_HD int32_t clamp(int32_t x, int32_t low, int32_t high) { return x < low ? low : (x > high ? high : x); }

FUSED_HD int32_t nearest(float x) {
  return int32_t(x + (x < 0.0f ? -0.5f : 0.5f));
}

FUSED_HD float finite_or_zero(float x) { return (bits_of(x) & kMagnitude) >= kInfinity ? 0.0f : x; }

// Distance from the half to the master's magnitude, in float32 spacings for normal halves, else in units of 2^-(24+log2 unit).
FUSED_HD int32_t fp16_distance(float master, uint16_t half, float denormal_unit) {
  const float h = fp16_to_float(half);
  const bool special = (half & 0x7fffu) >= 0x7c00u;
  const int32_t normal = int32_t(bits_of(master) & kMagnitude) - int32_t(bits_of(h) & kMagnitude);
  const float difference = finite_or_zero(float_of(bits_of(master) & kMagnitude)) - finite_or_zero(float_of(bits_of(h) & kMagnitude));
  const bool denormal = (half & 0x7fffu) < 0x400u;
  const int32_t fixed = nearest((denormal ? difference : 0.0f) * denormal_unit);
  return special ? 0 : (denormal ? fixed : normal);
}

FUSED_HD float fp16_at_distance(uint16_t half, int32_t distance, float denormal_unit) {
  const float h = fp16_to_float(half);
  const uint32_t a = bits_of(h) & kMagnitude;
  const uint32_t sign = bits_of(h) & ~kMagnitude;
  const bool special = (half & 0x7fffu) >= 0x7c00u;
  const bool denormal = (half & 0x7fffu) < 0x400u;
  const float fixed = float_of(denormal ? a : 0u) + float(distance) / denormal_unit;
  const uint32_t normal = uint32_t(int32_t(a) + distance);
  return float_of(sign ^ (special ? a : (denormal ? bits_of(fixed) : normal)));
}

FUSED_HD Split16 split16_fp16(float master) {
  const uint16_t half = float_to_fp16(master);
  return {half, int16_t(clamp(fp16_distance(master, half, 0x1p39f), -32768, 32767))};
}

FUSED_HD float join16_fp16(uint16_t param, int16_t remainder) { return fp16_at_distance(param, remainder, 0x1p39f); }

// `round` as in split8_bf16, in 1/256 of the kept unit.
FUSED_HD Split8 split8_fp16(float master, uint32_t round) {
  const uint16_t half = float_to_fp16(master);
  const bool denormal = (half & 0x7fffu) < 0x400u;
  const int32_t distance = fp16_distance(master, half, 0x1p40f);
  const int32_t shift = denormal ? 8 : 5;  // 2^-32 steps below the normal range, 32 spacings within it
  const int32_t offset = int32_t(round) >> (8 - shift);
  return {half, int8_t(clamp((distance + offset) >> shift, -128, 127))};
}

FUSED_HD float join8_fp16(uint16_t param, int8_t remainder) {
  const bool denormal = (param & 0x7fffu) < 0x400u;
  return fp16_at_distance(param, denormal ? int32_t(remainder) : int32_t(remainder) * 32, 0x1p32f);
}

// ---- random bits for stochastic rounding ----

struct Random4 {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;

FUSED_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t m0 = uint64_t(kPhiloxMultiplier0) * c0;
  const uint64_t m1 = uint64_t(kPhiloxMultiplier1) * c2;
  c0 = uint32_t(m1 >> 32) ^ c1 ^ k0;
  c1 = uint32_t(m1);
  c2 = uint32_t(m0 >> 32) ^ c3 ^ k1;
  c3 = uint32_t(m0);
}

FUSED_HD void philox_next_key(uint32_t& k0, uint32_t& k1) {
  k0 += 0x9E3779B9u;
  k1 += 0xBB67AE85u;
}

// Philox4x32-10 (Salmon et al., SC 2011): element i of tensor `stream` at `step` takes word i % 4 of counter i / 4, so
// the bits depend on nothing but the seed, the step, the tensor, the operand and the element.
FUSED_HD Random4 philox(uint64_t seed, uint64_t counter, uint32_t stream, uint32_t step) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = stream, c3 = step;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    philox_next_key(k0, k1);
  }
  return {{c0, c1, c2, c3}};
}

// The stream of one operand of a tensor: 0 is the parameter (or its remainder), 1 + k is state k.
FUSED_HD uint32_t operand_stream(uint32_t stream, uint32_t operand) { return stream * 8u + operand; }

}  // namespace fused
