#include "host_table.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "prefetch.h"

namespace py = pybind11;

namespace fused {
namespace {

// Stands for the address of a tensor without elements, which torch gives as null: null means "no gradient" in a row.
void* const kNoElements = reinterpret_cast<void*>(uintptr_t{64});

// State memory is looked at in every step for models of few tensors, else for one row in kLookEvery, in turn.
constexpr size_t kFewRows = 64;
constexpr size_t kLookEvery = 8;

// torch.Tensor's own `.grad`, called without the search through a class and its bases that every attribute costs.
class Grad {
 public:
  Grad() : name_(PyUnicode_InternFromString("grad")) {
    PyObject* found = py::object(py::module_::import("torch").attr("Tensor").attr("grad")).release().ptr();
    if (Py_IS_TYPE(found, &PyGetSetDescr_Type)) getset_ = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
  }

  py::object of(PyObject* tensor) const {
    PyObject* grad = getset_ != nullptr ? getset_->get(tensor, getset_->closure) : PyObject_GetAttr(tensor, name_);
    if (grad == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }

 private:
  PyObject* name_;
  PyGetSetDef* getset_ = nullptr;
};

const Grad& grads() {
  static const Grad* instance = new Grad;
  return *instance;
}

// Rows' objects lie scattered over the heap, each with pointers to the next. They are fetched in three stages, so many rows
// before their turn.
constexpr size_t kFar = 12, kMiddle = 8, kNear = 4;

double number_at(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (value == Py_None) return std::numeric_limits<double>::quiet_NaN();  // an option that is off
  const double number = PyFloat_AsDouble(value);  // bool, int, numpy scalars, tensors
  if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

}  // namespace

HostTable::HostTable(py::list hyper_names_by_rule) {
  for (const py::handle rule : hyper_names_by_rule) {
    std::vector<HyperName> names;
    for (const py::handle item : py::cast<py::list>(rule)) {
      const auto pair = py::cast<py::tuple>(item);
      py::object key = py::cast<py::object>(pair[0]);
      names.push_back({py::cast<py::str>(key), py::cast<int>(pair[1])});
    }
    if (names.size() > kMaxHypers) throw std::invalid_argument("too many hyperparameters for a rule");
    hyper_names_.push_back(std::move(names));
  }
}

void HostTable::resize(size_t row_count, size_t group_count) {
  rows.assign(row_count, TensorRow{});
  groups.assign(group_count, GroupRow{});
  entries_.assign(row_count, Entry{});
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
  entry.param = std::move(param);
  entry.watched = watched && view_of(entry.param.ptr(), entry.view);
  entry.ready = row.grad != nullptr;
  entry.foreign = number("foreign") != 0;
  if (py::isinstance<py::dict>(state)) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value);) {
      const bool is_tensor = py::hasattr(value, "data_ptr");
      if (is_tensor) entry.last = value;
      if (entry.value_count == kMaxValues) {
        entry.watched = false;
        break;
      }
      if (is_tensor) entry.values[entry.value_count] = py::reinterpret_borrow<py::object>(value);
      ++entry.value_count;
    }
    if (entry.last != nullptr) entry.last_data = data_of(entry.last);
    entry.state = std::move(state);
  }
  rows[index] = row;
  entries_[index] = std::move(entry);
  ++generation;
  ++active_generation;
}

// The tensors of a state dictionary by identity, and, where `look` says so, the memory of the last one. Code that moves
// state by assigning to `.data` moves all of it, so a look at some rows in each step finds it; a look at every address
// would double the cost of a step's bookkeeping. Walking a dictionary costs no hashing.
bool HostTable::state_in_place(const Entry& entry, bool look) {
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  size_t i = 0;
  for (; PyDict_Next(entry.state.ptr(), &position, &key, &value); ++i)
    if (i >= entry.value_count || (entry.values[i] && entry.values[i].ptr() != value)) return false;
  if (i != entry.value_count) return false;
  return !look || entry.last == nullptr || data_of(entry.last) == entry.last_data;
}

