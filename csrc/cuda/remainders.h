// bfloat16 parameters with remainders on the device, bit for bit as ../formats.h defines them, eight elements at a time. A master
// is the parameter's pattern plus the remainder as a signed number, except for NaN and for a zero beside an old negative remainder,
// whose sum is the pattern of a NaN: one look at the sum of all values finds both.
#pragma once

#include "../formats.h"
#include "memory.h"

namespace fused::cuda {

__device__ __forceinline__ bool any_nan(const float (&x)[kVector]) {
  float sum = x[0];
#pragma unroll
  for (int j = 1; j < kVector; ++j) sum += x[j];
  return sum != sum;
}

constexpr int kPairs = kVector / 2;

// Remainders in bytes, of which four come in a word.
struct Bytes {
  using Low = int8_t;
  static constexpr int kWords = kVector / 4;
  static constexpr uint32_t kSigns = 0x80808080u;
  static constexpr uint32_t kRound = 0x8080u;  // to 24 bits, and from there to 16

  __device__ __forceinline__ static uint32_t at(uint32_t word, int j) { return __byte_perm(word, 0u, 0x4404u + (uint32_t(j) << 4)); }
  __device__ __forceinline__ static void pack(const uint32_t (&rounded)[kVector], uint32_t (&word)[kWords]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t low = __byte_perm(rounded[4 * w], rounded[4 * w + 1], 0x0051u);
      const uint32_t high = __byte_perm(rounded[4 * w + 2], rounded[4 * w + 3], 0x0051u);
      word[w] = __byte_perm(low, high, 0x5410u);
    }
  }
  __device__ __forceinline__ static float join(uint16_t param, Low low) { return join8_bf16(param, low); }
  __device__ __forceinline__ static Split8 split(float x) { return split8_bf16(x, 0x80u); }
};

// Remainders in halves of words.
struct Halves {
  using Low = int16_t;
  static constexpr int kWords = kPairs;
  static constexpr uint32_t kSigns = 0x80008000u;
  static constexpr uint32_t kRound = 0x8000u;

  __device__ __forceinline__ static uint32_t at(uint32_t word, int j) { return j == 0 ? word & 0xffffu : word >> 16; }
  __device__ __forceinline__ static void pack(const uint32_t (&rounded)[kVector], uint32_t (&word)[kWords]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = __byte_perm(rounded[2 * w], rounded[2 * w + 1], 0x5410u);
  }
  __device__ __forceinline__ static float join(uint16_t param, Low low) { return join16_bf16(param, low); }
  __device__ __forceinline__ static Split16 split(float x) { return split16_bf16(x); }
};

template <class Remainder>
__device__ __forceinline__ void join_bf16(const uint32_t (&high)[kPairs], const uint32_t (&low)[Remainder::kWords], float (&x)[kVector]) {
  constexpr int kEach = kVector / Remainder::kWords;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t pattern = j % 2 == 0 ? high[j / 2] << 16 : high[j / 2] & 0xffff0000u;
    x[j] = float_of(pattern + Remainder::at(low[j / kEach] ^ Remainder::kSigns, j % kEach) - 0x8000u);
  }
  if (!any_nan(x)) return;
  FUSED_RARE();
  uint16_t param[kVector];
  typename Remainder::Low remainder[kVector];
  memcpy(param, high, sizeof param);
  memcpy(remainder, low, sizeof remainder);
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = Remainder::join(param[j], remainder[j]);
}

// To nearest.
template <class Remainder>
__device__ __forceinline__ void split_bf16(const float (&x)[kVector], uint32_t (&high)[kPairs], uint32_t (&low)[Remainder::kWords]) {
  uint32_t rounded[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) rounded[j] = bits_of(x[j]) + Remainder::kRound;
#pragma unroll
  for (int w = 0; w < kPairs; ++w) high[w] = __byte_perm(rounded[2 * w], rounded[2 * w + 1], 0x7632u);
  Remainder::pack(rounded, low);
#pragma unroll
  for (int w = 0; w < Remainder::kWords; ++w) low[w] ^= Remainder::kSigns;  // which rounding to 16 bits has turned
  if (!any_nan(x)) return;
  FUSED_RARE();
  uint16_t param[kVector];
  typename Remainder::Low remainder[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const auto parts = Remainder::split(x[j]);
    param[j] = parts.param;
    remainder[j] = parts.remainder;
  }
  memcpy(high, param, sizeof param);
  memcpy(low, remainder, sizeof remainder);
}

}  // namespace fused::cuda
