// The native module's submodule `cuda`, with emulated kernels; test_cuda_launcher.py calls it.
#include <pybind11/pybind11.h>

#include "device.h"

void bind_cuda(pybind11::module_& native);

int tnt::cuda::probe() { return 0; }

PYBIND11_MODULE(emulated, m) { bind_cuda(m); }
