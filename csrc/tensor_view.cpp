// Two ways to ask about a tensor, both interfaces that torch keeps stable: the C functions of its stable ABI
// (torch/csrc/inductor/aoti_torch/c/shim.h), found in the library that is loaded already, and DLPack's exchange API. The
// first takes a third of the second's time, which for models of many small tensors is the time of a step, but needs the
// tensor's handle; where a look at a tensor does not find that, the second serves.
#include "tensor_view.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include "tensor_object.h"

namespace py = pybind11;

namespace fused {
namespace {

constexpr int16_t kDLCpu = 1, kDLCuda = 2;

// ---- DLPack ----

// The C exchange interface of DLPack 1.2, as far as it is used (https://dmlc.github.io/dlpack). The layout is a stable ABI.
struct DLTensor {
  void* data;
  struct { int32_t type, index; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct { uint32_t major, minor; } version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, DLTensor* out);
  void* current_work_stream;
};

const DLPackExchangeAPI* find_exchange() {
  const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->version.major != 1 || api->dltensor_from_py_object == nullptr)
    throw std::runtime_error("this torch offers DLPack exchange " + std::to_string(api->version.major) + "." +
                             std::to_string(api->version.minor) + ", version 1 is needed");
  return api;
}

const DLPackExchangeAPI& exchange() {
  static const DLPackExchangeAPI* api = find_exchange();
  return *api;
}

enum DLCode : uint8_t { kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5 };

uint8_t format_of(uint8_t code, uint8_t bits) {
  if (code == kDLFloat && bits == 32) return kFloat32;
  if (code == kDLFloat && bits == 64) return kFloat64;
  if (code == kDLFloat && bits == 16) return kFloat16;
  if (code == kDLBfloat && bits == 16) return kBFloat16;
  return kNone;
}

bool exchange_tensor(PyObject* tensor, DLTensor& out) {
  if (exchange().dltensor_from_py_object(tensor, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

bool view_by_exchange(PyObject* tensor, TensorView& view) {
  DLTensor t;
  if (!exchange_tensor(tensor, t)) return false;
  if (t.ndim > TensorView::kMaxDims || t.dtype.lanes != 1) return false;
  const bool is_complex = t.dtype.code == kDLComplex;  // a complex number is two reals
  view.format = is_complex ? format_of(kDLFloat, uint8_t(t.dtype.bits / 2)) : format_of(t.dtype.code, t.dtype.bits);
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.device_type = int16_t(t.device.type);
  view.device_index = t.device.index;
  view.ndim = int8_t(t.ndim);
  view.numel = is_complex ? 2 : 1;
  for (int d = 0; d < t.ndim; ++d) {
    view.dims[d] = {t.shape[d], t.strides[d]};
    view.numel *= t.shape[d];
  }
  return view.format != kNone && (view.numel == 0 || view.data != nullptr);
}

// ---- torch's stable ABI ----

class StableABI {
 public:
  // Null where this torch or this system does not offer it, and where FUSED_TENSOR_INTERFACE=dlpack declines it.
  static const StableABI* instance() {
    static const StableABI* found = find();
    return found;
  }

  // A handle is the address of a C++ tensor, which is one pointer, to the implementation. A Python tensor keeps one right
  // after its head; `agrees` makes sure of it.
  static const void* implementation(PyObject* tensor) { return *static_cast<const void* const*>(handle_of(tensor)); }

  int64_t* sizes(PyObject* tensor) const {
    int64_t* sizes = nullptr;
    return sizes_(handle_of(tensor), &sizes) == 0 ? sizes : nullptr;
  }

  void* data(PyObject* tensor) const {
    void* address = nullptr;
    int32_t layout = -1;
    const void* handle = handle_of(tensor);
    return layout_(handle, &layout) == 0 && layout == strided_ && data_(handle, &address) == 0 ? address : nullptr;
  }

  bool view(PyObject* tensor, TensorView& view) const {
    const void* handle = handle_of(tensor);
    int32_t layout = -1, device = -1, dtype = -1;
    int64_t ndim = 0, *sizes = nullptr, *strides = nullptr;
    // The device first: on others than these two even an address may be refused, with a message on the terminal.
    if (device_type_(handle, &device) != 0 || (device != cpu_ && device != cuda_)) return view_by_exchange(tensor, view);
    if (layout_(handle, &layout) != 0 || layout != strided_) return false;
    if (dtype_(handle, &dtype) != 0 || dim_(handle, &ndim) != 0 || ndim > TensorView::kMaxDims) return false;
    view.format = dtype == float32_ ? kFloat32 : dtype == bfloat16_ ? kBFloat16 : dtype == float16_ ? kFloat16
                : dtype == float64_ ? kFloat64 : kNone;
    if (view.format == kNone) return view_by_exchange(tensor, view);  // complex numbers, above all
    if (sizes_(handle, &sizes) != 0 || strides_(handle, &strides) != 0 || data_(handle, &view.data) != 0) return false;
    view.device_type = device == cpu_ ? kDLCpu : kDLCuda;
    view.device_index = 0;
    if (device != cpu_ && device_index_(handle, &view.device_index) != 0) return false;
    view.ndim = int8_t(ndim);
    view.numel = 1;
    for (int d = 0; d < ndim; ++d) {
      view.dims[d] = {sizes[d], strides[d]};
      view.numel *= sizes[d];
    }
    return view.numel == 0 || view.data != nullptr;
  }

 private:
  template <class T>
  using Getter = int32_t (*)(const void* handle, T* out);
  using Constant = int32_t (*)();

  static const StableABI* find() {
#if defined(__linux__) || defined(__APPLE__)
    const char* wanted = std::getenv("FUSED_TENSOR_INTERFACE");
    if (wanted != nullptr && std::string(wanted) == "dlpack") return nullptr;
    try {
      StableABI abi;
      if (abi.load() && abi.agrees()) return new StableABI(abi);
    } catch (const py::error_already_set&) {  // a torch without some of it: exchange serves
    }
#endif
    return nullptr;
  }

#if defined(__linux__) || defined(__APPLE__)
  bool load() {
    void* library = torch_library("torch_cpu");
    if (library == nullptr) return false;
    bool complete = true;
    const auto take = [&](auto& function, const std::string& symbol) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, ("aoti_torch_" + symbol).c_str()));
      complete = complete && function != nullptr;
    };
    const auto constant = [&](int32_t& value, const std::string& symbol) {
      Constant function = nullptr;
      take(function, symbol);
      if (function != nullptr) value = function();
    };
    take(data_, "get_data_ptr");
    take(sizes_, "get_sizes");
    take(strides_, "get_strides");
    take(dim_, "get_dim");
    take(dtype_, "get_dtype");
    take(layout_, "get_layout");
    take(device_type_, "get_device_type");
    take(device_index_, "get_device_index");
    constant(strided_, "layout_strided");
    constant(float32_, "dtype_float32");
    constant(float64_, "dtype_float64");
    constant(bfloat16_, "dtype_bfloat16");
    constant(float16_, "dtype_float16");
    constant(cpu_, "device_type_cpu");
    constant(cuda_, "device_type_cuda");
    // On ROCm torch says CUDA as well, where DLPack does not.
    if (!py::module_::import("torch").attr("version").attr("hip").is_none()) cuda_ = -1;
    return complete;
  }

  // Whether a tensor's handle is where it is looked for: torch's own function gives the handle to compare with.
  bool agrees() const {
    const py::object torch = py::module_::import("torch");
    const py::object tensor = torch.attr("nn").attr("Parameter")(torch.attr("zeros")(3));
    py::list tensors;
    tensors.append(tensor);
    const py::list handles = torch.attr("_C").attr("_aoti").attr("unsafe_alloc_void_ptrs_from_tensors")(tensors);
    auto* handle = static_cast<void**>(PyCapsule_GetPointer(handles[0].ptr(), nullptr));
    if (handle == nullptr) throw py::error_already_set();
    const bool same = size_t(Py_TYPE(tensor.ptr())->tp_basicsize) >= sizeof(PyObject) + sizeof(void*) &&
                      implementation(tensor.ptr()) == *handle;
    // Gives the handle back, and with it its share of the tensor.
    torch.attr("_C").attr("_aoti").attr("alloc_tensor_by_stealing_from_void_ptr")(handles[0]);
    TensorView mine, reference;
    return same && view(tensor.ptr(), mine) && view_by_exchange(tensor.ptr(), reference) && mine.data == reference.data &&
           mine.same_layout(reference);
  }
#endif

  Getter<void*> data_ = nullptr;
  Getter<int64_t*> sizes_ = nullptr, strides_ = nullptr;
  Getter<int64_t> dim_ = nullptr;
  Getter<int32_t> dtype_ = nullptr, layout_ = nullptr, device_type_ = nullptr, device_index_ = nullptr;
  int32_t strided_ = 0, float32_ = 0, float64_ = 0, bfloat16_ = 0, float16_ = 0, cpu_ = 0, cuda_ = 0;
};

}  // namespace

