// A thread's elements in float32, back to whatever they are stored as: parameters with masters or remainders, states in 16 or
// 8 bits; fetch.h brings them. The formats of a row are the same for all threads of a block, so each is a branch that the
// whole block takes: formats add up instead of multiplying the kernels.
#pragma once

#include "fetch.h"

namespace fused::cuda {

// How an operand is rounded: to nearest, or with 32 random bits for each of the thread's elements, as the CPU draws them.
struct Rounding {
  bool stochastic;
  uint32_t random[kVector];
};

__device__ __forceinline__ Rounding rounding_of(const TensorRow& row, uint8_t format, uint32_t operand, uint64_t seed,
                                                uint32_t step, const Place& at) {
  Rounding rounding = {};
  rounding.stochastic = row.stochastic && (format == kBFloat16 || format == kFloat16 || format == kRemainder8);
  if (rounding.stochastic) {
#pragma unroll
    for (int q = 0; q < kVector / 4; ++q) {
      const Random4 r = philox(seed, uint64_t(at.begin) / 4 + q, operand_stream(row.stream, operand), step);
#pragma unroll
      for (int w = 0; w < 4; ++w) rounding.random[4 * q + w] = r.word[w];
    }
  }
  return rounding;
}

template <Reuse REUSE, class Raw, class Convert>
__device__ __forceinline__ void store_as(void* base, const Place& at, const float (&x)[kVector], Convert convert) {
  Raw raw[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) raw[j] = convert(x[j], j);
  store_raw<REUSE>(static_cast<Raw*>(base) + at.begin, at.count, raw);
}

// Values in a format with no state of its own.
template <Reuse REUSE>
__device__ __forceinline__ void store(uint8_t format, void* base, const Place& at, const float (&x)[kVector], const Rounding& r) {
  using Half = unsigned short;
  if (format == kFloat32) {
    store_as<REUSE, float>(base, at, x, [](float v, int) { return v; });
  } else if (format == kBFloat16) {
    if (!r.stochastic) return store_as<REUSE, Half>(base, at, x, [](float v, int) { return float_to_bf16(v); });
    store_as<REUSE, Half>(base, at, x, [&](float v, int j) { return float_to_bf16_stochastic(v, r.random[j]); });
  } else {
    if (!r.stochastic) return store_as<REUSE, Half>(base, at, x, [](float v, int) { return float_to_fp16(v); });
    store_as<REUSE, Half>(base, at, x, [&](float v, int j) { return float_to_fp16_stochastic(v, r.random[j]); });
  }
}

// ---- parameters, with their masters or remainders ----

template <class Low, class Split>
__device__ __forceinline__ void split(const TensorRow& row, const Place& at, const float (&x)[kVector], Split f) {
  unsigned short high[kVector];
  Low low[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const auto parts = f(x[j], j);
    high[j] = parts.param;
    low[j] = parts.remainder;
  }
  store_raw<Reuse::kAgain>(static_cast<unsigned short*>(row.param) + at.begin, at.count, high);
  store_raw<Reuse::kOnce>(static_cast<Low*>(row.master) + at.begin, at.count, low);
}

// The same to nearest, for bfloat16.
template <class Remainder>
__device__ __forceinline__ void split_nearest(const TensorRow& row, const Place& at, const float (&x)[kVector]) {
  uint32_t high[kPairs], low[Remainder::kWords];
  split_bf16<Remainder>(x, high, low);
  store_packed<Reuse::kAgain>(static_cast<unsigned short*>(row.param) + at.begin, at.count, high);
  store_packed<Reuse::kOnce>(static_cast<typename Remainder::Low*>(row.master) + at.begin, at.count, low);
}

__device__ __forceinline__ void store_param(const TensorRow& row, const Place& at, const float (&x)[kVector], const Rounding& r) {
  const bool bf16 = row.param_format == kBFloat16;
  switch (row.master_format) {
    case kFloat32:
      store_as<Reuse::kOnce, float>(row.master, at, x, [](float v, int) { return v; });
      break;
    case kRemainder16:
      if (bf16) return split_nearest<Halves>(row, at, x);
      return split<int16_t>(row, at, x, [](float v, int) { return split16_fp16(v); });
    case kRemainder8: {
      if (bf16 && !r.stochastic) return split_nearest<Bytes>(row, at, x);
      const auto round = [&](int j) { return r.stochastic ? r.random[j] >> 24 : 0x80u; };
      if (bf16) return split<int8_t>(row, at, x, [&](float v, int j) { return split8_bf16(v, round(j)); });
      return split<int8_t>(row, at, x, [&](float v, int j) { return split8_fp16(v, round(j)); });
    }
    default:
      break;
  }
  store<Reuse::kAgain>(row.param_format, row.param, at, x, r);
}

// ---- states, with their block scales ----

__device__ __forceinline__ void store_block8(const TensorRow& row, int k, const Place& at, const float (&x)[kVector], uint32_t step) {
  Codes code;
  const uint16_t scale = row.state_format[k] == kBlock8Signed ? encode_signed(at, x, code) : encode_unsigned(at, x, code, step);
  if (at.count > 0 && at.begin % kBlock8 == 0) static_cast<uint16_t*>(row.scale[k])[block_of(at)] = scale;
  store_packed<Reuse::kOnce>(static_cast<uint8_t*>(row.state[k]) + at.begin, at.count, code);
}

// ---- rounding included ----

__device__ __forceinline__ void round_param(const TensorRow& row, const Place& at, const float (&x)[kVector], uint64_t seed, uint32_t step) {
  const uint8_t main_format = row.master_format == kNone ? row.param_format : row.master_format;
  store_param(row, at, x, rounding_of(row, main_format, 0, seed, step, at));
}

__device__ __forceinline__ void round_state(const TensorRow& row, int k, const Place& at, const float (&x)[kVector], uint64_t seed,
                                            uint32_t step) {
  const uint8_t format = row.state_format[k];
  if (is_block8(format)) return store_block8(row, k, at, x, step);
  store<Reuse::kOnce>(format, row.state[k], at, x, rounding_of(row, format, uint32_t(k + 1), seed, step, at));
}

}  // namespace fused::cuda
