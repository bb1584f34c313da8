// Several neighbouring elements of one thread: memory <-> registers, 16 bytes at a time where the address allows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../formats.h"
#include "device_table.h"

namespace fused::cuda {

// Marks what whole vectors of ordinary contents do not run; the count of a kernel's instructions has it leave a trace.
#if !defined(FUSED_RARE)
#define FUSED_RARE()
#endif

constexpr int kVector = 8;  // elements per thread where formats differ: 16 bytes of a 16-bit one

// What a thread works on: elements [begin, begin + count) of a tensor.
struct Place {
  int64_t begin;
  int count;
};

template <int BYTES>
struct Word;
template <>
struct Word<2> { using type = unsigned short; };
template <>
struct Word<4> { using type = unsigned int; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<16> { using type = uint4; };

template <int BYTES>
constexpr int kWordBytes = BYTES >= 16 ? 16 : BYTES;

enum class Reuse { kOnce, kAgain };  // whether another kernel soon reads the same memory

template <Reuse REUSE, class T>
__device__ __forceinline__ T load_word(const T* address) {
  // Named as global memory: an address out of a table could be any to the compiler.
  if constexpr (REUSE == Reuse::kOnce) return __ldcs(address);
  else return __ldcg(address);
}

template <Reuse REUSE, class T>
__device__ __forceinline__ void store_word(T* address, T value) {
  if constexpr (REUSE == Reuse::kOnce) __stcs(address, value);
  else __stcg(address, value);
}

// V elements from an address that takes 16-byte accesses, or one access where they are fewer bytes.
template <Reuse REUSE, class Raw, int V>
__device__ __forceinline__ void load_vector(const Raw* address, Raw (&out)[V]) {
  constexpr int kBytes = V * int(sizeof(Raw)), kWord = kWordBytes<kBytes>;
  using W = typename Word<kWord>::type;
  W words[kBytes / kWord];
#pragma unroll
  for (int w = 0; w < kBytes / kWord; ++w) words[w] = load_word<REUSE>(reinterpret_cast<const W*>(address) + w);
  memcpy(out, words, kBytes);
}

template <Reuse REUSE, class Raw, int V>
__device__ __forceinline__ void store_vector(Raw* address, const Raw (&in)[V]) {
  constexpr int kBytes = V * int(sizeof(Raw)), kWord = kWordBytes<kBytes>;
  using W = typename Word<kWord>::type;
  W words[kBytes / kWord];
  memcpy(words, in, kBytes);
#pragma unroll
  for (int w = 0; w < kBytes / kWord; ++w) store_word<REUSE>(reinterpret_cast<W*>(address) + w, words[w]);
}

// Of V elements, as many as are left.
template <int V>
__device__ __forceinline__ int count_of(int left) {
  return left < 0 ? 0 : left < V ? left : V;
}

// At `first` of the elements after `begin`. If none are left it is `begin`, where whole vectors can be read for nothing.
__device__ __forceinline__ Place place_of(int64_t begin, int first, int left) {
  return {begin + (left > 0 ? first : 0), count_of<kVector>(left)};
}

// Elements [0, count) at `address`; the others become zero.
template <Reuse REUSE, class Raw, int V>
__device__ __forceinline__ void load_raw(const Raw* address, int count, Raw (&out)[V]) {
  if (count >= V && reinterpret_cast<uintptr_t>(address) % kWordBytes<V * int(sizeof(Raw))> == 0) {
    load_vector<REUSE>(address, out);
  } else {
    FUSED_RARE();
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = j < count ? load_word<REUSE>(address + j) : Raw(0);
  }
}

// The same; WHOLE: all V of them, at an address that takes the widest accesses.
template <bool WHOLE, Reuse REUSE, class Raw, int V>
__device__ __forceinline__ void load_elements(const Raw* address, int count, Raw (&out)[V]) {
  if constexpr (WHOLE) load_vector<REUSE>(address, out);
  else load_raw<REUSE>(address, count, out);
}

template <Reuse REUSE, class Raw, int V>
__device__ __forceinline__ void store_raw(Raw* address, int count, const Raw (&in)[V]) {
  if (count >= V && reinterpret_cast<uintptr_t>(address) % kWordBytes<V * int(sizeof(Raw))> == 0) {
    store_vector<REUSE>(address, in);
  } else {
    FUSED_RARE();
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (j < count) address[j] = in[j];
  }
}

// A thread's elements, packed into words: of elements that are smaller, compilers would put them together anew.
template <Reuse REUSE, class Raw, int W>
__device__ __forceinline__ void store_packed(Raw* address, int count, const uint32_t (&word)[W]) {
  static_assert(sizeof word == kVector * sizeof(Raw), "");
  if (count >= kVector && reinterpret_cast<uintptr_t>(address) % sizeof word == 0) {
    store_vector<REUSE>(reinterpret_cast<uint32_t*>(address), word);
  } else {
    FUSED_RARE();
    constexpr int kEach = kVector / W, kBits = 32 / kEach;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (j < count) address[j] = Raw(word[j / kEach] >> (j % kEach * kBits));
  }
}

// Stored elements as T. `base` is the tensor's address, `begin` the thread's first element.
template <Reuse REUSE, class T, int V>
__device__ __forceinline__ void load(uint8_t format, const void* base, int64_t begin, int count, T (&out)[V]) {
  switch (format) {
    case kFloat32: {
      float raw[V];
      load_raw<REUSE>(static_cast<const float*>(base) + begin, count, raw);
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = T(raw[j]);
      break;
    }
    case kFloat64: {
      double raw[V];
      load_raw<REUSE>(static_cast<const double*>(base) + begin, count, raw);
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = T(raw[j]);
      break;
    }
    default: {
      unsigned short raw[V];
      load_raw<REUSE>(static_cast<const unsigned short*>(base) + begin, count, raw);
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = T(format == kBFloat16 ? bf16_to_float(raw[j]) : fp16_to_float(raw[j]));
    }
  }
}

}  // namespace fused::cuda
