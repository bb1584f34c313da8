// The norm of all gradients in one launch.
#pragma once

#include <cuda_runtime.h>

#include "device_table.h"

namespace fused::cuda {

struct ReduceArgs {
  const DeviceRow* rows;
  const void* const* grads;
  const Piece* spans;    // null: there are none
  double* partials;      // one per span
  uint32_t* flags;       // one per row: nonfinite; zero between launches
  uint32_t* arrived;     // one per row: spans that are done; zero between launches
  uint32_t* counter;     // blocks that are done; zero between launches
  double* row_values;    // out: {value, nonfinite} by the host's index; rows without elements are left alone
  double* total;         // out
  int64_t row_count;
  bool maximum;
};

__global__ void reduce(ReduceArgs args);

}  // namespace fused::cuda
