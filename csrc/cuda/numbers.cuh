// Number types of the kernels, and conversions, rounded to nearest even.
#pragma once

#include "ptx.cuh"

namespace tnt {
namespace cuda {

constexpr int kLanes = 32;  // of a warp

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TNT_DEVICE float to_float(float x) { return x; }
TNT_DEVICE float to_float(uint8_t x) { return static_cast<float>(x); }
TNT_DEVICE float to_float(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
TNT_DEVICE float to_float(Float16 x) { return half_to_float(x.bits); }

template <class T>
struct Numbers;

template <>
struct Numbers<float> {
  static TNT_DEVICE float from_float(float x) { return x; }
};
template <>
struct Numbers<BFloat16> {
  static TNT_DEVICE BFloat16 from_float(float x) { return {float_to_bfloat16(x)}; }
  static TNT_DEVICE uint32_t pair(float low, float high) { return floats_to_bfloat16s(low, high); }
};
template <>
struct Numbers<Float16> {
  static TNT_DEVICE Float16 from_float(float x) { return {float_to_half(x)}; }
  static TNT_DEVICE uint32_t pair(float low, float high) { return floats_to_halves(low, high); }
};

// One element of memory whose type is known at run time only.
TNT_DEVICE float load_as_float(const void* from, int type, int64_t i) {
  if (type == kFloat32) return __ldg(static_cast<const float*>(from) + i);
  const uint16_t bits = __ldg(static_cast<const uint16_t*>(from) + i);
  return type == kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

// Four elements from element i on, which is a multiple of four.
TNT_DEVICE float4 load_four(const void* from, int type, int64_t i) {
  if (type == kFloat32) return __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(from) + i));
  const uint2 two = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + i));
  const uint16_t bits[4] = {static_cast<uint16_t>(two.x), static_cast<uint16_t>(two.x >> 16),
                            static_cast<uint16_t>(two.y), static_cast<uint16_t>(two.y >> 16)};
  if (type == kBFloat16)
    return {to_float(BFloat16{bits[0]}), to_float(BFloat16{bits[1]}), to_float(BFloat16{bits[2]}),
            to_float(BFloat16{bits[3]})};
  return {to_float(Float16{bits[0]}), to_float(Float16{bits[1]}), to_float(Float16{bits[2]}),
          to_float(Float16{bits[3]})};
}

TNT_DEVICE void store_float(void* to, int type, int64_t i, float x) {
  if (type == kFloat32)
    static_cast<float*>(to)[i] = x;
  else
    static_cast<uint16_t*>(to)[i] = type == kBFloat16 ? float_to_bfloat16(x) : float_to_half(x);
}

}  // namespace cuda
}  // namespace tnt
