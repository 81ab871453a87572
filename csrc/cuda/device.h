// Whether the kernels of this build run on the current device.
#pragma once

namespace tnt {
namespace cuda {

int probe();  // a cudaError_t; 0: they do

}  // namespace cuda
}  // namespace tnt
