#include <cuda_runtime.h>

#include "device.h"

namespace tnt {
namespace cuda {

namespace {

__global__ void nothing() {}

}  // namespace

int probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, nothing);
}

}  // namespace cuda
}  // namespace tnt
