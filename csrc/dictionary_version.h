// A number that every change of a dictionary changes, and that no two dictionaries share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fused {

// 0: this Python keeps none.
inline uint64_t dictionary_version(PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED) && !defined(PYPY_VERSION)
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // it went in Python 3.14
#endif
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#else
  (void)dictionary;
  return 0;
#endif
}

}  // namespace fused
