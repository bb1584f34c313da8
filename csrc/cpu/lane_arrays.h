// Conversions of whole arrays by the functions of lanes.h, for everything that goes through buffers. Each returns how many
// elements, from the first on, it has seen to; the others are left to the portable functions of formats.h, all of them where
// the processor has no such lanes.
#pragma once

#include "lanes.h"

namespace fused {
namespace FUSED_ISA {
namespace {

#if defined(FUSED_LANES)

// Calls body(i) for every sixteen elements.
template <class Body>
FUSED_HD int64_t for_pairs(int64_t n, Body body) {
  const int64_t whole = n / kPair * kPair;
  for (int64_t i = 0; i < whole; i += kPair) body(i);
  return whole;
}

int64_t load_lanes(uint8_t format, const void* in, int64_t n, float* out) {
  const uint16_t* half = static_cast<const uint16_t*>(in);
  if (format == kBFloat16) return for_pairs(n, [=](int64_t i) { store_float_in_order(out + i, load_bf16_in_order(half + i)); });
  if (format == kFloat16) return for_pairs(n, [=](int64_t i) { store_float_in_order(out + i, load_fp16_in_order(half + i)); });
  return 0;
}

int64_t store_lanes(uint8_t format, const float* in, const uint32_t* random, uint16_t* out, int64_t n) {
  if (format == kFloat16) {
    if (random == nullptr) return for_pairs(n, [=](int64_t i) { store_fp16_in_order(out + i, load_float_in_order(in + i)); });
    return for_pairs(n, [=](int64_t i) { store_fp16_stochastic_in_order(out + i, load_float_in_order(in + i), random + i); });
  }
  if (random == nullptr) return for_pairs(n, [=](int64_t i) { store_bf16_in_order(out + i, load_float_in_order(in + i)); });
  return for_pairs(n, [=](int64_t i) { store_bf16_stochastic_in_order(out + i, load_float_in_order(in + i), random + i); });
}

int64_t join_lanes(bool bf16, const uint16_t* param, const int16_t* low, int64_t n, float* out) {
  if (bf16)
    return for_pairs(n, [=](int64_t i) { store_float_by_parity(out + i, join_bf16_by_parity(param + i, low + i)); });
  return for_pairs(n, [=](int64_t i) { store_float_in_order(out + i, join_fp16_in_order(param + i, low + i)); });
}

int64_t join_lanes(bool bf16, const uint16_t* param, const int8_t* low, int64_t n, float* out) {
  if (!bf16) return for_pairs(n, [=](int64_t i) { store_float_in_order(out + i, join8_fp16_in_order(param + i, low + i)); });
  return for_pairs(n, [=](int64_t i) { store_float_by_parity(out + i, join8_bf16_by_parity(param + i, low + i)); });
}

int64_t split_lanes(bool bf16, const float* in, const uint32_t*, uint16_t* param, int16_t* low, int64_t n) {
  if (bf16)
    return for_pairs(n, [=](int64_t i) { split_bf16_by_parity(param + i, low + i, load_float_by_parity(in + i)); });
  return for_pairs(n, [=](int64_t i) { split_fp16_in_order(param + i, low + i, load_float_in_order(in + i)); });
}

int64_t split_lanes(bool bf16, const float* in, const uint32_t* random, uint16_t* param, int8_t* low, int64_t n) {
  if (bf16)
    return for_pairs(n, [=](int64_t i) {
      const Rounding r = random == nullptr ? nearest8() : random8_by_parity(random + i);
      split8_bf16_by_parity(param + i, low + i, load_float_by_parity(in + i), r);
    });
  return for_pairs(n, [=](int64_t i) {
    const Rounding r = random == nullptr ? nearest8() : random8_in_order(random + i);
    split8_fp16_in_order(param + i, low + i, load_float_in_order(in + i), r);
  });
}

// ---- sums of squares: element i in lane i % 16, as everywhere ----

FUSED_HD void add_squares(__m256d& sum, __m128 x) {
  const __m256d wide = _mm256_cvtps_pd(x);
  sum = _mm256_fmadd_pd(wide, wide, sum);  // a square is exact: rounded once or twice, the sum is the same
}

// In a pair, B is how far the first element of `b` lies behind that of `a`, NEXT how far neighbours are apart.
template <Pair (*LOAD)(const uint16_t*), int B, int NEXT>
int64_t sum_pairs(const uint16_t* in, int64_t n, double* lane) {
  __m256d sum[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
  const int64_t whole = for_pairs(n, [&](int64_t i) {
    const Pair v = LOAD(in + i);
    add_squares(sum[0], _mm256_castps256_ps128(v.a.x));
    add_squares(sum[1], _mm256_extractf128_ps(v.a.x, 1));
    add_squares(sum[2], _mm256_castps256_ps128(v.b.x));
    add_squares(sum[3], _mm256_extractf128_ps(v.b.x, 1));
  });
  for (int k = 0; k < 4; ++k) {
    double part[4];
    _mm256_storeu_pd(part, sum[k]);
    for (int j = 0; j < 4; ++j) lane[k / 2 * B + (k % 2 * 4 + j) * NEXT] = part[j];
  }
  return whole;
}

int64_t sum_squares_lanes(uint8_t format, const uint16_t* in, int64_t n, double* lane) {
  if (format == kBFloat16) return sum_pairs<load_bf16_by_parity, 1, 2>(in, n, lane);
  return sum_pairs<load_fp16_in_order, 8, 1>(in, n, lane);
}

// ---- 16-bit numbers in place: x = f(x) ----

// `largest` is raised to the magnitude of the old values, as bits.
template <class F>
int64_t transform_lanes(uint8_t format, uint16_t* x, int64_t n, F f, int16_t& largest) {
  __m256i top = _mm256_set1_epi16(largest);
  const auto seen = [&top](const uint16_t* at) {
    top = _mm256_max_epi16(top, _mm256_and_si256(load16(at), _mm256_set1_epi16(0x7fff)));
  };
  int64_t whole;
  if (format == kBFloat16) {
    whole = for_pairs(n, [&](int64_t i) {
      const Pair v = load_bf16_by_parity(x + i);
      seen(x + i);
      store_bf16_by_parity(x + i, {f(v.a), f(v.b)});
    });
  } else {
    whole = for_pairs(n, [&](int64_t i) {
      const Pair v = load_fp16_in_order(x + i);
      seen(x + i);
      store_fp16_in_order(x + i, {f(v.a), f(v.b)});
    });
  }
  int16_t tops[kPair];
  store16(tops, top);
  for (int16_t t : tops) largest = t > largest ? t : largest;
  return whole;
}

// ---- random bits ----

// philox() of four counters, one to a 64-bit lane. Multiplications read the low half of a lane, so what the shifts and
// exclusive ors leave in the high half need not be cleared.
struct PhiloxLanes {
  __m256i c0, c1, c2, c3;

  FUSED_HD void round(__m256i m0, __m256i m1, __m256i k0, __m256i k1) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, k0));
    c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, k1));
    c1 = p1;
    c3 = p0;
  }

  // The words of one counter after those of another. Counters lie in the lanes as 0 2 1 3, so that this needs no permutation.
  FUSED_HD void store(uint32_t* out) const {
    const __m256i a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    const __m256i b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    store16(out, _mm256_unpacklo_epi64(a, b));
    store16(out + 8, _mm256_unpackhi_epi64(a, b));
  }
};

