// What is done once per row before the update: the decision to skip, the step count, the rule's constants.
#pragma once

#include <cuda_runtime.h>

#include "../formats.h"
#include "../table.h"
#include "device_table.h"

namespace fused::cuda {

__device__ __forceinline__ double read_number(const void* address, uint8_t format) {
  switch (format) {
    case kFloat32: return double(*static_cast<const float*>(address));
    case kFloat64: return *static_cast<const double*>(address);
    case kBFloat16: return double(bf16_to_float(*static_cast<const uint16_t*>(address)));
    default: return double(fp16_to_float(*static_cast<const uint16_t*>(address)));
  }
}

// A group's hyperparameters, those that live on the device read there.
__device__ __forceinline__ void read_hypers(const GroupRow& group, double (&hyper)[kMaxHypers]) {
#pragma unroll
  for (int h = 0; h < kMaxHypers; ++h)
    hyper[h] = group.hyper_at[h] != nullptr ? read_number(group.hyper_at[h], group.hyper_format[h]) : group.hyper[h];
}

// Groups that fit in the kernel's arguments, which hold 4 KB. More are read from memory.
constexpr int kInlineGroups = 21;

struct PrologueArgs {
  StepControl control;
  const DeviceRow* rows;
  RowWork* work;
  int64_t row_count;
  const GroupRow* groups;  // null: they are inline
  GroupRow inline_groups[kInlineGroups];
};
static_assert(sizeof(PrologueArgs) <= 4000, "kernel arguments hold 4 KB");

__global__ void prologue(const __grid_constant__ PrologueArgs args);

}  // namespace fused::cuda
