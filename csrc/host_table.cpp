#include "host_table.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;

namespace fused {
namespace {

double number_at(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double number = PyFloat_AsDouble(value);  // bool, int, numpy scalars, tensors
  if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

}  // namespace

HostTable::HostTable(py::list hyper_names_by_rule) {
  for (const py::handle rule : hyper_names_by_rule) {
    std::vector<HyperName> names;
    for (const py::handle item : py::cast<py::list>(rule)) {
      const auto parts = py::cast<py::tuple>(item);
      py::object key = py::cast<py::object>(parts[0]);
      names.push_back({py::cast<py::str>(key), py::cast<int>(parts[1]), py::cast<bool>(parts[2])});
    }
    if (names.size() > kMaxHypers) throw std::invalid_argument("too many hyperparameters for a rule");
    hyper_names_.push_back(std::move(names));
  }
}

void HostTable::resize(size_t row_count, size_t group_count) {
  rows.assign(row_count, TensorRow{});
  groups.assign(group_count, GroupRow{});
  entries_.assign(row_count, Entry{});
  glances_.assign(row_count, Glance{});
  state_memory_.assign(row_count, StateMemory{});
  ++generation;
  ++active_generation;
}

void HostTable::bind(size_t index, py::object param, bool watched, py::object state, py::dict fields) {
  TensorRow row{};
  const auto address = [&](const char* name) -> void* {
    return fields.contains(name) ? reinterpret_cast<void*>(py::cast<uintptr_t>(fields[name])) : nullptr;
  };
  const auto number = [&](const char* name) -> int64_t { return fields.contains(name) ? py::cast<int64_t>(fields[name]) : 0; };
  row.param = address("param");
  row.grad = address("grad");
  if (row.grad == nullptr && fields.contains("grad")) row.grad = kNoElements;
  row.master = address("master");
  row.step = static_cast<float*>(address("step"));
  row.numel = number("numel");
  row.group = int32_t(number("group"));
  row.stream = uint32_t(number("stream"));
  row.rule = uint8_t(number("rule"));
  row.stochastic = uint8_t(number("stochastic"));
  row.param_format = uint8_t(number("param_format"));
  row.grad_format = uint8_t(number("grad_format"));
  row.master_format = uint8_t(number("master_format"));
  int k = 0;
  if (fields.contains("states"))
    for (const py::handle item : fields["states"]) {  // (address, format, scale address)
      const auto part = py::cast<py::tuple>(item);
      row.state[k] = reinterpret_cast<void*>(py::cast<uintptr_t>(part[0]));
      row.state_format[k] = py::cast<uint8_t>(part[1]);
      row.scale[k] = reinterpret_cast<void*>(py::cast<uintptr_t>(part[2]));
      ++k;
    }

  Entry entry;
  StateMemory memory;
  entry.param = std::move(param);
  entry.watched = watched && view_of(entry.param.ptr(), entry.view);
  entry.ready = row.grad != nullptr;
  entry.foreign = number("foreign") != 0;
  if (py::isinstance<py::dict>(state)) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value);) {
      const bool is_tensor = py::hasattr(value, "data_ptr");
      if (is_tensor) memory.tensor = value;
      if (entry.value_count == kMaxValues) {
        entry.watched = false;
        break;
      }
      if (is_tensor) entry.values[entry.value_count] = py::reinterpret_borrow<py::object>(value);
      ++entry.value_count;
    }
    if (memory.tensor != nullptr) memory.data = data_of(memory.tensor);
    entry.state = std::move(state);
  }
  rows[index] = row;
  glances_[index] = Glance{};
  glances_[index].param = entry.param.ptr();
  state_memory_[index] = memory;
  entries_[index] = std::move(entry);
  ++generation;
  ++active_generation;
}

py::bytes HostTable::row_bytes() const {
  return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(TensorRow));
}

py::bytes HostTable::group_bytes() const {
  return py::bytes(reinterpret_cast<const char*>(groups.data()), groups.size() * sizeof(GroupRow));
}

void HostTable::read_on_device(int32_t type, int32_t index) {
  reader_type_ = type;
  reader_index_ = index;
}

void HostTable::read_hyper(PyObject* value, bool may_be_off, GroupRow& row, size_t h) const {
  row.hyper_at[h] = nullptr;
  if (may_be_off && value == Py_None) {
    row.hyper[h] = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  if (reader_type_ != 0 && !PyFloat_CheckExact(value) && py::hasattr(value, "data_ptr")) {
    TensorView view;
    if (view_of(value, view) && view.numel == 1 && view.device_type == reader_type_ && view.device_index == reader_index_) {
      row.hyper[h] = 0.0;
      row.hyper_at[h] = view.data;
      row.hyper_format[h] = view.format;
      return;
    }
  }
  row.hyper[h] = number_at(value);
}

void HostTable::read_hypers(const py::list& param_groups, const std::vector<int>& rule_of_group) {
  static PyObject* const maximize_name = PyUnicode_InternFromString("maximize");
  for (size_t g = 0; g < groups.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups.ptr(), Py_ssize_t(g));
    const auto& names = hyper_names_[size_t(rule_of_group[g])];
    for (size_t h = 0; h < names.size(); ++h) {
      PyObject* value = PyDict_GetItemWithError(group, names[h].key.ptr());
      if (value == nullptr) throw py::key_error("parameter group " + std::to_string(g) + " has no option '" + std::string(names[h].key) + "'");
      if (names[h].item >= 0) {
        const py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(value, names[h].item));
        if (!item) throw py::error_already_set();
        read_hyper(item.ptr(), names[h].may_be_off, groups[g], h);
      } else {
        read_hyper(value, names[h].may_be_off, groups[g], h);
      }
    }
    PyObject* maximize = PyDict_GetItemWithError(group, maximize_name);
    groups[g].grad_sign = maximize != nullptr && PyObject_IsTrue(maximize) == 1 ? -1.0 : 1.0;
  }
}

}  // namespace fused
