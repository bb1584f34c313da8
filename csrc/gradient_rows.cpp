#include "gradient_rows.h"

#include <algorithm>
#include <utility>

#include "cpu/driver.h"

namespace py = pybind11;

namespace fused {
namespace {

constexpr int32_t kCpuDevice = 1;  // DLPack's number

// Whether the elements fill a range of memory without gaps or overlaps, in any order: each stride is the product of the
// sizes of the dimensions that have smaller ones.
bool is_dense(const TensorView& view) {
  if (view.numel == 0) return true;
  int left = 0;
  for (int d = 0; d < view.ndim; ++d) left += view.dims[d].size != 1;
  for (int64_t expected = 1; left > 0; --left) {
    int next = -1;
    for (int d = view.ndim - 1; d >= 0 && next < 0; --d)
      if (view.dims[d].size != 1 && view.dims[d].stride == expected) next = d;
    if (next < 0) return false;
    expected *= view.dims[next].size;
  }
  return true;
}

}  // namespace

GradientRows::GradientRows(const py::list& items, bool of_params) {
  rows.reserve(items.size());
  for (const py::handle item : items) {
    const py::object tensor = of_params ? grad_of(item.ptr()) : py::reinterpret_borrow<py::object>(item);
    if (tensor.is_none()) continue;
    TensorView view;
    if (!is_plain(tensor.ptr()) || !view_of(tensor.ptr(), view) || view.device_type != kCpuDevice || !is_dense(view)) {
      rest.append(tensor);
      continue;
    }
    TensorRow row{};
    row.grad = view.numel != 0 ? view.data : nullptr;
    row.numel = view.numel;
    row.grad_format = view.format;
    has_float64 |= view.format == kFloat64;
    rows.push_back(row);
    tensors.append(tensor);
  }
}

Accumulation::Accumulation(const py::list& params, const py::list& buffers)
    : counts_(params.size(), 0), rows_(params.size()), views_(params.size()) {
  for (size_t i = 0; i < params.size(); ++i) {
    params_.push_back(py::reinterpret_borrow<py::object>(params[i]));
    const py::object buffer = buffers[i];
    if (!is_plain(buffer.ptr()) || !view_of(buffer.ptr(), views_[i]) || views_[i].device_type != kCpuDevice) continue;
    rows_[i].param = views_[i].data;
    rows_[i].numel = views_[i].numel;
    rows_[i].param_format = views_[i].format;
  }
}

py::list Accumulation::look_up(Py_ssize_t index) {
  py::list attention;
  found_.clear();
  const size_t first = index < 0 ? 0 : size_t(index), last = index < 0 ? rows_.size() : first + 1;
  for (size_t i = first; i < last; ++i) {
    py::object grad = grad_of(params_[i].ptr());
    if (grad.is_none()) continue;
    TensorView view;
    const bool known = rows_[i].param_format != kNone && is_plain(grad.ptr()) && view_of(grad.ptr(), view);
    if (!known || !view.same_place(views_[i]) || view.numel == 0 || (view.numel == 1 && is_negated(grad.ptr()))) {
      attention.append(i);
      continue;
    }
    rows_[i].grad = view.data;
    rows_[i].grad_format = view.format;
    found_.push_back({i, std::move(grad)});
  }
  return attention;
}

void Accumulation::add() {
  std::vector<TensorRow> rows;
  std::vector<uint8_t> overwrite;
  rows.reserve(found_.size());
  overwrite.reserve(found_.size());
  for (const Found& found : found_) {
    rows.push_back(rows_[found.index]);
    overwrite.push_back(counts_[found.index]++ == 0);
  }
  accumulate(rows, overwrite);
}

void Accumulation::release() {
  for (const Found& found : found_) py::setattr(params_[found.index], "grad", py::none());
  found_.clear();
}

uint32_t Accumulation::largest_count() const {
  return counts_.empty() ? 0 : *std::max_element(counts_.begin(), counts_.end());
}

}  // namespace fused
