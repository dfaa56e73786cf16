// The Python module co2s_fast._native.
#include <pybind11/pybind11.h>
#include <torch/library.h>

PYBIND11_MODULE(_native, module) { module.doc() = "Native part of co2s-fast."; }
