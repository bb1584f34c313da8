// The tables as kernels see them.
#pragma once

#include <cstdint>

#include "../blocks8.h"
#include "../table.h"

namespace fused::cuda {

constexpr int kChunk = 8192;   // elements that one block updates
constexpr int kSpan = 32768;   // elements whose squares one block adds up
constexpr int kThreads = 256;  // per block, in every kernel
constexpr int kWarp = 32;
static_assert(kChunk % kBlock8 == 0, "8-bit blocks must not straddle chunks");

// A row with its gradient's address left out: `grads`, beside the rows, holds the one address that changes often.
struct DeviceRow {
  TensorRow tensor;
  int64_t first_chunk;
  int64_t first_span;
  int64_t index;  // of the row in the host's table
};

// Piece `index` of a row, kChunk or kSpan elements long.
struct Piece {
  int32_t row;
  int32_t index;
};

// What the prologue derives for a row and the update needs.
struct alignas(16) RowWork {
  static constexpr int kConstants = 80;
  unsigned char constants[kConstants];  // Rule::Constants<T>
  double factor;                        // of the gradient
  uint32_t step;
  uint32_t skip;
};

// How a launch computes: one kernel each.
enum Variant : uint8_t {
  kPlain,   // float32 in every place
  kMixed,   // float32 arithmetic, any storage
  kDouble,  // float64 arithmetic and state
  kVariants
};

}  // namespace fused::cuda
