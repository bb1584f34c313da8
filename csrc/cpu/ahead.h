// Memory that is asked for before it is read. Included by kernels.cpp and what it includes, which name the instruction set.
#pragma once

#include <algorithm>

#include "../prefetch.h"
#include "../table.h"

namespace fused {
namespace FUSED_ISA {
namespace {

constexpr int64_t kCacheLine = 64;

inline void prefetch_bytes(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kCacheLine) prefetch(static_cast<const char*>(from) + at);
}

// Parameters and gradients of the block after this one, a part before each piece of work on this one. Blocks end where pages
// end, and the processor itself looks no further: without this, memory would rest while a block is worked on.
struct Ahead {
  const char *param, *grad;
  int64_t param_bytes, grad_bytes, at = 0, part;

  Ahead(const TensorRow& row, int64_t begin, int64_t n, int parts)
      : param(static_cast<const char*>(row.param)), grad(static_cast<const char*>(row.grad)) {
    param += begin * bytes_of(row.param_format), param_bytes = n * bytes_of(row.param_format);
    grad += begin * bytes_of(row.grad_format), grad_bytes = n * bytes_of(row.grad_format);
    part = (std::max(param_bytes, grad_bytes) / parts + kCacheLine) / kCacheLine * kCacheLine;
  }

  void fetch() {
    for (int64_t end = at + part; at < end; at += kCacheLine) {
      if (at < param_bytes) prefetch(param + at);
      if (at < grad_bytes) prefetch(grad + at);
    }
  }
};

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused
