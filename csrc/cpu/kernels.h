// The CPU kernels: one set per instruction set, chosen at run time by driver.cpp.
#pragma once

#include <cstdint>

#include "../table.h"

namespace fused {

constexpr int64_t kChunk = 8192;  // elements; threads meet at multiples of it, partial sums are kept per chunk

struct UpdateContext {
  double step;         // count including this update
  double grad_factor;  // loss unscaling, averaging and clipping in one
  uint64_t seed;
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
