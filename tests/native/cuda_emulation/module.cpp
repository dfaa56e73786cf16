// Importing this registers the emulated kernels as torch.ops.co2s_emulated, for CPU tensors.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda_emulated, module) {
  module.doc() = "The CUDA kernels of co2s-fast, run on the CPU for tests.";
}
