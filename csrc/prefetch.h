// A hint that memory will soon be read. Any address is allowed, also one that does not exist.
#pragma once

namespace fused {

inline void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

}  // namespace fused
