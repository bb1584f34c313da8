// Stored elements <-> blocks of registers' width: loading and storing by format, for every kernel of one instruction set.
// Included by kernels.cpp alone, which names the instruction set.
#pragma once

#include <algorithm>

#include "../blocks8.h"
#include "../formats.h"
#include "kernels.h"

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
  alignas(64) uint32_t random[kBlock];
};

template <class In, class Out, class Convert>
void convert(const In* __restrict in, Out* __restrict out, int64_t n, Convert f) {
  for (int64_t i = 0; i < n; ++i) out[i] = f(in[i]);
}

// Elements [begin, begin + n) of a stored tensor as T: in place where the format is T's own.
template <class T>
const T* load(uint8_t format, const void* base, int64_t begin, int64_t n, T* buffer) {
  if (format == kNative<T>) return static_cast<const T*>(base) + begin;
  switch (format) {
    case kFloat32:
      convert(static_cast<const float*>(base) + begin, buffer, n, [](float x) { return T(x); });
      break;
    case kFloat64:
      convert(static_cast<const double*>(base) + begin, buffer, n, [](double x) { return T(x); });
      break;
    case kBFloat16:
      convert(static_cast<const uint16_t*>(base) + begin, buffer, n, [](uint16_t x) { return T(bf16_to_float(x)); });
      break;
    case kFloat16:
      convert(static_cast<const uint16_t*>(base) + begin, buffer, n, [](uint16_t x) { return T(fp16_to_float(x)); });
      break;
  }
  return buffer;
}

void fill_random(const TensorRow& row, uint32_t operand, const UpdateContext& context, int64_t begin, int64_t n, uint32_t* out) {
  const uint32_t stream = operand_stream(row.stream, operand);
  const uint32_t step = uint32_t(context.step);
  const uint64_t first = uint64_t(begin) / 4;
  const int64_t counters = (n + 3) / 4;
  for (int64_t i = 0; i < counters; ++i) {
    const Random4 r = philox(context.seed, first + uint64_t(i), stream, step);
    for (int w = 0; w < 4; ++w) out[4 * i + w] = r.word[w];
  }
}

// The low-precision copy of float32 values, in a format with no state of its own.
void store(uint8_t format, void* base, int64_t begin, int64_t n, const float* in, const uint32_t* random) {
  uint16_t* __restrict out = static_cast<uint16_t*>(base) + begin;
  if (format == kBFloat16) {
    if (random == nullptr) return convert(in, out, n, [](float x) { return float_to_bf16(x); });
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16_stochastic(in[i], random[i]);
  } else if (format == kFloat16) {
    if (random == nullptr) return convert(in, out, n, [](float x) { return float_to_fp16(x); });
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_fp16_stochastic(in[i], random[i]);
  }
}

// ---- parameters, with their masters or remainders ----

