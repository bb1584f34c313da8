// Dtype, shape, place and gradient of a torch tensor, read from its Python object without linking torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "table.h"

namespace fused {

struct TensorView {
  static constexpr int kMaxDims = 8;
  struct Dim {
    int64_t size, stride;
  };
  void* data = nullptr;
  int64_t numel = 0;  // real numbers: a complex element counts twice
  uint8_t format = kNone;
  int8_t ndim = 0;
  int16_t device_type = 0;  // DLPack's number
  int32_t device_index = 0;
  Dim dims[kMaxDims];  // the first ndim are set

  // Same dtype, device, shape and, where a size exceeds one, strides.
  bool same_layout(const TensorView& other) const { return format == other.format && same_place(other); }

  // Shape, strides and device, dtype apart.
  bool same_place(const TensorView& other) const {
    if (ndim != other.ndim || numel != other.numel || device_type != other.device_type || device_index != other.device_index)
      return false;
    for (int d = 0; d < ndim; ++d) {
      if (dims[d].size != other.dims[d].size) return false;
      if (dims[d].stride != other.dims[d].stride && dims[d].size != 1 && numel != 0) return false;
    }
    return true;
  }
};

// Whether the class is torch.Tensor or torch.nn.Parameter: a subclass may stand for tensors elsewhere, as DTensor does, and
// has an address of its own that means nothing.
bool is_plain(PyObject* tensor);

// Reads a torch tensor without creating Python objects. False: it has none of the known dtypes, too many dimensions, or
// no memory that can be named, and Python has to look at it.
bool view_of(PyObject* tensor, TensorView& view);

// Whether a tensor stands for the negated elements of its memory, which its view does not show. Autograd leaves such
// gradients (imaginary parts of conjugated tensors) where they are dense, which is where they have one element.
bool is_negated(PyObject* tensor);

// The address of the first element; null where there is none.
void* data_of(PyObject* tensor);

// The attribute `grad`; None where there is none.
pybind11::object grad_of(PyObject* tensor);

// The C++ object behind a tensor of a plain class, null where it is not known; and its handle, the address of a pointer to it.
const void* implementation_of(PyObject* tensor);
inline const void* handle_of(PyObject* tensor) { return tensor + 1; }

// Where in that object the sizes are, in words. Only for a tensor whose implementation is known.
int sizes_word(PyObject* tensor);

// A library of torch that is loaded already, such as "torch_cpu"; null: not found.
void* torch_library(const char* name);

// "objects", "stable ABI" or "DLPack": how tensors are read.
const char* tensor_interface();

}  // namespace fused
