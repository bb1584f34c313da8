// The look at every tensor in every step: what changed since the last one.
//
// A row is looked at twice at most. First at a glance: words of torch's objects, as they lie in memory, with those of the
// last look. Where one differs, or where that is not known to be possible, torch's functions are asked, and what they say is
// compared with the row. Where that differs too, it is for Python to describe the row anew.
#include <stdexcept>
#include <utility>

#include "dictionary_version.h"
#include "host_table.h"
#include "prefetch.h"
#include "tensor_object.h"

namespace py = pybind11;

namespace fused {
namespace {

// State memory is looked at in every step for models of few tensors, else for one row in kLookEvery, in turn.
constexpr size_t kFewRows = 64;
constexpr size_t kLookEvery = 8;

// Rows' objects lie scattered over the heap, each with pointers to the next. They are fetched in stages, so many rows before
// their turn: Python's objects, torch's, what hangs on those, gradients, and their storages.
constexpr size_t kPython = 20, kObject = 15, kParts = 10, kGrad = 6, kGradParts = 3;

const void* object_in(PyObject* tensor) { return *static_cast<const void* const*>(handle_of(tensor)); }

}  // namespace

// ---- at a glance ----

bool HostTable::looks_at_state(size_t index) const {
  return entries_.size() <= kFewRows || index % kLookEvery == turn_ % kLookEvery;
}

void HostTable::fetch_ahead(size_t index) const {
  const TensorObjects* objects = TensorObjects::instance();
  if (objects == nullptr) return;
  const auto tensor_at = [&](size_t i) {
    return i < glances_.size() && glances_[i].layout != Layouts::kNone ? glances_[i].param : nullptr;
  };
  const auto state_at = [&](size_t i) { return i < glances_.size() && looks_at_state(i) ? state_memory_[i].tensor : nullptr; };

  if (index + kPython < glances_.size()) {
    prefetch(glances_[index + kPython].param);
    prefetch(glances_[index + kPython].state);
    prefetch(state_at(index + kPython));
  }

  if (PyObject* param = tensor_at(index + kObject)) TensorObjects::prefetch_object(object_in(param));
  if (PyObject* state = state_at(index + kObject)) TensorObjects::prefetch_object(implementation_of(state));

  if (PyObject* param = tensor_at(index + kParts)) {
    TensorObjects::prefetch_storage(object_in(param));
    TensorObjects::prefetch_grad(object_in(param));
  }
  if (PyObject* state = state_at(index + kParts))
    if (const void* object = implementation_of(state)) TensorObjects::prefetch_storage(object);

  if (PyObject* param = tensor_at(index + kGrad)) TensorObjects::prefetch_object(objects->grad(object_in(param)));
  if (PyObject* param = tensor_at(index + kGradParts))
    if (const void* grad = objects->grad(object_in(param))) TensorObjects::prefetch_storage(grad);
}

// True: the row holds, and has the gradient's address.
bool HostTable::same_at_a_glance(size_t index) {
  const Glance& glance = glances_[index];
  if (glance.layout == Layouts::kNone || !is_plain(glance.param)) return false;
  const TensorObjects& objects = *TensorObjects::instance();
  const void* object = object_in(glance.param);
  const Layout& layout = layouts_[glance.layout];
  if (!objects.has_traits(object, layout.traits) || TensorObjects::storage(object) != glance.storage ||
      TensorObjects::owner(glance.storage) != glance.owner || objects.address(object, layout.element_size) != glance.data)
    return false;
  if (glance.foreign) return true;

  const void* address = nullptr;
  uint8_t format = rows[index].grad_format;
  if (const void* grad = objects.grad(object)) {
    const Layout& expected = layouts_[glance.grad_layout];
    if (glance.grad_layout == Layouts::kNone || !objects.has_traits(grad, expected.traits)) return false;
    address = expected.numel != 0 ? objects.address(grad, expected.element_size) : kNoElements;
    format = expected.format;
  }
  if (glance.state != nullptr) {
    const uint64_t version = dictionary_version(glance.state);
    if (version != glance.state_version || (version == 0 && !state_in_place(index))) return false;
    if (looks_at_state(index) && !state_memory_in_place(index)) return false;
  }
  set_grad(rows[index], address, format);
  return true;
}

// Takes down what `same_at_a_glance` compares, of a row that holds. `grad` null or None: there is none, and none is learned.
void HostTable::learn(size_t index, PyObject* grad, const TensorView& grad_view) {
  const Entry& entry = entries_[index];
  Glance& glance = glances_[index];
  if (layouts_.size() > 64 + 2 * glances_.size()) {  // gradients of ever new layouts
    layouts_.clear();
    for (Glance& each : glances_) each.layout = each.grad_layout = Layouts::kNone;
  }
  const void* object = implementation_of(entry.param.ptr());
  glance.layout = layouts_.index_of(object, entry.view);
  if (glance.layout == Layouts::kNone) return;
  glance.data = TensorObjects::instance()->address(object, layouts_[glance.layout].element_size);
  glance.storage = TensorObjects::storage(object);
  glance.owner = TensorObjects::owner(glance.storage);
  glance.foreign = entry.foreign;
  if (entry.foreign) return;
  if (grad != nullptr && grad != Py_None) glance.grad_layout = layouts_.index_of(implementation_of(grad), grad_view);
  glance.state = entry.state.ptr();
  if (glance.state != nullptr) glance.state_version = dictionary_version(glance.state);
}

// ---- closer ----

// The tensors of a state dictionary by identity. Walking a dictionary costs no hashing.
bool HostTable::state_in_place(size_t index) const {
  const Entry& entry = entries_[index];
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  size_t i = 0;
  for (; PyDict_Next(entry.state.ptr(), &position, &key, &value); ++i)
    if (i >= entry.value_count || (entry.values[i] && entry.values[i].ptr() != value)) return false;
  return i == entry.value_count;
}

// The memory of the last of them. Code that moves state by assigning to `.data` moves all of it, so a look at some rows in
// each step finds it; a look at every address would double the cost of a step's bookkeeping.
bool HostTable::state_memory_in_place(size_t index) const {
  const StateMemory& memory = state_memory_[index];
  return memory.tensor == nullptr || data_of(memory.tensor) == memory.data;
}

void HostTable::set_grad(TensorRow& row, const void* address, uint8_t format) {
  if (row.grad != address) {
    active_generation += (row.grad == nullptr) != (address == nullptr);
    row.grad = address;
    ++generation;
  }
  if (row.grad_format != format) {
    row.grad_format = format;
    ++generation;
  }
}

// True if the row holds for the live objects, with the gradient's address brought up to date.
bool HostTable::unchanged(size_t index) {
  Entry& entry = entries_[index];
  TensorView view;
  if (!entry.watched || !view_of(entry.param.ptr(), view) || view.data != entry.view.data || !view.same_layout(entry.view))
    return false;
  if (entry.foreign) {
    learn(index, nullptr, view);
    return true;
  }

  const py::object grad = grad_of(entry.param.ptr());
  const void* address = nullptr;
  uint8_t format = rows[index].grad_format;
  if (!grad.is_none()) {
    if (!entry.ready || !view_of(grad.ptr(), view) || !view.same_place(entry.view)) return false;
    if (view.numel == 1 && is_negated(grad.ptr())) return false;
    address = view.numel != 0 ? view.data : kNoElements;
    format = view.format;
  }
  set_grad(rows[index], address, format);

  if (entry.state && (!state_in_place(index) || (looks_at_state(index) && !state_memory_in_place(index)))) {
    state_moved_ = true;
    return false;
  }
  learn(index, grad.ptr(), view);
  return true;
}

// ---- all rows ----

// Whether the optimizer's state still holds the dictionaries of the last look, in their order. Walking a dictionary costs
// no hashing, which for a tensor is a call into Python.
bool HostTable::same_dictionaries(const py::dict& state) const {
  const uint64_t version = dictionary_version(state.ptr());
  if (version != 0 && version == dictionaries_version_) return true;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  size_t i = 0;
  for (; PyDict_Next(state.ptr(), &position, &key, &value); ++i)
    if (i >= dictionaries_.size() || dictionaries_[i].first != key || dictionaries_[i].second != value) return false;
  return i == dictionaries_.size();
}

void HostTable::remember_dictionaries(const py::dict& state) {
  dictionaries_version_ = dictionary_version(state.ptr());
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value);) dictionaries_.emplace_back(key, value);
}

