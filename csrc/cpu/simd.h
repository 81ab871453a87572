// One vector of float32 lanes per SIMD tier, and the few functions on it that the kernels need.
// Compiled once per tier inside that tier's own unnamed namespace, so that no symbol is shared
// between tiers: a shared one could bring AVX-512 code to a machine without it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 header for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace tnt {
namespace TNT_TIER {
namespace {

#if defined(__AVX512F__)
constexpr int L = 16;  // lanes
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));
typedef float vf_any __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * L), aligned(2), may_alias));

typedef uint32_t u32_any __attribute__((may_alias));

#define TNT_INLINE inline __attribute__((always_inline))
#define TNT_LAMBDA __attribute__((always_inline))

TNT_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
TNT_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
TNT_INLINE vu load(const uint32_t* p) { return *reinterpret_cast<const vu_any*>(p); }
TNT_INLINE void store(uint32_t* p, vu v) { *reinterpret_cast<vu_any*>(p) = v; }
TNT_INLINE vf splat(float f) { return f - vf{}; }  // no addition: f - 0 is f, 0 + f is not where f is -0
TNT_INLINE vu splat(uint32_t u) { return vu{} + u; }
TNT_INLINE vu bits(vf v) { return (vu)v; }
TNT_INLINE vf from_bits(vu v) { return (vf)v; }

TNT_INLINE float hsum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float s = 0;
  for (int i = 0; i < L; ++i) s += v[i];
  return s;
}

// max(a, b) with b where either is NaN: the order that keeps a NaN score alive.
TNT_INLINE vf max_keep(vf a, vf b) { return a > b ? a : b; }

TNT_INLINE vf sqrt_(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < L; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// How exactly a function is needed: for float32, or for a value that is rounded to bfloat16 next.
enum Accuracy { kFull, kCoarse };

// 2^t. Relative error below 2e-7 (kCoarse: 8e-5); 0 far below the normal range; NaN stays NaN.
template <Accuracy A>
TNT_INLINE vf exp2_(vf t) {
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF);  // t - floor(t); 0 at +-inf
  vf p;
  if (A == kFull) {
    p = splat(1.8775766e-3f);
    p = p * f + 8.989341e-3f;
    p = p * f + 5.5826318e-2f;
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 9.9999994e-1f;
  } else {
    p = splat(7.8024514e-2f);
    p = p * f + 2.2606717e-1f;
    p = p * f + 6.9583356e-1f;
    p = p * f + 9.999252e-1f;
  }
  // Zero rather than a subnormal, on which later products would be slow; the comparison lets NaN through.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)t);
#else
  const vf clamped = max_keep(splat(-126.0f), t);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = clamped + magic;
  const vf f = clamped - (shifted - magic);
  vf p = splat(1.3276271e-3f);
  p = p * f + 9.675541e-3f;
  p = p * f + 5.550713e-2f;
  p = p * f + 2.402212e-1f;
  p = p * f + 6.9314694e-1f;
  p = p * f + 1.0000001f;
  const vf r = from_bits(bits(p) + (bits(shifted) << 23));
  return t < splat(-126.0f) ? splat(0.0f) : r;
#endif
}

// x * Phi(x), Phi the normal distribution: Phi(-|x|) = 2^P(|x|), P of degree 5.
// Absolute error below 7e-7 (kCoarse: 2e-4). As in eager: +inf gives +inf, -inf and NaN give NaN.
template <Accuracy A>
TNT_INLINE vf gelu(vf x) {
  const vf abs_x = from_bits(bits(x) & splat(0x7fffffffu));
  const vf t = abs_x < splat(20.0f) ? abs_x : splat(20.0f);
  vf p = splat(-4.73309299e-4f);
  p = p * t + 7.08455728e-3f;
  p = p * t + -5.18273832e-2f;
  p = p * t + -4.59992438e-1f;
  p = p * t + -1.15078785f;
  p = p * t + -1.00003762f;
  const vf e = exp2_<A>(p);
  return x * (x < splat(0.0f) ? e : splat(1.0f) - e);
}

// GELU and its derivative Phi(x) + x phi(x). A derivative needs Phi itself, so here P is of degree 8. The
// density follows from phi(x) = Phi(-|x|) R(|x|), R a polynomial on [0, 6]: Phi(-|x|) vanishes beyond.
// Absolute error of the derivative below 2e-7 (kCoarse: 1e-4).
template <Accuracy A>
TNT_INLINE void gelu_and_derivative(vf x, vf& value, vf& derivative) {
  const vf abs_x = from_bits(bits(x) & splat(0x7fffffffu));
  const vf t = abs_x < splat(20.0f) ? abs_x : splat(20.0f);
  vf p, r;
  if (A == kFull) {
    p = splat(-2.2758702e-6f);
    p = p * t + 3.2967997e-5f;
    p = p * t + -1.572787e-4f;
    p = p * t + -2.02479132e-4f;
    p = p * t + 7.14278221e-3f;
    p = p * t + -5.25464378e-2f;
    p = p * t + -4.59193051e-1f;
    p = p * t + -1.15110695f;
    p = p * t + -9.9999994e-1f;
    r = splat(1.19989318e-5f);
    r = r * t + -1.52570734e-4f;
    r = r * t + 6.19763159e-4f;
    r = r * t + 7.80888018e-4f;
    r = r * t + -1.9898735e-2f;
    r = r * t + 1.09323055e-1f;
    r = r * t + 6.36563361e-1f;
    r = r * t + 7.97887206e-1f;
  } else {
    p = splat(-4.73309299e-4f);
    p = p * t + 7.08455728e-3f;
    p = p * t + -5.18273832e-2f;
    p = p * t + -4.59992438e-1f;
    p = p * t + -1.15078785f;
    p = p * t + -1.00003762f;
    r = splat(1.69925625e-3f);
    r = r * t + -1.9985117e-2f;
    r = r * t + 1.08439833e-1f;
    r = r * t + 6.37180567e-1f;
    r = r * t + 7.97785163e-1f;
  }
  const vf e = exp2_<A>(p);
  const vf cumulative = x < splat(0.0f) ? e : splat(1.0f) - e;
  value = x * cumulative;
  derivative = cumulative + x * (e * r);
}

