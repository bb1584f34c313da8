// A tensor's C++ object as it lies in memory, for the look at every tensor in every step.
//
// Even torch's C functions take eight calls to describe a tensor, and a Python object for its gradient. But mostly nothing
// has changed, and that shows in the object itself: the words that tell dtype, device, shape, strides and kind are compared
// with those of a tensor about which the functions were asked. Where they lie is checked once, at import, on tensors that
// differ in one of these each; where the check fails, the functions serve.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

#include "prefetch.h"

namespace fused {

// The same for tensors of the same dtype, device, shape, strides and dispatch keys (a negated view has one of its own).
struct TensorTraits {
  static constexpr int kDims = 5;                // more lie elsewhere
  static constexpr int kShape = 1 + 2 * kDims;   // dimensions, sizes, strides
  uint64_t words[kShape + 3];                    // and: elements; dtype, device and flags; dispatch keys
};

class TensorObjects {
 public:
  // Null where torch's objects are not what they are taken for, or where FUSED_TENSOR_INTERFACE declines them.
  static const TensorObjects* instance();

  bool has_traits(const void* object, const TensorTraits& traits) const {
    const uint64_t* shape = words(object) + shape_;
    return std::memcmp(shape, traits.words, sizeof(uint64_t) * TensorTraits::kShape) == 0 &&
           shape[kNumel] == traits.words[TensorTraits::kShape] &&
           (shape[kKind] & kKindBits) == traits.words[TensorTraits::kShape + 1] &&
           shape[kKeys] == traits.words[TensorTraits::kShape + 2];
  }

  // False: too many dimensions for the object.
  bool traits_of(const void* object, TensorTraits& traits) const {
    const uint64_t* shape = words(object) + shape_;
    if (shape[0] > TensorTraits::kDims) return false;
    std::memcpy(traits.words, shape, sizeof(uint64_t) * TensorTraits::kShape);
    traits.words[TensorTraits::kShape] = shape[kNumel];
    traits.words[TensorTraits::kShape + 1] = shape[kKind] & kKindBits;
    traits.words[TensorTraits::kShape + 2] = shape[kKeys];
    return true;
  }

  static int64_t numel(const TensorTraits& traits) { return int64_t(traits.words[TensorTraits::kShape]); }

  static const void* storage(const void* object) { return pointer(object, kStorage); }
  // What the memory belongs to: another one where a lazy copy shares it, until one of the two is written to.
  static const void* owner(const void* storage) { return pointer(storage, kOwner); }

  // Of the first element; `size` is that of one.
  const void* address(const void* object, int64_t size) const {
    return static_cast<const char*>(pointer(storage(object), kData)) + int64_t(words(object)[shape_ + kOffset]) * size;
  }

  // The gradient's object, null where there is none.
  const void* grad(const void* object) const {
    const void* found = *grad_(object);
    return found == undefined_ ? nullptr : found;
  }

  // Tells autograd that a tensor was written to. The handle is the address of a pointer to its object. May throw.
  void bump_version(const void* handle) const { bump_(handle); }

  // Hints, in the order in which they are of use: the object, then what hangs on it.
  static void prefetch_object(const void* object) {
    const char* at = static_cast<const char*>(object);
    for (int offset = 0; offset < 192; offset += 64) prefetch(at + offset);
    prefetch(at + 175);
  }
  static void prefetch_storage(const void* object) { prefetch(static_cast<const uint64_t*>(storage(object)) + kData); }
  static void prefetch_grad(const void* object) { prefetch(static_cast<const char*>(pointer(object, kAutograd)) + kGradOffset); }
  static void prefetch_version(const void* object) { prefetch(pointer(object, kVersion)); }

 private:
  // In words. Of a tensor: its storage, what autograd knows (a hint), its version (a hint).
  static constexpr int kStorage = 2, kAutograd = 3, kVersion = 5;
  static constexpr int kData = 2, kOwner = 4;  // of a storage
  static constexpr int kGradOffset = 40;       // in bytes; a hint
  // Counted from the number of dimensions, in front of the sizes.
  static constexpr int kOffset = TensorTraits::kShape, kNumel = kOffset + 1, kKind = kNumel + 1, kKeys = kKind + 1;
  static constexpr uint64_t kKindBits = ~(uint64_t{1} << 63);  // the last flag's neighbour is never set to anything

  static const uint64_t* words(const void* object) { return static_cast<const uint64_t*>(object); }
  static const void* pointer(const void* object, int word) { return static_cast<const void* const*>(object)[word]; }

  static const TensorObjects* find();
  bool load();
  bool lies_as_expected(pybind11::handle tensor) const;
  bool verify();

  int shape_ = 0;  // where the number of dimensions is, in words
  const void* undefined_ = nullptr;
  const void* const* (*grad_)(const void* object) = nullptr;
  void (*bump_)(const void* handle) = nullptr;
};

}  // namespace fused