const float* load_param(const TensorRow& row, int64_t begin, int64_t n, float* buffer) {
  const uint16_t* param = static_cast<const uint16_t*>(row.param) + begin;
  const int16_t* low16 = static_cast<const int16_t*>(row.master) + begin;
  const int8_t* low8 = static_cast<const int8_t*>(row.master) + begin;
  float* __restrict out = buffer;
  const bool bf16 = row.param_format == kBFloat16;
  switch (row.master_format) {
    case kFloat32:
      return static_cast<const float*>(row.master) + begin;
    case kRemainder16:
      if (bf16) {
        for (int64_t i = 0; i < n; ++i) out[i] = join16_bf16(param[i], low16[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = join16_fp16(param[i], low16[i]);
      }
      return buffer;
    case kRemainder8:
      if (bf16) {
        for (int64_t i = 0; i < n; ++i) out[i] = join8_bf16(param[i], low8[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = join8_fp16(param[i], low8[i]);
      }
      return buffer;
    default:
      return load(row.param_format, row.param, begin, n, buffer);
  }
}

template <class Split, class Low, class Convert>
void store_split(const float* __restrict in, uint16_t* __restrict param, Low* __restrict low, int64_t n, Convert f) {
  for (int64_t i = 0; i < n; ++i) {
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
      if (bf16) return store_split<Split16>(in, param, low, n, [](float x, int64_t) { return split16_bf16(x); });
      return store_split<Split16>(in, param, low, n, [](float x, int64_t) { return split16_fp16(x); });
    }
    case kRemainder8: {
      int8_t* low = static_cast<int8_t*>(row.master) + begin;
      if (random != nullptr) {
        if (bf16) return store_split<Split8>(in, param, low, n, [=](float x, int64_t i) { return split8_bf16(x, random[i] >> 24); });
        return store_split<Split8>(in, param, low, n, [=](float x, int64_t i) { return split8_fp16(x, random[i] >> 24); });
      }
      if (bf16) return store_split<Split8>(in, param, low, n, [](float x, int64_t) { return split8_bf16(x, 0x80u); });
      return store_split<Split8>(in, param, low, n, [](float x, int64_t) { return split8_fp16(x, 0x80u); });
    }
    default:
      store(row.param_format, row.param, begin, n, in, random);
  }
}

// ---- states, with their block scales ----

const float* load_blocks8(bool is_signed, const void* codes, const void* scales, int64_t begin, int64_t n, float* buffer) {
  const uint8_t* code = static_cast<const uint8_t*>(codes) + begin;
  const uint32_t* scale = static_cast<const uint32_t*>(scales) + begin / kBlock8;
  for (int64_t first = 0; first < n; first += kBlock8, ++scale) {
    const int64_t count = std::min<int64_t>(kBlock8, n - first);
    const uint8_t* __restrict in = code + first;
    float* __restrict out = buffer + first;
    if (is_signed) {
      const Block8Range range = block8_range(*scale, 126.0f);
      for (int64_t i = 0; i < count; ++i) out[i] = block8_decode_signed(in[i], range);
    } else {
      const Block8Range range = block8_range(*scale, 254.0f);
      for (int64_t i = 0; i < count; ++i) out[i] = block8_decode_unsigned(in[i], range);
    }
  }
  return buffer;
}

void store_blocks8(bool is_signed, void* codes, void* scales, int64_t begin, int64_t n, const float* in) {
  uint8_t* code = static_cast<uint8_t*>(codes) + begin;
  uint32_t* scale = static_cast<uint32_t*>(scales) + begin / kBlock8;
  for (int64_t first = 0; first < n; first += kBlock8, ++scale) {
    const int64_t count = std::min<int64_t>(kBlock8, n - first);
    const float* __restrict x = in + first;
    uint8_t* __restrict out = code + first;
    uint32_t smallest = kMagnitude, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t a = bits_of(x[i]) & kMagnitude;
      smallest = std::min(smallest, a == 0 ? kMagnitude : a);
      largest = std::max(largest, a);
    }
    *scale = block8_scale(largest == 0 ? 0 : smallest, largest);
    if (is_signed) {
      const Block8Range range = block8_range(*scale, 126.0f);
      for (int64_t i = 0; i < count; ++i) out[i] = block8_encode_signed(x[i], range);
    } else {
      const Block8Range range = block8_range(*scale, 254.0f);
      for (int64_t i = 0; i < count; ++i) out[i] = block8_encode_unsigned(x[i], range);
    }
  }
}

const float* load_state(const TensorRow& row, int k, int64_t begin, int64_t n, float* buffer) {
  const uint8_t format = row.state_format[k];
  if (format == kBlock8Signed || format == kBlock8Unsigned)
    return load_blocks8(format == kBlock8Signed, row.state[k], row.scale[k], begin, n, buffer);
  return load(format, row.state[k], begin, n, buffer);
}

void store_state(const TensorRow& row, int k, int64_t begin, int64_t n, const float* in, const uint32_t* random) {
  const uint8_t format = row.state_format[k];
  if (format == kBlock8Signed || format == kBlock8Unsigned)
    return store_blocks8(format == kBlock8Signed, row.state[k], row.scale[k], begin, n, in);
  store(format, row.state[k], begin, n, in, random);
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
