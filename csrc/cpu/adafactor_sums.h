// Sums of squares for Adafactor's passes, in an order that the shape alone decides. Included by adafactor_kernels.h and
// adafactor_small.h alone.
#pragma once

#include "adafactor.h"
#include "storage.h"

namespace fused {
namespace FUSED_ISA {
namespace {

// Sums take sixteen lanes and a fixed tree, at most kBlock elements at a time: the same bits for every instruction set.
constexpr int kSumLanes = 16;

template <class T>
double sum_lanes(const T* lane) {
  double wide[kSumLanes];
  for (int l = 0; l < kSumLanes; ++l) wide[l] = double(lane[l]);
  for (int width = kSumLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) wide[l] += wide[l + width];
  return wide[0];
}

// The sum of value(i) over [0, n).
template <class T, class Value>
double sum_of(int64_t n, Value value) {
  if (n < kSumLanes) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += double(value(i));
    return sum;
  }
  T lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int l = 0; l < kSumLanes; ++l) lane[l] += value(i + l);
  for (int l = 0; i + l < n; ++l) lane[l] += value(i + l);
  return sum_lanes(lane);
}

template <class T>
const T* load_param_as(const TensorRow& row, int64_t begin, int64_t n, T* buffer) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const T*>(row.param) + begin;
  } else {
    return load_param(row, begin, n, buffer);
  }
}

template <class T>
T gradient_factor(const AdafactorJob& job) {
  return T(job.context.grad_factor * job.group->grad_sign);
}

template <class T>
double sum_param_squares(const AdafactorJob& job, int64_t begin, int64_t n, T* buffer) {
  if ((job.factored->flags & Adafactor::kScaleParameter) == 0) return 0.0;
  const T* __restrict p = load_param_as<T>(*job.row, begin, n, buffer);
  return sum_of<T>(n, [p](int64_t i) { return p[i] * p[i]; });
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