TNT_INLINE vu bf16_bits(vf v) {  // round to nearest even; the result in the low half of each lane
  const vu u = bits(v);
  const vu rounded = (u + splat(0x7fffu) + ((u >> 16) & splat(1u))) >> 16;
  const vu quiet_nan = (u >> 16) | splat(0x40u);
  return (u & splat(0x7fffffffu)) > splat(0x7f800000u) ? quiet_nan : rounded;
}

// (lo, hi) rounded to bfloat16, lo in the low half of each lane: the order of the dot instructions.
TNT_INLINE vu bf16_pair(vf lo, vf hi) {
#if defined(__AVX512BF16__)
  // vcvtne2ps2bf16 puts all of lo below all of hi; the permutation interleaves them.
  alignas(64) static const uint16_t interleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo);
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(interleave), packed);
#else
  return bf16_bits(lo) | (bf16_bits(hi) << 16);
#endif
}

TNT_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

TNT_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Storage types: float is float32, uint16_t is bfloat16.
TNT_INLINE vf load_io(const float* p) { return load(p); }
TNT_INLINE vf load_io(const uint16_t* p) {
  const vh h = *reinterpret_cast<const vh_any*>(p);
  return from_bits(__builtin_convertvector(h, vu) << 16);
}
TNT_INLINE void store_io(float* p, vf v) { store(p, v); }
TNT_INLINE void store_io(uint16_t* p, vf v) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<vh_any*>(p) = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(bf16_bits(v), vh);
#endif
}
TNT_INLINE float load_scalar(const float* p) { return *p; }
TNT_INLINE float load_scalar(const uint16_t* p) { return bf16_to_float(*p); }
TNT_INLINE void store_scalar(float* p, float f) { *p = f; }
TNT_INLINE void store_scalar(uint16_t* p, float f) { *p = float_to_bf16(f); }

// The first n < L elements, zeros behind them; nothing past them is touched.
template <class T>
TNT_INLINE vf load_part(const T* p, int n) {
  alignas(64) T buffer[L] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load_io(buffer);
}
template <class T>
TNT_INLINE void store_part(T* p, vf v, int n) {
  alignas(64) T buffer[L];
  store_io(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
#if defined(__AVX512F__)
TNT_INLINE vf load_part(const float* p, int n) {
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
TNT_INLINE void store_part(float* p, vf v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
#endif

// Transposes L vectors of L lanes in place: log2(L) butterfly stages of two-input shuffles.
template <int Step>
TNT_INLINE void transpose_stage(vf (&r)[L]) {
  vi low, high;
  for (int k = 0; k < L; ++k) {
    low[k] = (k & Step) ? L + (k ^ Step) : k;
    high[k] = (k & Step) ? L + k : (k ^ Step);
  }
  for (int i = 0; i < L; ++i) {
    if (i & Step) continue;
    const vf a = r[i], b = r[i | Step];
#if defined(__AVX512F__)
    r[i] = (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b);
    r[i | Step] = (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)high, (__m512)b);
#elif defined(__clang__)
    vf x, y;
    for (int k = 0; k < L; ++k) {
      x[k] = (k & Step) ? b[k ^ Step] : a[k];
      y[k] = (k & Step) ? b[k] : a[k ^ Step];
    }
    r[i] = x;
    r[i | Step] = y;
#else
    r[i] = __builtin_shuffle(a, b, low);
    r[i | Step] = __builtin_shuffle(a, b, high);
#endif
  }
}

TNT_INLINE void transpose(vf (&r)[L]) {
  transpose_stage<1>(r);
  transpose_stage<2>(r);
#if defined(__AVX2__)
  transpose_stage<4>(r);
#endif
#if defined(__AVX512F__)
  transpose_stage<8>(r);
#endif
}

TNT_INLINE int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

TNT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
TNT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TNT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One allocation for all scratch of a call. Used twice: a first pass without memory adds the sizes
// up, a second hands the pieces out, each on its own cache lines.
class Arena {
 public:
  ~Arena() { free(base_); }
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  // Allocates what has been taken so far, zeroed, and starts again from its beginning.
  bool commit() {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(used_ + 64)) != 0) return false;
    memset(p, 0, static_cast<size_t>(used_ + 64));
    base_ = static_cast<char*>(p);
    used_ = 0;
    return true;
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
