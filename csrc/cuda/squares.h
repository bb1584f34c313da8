// What a thread keeps of the elements of a norm.
//
// Consumer GPUs and B300 do two float64 operations per clock and multiprocessor, where others do 64: with one per element
// they would wait for their arithmetic, not for their memory. So float32 does what it can: the squares of 32 bytes are added
// up in it, within 4 * 2^-24 of their sum, and these sums in pairs of float32, which lose nothing.
#pragma once

#include "../rules.h"
#include "memory.h"

namespace fused::cuda {

class SumOfSquares {
 public:
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    float part[N / 2];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) part[j] = fma_(x[j], x[j], x[j + N / 2] * x[j + N / 2]);
#pragma unroll
    for (int width = N / 4; width > 0; width /= 2)
#pragma unroll
      for (int j = 0; j < width; ++j) part[j] += part[j + width];
    const float sum = part[0];
    if (sum >= kLeast && sum < kMost) {
      // The rounding error of an addition, exact whichever is larger (Knuth, TAOCP 2, 4.2.2, Theorem B).
      const float total = high_ + sum, added = total - high_;
      low_ += (high_ - (total - added)) + (sum - added);
      high_ = total;
    } else {
      FUSED_RARE();
      if (all_zero(x)) return;
#pragma unroll
      for (int j = 0; j < N; ++j) wide_ = fma_(double(x[j]), double(x[j]), wide_);
    }
  }
  __device__ __forceinline__ double value() const { return double(high_) + double(low_) + wide_; }

 private:
  // Squares that underflow do not count beside the least sum; 2^27 of the largest do not overflow.
  static constexpr float kLeast = 0x1p-80f, kMost = 0x1p100f;

  template <int N>
  static __device__ __forceinline__ bool all_zero(const float (&x)[N]) {
    bool zero = true;
#pragma unroll
    for (int j = 0; j < N; ++j) zero = zero && x[j] == 0.0f;
    return zero;
  }

  float high_ = 0.0f, low_ = 0.0f;
  double wide_ = 0.0;  // what float32 does not hold, infinities and NaN among it
};

class SumOfWideSquares {
 public:
  template <int N>
  __device__ __forceinline__ void add(const double (&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) lane_[j % 2] = fma_(x[j], x[j], lane_[j % 2]);
  }
  __device__ __forceinline__ double value() const { return lane_[0] + lane_[1]; }

 private:
  double lane_[2] = {};
};

template <class T>
class Largest {
 public:
  template <int N>
  __device__ __forceinline__ void add(const T (&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) most_ = max_nan(T(fabs(x[j])), most_);
  }
  __device__ __forceinline__ double value() const { return double(most_); }

 private:
  T most_ = T(0);
};

}  // namespace fused::cuda
