// Between token-major memory, [words, c], and channel-major registers, [c, words]: a word per lane.
#pragma once

#include "simd.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// `words` rows of c channels, row r at row(r), into lanes [0, L) of x [c, ld]. Lanes past the last word
// become zero.
template <class Row>
TNT_INLINE void load_rows(Row row, int words, int64_t c, float* x, int64_t ld) {
  for (int64_t k = 0; k < c; k += L) {
    const int n = static_cast<int>(least(L, c - k));
    vf r[L];
    if (n == L && words == L) {
      for (int i = 0; i < L; ++i) r[i] = load_io(row(i) + k);
    } else {
      for (int i = 0; i < L; ++i)
        r[i] = i >= words ? splat(0.0f) : n == L ? load_io(row(i) + k) : load_part(row(i) + k, n);
    }
    transpose(r);
    if (n == L) {
      for (int i = 0; i < L; ++i) store(x + (k + i) * ld, r[i]);
    } else {
      for (int i = 0; i < L; ++i)
        if (i < n) store(x + (k + i) * ld, r[i]);
    }
  }
}

// The same for rows that lie `stride` elements apart.
template <class T>
TNT_INLINE void load_words(const T* from, int64_t stride, int words, int64_t c, float* x, int64_t ld) {
  load_rows([&](int i) TNT_LAMBDA { return from + i * stride; }, words, c, x, ld);
}

// The way back. `add` (row r at add + r * add_stride), if given, is added to every row.
template <class T, class A>
TNT_INLINE void store_words(T* to, int64_t stride, int words, int64_t c, const float* x, int64_t ld,
                            const A* add = nullptr, int64_t add_stride = 0) {
  for (int64_t k = 0; k < c; k += L) {
    const int n = static_cast<int>(least(L, c - k));
    vf r[L];
    for (int i = 0; i < L; ++i) r[i] = i < n ? load(x + (k + i) * ld) : splat(0.0f);
    transpose(r);
    for (int i = 0; i < L; ++i) {
      if (i >= words) continue;
      vf row = r[i];
      if (n == L) {
        if (add != nullptr) row += load_io(add + i * add_stride + k);
        store_io(to + i * stride + k, row);
      } else {
        if (add != nullptr) row += load_part(add + i * add_stride + k, n);
        store_part(to + i * stride + k, row, n);
      }
    }
  }
}

struct Affine {
  float* gain;
  float* shift;

  void plan(Arena& arena, int64_t n) {
    gain = arena.take<float>(round_up(n, 2));
    shift = arena.take<float>(round_up(n, 2));
  }
};

// What a LayerNorm finds in one vector of lanes.
struct Moments {
  vf mean, rstd, offset;
  TNT_INLINE vf normal(vf x) const { return (x - mean) * rstd + offset; }
};

// Moments of the n rows of x [n, ld]. Mean first, then the variance of what is left: no cancellation.
TNT_INLINE Moments moments(const float* x, int64_t ld, int64_t n, float eps) {
  vf sum[4] = {};
  int64_t k = 0;
  for (; k + 4 <= n; k += 4)
    for (int i = 0; i < 4; ++i) sum[i] += load(x + (k + i) * ld);
  for (; k < n; ++k) sum[0] += load(x + k * ld);
  const float inverse = 1.0f / static_cast<float>(n);
  const vf mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * inverse;

  // The mean as it was rounded leaves a rest: summed along with the squares, and taken off at the end.
  vf square[4] = {}, rest[4] = {};
  for (k = 0; k + 4 <= n; k += 4) {
    for (int i = 0; i < 4; ++i) {
      const vf d = load(x + (k + i) * ld) - mean;
      rest[i] += d;
      square[i] += d * d;
    }
  }
  for (; k < n; ++k) {
    const vf d = load(x + k * ld) - mean;
    rest[0] += d;
    square[0] += d * d;
  }
  const vf left = ((rest[0] + rest[1]) + (rest[2] + rest[3])) * inverse;
  const vf variance = ((square[0] + square[1]) + (square[2] + square[3])) * inverse - left * left;
  const vf rstd = splat(1.0f) / sqrt_(variance + eps);
  return {mean, rstd, splat(0.0f) - left * rstd};
}

// LayerNorm over the n rows of x [n, ld], one vector of lanes: emit(k, even, odd) gets rows k and k + 1
// (zeros for an odd row past the end).
template <class Emit>
TNT_INLINE void layer_norm(const float* x, int64_t ld, int64_t n, const Affine& affine, float eps,
                           Emit emit) {
  const Moments found = moments(x, ld, n, eps);
  for (int64_t k = 0; k < n; k += 2) {
    const vf even = found.normal(load(x + k * ld)) * affine.gain[k] + affine.shift[k];
    const vf odd = k + 1 < n ? found.normal(load(x + (k + 1) * ld)) * affine.gain[k + 1] + affine.shift[k + 1]
                             : splat(0.0f);
    emit(k, even, odd);
  }
}

// Backward of LayerNorm for one vector of lanes: normal [n, ld] are the normalised rows, grad [n, ld] the
// gradient of its result. emit(k, v) gets the gradient of row k of its input. grad_gain and grad_shift
// [n, L], if given, gain their lanes' sums.
template <class Emit>
TNT_INLINE void layer_norm_backward(const float* normal, const float* grad, int64_t ld, int64_t n,
                                    const float* gain, vf rstd, float* grad_gain, float* grad_shift,
                                    Emit emit) {
  vf sum[2] = {}, product[2] = {};
  for (int64_t k = 0; k < n; ++k) {
    const vf g = load(grad + k * ld), x = load(normal + k * ld), scaled = g * gain[k];
    sum[k % 2] += scaled;
    product[k % 2] += scaled * x;
    if (grad_gain != nullptr) store(grad_gain + k * L, load(grad_gain + k * L) + g * x);
    if (grad_shift != nullptr) store(grad_shift + k * L, load(grad_shift + k * L) + g);
  }
  const float inverse = 1.0f / static_cast<float>(n);
  const vf mean = (sum[0] + sum[1]) * inverse, slope = (product[0] + product[1]) * inverse;
  for (int64_t k = 0; k < n; ++k)
    emit(k, rstd * (load(grad + k * ld) * gain[k] - mean - load(normal + k * ld) * slope));
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
