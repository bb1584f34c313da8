// The host side of the tables: which tensors, where, what changed since the last step.
//
// Python describes a row once (`bind`). From then on `refresh` walks the parameter groups in C once per step and compares
// every address and layout with the cached row: in steady state the host's work is a few pointer comparisons per tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <vector>

#include "table.h"
#include "tensor_view.h"

namespace fused {

class HostTable {
 public:
  explicit HostTable(pybind11::list hyper_names_by_rule);

  void resize(size_t rows, size_t groups);
  // Row `index`: the parameter object, the state dictionary, whose tensors' identity is watched, and the row's fields. `watched` false: Python looks at this row before every
  // step, as it must where the class has a property `grad` of its own.
  void bind(size_t index, pybind11::object param, bool watched, pybind11::object state, pybind11::dict fields);
  // Compares all rows with the live objects. Returns the indices of the rows that Python must look at, or None if the
  // groups hold other parameters than the table.
  pybind11::object refresh(const pybind11::list& param_groups, const pybind11::dict& state);
  // Names the device (DLPack's type and index) whose kernels read a hyperparameter that is a tensor there by themselves:
  // `read_hypers` then takes its address and waits for nothing.
  void read_on_device(int32_t type, int32_t index);
  // Copies the hyperparameters of every group out of its dictionary.
  void read_hypers(const pybind11::list& param_groups, const std::vector<int>& rule_of_group);

  std::vector<TensorRow> rows;
  std::vector<GroupRow> groups;
  uint64_t generation = 0;         // counts changes of `rows`
  uint64_t active_generation = 0;  // counts changes of which rows have a gradient

  // The rows as they lie in memory, for a backend that copies them to a device itself.
  pybind11::bytes row_bytes() const;
  pybind11::bytes group_bytes() const;
  // The parameters that have a gradient, in table order.
  pybind11::list active_params() const;

 private:
  // Step, states, their scales, and a master. A row whose state has more is looked at by Python before every step.
  static constexpr size_t kMaxValues = 2 * kMaxStates + 2;
  // In the order in which they are looked at: what a step reads of an entry should lie in few cache lines.
  struct Entry {
    pybind11::object param;
    pybind11::object state;
    bool watched = false;
    bool foreign = false;  // another table updates it
    bool ready = false;    // state exists: a gradient may be used
    // Where the last gradient was, for a hint only: it may be dead.
    const void *last_grad = nullptr, *last_grad_implementation = nullptr;
    PyObject* last = nullptr;  // the last tensor among the values, and its memory
    void* last_data = nullptr;
    // Of the state dictionary, in its order; null: no tensor. Owned, so that no other tensor takes the place of a dead one.
    size_t value_count = 0;
    std::array<pybind11::object, kMaxValues> values;
    TensorView view;
  };

  void fetch_ahead(size_t index) const;
  bool unchanged(Entry& entry, TensorRow& row, bool look);
  static bool state_in_place(const Entry& entry, bool look);
  bool same_dictionaries(const pybind11::dict& state) const;
  void read_hyper(PyObject* value, GroupRow& row, size_t h) const;

  bool state_moved_ = false;
  size_t turn_ = 0;
  std::vector<std::pair<PyObject*, PyObject*>> dictionaries_;  // the optimizer's state as of the last look, borrowed
  std::vector<Entry> entries_;
  struct HyperName {
    pybind11::str key;
    int item;  // index into a tuple such as betas, or -1
  };
  std::vector<std::vector<HyperName>> hyper_names_;
  int32_t reader_type_ = 0, reader_index_ = 0;  // no device's type is 0
};

}  // namespace fused
