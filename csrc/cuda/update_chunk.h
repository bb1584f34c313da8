// The update of one chunk, which all of its kernels share. How elements come and go is their storage's:
//
//   kElements                       of a thread, in one vector
//   kAtOnce                         vectors that a thread has under way at once
//   kLanesMeet                      whether threads with nothing to do still have to take part
//   Operands                        a thread's vectors as they come from memory
//   fetch(first, count, operands)   asks for `count` elements from `first` on, counted from the chunk's beginning
//   convert(operands, p, g, s)      what they stand for
//   store(first, count, p, s)
#pragma once

#include <type_traits>

#include "fetch.h"
#include "update.h"

namespace fused::cuda {

// A block's share of the work: elements [begin, begin + n) of a row.
template <class Rule, class T>
struct Chunk {
  using Constants = typename Rule::template Constants<T>;
  static_assert(sizeof(Constants) <= RowWork::kConstants && std::is_trivially_copyable<Constants>::value, "");

  const TensorRow* row;
  const void* grad;
  int64_t begin;
  int n;
  T factor;  // of the gradient
  Constants constants;
  uint32_t step;
  bool skip;

  __device__ __forceinline__ void open(const UpdateArgs& args) {
    const Piece piece = args.chunks[blockIdx.x];
    const RowWork& work = args.work[piece.row];
    skip = work.skip != 0u;
    if (skip) return;
    row = &args.rows[piece.row].tensor;
    grad = args.grads[piece.row];
    begin = int64_t(piece.index) * kChunk;
    const int64_t left = row->numel - begin;
    n = left < kChunk ? int(left) : kChunk;
    factor = T(work.factor);
    step = work.step;
    constexpr int kWords = (sizeof(Constants) + sizeof(uint4) - 1) / sizeof(uint4);
    uint4 words[kWords];  // else they would come byte by byte
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = reinterpret_cast<const uint4*>(work.constants)[w];
    memcpy(&constants, words, sizeof constants);
  }
};

template <class Rule, class Storage, class T>
__device__ __forceinline__ void update_chunk(const Chunk<Rule, T>& chunk, const Storage& storage) {
  constexpr int V = Storage::kElements, U = Storage::kAtOnce, S = Rule::kStates;
  static_assert(kChunk % (U * kThreads * V) == 0, "");
  for (int round = 0; round < chunk.n; round += U * kThreads * V) {
    typename Storage::Operands operands[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int first = round + (u * kThreads + int(threadIdx.x)) * V, left = chunk.n - first;
      storage.fetch(left > 0 ? first : 0, count_of<V>(left), operands[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int first = round + (u * kThreads + int(threadIdx.x)) * V, left = chunk.n - first;
      if (!Storage::kLanesMeet && left <= 0) break;
      T p[V], g[V], s[S ? S : 1][V];
      storage.convert(operands[u], p, g, s);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        T v[S ? S : 1];
#pragma unroll
        for (int k = 0; k < S; ++k) v[k] = s[k][j];
        Rule::apply(p[j], g[j] * chunk.factor, v, chunk.constants);
#pragma unroll
        for (int k = 0; k < S; ++k) s[k][j] = v[k];
      }
      storage.store(left > 0 ? first : 0, count_of<V>(left), p, s);
    }
  }
}

// Every operand but the gradient is of the arithmetic's type, as is the gradient where GRAD_IS_T. WHOLE: the chunk's length is
// a multiple of V, and all of its addresses take the widest accesses.
template <class Rule, class T, int V, int U, bool WHOLE, bool GRAD_IS_T>
struct Direct {
  static constexpr int kElements = V, kAtOnce = U, kStates = Rule::kStates;
  static constexpr bool kLanesMeet = false;
  struct Operands {
    T param[V], grad[V], state[kStates ? kStates : 1][V];
  };

  T* param;
  T* state[kStates ? kStates : 1];
  const void* grad;  // of the chunk where it is of type T, else of the tensor
  int64_t begin;
  uint8_t grad_format;

  __device__ __forceinline__ explicit Direct(const Chunk<Rule, T>& chunk)
      : param(static_cast<T*>(chunk.row->param) + chunk.begin),
        grad(GRAD_IS_T ? static_cast<const T*>(chunk.grad) + chunk.begin : chunk.grad), begin(chunk.begin),
        grad_format(chunk.row->grad_format) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) state[k] = static_cast<T*>(chunk.row->state[k]) + chunk.begin;
  }

  template <Reuse REUSE>
  __device__ __forceinline__ static void store_one(T* to, int count, const T (&x)[V]) {
    if constexpr (WHOLE) store_vector<REUSE>(to, x);
    else store_raw<REUSE>(to, count, x);
  }

  __device__ __forceinline__ void fetch(int first, int count, Operands& to) const {
    load_elements<WHOLE, Reuse::kAgain>(param + first, count, to.param);
    if constexpr (GRAD_IS_T) load_elements<WHOLE, Reuse::kOnce>(static_cast<const T*>(grad) + first, count, to.grad);
    else load<Reuse::kOnce>(grad_format, grad, begin + first, count, to.grad);
#pragma unroll
    for (int k = 0; k < kStates; ++k) load_elements<WHOLE, Reuse::kOnce>(state[k] + first, count, to.state[k]);
  }

  template <class States>
  __device__ __forceinline__ void convert(const Operands& from, T (&p)[V], T (&g)[V], States& s) const {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      p[j] = from.param[j];
      g[j] = from.grad[j];
#pragma unroll
      for (int k = 0; k < kStates; ++k) s[k][j] = from.state[k][j];
    }
  }

  template <class States>
  __device__ __forceinline__ void store(int first, int count, const T (&p)[V], const States& s) const {
    store_one<Reuse::kAgain>(param + first, count, p);
#pragma unroll
    for (int k = 0; k < kStates; ++k) store_one<Reuse::kOnce>(state[k] + first, count, s[k]);
  }
};

}  // namespace fused::cuda