py::object HostTable::refresh(const py::list& param_groups, const py::dict& state) {
  static PyObject* const params_name = PyUnicode_InternFromString("params");
  py::list attention;
  size_t index = 0;
  state_moved_ = false;
  ++turn_;
  if (!same_dictionaries(state)) {
    dictionaries_.clear();
    dictionaries_version_ = 0;
    for (const Entry& entry : entries_)
      state_moved_ |= entry.state && PyDict_GetItemWithError(state.ptr(), entry.param.ptr()) != entry.state.ptr();
    if (PyErr_Occurred()) throw py::error_already_set();
    // Until the rows are described anew, which may fail, they are compared again.
    if (!state_moved_) remember_dictionaries(state);
  }
  for (const py::handle group : param_groups) {
    PyObject* params = PyDict_GetItemWithError(group.ptr(), params_name);
    if (params == nullptr || !PyList_Check(params)) return py::none();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++index) {
      if (index >= glances_.size() || glances_[index].param != PyList_GET_ITEM(params, i)) return py::none();
      fetch_ahead(index);
      if (!same_at_a_glance(index) && !unchanged(index)) attention.append(index);
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

py::list HostTable::bump_versions() {
  if (active_seen_ != active_generation) {
    active_seen_ = active_generation;
    active_.clear();
    for (size_t i = 0; i < rows.size(); ++i)
      if (rows[i].grad != nullptr) active_.push_back(glances_[i].param);
  }
  const TensorObjects* objects = TensorObjects::instance();
  const auto object_at = [&](size_t i) { return i < active_.size() ? implementation_of(active_[i]) : nullptr; };
  py::list rest;
  for (size_t i = 0; i < active_.size(); ++i) {
    if (objects != nullptr) {
      if (i + kPython < active_.size()) prefetch(active_[i + kPython]);
      if (const void* object = object_at(i + kObject)) prefetch(object);
      if (const void* object = object_at(i + kParts)) TensorObjects::prefetch_version(object);
      if (object_at(i) != nullptr) {
        try {
          objects->bump_version(handle_of(active_[i]));
          continue;
        } catch (...) {  // an inference tensor has no version; torch's function knows what else to say
        }
      }
    }
    rest.append(py::handle(active_[i]));
  }
  return rest;
}

}  // namespace fused
