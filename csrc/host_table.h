// The host side of the tables: which tensors, where, what changed since the last step.
//
// Python describes a row once (`bind`). From then on `refresh` walks the parameter groups in C once per step and compares
// every address and layout with the cached row (refresh.cpp): in steady state the host's work is a few comparisons of
// memory per tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <vector>

#include "layouts.h"
#include "table.h"
#include "tensor_view.h"

namespace fused {

class HostTable {
 public:
  // A list for each rule of (key, index into its value or -1, whether it may be None).
  explicit HostTable(pybind11::list hyper_names_by_rule);

  void resize(size_t rows, size_t groups);
  // Row `index`: the parameter object, the state dictionary, whose tensors' identity is watched, and the row's fields.
  // `watched` false: Python looks at this row before every step, as it must where the class has a property `grad` of its own.
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
  // Tells autograd that the parameters with a gradient were written to. Returns those that Python must tell it of.
  pybind11::list bump_versions();

 private:
  // Stands for the address of a tensor without elements, which torch gives as null: null means "no gradient" in a row.
  static inline void* const kNoElements = reinterpret_cast<void*>(uintptr_t{64});
  // Step, states, their scales, and a master. A row whose state has more is looked at by Python before every step.
  static constexpr size_t kMaxValues = 2 * kMaxStates + 2;
  struct Entry {
    pybind11::object param;
    pybind11::object state;
    bool watched = false;
    bool foreign = false;  // another table updates it
    bool ready = false;    // state exists: a gradient may be used
    // Of the state dictionary, in its order; null: no tensor. Owned, so that no other tensor takes the place of a dead one.
    size_t value_count = 0;
    std::array<pybind11::object, kMaxValues> values;
    TensorView view;
  };

  // What is compared of a row whose entry held at the last look, in one cache line. Nothing is owned here.
  struct alignas(64) Glance {
    PyObject* param = nullptr;
    const void* data = nullptr;     // of the parameter, its storage and what that belongs to
    const void* storage = nullptr;
    const void* owner = nullptr;
    PyObject* state = nullptr;      // null: none
    uint64_t state_version = 0;
    Layouts::Index layout = Layouts::kNone;       // of the parameter; none: the entry must be looked at
    Layouts::Index grad_layout = Layouts::kNone;  // none: a gradient must be looked at
    bool foreign = false;
  };

  // The last tensor of a row's state, and its memory.
  struct StateMemory {
    PyObject* tensor = nullptr;
    const void* data = nullptr;
  };

  bool looks_at_state(size_t index) const;
  void fetch_ahead(size_t index) const;
  bool same_at_a_glance(size_t index);
  bool unchanged(size_t index);
  void learn(size_t index, PyObject* grad, const TensorView& grad_view);
  void set_grad(TensorRow& row, const void* address, uint8_t format);
  bool state_in_place(size_t index) const;
  bool state_memory_in_place(size_t index) const;
  bool same_dictionaries(const pybind11::dict& state) const;
  void remember_dictionaries(const pybind11::dict& state);

  void read_hyper(PyObject* value, bool may_be_off, GroupRow& row, size_t h) const;

  bool state_moved_ = false;
  size_t turn_ = 0;
  std::vector<std::pair<PyObject*, PyObject*>> dictionaries_;  // the optimizer's state as of the last look, borrowed
  uint64_t dictionaries_version_ = 0;
  std::vector<Entry> entries_;
  std::vector<Glance> glances_;
  std::vector<StateMemory> state_memory_;
  Layouts layouts_;
  std::vector<PyObject*> active_;  // the parameters with a gradient, in table order, as of `active_generation`
  uint64_t active_seen_ = 0;
  struct HyperName {
    pybind11::str key;
    int item;         // index into a tuple such as betas, or -1
    bool may_be_off;  // None is a value: NaN in the row
  };
  std::vector<std::vector<HyperName>> hyper_names_;
  int32_t reader_type_ = 0, reader_index_ = 0;  // no device's type is 0
};

}  // namespace fused