int64_t random_lanes(uint64_t seed, uint64_t first, uint32_t stream, uint32_t step, int64_t counters, uint32_t* out) {
  constexpr int kSets = 2;  // as many as fit in the registers
  const __m256i m0 = _mm256_set1_epi32(int32_t(kPhiloxMultiplier0)), m1 = _mm256_set1_epi32(int32_t(kPhiloxMultiplier1));
  const __m256i c2 = _mm256_set1_epi64x(int64_t(stream)), c3 = _mm256_set1_epi64x(int64_t(step));
  __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), _mm256_set_epi64x(3, 1, 2, 0));
  for (int64_t i = 0; i < counters; i += 4 * kSets) {
    PhiloxLanes set[kSets];
    for (PhiloxLanes& s : set) {
      s = {counter, _mm256_srli_epi64(counter, 32), c2, c3};
      counter = _mm256_add_epi64(counter, _mm256_set1_epi64x(4));
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi32(int32_t(k0)), key1 = _mm256_set1_epi32(int32_t(k1));
      for (PhiloxLanes& s : set) s.round(m0, m1, key0, key1);
      philox_next_key(k0, k1);
    }
    for (int s = 0; s < kSets; ++s) set[s].store(out + 4 * i + 16 * s);
  }
  return counters;
}

#else

int64_t load_lanes(uint8_t, const void*, int64_t, float*) { return 0; }
int64_t store_lanes(uint8_t, const float*, const uint32_t*, uint16_t*, int64_t) { return 0; }
int64_t sum_squares_lanes(uint8_t, const uint16_t*, int64_t, double*) { return 0; }
int64_t random_lanes(uint64_t, uint64_t, uint32_t, uint32_t, int64_t, uint32_t*) { return 0; }
template <class F>
int64_t transform_lanes(uint8_t, uint16_t*, int64_t, F, int16_t&) {
  return 0;
}
template <class Low>
int64_t join_lanes(bool, const uint16_t*, const Low*, int64_t, float*) {
  return 0;
}
template <class Low>
int64_t split_lanes(bool, const float*, const uint32_t*, uint16_t*, Low*, int64_t) {
  return 0;
}

#endif

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
