// The CPU kernels: one set per instruction set, chosen at run time by driver.cpp.
#pragma once

#include <cstdint>

#include "../table.h"

namespace fused {

constexpr int64_t kChunk = 8192;  // elements; threads meet at multiples of it, partial sums are kept per chunk

// What a rule made of a group's hyperparameters at a step. Tensors of a group mostly share their step count, and powers of
// the betas cost more than the update of a small tensor: one thread keeps the last ones for the next tensor.
struct ConstantsCache {
  const GroupRow* group = nullptr;
  double step = 0.0;
  bool wide = false;  // made for float64
  alignas(16) unsigned char bytes[128];
};

struct UpdateContext {
  double step;         // count including this update
  double grad_factor;  // loss unscaling, averaging and clipping in one
  uint64_t seed;
  ConstantsCache* constants = nullptr;  // of this thread, empty at the beginning of a step
};

// Sum of squares, or largest magnitude, of a range; nonfinite elements propagate.
struct Reduction {
  double value;
  bool nonfinite;
};

struct AdafactorJob;

// The passes of Adafactor over one tensor (adafactor.h says how it is divided).
struct AdafactorKernels {
  void (*stats)(const AdafactorJob&, int64_t tile, double* scratch);
  void (*combine)(const AdafactorJob&, int64_t unit);
  void (*norm)(const AdafactorJob&, int64_t chunk);
  void (*apply)(const AdafactorJob&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  void (*update)(const TensorRow&, const GroupRow&, int64_t begin, int64_t end, const UpdateContext&);
  Reduction (*reduce)(const TensorRow&, int64_t begin, int64_t end, bool maximum);  // at most a chunk
  // On the gradients alone; `scale` returns whether one of the old values was not finite.
  bool (*scale)(const TensorRow&, int64_t begin, int64_t end, double factor);
  void (*clamp)(const TensorRow&, int64_t begin, int64_t end, double limit);
  void (*accumulate)(const TensorRow&, int64_t begin, int64_t end, bool overwrite);
  AdafactorKernels adafactor;
};

}  // namespace fused
