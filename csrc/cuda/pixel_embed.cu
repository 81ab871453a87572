#include "pixel_embed.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace tnt {
namespace cuda {

namespace {

__device__ float load(const void* p, int type, int64_t i) {
  if (type == kFloat32) return static_cast<const float*>(p)[i];
  if (type == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return __half2float(static_cast<const __half*>(p)[i]);
}

__global__ void forward(PixelEmbed a, int64_t total) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < total) static_cast<float*>(a.out)[i] = load(a.bias, a.bias_type, i % a.c);
}

}  // namespace

int64_t pixel_embed_workspace(const PixelEmbed&) { return 0; }

int pixel_embed(const PixelEmbed& a, void*, void* stream) {
  forward<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(a, 1);
  return cudaGetLastError();
}

int64_t pixel_embed_backward_workspace(const PixelEmbed&, const PixelEmbedGradients&) { return 0; }

int pixel_embed_backward(const PixelEmbed& a, const PixelEmbedGradients&, void*, void* stream) {
  forward<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(a, 1);
  return cudaGetLastError();
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace tnt
