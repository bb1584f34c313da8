// A thread's elements on their way from memory. The raw words of all operands are asked for before the first of them is
// looked at: converting one at once would have the thread wait for it before it asks for the next.
//
// How much has to be under way: memory of 4.8 TB/s (H200) that answers after 750 ns or so needs 3.6 MB, 27 KB for each of
// 132 multiprocessors. A thread of the update has 16 bytes of every 16-bit operand under way and 32 of a 32-bit one: AdamW in
// bfloat16 64 bytes, and three blocks of 256 threads 48 KB; with 8-bit moments and remainders 42 KB. One operand at a time it
// would be 12 KB.
#pragma once

#include "blocks8_warp.h"
#include "remainders.h"

namespace fused::cuda {

static_assert(kChunk % (kThreads * kVector) == 0, "");

// kVector elements as they are stored, of up to 4 bytes. What belongs to a 16-bit parameter or to 8-bit codes lies behind
// them: remainders, the block's scale.
struct Fetched {
  uint32_t word[kVector];
};
constexpr int kBehindHalves = 4, kBehindCodes = 2;  // words

template <class T>
__device__ __forceinline__ void take(const Fetched& raw, int from, T (&out)[kVector]) {
  memcpy(out, raw.word + from, sizeof out);
}

// WHOLE, here and below: every vector of the block is whole, at an address that takes the widest accesses.
template <bool WHOLE, Reuse REUSE, class T>
__device__ __forceinline__ void fetch_as(const void* base, const Place& at, Fetched& raw, int to = 0) {
  T value[kVector];
  const T* address = static_cast<const T*>(base) + at.begin;
  load_elements<WHOLE, REUSE>(address, at.count, value);
  memcpy(raw.word + to, value, sizeof value);
}

// Elements of a format without a state of its own.
template <bool WHOLE, Reuse REUSE>
__device__ __forceinline__ void fetch(uint8_t format, const void* base, const Place& at, Fetched& raw) {
  if (format == kFloat32) fetch_as<WHOLE, REUSE, float>(base, at, raw);
  else fetch_as<WHOLE, REUSE, unsigned short>(base, at, raw);
}

// Float64 is rounded on the way and becomes float32.
template <bool WHOLE>
__device__ __forceinline__ void fetch_grad(const TensorRow& row, const void* grad, const Place& at, Fetched& raw) {
  if (WHOLE || row.grad_format != kFloat64) return fetch<WHOLE, Reuse::kOnce>(row.grad_format, grad, at, raw);
  float x[kVector];
  load<Reuse::kOnce>(kFloat64, grad, at.begin, at.count, x);
  memcpy(raw.word, x, sizeof x);
}

__device__ __forceinline__ void to_float(uint8_t format, const Fetched& raw, float (&x)[kVector]) {
  if (format == kFloat32 || format == kFloat64) return take(raw, 0, x);
  unsigned short half[kVector];
  take(raw, 0, half);
  if (format == kBFloat16) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = bf16_to_float(half[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = fp16_to_float(half[j]);
  }
}

// ---- parameters, with their masters or remainders ----

template <bool WHOLE>
__device__ __forceinline__ void fetch_param(const TensorRow& row, const Place& at, Fetched& raw) {
  const uint8_t master = row.master_format;
  if (master == kFloat32) return fetch_as<WHOLE, Reuse::kOnce, float>(row.master, at, raw);
  fetch<WHOLE, Reuse::kAgain>(row.param_format, row.param, at, raw);
  if (master == kRemainder16) fetch_as<WHOLE, Reuse::kOnce, int16_t>(row.master, at, raw, kBehindHalves);
  if (master == kRemainder8) fetch_as<WHOLE, Reuse::kOnce, int8_t>(row.master, at, raw, kBehindHalves);
}

template <class Low, class Join>
__device__ __forceinline__ void join(const Fetched& raw, float (&x)[kVector], Join f) {
  unsigned short high[kVector];
  Low low[kVector];
  take(raw, 0, high);
  take(raw, kBehindHalves, low);
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = f(high[j], low[j]);
}

template <class Remainder>
__device__ __forceinline__ void join_words(const Fetched& raw, float (&x)[kVector]) {
  uint32_t high[kPairs], low[Remainder::kWords];
  memcpy(high, raw.word, sizeof high);
  memcpy(low, raw.word + kBehindHalves, sizeof low);
  join_bf16<Remainder>(high, low, x);
}

__device__ __forceinline__ void param_to_float(const TensorRow& row, const Fetched& raw, float (&x)[kVector]) {
  const bool bf16 = row.param_format == kBFloat16;
  switch (row.master_format) {
    case kFloat32:
      return to_float(kFloat32, raw, x);
    case kRemainder16:
      if (bf16) return join_words<Halves>(raw, x);
      return join<int16_t>(raw, x, [](uint16_t p, int16_t r) { return join16_fp16(p, r); });
    case kRemainder8:
      if (bf16) return join_words<Bytes>(raw, x);
      return join<int8_t>(raw, x, [](uint16_t p, int8_t r) { return join8_fp16(p, r); });
    default:
      return to_float(row.param_format, raw, x);
  }
}

// ---- states, with their block scales ----

__device__ __forceinline__ bool is_block8(uint8_t format) { return format == kBlock8Signed || format == kBlock8Unsigned; }

template <bool WHOLE>
__device__ __forceinline__ void fetch_state(const TensorRow& row, int k, const Place& at, Fetched& raw) {
  const uint8_t format = row.state_format[k];
  if (!is_block8(format)) return fetch<WHOLE, Reuse::kOnce>(format, row.state[k], at, raw);
  fetch_as<WHOLE, Reuse::kOnce, uint8_t>(row.state[k], at, raw);
  const uint16_t* scale = static_cast<const uint16_t*>(row.scale[k]) + block_of(at);
  raw.word[kBehindCodes] = WHOLE || at.count > 0 ? load_word<Reuse::kAgain>(scale) : uint16_t(0);
}

__device__ __forceinline__ void state_to_float(const TensorRow& row, int k, const Fetched& raw, float (&x)[kVector]) {
  const uint8_t format = row.state_format[k];
  if (!is_block8(format)) return to_float(format, raw, x);
  const uint16_t scale = uint16_t(raw.word[kBehindCodes]);
  Codes code;
  memcpy(code, raw.word, sizeof code);
  if (format == kBlock8Signed) decode_signed(code, scale, x);
  else decode_unsigned(code, scale, x);
}

// ---- where vectors are whole ----

__device__ __forceinline__ bool all_aligned(uintptr_t addresses) { return addresses % 16 == 0; }

// Whether every vector of a row that begins at a multiple of kVector takes the widest accesses. Null is aligned.
__device__ __forceinline__ bool takes_vectors(const TensorRow& row, const void* grad) {
  uintptr_t addresses = reinterpret_cast<uintptr_t>(row.param) | reinterpret_cast<uintptr_t>(grad) | reinterpret_cast<uintptr_t>(row.master);
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) addresses |= reinterpret_cast<uintptr_t>(row.state[k]);
  return all_aligned(addresses) && row.grad_format != kFloat64;
}

}  // namespace fused::cuda