bool is_plain(PyObject* tensor) {
  static PyObject* const tensor_type = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  static PyObject* const parameter_type = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == tensor_type || type == parameter_type;
}

bool view_of(PyObject* tensor, TensorView& view) {
  const StableABI* abi = StableABI::instance();
  return abi != nullptr && is_plain(tensor) ? abi->view(tensor, view) : view_by_exchange(tensor, view);
}

bool is_negated(PyObject* tensor) {
  static PyObject* const method = py::object(py::module_::import("torch").attr("Tensor").attr("is_neg")).release().ptr();
  const py::object result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(method, tensor));
  if (!result) throw py::error_already_set();
  return result.ptr() == Py_True;
}

void* data_of(PyObject* tensor) {
  const StableABI* abi = StableABI::instance();
  if (abi != nullptr && is_plain(tensor)) return abi->data(tensor);
  DLTensor t;
  return exchange_tensor(tensor, t) ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
}

const void* implementation_of(PyObject* tensor) {
  return StableABI::instance() != nullptr && is_plain(tensor) ? StableABI::implementation(tensor) : nullptr;
}

int sizes_word(PyObject* tensor) {
  return int(StableABI::instance()->sizes(tensor) - static_cast<const int64_t*>(StableABI::implementation(tensor)));
}

void* torch_library(const char* name) {
#if defined(__linux__) || defined(__APPLE__)
#if defined(__APPLE__)
  const char* const suffix = ".dylib";
#else
  const char* const suffix = ".so";
#endif
  const py::object path = py::module_::import("pathlib").attr("Path")(py::module_::import("torch").attr("__file__"));
  const auto file = py::str(path.attr("parent").attr("joinpath")("lib", std::string("lib") + name + suffix)).cast<std::string>();
  return dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);
#else
  (void)name;
  return nullptr;
#endif
}

// Called without the search through a class and its bases that every attribute costs, where no class has one of its own.
py::object grad_of(PyObject* tensor) {
  static const auto* const getset = [] {
    PyObject* found = py::object(py::module_::import("torch").attr("Tensor").attr("grad")).release().ptr();
    return Py_IS_TYPE(found, &PyGetSetDescr_Type) ? reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset : nullptr;
  }();
  static PyObject* const name = PyUnicode_InternFromString("grad");
  PyObject* grad = getset != nullptr && is_plain(tensor) ? getset->get(tensor, getset->closure) : PyObject_GetAttr(tensor, name);
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

const char* tensor_interface() {
  if (TensorObjects::instance() != nullptr) return "objects";
  return StableABI::instance() != nullptr ? "stable ABI" : "DLPack";
}

}  // namespace fused
