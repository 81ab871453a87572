// Kernels of which each shows one thing that tests/compile must notice.
#include <cstdint>

namespace tnt {
namespace cuda {
namespace {

struct BFloat16 {};

__device__ __noinline__ float grown(float x) {
  for (int i = 0; i < 5; ++i) x = x * x + 1;
  return x;
}

template <class T, int kTiles>
__global__ void calling_kernel(float* out) {
  for (int i = 0; i < kTiles; ++i) out[i * 32 + threadIdx.x] = grown(out[i * 32 + threadIdx.x]);
}

__global__ void trapping_kernel(float*) { __trap(); }

__global__ void empty_kernel(float*) {}

// Calls a division of 64-bit numbers, which is the compiler's own.
__global__ void dividing_kernel(int64_t* out, int64_t by) { out[threadIdx.x] /= by; }

__global__ void stack_kernel(float* out, const int* order) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[order[i]] = out[i];
  for (int i = 0; i < 64; ++i) out[order[i]] = values[i];
}

__global__ void shared_kernel(float* out) {
  __shared__ float values[256];
  values[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[255 - threadIdx.x];
}

void* const kKernels[] = {
    reinterpret_cast<void*>(calling_kernel<BFloat16, 3>),
    reinterpret_cast<void*>(trapping_kernel),
    reinterpret_cast<void*>(empty_kernel),
    reinterpret_cast<void*>(dividing_kernel),
    reinterpret_cast<void*>(stack_kernel),
    reinterpret_cast<void*>(shared_kernel),
};

}  // namespace

const void* kernel(int i) { return kKernels[i]; }

}  // namespace cuda
}  // namespace tnt
