// Gradients looked up by the functions that work on them without an optimizer: clipping, unscaling, accumulation.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "host_table.h"

namespace fused {

// The tensors of one call that a CPU kernel can take as they lie in memory; the others are left to Python.
struct GradientRows {
  // `items` are tensors, or with `of_params` parameters whose gradients are meant; those without one are passed over.
  GradientRows(const pybind11::list& items, bool of_params);

  std::vector<TensorRow> rows;
  pybind11::list tensors;  // of the rows
  pybind11::list rest;
  bool has_float64 = false;  // among the rows
};

// Pairs of parameters and the float32 or float64 buffers that collect their gradients, at fixed addresses.
class Accumulation {
 public:
  Accumulation(const pybind11::list& params, const pybind11::list& buffers);

  // Looks up the gradient of parameter `index`, or of all for -1. Returns the indices that Python must see to.
  pybind11::list look_up(Py_ssize_t index);
  // Adds the gradients that were looked up to their buffers; the first one since `reset` is stored instead.
  void add();
  // Takes the gradients that were added off their parameters.
  void release();
  // Counts a gradient that Python has added; true for the first one since `reset`.
  bool count(size_t index) { return counts_[index]++ == 0; }
  // Gradients added since `reset`: to one parameter, and to the one that received most.
  uint32_t count_of(size_t index) const { return counts_[index]; }
  uint32_t largest_count() const;
  void reset() { counts_.assign(counts_.size(), 0); }

 private:
  struct Found {
    size_t index;
    pybind11::object grad;
  };
  std::vector<uint32_t> counts_;
  std::vector<TensorRow> rows_;
  std::vector<TensorView> views_;
  std::vector<pybind11::object> params_;
  std::vector<Found> found_;
};

}  // namespace fused
