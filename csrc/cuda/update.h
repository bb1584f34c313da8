// The update kernels' interface: a table of them, by rule and variant.
#pragma once

#include "device_table.h"

namespace fused::cuda {

struct UpdateArgs {
  const DeviceRow* rows;
  const void* const* grads;
  const RowWork* work;
  const Piece* chunks;
  uint64_t seed;
};

using UpdateKernel = void (*)(UpdateArgs);

UpdateKernel plain_kernel(int rule);
UpdateKernel mixed_kernel(int rule);
UpdateKernel double_kernel(int rule);

inline UpdateKernel update_kernel(int rule, int variant) {
  return variant == kPlain ? plain_kernel(rule) : variant == kMixed ? mixed_kernel(rule) : double_kernel(rule);
}

}  // namespace fused::cuda