// True if the row holds for the live objects, with the gradient's address brought up to date.
bool HostTable::unchanged(Entry& entry, TensorRow& row, bool look) {
  if (!entry.watched) return false;
  TensorView view;
  if (!view_of(entry.param.ptr(), view) || view.data != entry.view.data || !view.same_layout(entry.view)) return false;
  if (entry.foreign) return true;

  const py::object grad = grads().of(entry.param.ptr());
  const void* address = nullptr;
  if (grad.ptr() != entry.last_grad) {
    entry.last_grad = grad.ptr();
    entry.last_grad_implementation = implementation_of(grad.ptr());
  }
  if (!grad.is_none()) {
    if (!entry.ready || !view_of(grad.ptr(), view) || !view.same_place(entry.view)) return false;
    if (view.numel == 1 && is_negated(grad.ptr())) return false;
    address = view.numel != 0 ? view.data : kNoElements;
    if (row.grad_format != view.format) {
      row.grad_format = view.format;
      ++generation;
    }
  }
  if (row.grad != address) {
    active_generation += (row.grad == nullptr) != (address == nullptr);
    row.grad = address;
    ++generation;
  }

  if (entry.state && !state_in_place(entry, look)) {
    state_moved_ = true;
    return false;
  }
  return true;
}

py::bytes HostTable::row_bytes() const {
  return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(TensorRow));
}

py::bytes HostTable::group_bytes() const {
  return py::bytes(reinterpret_cast<const char*>(groups.data()), groups.size() * sizeof(GroupRow));
}

py::list HostTable::active_params() const {
  py::list params;
  for (size_t i = 0; i < rows.size(); ++i)
    if (rows[i].grad != nullptr) params.append(entries_[i].param);
  return params;
}

// Whether the optimizer's state still holds the dictionaries of the last look, in their order. Walking a dictionary costs
// no hashing, which for a tensor is a call into Python.
bool HostTable::same_dictionaries(const py::dict& state) const {
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  size_t i = 0;
  for (; PyDict_Next(state.ptr(), &position, &key, &value); ++i)
    if (i >= dictionaries_.size() || dictionaries_[i].first != key || dictionaries_[i].second != value) return false;
  return i == dictionaries_.size();
}

void HostTable::fetch_ahead(size_t index) const {
  if (index + kFar >= entries_.size()) return;
  const Entry &far = entries_[index + kFar], &middle = entries_[index + kMiddle], &near = entries_[index + kNear];
  prefetch(far.param.ptr());
  prefetch(far.state.ptr());
  prefetch(far.last_grad);
  prefetch_implementation(middle.param.ptr());
  if (middle.state) {
    const auto* keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(middle.state.ptr())->ma_keys);
    prefetch(keys);
    prefetch(keys + 64);
  }
  for (int line = 0; line < kImplementationLines; ++line)
    prefetch(static_cast<const char*>(middle.last_grad_implementation) + 64 * line);
  prefetch_storage(near.param.ptr());
}

py::object HostTable::refresh(const py::list& param_groups, const py::dict& state) {
  static PyObject* const params_name = PyUnicode_InternFromString("params");
  py::list attention;
  size_t index = 0;
  state_moved_ = false;
  ++turn_;
  if (!same_dictionaries(state)) {
    dictionaries_.clear();
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value);) dictionaries_.emplace_back(key, value);
    for (const Entry& entry : entries_)
      state_moved_ |= entry.state && PyDict_GetItemWithError(state.ptr(), entry.param.ptr()) != entry.state.ptr();
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  for (const py::handle group : param_groups) {
    PyObject* params = PyDict_GetItemWithError(group.ptr(), params_name);
    if (params == nullptr || !PyList_Check(params)) return py::none();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++index) {
      if (index >= entries_.size() || entries_[index].param.ptr() != PyList_GET_ITEM(params, i)) return py::none();
      fetch_ahead(index);
      const bool look = entries_.size() <= kFewRows || index % kLookEvery == turn_ % kLookEvery;
      if (!unchanged(entries_[index], rows[index], look)) attention.append(index);
    }
  }
  if (index != entries_.size()) return py::none();
  if (state_moved_) {  // where one state has moved, any may have
    attention = py::list();
    for (size_t i = 0; i < entries_.size(); ++i)
      if (!entries_[i].foreign) attention.append(i);
  }
  return std::move(attention);
}

void HostTable::read_on_device(int32_t type, int32_t index) {
  reader_type_ = type;
  reader_index_ = index;
}

void HostTable::read_hyper(PyObject* value, GroupRow& row, size_t h) const {
  row.hyper_at[h] = nullptr;
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
        read_hyper(item.ptr(), groups[g], h);
      } else {
        read_hyper(value, groups[g], h);
      }
    }
    PyObject* maximize = PyDict_GetItemWithError(group, maximize_name);
    groups[g].grad_sign = maximize != nullptr && PyObject_IsTrue(maximize) == 1 ? -1.0 : 1.0;
  }
}

}  // namespace fused
