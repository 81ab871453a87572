// Gradients of weight matrices: dW[o, k] += sum over words of dY[o, word] * X[k, word].
// Activations lie channel-major, a word per lane (gemm.h). The sum runs along lanes, so one factor is turned
// round: X becomes columns, [words, inputs], an input per lane, and dY stays as rows, [outputs, words], of
// which one element at a time is broadcast. Each way to multiply has its own form of both:
//   F32Gemm   rows [O, ld] float32              columns [ld, inputs] float32
//   DotGemm   rows [O, ld] bfloat16             columns [ld/2, inputs] pairs of words
//   TileGemm  rows [O, ld] bfloat16: an A tile  columns [ld/2, inputs] pairs of words: a B tile
#pragma once

#include "gemm.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// Outputs and inputs are rounded up to whole tiles and vectors.
TNT_INLINE int64_t gradient_rows(int64_t outputs) { return round_up(outputs, 16); }
TNT_INLINE int64_t gradient_columns(int64_t inputs) { return round_up(inputs, 16); }

// dW of R outputs and V vectors of inputs, from one group of words. `term` multiplies and adds one word (or
// pair) of one output. Their sum is added to dw at the end.
template <int R, int V, class Row, class Column, class Term>
TNT_INLINE void accumulate_tile(const Row* rows, int64_t row_stride, const Column* columns, int64_t kp,
                                int64_t steps, float* dw, Term term) {
  vf acc[R][V] = {};
  for (int64_t w = 0; w < steps; ++w) {
    const Column* x = columns + w * kp;
    for (int r = 0; r < R; ++r) term(acc[r], rows[r * row_stride + w], x);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(dw + r * kp + v * L, load(dw + r * kp + v * L) + acc[r][v]);
}

// All outputs of V vectors of inputs, R at a time and what is left over one by one.
template <int R, int V, class Row, class Column, class Term>
TNT_INLINE void accumulate_strip(const Row* rows, int64_t row_stride, int64_t outputs, const Column* columns,
                                 int64_t kp, int64_t steps, float* dw, Term term) {
  int64_t o = 0;
  for (; o + R <= outputs; o += R)
    accumulate_tile<R, V>(rows + o * row_stride, row_stride, columns, kp, steps, dw + o * kp, term);
  for (; o + 4 <= outputs; o += 4)
    accumulate_tile<4, V>(rows + o * row_stride, row_stride, columns, kp, steps, dw + o * kp, term);
  for (; o < outputs; ++o)
    accumulate_tile<1, V>(rows + o * row_stride, row_stride, columns, kp, steps, dw + o * kp, term);
}

#if defined(__AVX512F__)
constexpr int kStrip3 = 8, kStrip2 = 12, kStrip1 = 12;  // outputs at a time: up to 24 of 32 registers
#else
constexpr int kStrip3 = 3, kStrip2 = 5, kStrip1 = 8;  // 9, 10 or 8 of 16
#endif

// Words (or pairs) that are summed before they are added to dw: one long chain of additions rounds more.
constexpr int64_t kChain = 128;

template <class Row, class Column, class Term>
TNT_INLINE void accumulate_all(const Row* rows, int64_t row_stride, int64_t outputs, const Column* columns,
                               int64_t kp, int64_t words, float* dw, Term term) {
  for (int64_t w = 0; w < words; w += kChain) {
    const int64_t steps = least(kChain, words - w);
    const Row* y = rows + w;
    const Column* x = columns + w * kp;
    int64_t left = kp / L, k = 0;
    for (; left >= 3 && left != 4; left -= 3, k += 3 * L)
      accumulate_strip<kStrip3, 3>(y, row_stride, outputs, x + k, kp, steps, dw + k, term);
    for (; left >= 2; left -= 2, k += 2 * L)
      accumulate_strip<kStrip2, 2>(y, row_stride, outputs, x + k, kp, steps, dw + k, term);
    if (left > 0) accumulate_strip<kStrip1, 1>(y, row_stride, outputs, x + k, kp, steps, dw + k, term);
  }
}

template <class G>
struct WeightGradient;

template <>
struct WeightGradient<F32Gemm> {
  typedef float Row;
  typedef float Column;
  static constexpr bool kRowsAreOperand = true;  // F32Gemm's operand is rows already
  static constexpr int64_t kWords = L;           // ld is a multiple of it

  static int64_t row_elements(int64_t outputs, int64_t ld) { return gradient_rows(outputs) * ld; }
  static int64_t column_elements(int64_t inputs, int64_t ld) { return gradient_columns(inputs) * ld; }
  static TNT_INLINE void put_row(Row* rows, int64_t ld, int64_t o, int64_t at, vf v) {
    store(rows + o * ld + at, v);
  }
  // Channels k to k + L of the words at lanes [at, at + L), a channel per vector.
  static TNT_INLINE void put_columns(Column* columns, int64_t kp, int64_t k, int64_t at, vf (&r)[L]) {
    transpose(r);
    for (int i = 0; i < L; ++i) store(columns + (at + i) * kp + k, r[i]);
  }
  // Channels k to k + L of the words `at` and `at` + 1, a word per vector.
  static TNT_INLINE void put_words(Column* columns, int64_t kp, int64_t k, int64_t at, vf even, vf odd) {
    store(columns + at * kp + k, even);
    store(columns + (at + 1) * kp + k, odd);
  }

  // dw [gradient_rows(outputs), gradient_columns(inputs)] += rows x columns over ld words.
  static void accumulate(const Row* rows, int64_t ld, int64_t outputs, const Column* columns, int64_t inputs,
                         float* dw) {
    accumulate_all(rows, ld, outputs, columns, gradient_columns(inputs), ld, dw,
                   [](auto& acc, float y, const float* x) TNT_LAMBDA {
                     const vf scalar = splat(y);
                     for (size_t v = 0; v < sizeof(acc) / sizeof(vf); ++v) acc[v] += scalar * load(x + v * L);
                   });
  }
};

#if defined(TNT_BF16_GEMM)
struct PairGradient {
  typedef uint16_t Row;
  typedef uint32_t Column;
  static constexpr bool kRowsAreOperand = false;

  static int64_t row_elements(int64_t outputs, int64_t ld) { return gradient_rows(outputs) * ld; }
  static int64_t column_elements(int64_t inputs, int64_t ld) { return gradient_columns(inputs) * ld / 2; }
  static TNT_INLINE void put_row(Row* rows, int64_t ld, int64_t o, int64_t at, vf v) {
    store_io(rows + o * ld + at, v);
  }
  static TNT_INLINE void put_columns(Column* columns, int64_t kp, int64_t k, int64_t at, vf (&r)[L]) {
    transpose(r);
    for (int i = 0; i < L; i += 2) put_words(columns, kp, k, at + i, r[i], r[i + 1]);
  }
  static TNT_INLINE void put_words(Column* columns, int64_t kp, int64_t k, int64_t at, vf even, vf odd) {
    store(columns + at / 2 * kp + k, bf16_pair(even, odd));
  }
};

template <>
struct WeightGradient<Bf16Gemm> : PairGradient {
#if defined(TNT_TILES)
  // A tile takes 16 outputs by 32 words, or 16 pairs of words by 16 inputs.
  static constexpr int64_t kWords = 32;
  static void accumulate(const Row* rows, int64_t ld, int64_t outputs, const Column* columns, int64_t inputs,
                         float* dw) {
    const int64_t kp = gradient_columns(inputs), stride = kp * 4;
    for (int64_t o = 0; o < outputs; o += 16) {
      for (int64_t k = 0; k < kp; k += 32) {
        const bool two = k + 16 < kp;
        float* to = dw + o * kp + k;
        TNT_TILE_LOAD(0, to, stride);
        if (two) TNT_TILE_LOAD(1, to + 16, stride);
        for (int64_t w = 0; w < ld; w += 32) {
          TNT_TILE_LOAD(4, rows + o * ld + w, ld * 2);
          TNT_TILE_LOAD(6, columns + w / 2 * kp + k, stride);
          TNT_TILE_DOT(0, 4, 6);
          if (two) {
            TNT_TILE_LOAD(7, columns + w / 2 * kp + k + 16, stride);
            TNT_TILE_DOT(1, 4, 7);
          }
        }
        TNT_TILE_STORE(0, to, stride);
        if (two) TNT_TILE_STORE(1, to + 16, stride);
      }
    }
  }
#else
  static constexpr int64_t kWords = L;
  static void accumulate(const Row* rows, int64_t ld, int64_t outputs, const Column* columns, int64_t inputs,
                         float* dw) {
    accumulate_all(reinterpret_cast<const u32_any*>(rows), ld / 2, outputs, columns, gradient_columns(inputs),
                   ld / 2, dw, [](auto& acc, uint32_t y, const uint32_t* x) TNT_LAMBDA {
                     const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(y));
                     for (size_t v = 0; v < sizeof(acc) / sizeof(vf); ++v)
                       acc[v] = (vf)_mm512_dpbf16_ps((__m512)acc[v], (__m512bh)load(x + v * L), pair);
                   });
  }
#endif
};
#endif

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
