// Every entry point of the extension. It knows addresses, numbers and Python objects; torch is met in Python only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/adafactor.h"
#include "cpu/driver.h"
#include "gradient_rows.h"
#include "host_table.h"
#include "prologue.h"
#include "rules.h"
#include "tensor_view.h"

#if defined(FUSED_WITH_CUDA)
#include "cuda/adafactor_table.h"
#include "cuda/driver.h"
#endif

namespace py = pybind11;
using namespace fused;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::list rule_info() {
  py::list rules;
#define X(name, ...) rules.append(py::make_tuple(#name, int(__VA_ARGS__::kStates), int(__VA_ARGS__::kHypers)));
  FUSED_RULES(X)
#undef X
  return rules;
}

py::list built_isas() {
  py::list names;
#define X(name) names.append(#name);
  FUSED_ISA_LIST
#undef X
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fused; torch-free, addressed by pointers.";

  m.def("rule_info", &rule_info, "(name, states, hyperparameters) of every rule, in table order");
  m.def("built_isas", &built_isas, "instruction sets that were compiled, best last");
  m.def("isa", &isa, "instruction set in use");
  m.def("select_isa", &select_isa, py::arg("name"), "use another instruction set; '' for the best this processor has");
  m.def("max_threads", &max_threads);
  m.def("tensor_interface", &tensor_interface, "how tensors are read: objects, stable ABI or DLPack");

  py::class_<StepControl>(m, "StepControl")
      .def(py::init([](uintptr_t norm_total, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t grad_norm, uintptr_t skipped,
                       double max_norm, double grad_multiplier, uint64_t seed, bool norm_is_max, bool skip_nonfinite,
                       uintptr_t unscale) {
             return StepControl{pointer<const double>(norm_total), pointer<const float>(grad_scale),
                                pointer<const float>(found_inf),   pointer<float>(grad_norm),
                                pointer<float>(skipped),           max_norm,
                                grad_multiplier,                   seed,
                                norm_is_max,                       skip_nonfinite,
                                pointer<double>(unscale)};
           }),
           py::arg("norm_total") = 0, py::arg("grad_scale") = 0, py::arg("found_inf") = 0, py::arg("grad_norm") = 0,
           py::arg("skipped") = 0, py::arg("max_norm") = -1.0, py::arg("grad_multiplier") = 1.0, py::arg("seed") = 0,
           py::arg("norm_is_max") = false, py::arg("skip_nonfinite") = false, py::arg("unscale") = 0);

  py::class_<HostTable>(m, "HostTable")
      .def(py::init<py::list>(), py::arg("hyper_names_by_rule"))
      .def("resize", &HostTable::resize, py::arg("rows"), py::arg("groups"))
      .def("bind", &HostTable::bind, py::arg("index"), py::arg("param"), py::arg("watched"), py::arg("state"), py::arg("fields"))
      .def("refresh", &HostTable::refresh, py::arg("param_groups"), py::arg("state"))
      .def("read_hypers", &HostTable::read_hypers, py::arg("param_groups"), py::arg("rule_of_group"))
      .def("read_on_device", &HostTable::read_on_device, py::arg("type"), py::arg("index"))
      .def("row_bytes", &HostTable::row_bytes)
      .def("group_bytes", &HostTable::group_bytes)
      .def("bump_versions", &HostTable::bump_versions)
      .def_readonly("active_generation", &HostTable::active_generation)
      .def_readonly("generation", &HostTable::generation);

  py::class_<GradientRows>(m, "GradientRows")
      .def(py::init<const py::list&, bool>(), py::arg("items"), py::arg("of_params"))
      .def_readonly("has_float64", &GradientRows::has_float64)
      .def_readonly("tensors", &GradientRows::tensors)
      .def_readonly("rest", &GradientRows::rest);

  py::class_<Accumulation>(m, "Accumulation")
      .def(py::init<const py::list&, const py::list&>(), py::arg("params"), py::arg("buffers"))
      .def("look_up", &Accumulation::look_up, py::arg("index") = -1)
      .def("add", &Accumulation::add, py::call_guard<py::gil_scoped_release>())
      .def("release", &Accumulation::release)
      .def("count", &Accumulation::count, py::arg("index"))
      .def("count_of", &Accumulation::count_of, py::arg("index"))
      .def("largest_count", &Accumulation::largest_count)
      .def("reset", &Accumulation::reset);

  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(
      "reduce_cpu",
      [](const HostTable& table, bool maximum, uintptr_t row_values, uintptr_t total) {
        reduce(table.rows, maximum, pointer<double>(row_values), pointer<double>(total));
      },
      py::arg("table"), py::arg("maximum"), py::arg("row_values"), py::arg("total"), unlocked);
  m.def(
      "norm_total_cpu",
      [](const GradientRows& rows, bool maximum) {
        double out[2];
        {
          const py::gil_scoped_release release;
          reduce(rows.rows, maximum, nullptr, out);
        }
        return py::make_tuple(out[0], out[1]);
      },
      py::arg("rows"), py::arg("maximum"));
  m.def("scale_cpu", [](const GradientRows& rows, double factor) { return scale(rows.rows, factor); }, py::arg("rows"),
        py::arg("factor"), unlocked);
  m.def("clamp_cpu", [](const GradientRows& rows, double limit) { clamp(rows.rows, limit); }, py::arg("rows"),
        py::arg("limit"), unlocked);
  m.def("clip_factor", &clip_factor, py::arg("norm"), py::arg("max_norm"));
  m.def(
      "update_cpu",
      [](const HostTable& table, const StepControl& control) { update(table.rows, table.groups, control); },
      py::arg("table"), py::arg("control"), py::call_guard<py::gil_scoped_release>());

  m.attr("adafactor_hypers") = int(Adafactor::kHypers);
  py::class_<FactoredTable>(m, "FactoredTable")
      .def(py::init([](size_t rows) { return FactoredTable{std::vector<FactoredRow>(rows)}; }), py::arg("rows"))
      .def(
          "bind",
          [](FactoredTable& table, size_t index, uintptr_t row_var, uintptr_t col_var, uintptr_t variance, int64_t lead,
             int64_t rows, int64_t cols, uint32_t flags) {
            table.rows.at(index) = {pointer<void>(row_var), pointer<void>(col_var), pointer<void>(variance), lead, rows, cols, flags};
          },
          py::arg("index"), py::arg("row_var"), py::arg("col_var"), py::arg("variance"), py::arg("lead"), py::arg("rows"),
          py::arg("cols"), py::arg("flags"));
  py::class_<AdafactorWorkspace>(m, "AdafactorWorkspace").def(py::init<>());
  m.def(
      "update_adafactor_cpu",
      [](const HostTable& table, const FactoredTable& factored, const StepControl& control, AdafactorWorkspace& workspace) {
        update_adafactor(table.rows, factored.rows, table.groups, control, workspace);
      },
      py::arg("table"), py::arg("factored"), py::arg("control"), py::arg("workspace"), py::call_guard<py::gil_scoped_release>());

#if defined(FUSED_WITH_CUDA)
  m.attr("with_cuda") = true;
  m.def("cuda_problem", &cuda::problem, py::arg("device"), "why the CUDA kernels do not run on a device; '' if they do");
  m.def("cuda_debugging", &cuda::debugging);
  py::class_<cuda::DeviceTable>(m, "DeviceTable")
      .def(py::init<int>(), py::arg("device"))
      .def(
          "begin",
          [](cuda::DeviceTable& device, const HostTable& table, bool rows_changed, uintptr_t stream) {
            device.begin(table.rows, table.groups, rows_changed, stream);
          },
          py::arg("table"), py::arg("rows_changed"), py::arg("stream"))
      .def("reduce", &cuda::DeviceTable::reduce, py::arg("stream"), py::arg("maximum"), py::arg("row_values"),
           py::arg("total"))
      .def(
          "update",
          [](const cuda::DeviceTable& device, const HostTable& table, uintptr_t stream, const StepControl& control) {
            device.update(table.groups, stream, control);
          },
          py::arg("table"), py::arg("stream"), py::arg("control"))
      .def("bad_row", [](const cuda::DeviceTable& device, const HostTable& table) { return device.bad_row(table.rows); })
      .def_property_readonly("captured", &cuda::DeviceTable::captured)
      .def_property_readonly("uploads", &cuda::DeviceTable::uploads)
      .def_property_readonly("launches", &cuda::DeviceTable::launches);
  py::class_<cuda::AdafactorTable>(m, "AdafactorTable")
      .def(py::init<int>(), py::arg("device"))
      .def(
          "begin",
          [](cuda::AdafactorTable& device, const HostTable& table, const FactoredTable& factored, bool rows_changed, uintptr_t stream) {
            device.begin(table.rows, factored.rows, table.groups, rows_changed, stream);
          },
          py::arg("table"), py::arg("factored"), py::arg("rows_changed"), py::arg("stream"))
      .def("reduce", &cuda::AdafactorTable::reduce, py::arg("stream"), py::arg("maximum"), py::arg("row_values"), py::arg("total"))
      .def(
          "update",
          [](const cuda::AdafactorTable& device, const HostTable& table, uintptr_t stream, const StepControl& control) {
            device.update(table.groups, stream, control);
          },
          py::arg("table"), py::arg("stream"), py::arg("control"))
      .def("bad_row",
           [](const cuda::AdafactorTable& device, const HostTable& table, const FactoredTable& factored) {
             return device.bad_row(table.rows, factored.rows);
           })
      .def_property_readonly("captured", &cuda::AdafactorTable::captured)
      .def_property_readonly("uploads", &cuda::AdafactorTable::uploads)
      .def_property_readonly("launches", &cuda::AdafactorTable::launches)
      .def_property_readonly("workspace_bytes", &cuda::AdafactorTable::workspace_bytes);
#else
  m.attr("with_cuda") = false;
#endif
}
