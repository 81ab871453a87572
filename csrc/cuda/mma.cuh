// Matrix products of a warp, 16 x 8 by kDepth, in the fragments of mma.sync: lane = 4 * group + member holds
//   a  rows group, group + 8; columns 2 * member, + 1, + 8, + 9   (TF32: member, member + 4)
//   b  rows as the columns of a; column group
//   d  rows group, group + 8; columns 2 * member, + 1
// Where the GPU has no such instruction (bfloat16 and float32 before sm_80) lanes exchange operands and
// multiply in float32.
#pragma once

#include "numbers.cuh"

namespace tnt {
namespace cuda {

// Ways to multiply: the two 16-bit types themselves, and for float32:
struct Exact {};  // three products of TF32 parts
struct Tf32 {};   // one

constexpr int kRows = 16, kColumns = 8;  // of a product

struct Place {
  int row, column;
};
TNT_HOST_DEVICE Place place_in_d(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

#if !defined(TNT_TF32) || !defined(TNT_MMA_BFLOAT16)
// d[row, column] += sum over k of a[row, k] b[k, column], for what this lane holds of d. Half i of the inner
// dimension lies in registers 2 i and 2 i + 1 of a and i of b; unpack(register, j) is its element j.
template <int kPacked, class Register, class Unpack>
TNT_DEVICE void multiply_by_lanes(float (&d)[4], const Register (&a)[4], const Register (&b)[2],
                                  Unpack unpack) {
  const int lane = threadIdx.x % kLanes, group = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll 1
    for (int member = 0; member < 4; ++member) {
      const Register top = __shfl_sync(~0u, a[2 * i], group * 4 + member);
      const Register low = __shfl_sync(~0u, a[2 * i + 1], group * 4 + member);
      const Register left = __shfl_sync(~0u, b[i], column * 4 + member);
      const Register right = __shfl_sync(~0u, b[i], column * 4 + 4 + member);
      for (int j = 0; j < kPacked; ++j) {
        d[0] += unpack(top, j) * unpack(left, j);
        d[1] += unpack(top, j) * unpack(right, j);
        d[2] += unpack(low, j) * unpack(left, j);
        d[3] += unpack(low, j) * unpack(right, j);
      }
    }
}
#endif

template <class T>
struct Mma;

// What the two 16-bit types share: a register holds two elements.
template <class T>
struct Mma16 {
  typedef T Element;
  static constexpr int kDepth = 16;

  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };

  static TNT_DEVICE uint32_t pair(T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }

  // From f(row, k), its elements.
  template <class F>
  static TNT_DEVICE A make_a(int lane, F f) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
      a.r[i] = pair(f(row, k), f(row, k + 1));
    }
    return a;
  }
  // What a lane keeps of b in memory, from f(k, column).
  template <class F>
  static TNT_DEVICE uint2 pack_b(int lane, F f) {
    const int k = lane % 4 * 2, column = lane / 4;
    return {pair(f(k, column), f(k + 1, column)), pair(f(k + 8, column), f(k + 9, column))};
  }
  static TNT_DEVICE B unpack_b(uint2 bits) { return {{bits.x, bits.y}}; }
};

// kInstruction: whether the GPU has one. If not, a product is long, and not worth unrolling.
#if defined(TNT_MMA_BFLOAT16)
template <>
struct Mma<BFloat16> : Mma16<BFloat16> {
  static constexpr bool kInstruction = true;
  static TNT_DEVICE void multiply(float (&d)[4], const A& a, const B& b) { mma_bfloat16(d, a.r, b.r); }
};
#else
template <>
struct Mma<BFloat16> : Mma16<BFloat16> {
  static constexpr bool kInstruction = false;
  static TNT_DEVICE void multiply(float (&d)[4], const A& a, const B& b) {
    multiply_by_lanes<2>(
        d, a.r, b.r, [](uint32_t bits, int j) { return as_float(j == 0 ? bits << 16 : bits & 0xffff0000u); });
  }
};
#endif

template <>
struct Mma<Float16> : Mma16<Float16> {
  static constexpr bool kInstruction = true;
  static TNT_DEVICE void multiply(float (&d)[4], const A& a, const B& b) { mma_float16(d, a.r, b.r); }
};

template <bool kOnce>
struct Mma32 {
  typedef float Element;
  static constexpr int kDepth = 8;
#if defined(TNT_TF32)
  static constexpr bool kInstruction = true;
#else
  static constexpr bool kInstruction = false;
#endif

  // x = high + low in TF32. An infinity stays whole in `high` and meets the high part of b alone: beside a
  // low part, of either sign, it would become NaN.
  struct A {
    float high[4], finite[4], low[4];
  };
  struct B {
    float high[2], low[2];
  };

  static TNT_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

  static TNT_DEVICE A split(const float (&x)[4]) {
    A a{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if defined(TNT_TF32)
      a.high[i] = round_to_tf32(x[i]);
      if (kOnce) continue;
      const bool finite = is_finite(a.high[i]);
      a.finite[i] = finite ? a.high[i] : 0.0f;
      a.low[i] = finite ? round_to_tf32(x[i] - a.high[i]) : 0.0f;
#else
      a.high[i] = x[i];
#endif
    }
    return a;
  }

  template <class F>
  static TNT_DEVICE A make_a(int lane, F f) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = f(lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4);
    return split(x);
  }
  template <class F>
  static TNT_DEVICE uint2 pack_b(int lane, F f) {
    return {as_bits(f(lane % 4, lane / 4)), as_bits(f(lane % 4 + 4, lane / 4))};
  }
  static TNT_DEVICE B unpack_b(uint2 bits) {
    const float x[2] = {as_float(bits.x), as_float(bits.y)};
    B b{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#if defined(TNT_TF32)
      b.high[i] = round_to_tf32(x[i]);
      if (!kOnce) b.low[i] = is_finite(b.high[i]) ? round_to_tf32(x[i] - b.high[i]) : 0.0f;
#else
      b.high[i] = x[i];
#endif
    }
    return b;
  }

  static TNT_DEVICE void multiply(float (&d)[4], const A& a, const B& b) {
#if defined(TNT_TF32)
    if (!kOnce) {
      mma_tf32(d, a.low, b.high);
      mma_tf32(d, a.finite, b.low);
    }
    mma_tf32(d, a.high, b.high);
#else
    multiply_by_lanes<1>(d, a.high, b.high, [](float x, int) { return x; });
#endif
  }
};

template <>
struct Mma<Exact> : Mma32<false> {};
template <>
struct Mma<Tf32> : Mma32<true> {};

}  // namespace cuda
}  // namespace tnt
