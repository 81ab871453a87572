// Instructions that C++ has no name for, and launching. tests/cuda/emulator.h stands in for both where
// the kernels are compiled for a CPU.
#pragma once

#include "patches.h"

#if !defined(__CUDACC__)
#include "emulator.h"
#else

#include <cuda_runtime.h>

#define TNT_DEVICE __device__ __forceinline__

namespace tnt {
namespace cuda {

TNT_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
TNT_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

TNT_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
TNT_DEVICE uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
TNT_DEVICE uint32_t floats_to_halves(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
#endif
}
TNT_DEVICE uint16_t float_to_bfloat16(float x) {
#if __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = as_bits(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
TNT_DEVICE uint32_t floats_to_bfloat16s(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
#endif
}

#if __CUDA_ARCH__ >= 800
#define TNT_TF32 1
#define TNT_MMA_BFLOAT16 1
#endif

#if defined(TNT_TF32)
TNT_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return as_float(bits);
}
// d += a b, 16 x 8 by 8
TNT_DEVICE void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(as_bits(a[0])), "r"(as_bits(a[1])), "r"(as_bits(a[2])), "r"(as_bits(a[3])), "r"(as_bits(b[0])),
        "r"(as_bits(b[1])));
}
#endif

// d += a b, 16 x 8 by 16
#if defined(TNT_MMA_BFLOAT16)
TNT_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
TNT_DEVICE void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int i = 0; i < 2; ++i)  // halves of the inner dimension
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

// What a launch asked for.
TNT_DEVICE uint4* shared_memory() {
  extern __shared__ uint4 shared[];
  return shared;
}

// From an image, which is read once: not kept in L1. Zeros where not `inside`, without a branch, so that many
// loads are under way at a time. Without `volatile`, or with ld.global.nc, the compilers would move each load
// to where its result is used.
TNT_DEVICE uint4 load_stream(const uint4* from, bool inside) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"(static_cast<uint32_t>(inside))
      : "memory");
  return v;
}
TNT_DEVICE uint2 load_stream(const uint2* from, bool inside) {
  uint2 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\n"
      "@p ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n}"
      : "=&r"(v.x), "=&r"(v.y)
      : "l"(from), "r"(static_cast<uint32_t>(inside))
      : "memory");
  return v;
}

// The type of a parameter of which nothing is deduced.
template <class T>
struct Same {
  typedef T type;
};

template <class... P>
int launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
           typename Same<P>::type... args) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* pointers[] = {&args...};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), pointers, static_cast<size_t>(shared_bytes),
                       static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();  // reported here, so that no later call meets it
  return error;
}

}  // namespace cuda
}  // namespace tnt

#endif
