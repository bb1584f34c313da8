// What is done to gradients alone: norms, scaling, clamping and accumulation. Part of each instruction set's kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../formats.h"
#include "kernels.h"
#include "storage.h"

namespace fused {
namespace FUSED_ISA {
namespace {

// ---- the norm ----
//
// Sixteen float64 sums and a fixed tree over them, per chunk: the same bits for every instruction set and thread count.

constexpr int kLanes = 16;

double sum_of(double (&lane)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

// The square of a float32 is exact in float64: rounded once or twice, the sum is the same.
FUSED_HD double plus_square(double sum, float x) {
#if defined(__FMA__) || defined(__FP_FAST_FMA)
  return fma_(double(x), double(x), sum);
#else
  return sum + double(x) * double(x);
#endif
}
FUSED_HD double plus_square(double sum, double x) { return sum + x * x; }

// What comes before `x`, a multiple of kLanes, is in the sums.
template <class T>
void add_squares(const T* __restrict x, int64_t n, double (&lane)[kLanes]) {
  const int64_t full = n - n % kLanes;
  for (int64_t i = 0; i < full; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = plus_square(lane[l], x[i + l]);
  for (int64_t i = full; i < n; ++i) lane[i - full] = plus_square(lane[i - full], x[i]);
}

// Reads four places in turn: of one alone the processor does not ask for enough memory ahead.
template <class T>
double sum_squares(const T* __restrict x, int64_t n) {
  constexpr int kPlaces = 4;
  double lane[kLanes] = {};
  const int64_t apart = n / (kPlaces * kLanes) * kLanes;
  for (int64_t i = 0; i < apart; i += kLanes)
    for (int place = 0; place < kPlaces; ++place)
      for (int l = 0; l < kLanes; ++l) lane[l] = plus_square(lane[l], x[place * apart + i + l]);
  add_squares(x + kPlaces * apart, n - kPlaces * apart, lane);
  return sum_of(lane);
}

// A block of 16-bit numbers.
double sum_squares(uint8_t format, const uint16_t* x, int64_t n) {
  double lane[kLanes] = {};
  const int64_t done = sum_squares_lanes(format, x, n, lane);
  alignas(64) float buffer[kBlock];
  add_squares(load(format, x, done, n - done, buffer), n - done, lane);
  return sum_of(lane);
}

FUSED_HD int32_t magnitude_bits(float x) { return int32_t(bits_of(x) & kMagnitude); }
FUSED_HD int64_t magnitude_bits(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & INT64_MAX;
}
FUSED_HD int16_t magnitude_bits(uint16_t half) { return int16_t(half & 0x7fffu); }

// Magnitudes of floating-point numbers are ordered as their bits are, NaN above infinity.
template <class T>
auto largest_bits(const T* x, int64_t n) {
  decltype(magnitude_bits(T())) largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude_bits(x[i]));
  return largest;
}

constexpr int64_t kInfinity64 = 0x7ff0000000000000;
constexpr int16_t kInfinityBf16 = 0x7f80;
constexpr int16_t kInfinityFp16 = 0x7c00;

Reduction reduce_max(const TensorRow& row, int64_t begin, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(row.grad) + begin;
  switch (row.grad_format) {
    case kFloat64: {
      const int64_t bits = largest_bits(static_cast<const double*>(row.grad) + begin, n);
      double value;
      std::memcpy(&value, &bits, sizeof value);
      return {value, bits >= kInfinity64};
    }
    case kBFloat16: {
      const int16_t bits = largest_bits(half, n);
      return {double(bf16_to_float(uint16_t(bits))), bits >= kInfinityBf16};
    }
    case kFloat16: {
      const int16_t bits = largest_bits(half, n);
      return {double(fp16_to_float(uint16_t(bits))), bits >= kInfinityFp16};
    }
    default: {
      const int32_t bits = largest_bits(static_cast<const float*>(row.grad) + begin, n);
      return {double(float_of(uint32_t(bits))), bits >= int32_t(kInfinity)};
    }
  }
}

// One chunk at most. The square of a float32 and their sums are finite in float64, so a nonfinite sum tells of a nonfinite
// element; squares of float64 overflow, and the elements themselves are looked at.
Reduction reduce(const TensorRow& row, int64_t begin, int64_t end, bool maximum) {
  const int64_t n = end - begin;
  if (maximum) return reduce_max(row, begin, n);
  double total = 0.0;
  if (row.grad_format == kFloat32) {
    total = sum_squares(static_cast<const float*>(row.grad) + begin, n);
  } else if (row.grad_format == kFloat64) {
    bool nonfinite = false;
    for (int64_t b = begin; b < end; b += kBlock) {
      const double* x = static_cast<const double*>(row.grad) + b;
      total += sum_squares(x, std::min(kBlock, end - b));
      nonfinite |= largest_bits(x, std::min(kBlock, end - b)) >= kInfinity64;
    }
    return {total, nonfinite};
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(row.grad);
    for (int64_t b = begin; b < end; b += kBlock) total += sum_squares(row.grad_format, x + b, std::min(kBlock, end - b));
  }
  return {total, magnitude_bits(total) >= kInfinity64};
}

// ---- in place ----

// x = f(x); returns the largest magnitude of the old values, as bits.
template <class T, class F>
auto transform(T* x, int64_t n, F f) {
  decltype(magnitude_bits(T())) largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T old = x[i];
    largest = std::max(largest, magnitude_bits(old));
    x[i] = f(old);
  }
  return largest;
}

// `f` on floats, and `one` on stored elements.
template <class F, class One>
int16_t transform_half(uint8_t format, uint16_t* x, int64_t n, F f, One one) {
  int16_t largest = 0;
  const int64_t done = transform_lanes(format, x, n, f, largest);
  return std::max(largest, transform(x + done, n - done, one));
}

// Applies `f` (on float, or double for float64) to the stored gradients; true where one of the old values was not finite.
template <class F>
bool transform_gradients(const TensorRow& row, int64_t begin, int64_t end, F f) {
  void* base = const_cast<void*>(row.grad);
  const int64_t n = end - begin;
  switch (row.grad_format) {
    case kFloat64:
      return transform(static_cast<double*>(base) + begin, n, [=](double x) { return f(x); }) >= kInfinity64;
    case kBFloat16:
      return transform_half(kBFloat16, static_cast<uint16_t*>(base) + begin, n, f,
                            [=](uint16_t x) { return float_to_bf16(f(bf16_to_float(x))); }) >= kInfinityBf16;
    case kFloat16:
      return transform_half(kFloat16, static_cast<uint16_t*>(base) + begin, n, f,
                            [=](uint16_t x) { return float_to_fp16(f(fp16_to_float(x))); }) >= kInfinityFp16;
    default:
      return transform(static_cast<float*>(base) + begin, n, [=](float x) { return f(x); }) >= int32_t(kInfinity);
  }
}

bool scale(const TensorRow& row, int64_t begin, int64_t end, double factor) {
  return transform_gradients(row, begin, end, [=](auto x) { return x * decltype(x)(factor); });
}

// NaN stays.
template <class T>
FUSED_HD T clamp_nan(T x, T limit) {
  const T raised = x < -limit ? -limit : x;
  return raised > limit ? limit : raised;
}

void clamp(const TensorRow& row, int64_t begin, int64_t end, double limit) {
  transform_gradients(row, begin, end, [=](auto x) { return clamp_nan(x, decltype(x)(limit)); });
}

// ---- accumulation ----

template <class T>
void accumulate_as(const TensorRow& row, int64_t begin, int64_t end, bool overwrite) {
  alignas(64) T buffer[kBlock];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t n = std::min(kBlock, end - b);
    T* __restrict sum = static_cast<T*>(row.param) + b;
    const T* __restrict g = load(row.grad_format, row.grad, b, n, buffer);
    if (overwrite) {
      for (int64_t i = 0; i < n; ++i) sum[i] = g[i];
    } else {
      for (int64_t i = 0; i < n; ++i) sum[i] += g[i];
    }
  }
}

// param += grad, or param = grad; param is float32 or float64.
void accumulate(const TensorRow& row, int64_t begin, int64_t end, bool overwrite) {
  (row.param_format == kFloat64 ? accumulate_as<double> : accumulate_as<float>)(row, begin, end, overwrite);
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
