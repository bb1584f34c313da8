// What is done once per row before the update: the decision to skip, the step count, the rule's constants.
#pragma once

#include <cuda_runtime.h>

#include "../table.h"
#include "device_table.h"

namespace fused::cuda {

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
