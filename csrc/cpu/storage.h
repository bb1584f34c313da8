// Stored elements <-> blocks of registers' width: loading and storing by format, for every kernel of one instruction set.
// Included by kernels.cpp alone, which names the instruction set.
#pragma once

#include <algorithm>

#include "../formats.h"
#include "blocks8_kernels.h"
#include "kernels.h"
#include "lane_arrays.h"

namespace fused {
namespace FUSED_ISA {
namespace {

constexpr int64_t kBlock = 1024;
static_assert(kBlock % kBlock8 == 0 && kChunk % kBlock == 0, "8-bit blocks must not straddle blocks or threads");

template <class T>
constexpr uint8_t kNative = sizeof(T) == 8 ? kFloat64 : kFloat32;

template <class T>
struct Buffers {
  alignas(64) T param[kBlock];
  alignas(64) T grad[kBlock];
  alignas(64) T state[kMaxStates][kBlock];
  alignas(64) uint32_t random[kBlock];  // kBlock is a multiple of what fill_random writes at a time
};

template <class In, class Out, class Convert>
void convert(const In* __restrict in, Out* __restrict out, int64_t n, Convert f) {
  for (int64_t i = 0; i < n; ++i) out[i] = f(in[i]);
}

template <class T, class Convert>
void load_half(uint8_t format, const uint16_t* in, int64_t n, T* out, Convert f) {
  int64_t done = 0;
  if constexpr (sizeof(T) == sizeof(float)) done = load_lanes(format, in, n, out);
  convert(in + done, out + done, n - done, f);
}

// Elements [begin, begin + n) of a stored tensor as T: in place where the format is T's own.
template <class T>
const T* load(uint8_t format, const void* base, int64_t begin, int64_t n, T* buffer) {
  if (format == kNative<T>) return static_cast<const T*>(base) + begin;
  const uint16_t* half = static_cast<const uint16_t*>(base) + begin;
  switch (format) {
    case kFloat32:
      convert(static_cast<const float*>(base) + begin, buffer, n, [](float x) { return T(x); });
      break;
    case kFloat64:
      convert(static_cast<const double*>(base) + begin, buffer, n, [](double x) { return T(x); });
      break;
    case kBFloat16:
      load_half(format, half, n, buffer, [](uint16_t x) { return T(bf16_to_float(x)); });
      break;
    case kFloat16:
      load_half(format, half, n, buffer, [](uint16_t x) { return T(fp16_to_float(x)); });
      break;
  }
  return buffer;
}

// Random bits of elements [begin, begin + n), counter by counter in lanes: a loop over Philox's own rounds inside a loop over
// counters would not vectorize. `out` has room for n rounded up to a multiple of 64.
void fill_random(const TensorRow& row, uint32_t operand, const UpdateContext& context, int64_t begin, int64_t n, uint32_t* out) {
  constexpr int kLanes = 16;
  const uint32_t stream = operand_stream(row.stream, operand);
  const uint32_t step = uint32_t(context.step);
  const uint64_t first = uint64_t(begin) / 4;
  if (random_lanes(context.seed, first, stream, step, (n + 3) / 4, out) != 0) return;
  for (int64_t counter = 0; counter < (n + 3) / 4; counter += kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      c0[l] = uint32_t(first + uint64_t(counter)) + uint32_t(l);
      c1[l] = uint32_t((first + uint64_t(counter) + uint64_t(l)) >> 32);
      c2[l] = stream;
      c3[l] = step;
    }
    uint32_t k0 = uint32_t(context.seed), k1 = uint32_t(context.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int l = 0; l < kLanes; ++l) philox_round(c0[l], c1[l], c2[l], c3[l], k0, k1);
      philox_next_key(k0, k1);
    }
    uint32_t* __restrict block = out + 4 * counter;
    for (int l = 0; l < kLanes; ++l) {
      block[4 * l] = c0[l];
      block[4 * l + 1] = c1[l];
      block[4 * l + 2] = c2[l];
      block[4 * l + 3] = c3[l];
    }
  }
}

template <class Convert>
void convert_stochastic(const float* __restrict in, const uint32_t* __restrict random, uint16_t* __restrict out, int64_t n,
                        Convert f) {
  for (int64_t i = 0; i < n; ++i) out[i] = f(in[i], random[i]);
}

// The low-precision copy of float32 values, in a format with no state of its own.
void store(uint8_t format, void* base, int64_t begin, int64_t n, const float* in, const uint32_t* random) {
  if (format != kBFloat16 && format != kFloat16) return;
  uint16_t* out = static_cast<uint16_t*>(base) + begin;
  const int64_t done = store_lanes(format, in, random, out, n);
  in += done;
  out += done;
  n -= done;
  if (random != nullptr) random += done;
  if (format == kBFloat16) {
    if (random == nullptr) return convert(in, out, n, [](float x) { return float_to_bf16(x); });
    return convert_stochastic(in, random, out, n, [](float x, uint32_t r) { return float_to_bf16_stochastic(x, r); });
  }
  if (random == nullptr) return convert(in, out, n, [](float x) { return float_to_fp16(x); });
  return convert_stochastic(in, random, out, n, [](float x, uint32_t r) { return float_to_fp16_stochastic(x, r); });
}

// ---- parameters, with their masters or remainders ----

template <class Low, class Join>
const float* load_joined(const TensorRow& row, int64_t begin, int64_t n, float* buffer, Join f) {
  const uint16_t* param = static_cast<const uint16_t*>(row.param) + begin;
  const Low* low = static_cast<const Low*>(row.master) + begin;
  float* __restrict out = buffer;
  for (int64_t i = join_lanes(row.param_format == kBFloat16, param, low, n, buffer); i < n; ++i) out[i] = f(param[i], low[i]);
  return buffer;
}

const float* load_param(const TensorRow& row, int64_t begin, int64_t n, float* buffer) {
  const bool bf16 = row.param_format == kBFloat16;
  switch (row.master_format) {
    case kFloat32:
      return static_cast<const float*>(row.master) + begin;
    case kRemainder16:
      if (bf16) return load_joined<int16_t>(row, begin, n, buffer, [](uint16_t p, int16_t r) { return join16_bf16(p, r); });
      return load_joined<int16_t>(row, begin, n, buffer, [](uint16_t p, int16_t r) { return join16_fp16(p, r); });
    case kRemainder8:
      if (bf16) return load_joined<int8_t>(row, begin, n, buffer, [](uint16_t p, int8_t r) { return join8_bf16(p, r); });
      return load_joined<int8_t>(row, begin, n, buffer, [](uint16_t p, int8_t r) { return join8_fp16(p, r); });
    default:
      return load(row.param_format, row.param, begin, n, buffer);
  }
}

template <class Split, class Low, class Convert>
void store_split(const float* __restrict in, uint16_t* __restrict param, Low* __restrict low, int64_t begin, int64_t n, Convert f) {
  for (int64_t i = begin; i < n; ++i) {
    const Split s = f(in[i], i);
    param[i] = s.param;
    low[i] = s.remainder;
  }
}

void store_param(const TensorRow& row, int64_t begin, int64_t n, const float* in, const uint32_t* random) {
  uint16_t* param = static_cast<uint16_t*>(row.param) + begin;
  const bool bf16 = row.param_format == kBFloat16;
  switch (row.master_format) {
    case kFloat32:
      return store(row.param_format, row.param, begin, n, in, nullptr);
    case kRemainder16: {
      int16_t* low = static_cast<int16_t*>(row.master) + begin;
      const int64_t done = split_lanes(bf16, in, random, param, low, n);
      if (bf16) return store_split<Split16>(in, param, low, done, n, [](float x, int64_t) { return split16_bf16(x); });
      return store_split<Split16>(in, param, low, done, n, [](float x, int64_t) { return split16_fp16(x); });
    }
    case kRemainder8: {
      int8_t* low = static_cast<int8_t*>(row.master) + begin;
      const int64_t done = split_lanes(bf16, in, random, param, low, n);
      const auto round = [=](int64_t i) { return random != nullptr ? random[i] >> 24 : 0x80u; };
      if (bf16) return store_split<Split8>(in, param, low, done, n, [=](float x, int64_t i) { return split8_bf16(x, round(i)); });
      return store_split<Split8>(in, param, low, done, n, [=](float x, int64_t i) { return split8_fp16(x, round(i)); });
    }
    default:
      store(row.param_format, row.param, begin, n, in, random);
  }
}

// ---- states, with their block scales ----

static_assert(kBlock == kBlocks8 * kBlock8, "a buffer is what is encoded at a time");

const float* load_blocks8(bool is_signed, const void* codes, const void* scales, int64_t begin, int64_t n, float* buffer) {
  decode_blocks8(is_signed, static_cast<const uint8_t*>(codes) + begin, static_cast<const uint16_t*>(scales) + begin / kBlock8, n, buffer);
  return buffer;
}

void store_blocks8(bool is_signed, void* codes, void* scales, int64_t begin, int64_t n, const float* in, uint32_t step) {
  encode_blocks8(is_signed, in, n, static_cast<uint8_t*>(codes) + begin, static_cast<uint16_t*>(scales) + begin / kBlock8,
                 uint32_t(begin / kBlock8), step);
}

const float* load_state(const TensorRow& row, int k, int64_t begin, int64_t n, float* buffer) {
  const uint8_t format = row.state_format[k];
  if (format == kBlock8Signed || format == kBlock8Unsigned)
    return load_blocks8(format == kBlock8Signed, row.state[k], row.scale[k], begin, n, buffer);
  return load(format, row.state[k], begin, n, buffer);
}

// `step` counts this update: it moves the rounding of 8-bit second moments.
void store_state(const TensorRow& row, int k, int64_t begin, int64_t n, const float* in, const uint32_t* random, uint32_t step) {
  const uint8_t format = row.state_format[k];
  if (format == kBlock8Signed || format == kBlock8Unsigned)
    return store_blocks8(format == kBlock8Signed, row.state[k], row.scale[k], begin, n, in, step);
  store(format, row.state[k], begin, n, in, random);
}

// The random bits with which one operand is stored: state `k`, -1 for the parameter. Null: to nearest.
const uint32_t* random_for(const TensorRow& row, int k, const UpdateContext& context, int64_t begin, int64_t n, uint32_t* buffer) {
  const uint8_t format = k < 0 ? (row.master_format == kNone ? row.param_format : row.master_format) : row.state_format[k];
  if (!row.stochastic || (format != kBFloat16 && format != kFloat16 && format != kRemainder8)) return nullptr;
  fill_random(row, uint32_t(k + 1), context, begin, n, buffer);
  return buffer;
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
