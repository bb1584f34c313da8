#include "tensor_object.h"

#include <cstdlib>
#include <string>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <pybind11/stl.h>

#include "tensor_view.h"

namespace py = pybind11;

namespace fused {
namespace {

py::object torch_function(const char* name) { return py::module_::import("torch").attr(name); }

uintptr_t number_of(const py::object& value) { return py::cast<uintptr_t>(value); }

}  // namespace

const TensorObjects* TensorObjects::instance() {
  static const TensorObjects* found = find();
  return found;
}

const TensorObjects* TensorObjects::find() {
  const char* wanted = std::getenv("FUSED_TENSOR_INTERFACE");
  if (wanted != nullptr && (std::string(wanted) == "stable" || std::string(wanted) == "dlpack")) return nullptr;
  if (sizeof(void*) != sizeof(uint64_t)) return nullptr;
  try {
    TensorObjects objects;
    if (objects.load() && objects.verify()) return new TensorObjects(objects);
  } catch (const py::error_already_set&) {  // a torch without some of it
  } catch (const py::cast_error&) {
  }
  return nullptr;
}

// torch's own functions for the two things that no word tells.
bool TensorObjects::load() {
#if defined(__linux__) || defined(__APPLE__)
  void* core = torch_library("c10");
  void* cpu = torch_library("torch_cpu");
  if (core == nullptr || cpu == nullptr) return false;
  grad_ = reinterpret_cast<decltype(grad_)>(dlsym(core, "_ZNK3c1010TensorImpl4gradEv"));
  bump_ = reinterpret_cast<decltype(bump_)>(dlsym(cpu, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"));
  return grad_ != nullptr && bump_ != nullptr;
#else
  return false;
#endif
}

// Everything that is read of a tensor, beside what Python says of it.
bool TensorObjects::lies_as_expected(py::handle tensor) const {
  const void* object = implementation_of(tensor.ptr());
  if (object == nullptr) return false;
  const uint64_t* shape = words(object) + shape_;
  const auto sizes = tensor.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  if (shape[0] != sizes.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (int64_t(shape[1 + d]) != sizes[d] || int64_t(shape[1 + TensorTraits::kDims + d]) != strides[d]) return false;
  return shape[kOffset] == tensor.attr("storage_offset")().cast<uint64_t>() &&
         shape[kNumel] == tensor.attr("numel")().cast<uint64_t>() &&
         shape[kKeys] == torch_function("_C").attr("_dispatch_keys")(tensor).attr("raw_repr")().cast<uint64_t>() &&
         uintptr_t(storage(object)) == number_of(tensor.attr("untyped_storage")().attr("_cdata")) &&
         uintptr_t(address(object, tensor.attr("element_size")().cast<int64_t>())) == number_of(tensor.attr("data_ptr")());
}

bool TensorObjects::verify() {
  const py::object zeros = torch_function("zeros"), parameter = torch_function("nn").attr("Parameter");
  const auto matrix = [&](int rows, int columns) -> py::object { return zeros(py::make_tuple(rows, columns)); };
  const py::object one = parameter(matrix(2, 3)), two = parameter(matrix(2, 3)), plain = matrix(2, 3);
  const py::object shifted = zeros(9)[py::slice(2, 8, 1)].attr("view")(2, 3);
  const void* object = implementation_of(one.ptr());
  if (object == nullptr) return false;
  shape_ = sizes_word(one.ptr()) - 1;
  if (shape_ < kVersion || shape_ > kVersion + 4) return false;
  for (const py::object& tensor : {one, two, plain, shifted})
    if (!lies_as_expected(tensor)) return false;

  TensorTraits traits;
  if (!traits_of(object, traits) || !has_traits(implementation_of(two.ptr()), traits)) return false;
  const py::object others[] = {matrix(3, 2), matrix(3, 2).attr("t")(), zeros(6), plain.attr("to")(torch_function("int32")),
                               torch_function("_neg_view")(plain)};
  for (const py::object& other : others)
    if (implementation_of(other.ptr()) == nullptr || has_traits(implementation_of(other.ptr()), traits)) return false;

  undefined_ = *grad_(object);
  two.attr("grad") = plain;
  const bool found = undefined_ != nullptr && *grad_(implementation_of(plain.ptr())) == undefined_ &&
                     grad(implementation_of(two.ptr())) == implementation_of(plain.ptr());
  two.attr("grad") = py::none();
  const auto version = [&] { return one.attr("_version").cast<int64_t>(); };
  const int64_t before = version();
  bump_version(handle_of(one.ptr()));
  return found && grad(implementation_of(two.ptr())) == nullptr && version() == before + 1;
}

}  // namespace fused
