// The tables that describe a whole model to a driver: one row per tensor, one row per parameter group.
// Plain data: the host reads it in place, a GPU gets a copy.
#pragma once

#include <cstdint>

namespace fused {

constexpr int kMaxStates = 4;
constexpr int kMaxHypers = 8;

// Storage formats; the numbers are those of fused/precision.py.
enum Format : uint8_t {
  kNone = 0,
  kFloat32 = 1,
  kFloat64 = 2,
  kBFloat16 = 3,
  kFloat16 = 4,
  kRemainder16 = 5,  // low bits of a float32 master whose high bits are the parameter
  kRemainder8 = 6,
  kBlock8Signed = 7,  // 8-bit codes with a scale per block
  kBlock8Unsigned = 8,
};

// Of one element. Static: code of several instruction sets must not share one copy.
static constexpr int bytes_of(uint8_t format) {
  switch (format) {
    case kFloat64:
      return 8;
    case kFloat32:
      return 4;
    case kRemainder8:
    case kBlock8Signed:
    case kBlock8Unsigned:
      return 1;
    default:
      return 2;
  }
}

enum RuleId : uint8_t;

struct TensorRow {
  void* param;
  const void* grad;  // null: no gradient, the row is passed over
  void* master;      // float32 master weights or remainders, by master_format
  void* state[kMaxStates];
  void* scale[kMaxStates];  // block scales of 8-bit states
  float* step;              // null: the rule keeps no count
  int64_t numel;
  int32_t group;
  uint32_t stream;  // names the tensor in the stochastic-rounding stream
  uint8_t rule;
  uint8_t stochastic;
  uint8_t param_format;
  uint8_t grad_format;
  uint8_t master_format;
  uint8_t state_format[kMaxStates];
};

// Beside the TensorRow of the same index where the second moment is kept by rows and columns. The states are float32,
// float64 for float64 parameters. The elements lie in memory as `lead` matrices of `rows` x `cols`.
struct FactoredRow {
  void* row_var;   // lead x rows; null: not factored
  void* col_var;   // lead x cols; null: not factored
  void* variance;  // one per element; null: factored
  int64_t lead, rows, cols;
  uint32_t flags;  // Adafactor::Flag
};

struct GroupRow {
  double hyper[kMaxHypers];
  double grad_sign;  // -1 to maximize
  // A hyperparameter that lives on the device and is read there, step by step: its address (else null) and format.
  const void* hyper_at[kMaxHypers];
  uint8_t hyper_format[kMaxHypers];
};

// What one step needs beside the tables. Addresses are read and written on the device that runs the step.
struct StepControl {
  const double* norm_total;  // {sum of squares or largest magnitude, number of nonfinite tensors} of the raw gradients
  const float* grad_scale;   // loss scale to divide out
  const float* found_inf;    // nonzero: skip
  float* grad_norm;          // out: norm of the unscaled gradients before clipping
  float* skipped;            // out: 1 where the step was skipped
  double max_norm;           // negative: no clipping; infinite: the norm is wanted, not clipping
  double grad_multiplier;    // a constant factor for the gradients (averaging)
  uint64_t seed;
  int32_t norm_is_max;
  int32_t skip_nonfinite;
  double* unscale;           // out: what made unscaled gradients of the raw ones, before clipping
};

}  // namespace fused
