// Products of a weight matrix with channel-major activations: y[o, :] = bias[o] + sum_k w[o, k] x[k, :].
// A row of x holds one channel of many words, a word per lane, so weights are broadcast from memory and
// nothing is ever shuffled. Three ways to multiply share this interface:
//   F32Gemm   float32 FMA                         x [K, ld] float32
//   DotGemm   AVX512-BF16 dot of channel pairs    x [K/2, ld] pairs of bfloat16
//   TileGemm  AMX tiles, or their emulation       x [K/2, ld] pairs of bfloat16: a B tile as it lies
#pragma once

#include "kernels.h"
#include "simd.h"

#if defined(TNT_TIER_AMX) || defined(TNT_TIER_AMX_EMULATED)
#define TNT_TILES 1
#include "tiles.h"
#endif

namespace tnt {
namespace TNT_TIER {
namespace {

// Rows of a weight matrix; the second part (v below q and k) may be absent.
struct Rows {
  Param first;
  int64_t first_rows;
  Param second;
};

// Row o of [rows, K] as float32.
TNT_INLINE void read_row(const Rows& rows, int64_t o, int64_t K, float* to) {
  const bool in_first = o < rows.first_rows;
  const Param& p = in_first ? rows.first : rows.second;
  const int64_t offset = (in_first ? o : o - rows.first_rows) * K;
  if (p.dtype == kFloat32) {
    memcpy(to, static_cast<const float*>(p.ptr) + offset, static_cast<size_t>(K) * 4);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(p.ptr) + offset;
    for (int64_t k = 0; k < K; ++k) to[k] = bf16_to_float(from[k]);
  }
}

// A vector parameter as float32, or `absent` throughout.
TNT_INLINE void read_vector(const Param& p, int64_t n, float* to, float absent = 0.0f) {
  if (p.ptr == nullptr) {
    for (int64_t i = 0; i < n; ++i) to[i] = absent;
  } else {
    read_row({p, 1, {}}, 0, n, to);
  }
}

// A packed weight matrix with its bias.
template <class G>
struct Packed {
  typename G::Element* w;
  float* bias;  // [outputs rounded up to G::kPanel], zeros where the layer has none
  float* row;   // scratch for packing, one row per panel
  int64_t out, in;

  void plan(Arena& arena, int64_t outputs, int64_t inputs) {
    out = outputs;
    in = inputs;
    w = arena.take<typename G::Element>(panels() * G::panel_elements(inputs));
    bias = arena.take<float>(panels() * G::kPanel);
    row = arena.take<float>(panels() * round_up(inputs, 32));
  }
  int64_t panels() const { return (out + G::kPanel - 1) / G::kPanel; }

  // Panel p: outputs p * kPanel and on. Panels may be packed by different threads.
  void pack(int64_t p, const Rows& rows, const Rows& biases) {
    float* scratch = row + p * round_up(in, 32);
    typename G::Element* panel = w + p * G::panel_elements(in);
    for (int64_t i = 0; i < G::kPanel; ++i) {
      const int64_t o = p * G::kPanel + i;
      if (o >= out) break;  // the rest stays zero
      read_row(rows, o, in, scratch);
      G::pack_row(panel, i, scratch, in);
      const Param& b = o < biases.first_rows ? biases.first : biases.second;
      if (b.ptr != nullptr) read_row(biases, o, 1, bias + o);
    }
  }
};

// Elements [from, from + n) of row o of [rows, K], zeros behind them.
TNT_INLINE vf read_lanes(const Rows& rows, int64_t o, int64_t K, int64_t from, int n) {
  const bool in_first = o < rows.first_rows;
  const Param& p = in_first ? rows.first : rows.second;
  const int64_t at = (in_first ? o : o - rows.first_rows) * K + from;
  if (p.dtype == kFloat32) {
    const float* x = static_cast<const float*>(p.ptr) + at;
    return n == L ? load_io(x) : load_part(x, n);
  }
  const uint16_t* x = static_cast<const uint16_t*>(p.ptr) + at;
  return n == L ? load_io(x) : load_part(x, n);
}

// A weight matrix packed transposed and without a bias: what takes a gradient back through the layer.
template <class G>
struct PackedTransposed : Packed<G> {
  void plan(Arena& arena, int64_t outputs, int64_t inputs) {
    this->out = outputs;
    this->in = inputs;
    this->w = arena.take<typename G::Element>(G::packed_elements(outputs, inputs));
    this->bias = arena.take<float>(round_up(outputs, L) + G::kPanel);
    this->row = nullptr;
  }
  int64_t strips() const { return (this->out + L - 1) / L; }

  // Strip s: outputs s * L and on; `rows` is [in, out]. Strips may be packed by different threads.
  void pack(int64_t s, const Rows& rows) {
    const int64_t from = s * L, K = this->in, out = this->out;
    const int n = static_cast<int>(least(L, out - from));
    for (int64_t k = 0; k < K; k += 2)
      G::pack_inputs(this->w, K, from, k, read_lanes(rows, k, out, from, n),
                     k + 1 < K ? read_lanes(rows, k + 1, out, from, n) : splat(0.0f));
  }
};

#if defined(__AVX512F__)
// The two panels of 8 that one vector of outputs fills.
template <class T>
TNT_INLINE void store_halves(T* low, T* high, vf v) {
  _mm256_storeu_ps(reinterpret_cast<float*>(low), _mm512_castps512_ps256((__m512)v));
  _mm256_storeu_ps(reinterpret_cast<float*>(high), _mm512_extractf32x8_ps((__m512)v, 1));
}
#endif

struct F32Gemm {
  typedef float Element;
  static constexpr Accuracy kAccuracy = kFull;
#if defined(__AVX512F__)
  static constexpr int kPanel = 8;  // outputs: 8 x 2 vectors accumulate in 16 of 32 registers
#else
  static constexpr int kPanel = 6;  // 6 x 2 in 12 of 16
#endif

  static int64_t panel_elements(int64_t K) { return K * kPanel; }
  // Output i of a panel, its K weights in `row`, which may be overwritten.
  static void pack_row(Element* panel, int64_t i, float* row, int64_t K) {
    for (int64_t k = 0; k < K; ++k) panel[k * kPanel + i] = row[k];
  }
  // Inputs k and k + 1 of L outputs from o on, an output per lane: a matrix that lies transposed.
  static TNT_INLINE void pack_inputs(Element* w, int64_t K, int64_t o, int64_t k, vf even, vf odd) {
#if defined(__AVX512F__)
    float *low = w + o / kPanel * panel_elements(K) + k * kPanel, *high = low + panel_elements(K);
    store_halves(low, high, even);
    if (k + 1 < K) store_halves(low + kPanel, high + kPanel, odd);
    return;
#endif
    for (int i = 0; i < L; ++i) {
      Element* panel = w + (o + i) / kPanel * panel_elements(K) + (o + i) % kPanel;
      panel[k * kPanel] = even[i];
      if (k + 1 < K) panel[(k + 1) * kPanel] = odd[i];
    }
  }
  static int64_t packed_elements(int64_t out, int64_t K) {
    return (round_up(out, L) + kPanel - 1) / kPanel * panel_elements(K);
  }
  static int64_t operand_rows(int64_t K) { return round_up(K, 2); }
  static TNT_INLINE void put(Element* x, int64_t ld, int64_t k, vf even, vf odd) {
    store(x + k * ld, even);
    store(x + (k + 1) * ld, odd);
  }
  static TNT_INLINE void pad(Element*, int64_t, int64_t) {}

  template <int V>
  static TNT_INLINE void panel(const Element* w, const float* bias, const Element* x, int64_t ld, int64_t K,
                               float* y, int64_t rows) {
    vf acc[kPanel][V];
    for (int o = 0; o < kPanel; ++o)
      for (int v = 0; v < V; ++v) acc[o][v] = splat(bias[o]);
    for (int64_t k = 0; k < K; ++k) {
      vf xv[V];
      for (int v = 0; v < V; ++v) xv[v] = load(x + k * ld + v * L);
      for (int o = 0; o < kPanel; ++o) {
        const vf wo = splat(w[k * kPanel + o]);
        for (int v = 0; v < V; ++v) acc[o][v] += wo * xv[v];
      }
    }
    for (int o = 0; o < kPanel; ++o)
      if (o < rows)
        for (int v = 0; v < V; ++v) store(y + o * ld + v * L, acc[o][v]);
  }

  static void run(const Packed<F32Gemm>& m, const Element* x, int64_t ld, float* y) {
    for (int64_t p = 0; p < m.panels(); ++p) {
      const Element* w = m.w + p * panel_elements(m.in);
      const float* bias = m.bias + p * kPanel;
      float* to = y + p * kPanel * ld;
      const int64_t rows = m.out - p * kPanel;
      int64_t at = 0;
      for (; at + 2 * L <= ld; at += 2 * L) panel<2>(w, bias, x + at, ld, m.in, to + at, rows);
      if (at < ld) panel<1>(w, bias, x + at, ld, m.in, to + at, rows);
    }
  }

  static void begin() {}
  static void end() {}
};

#if defined(__AVX512BF16__) || defined(TNT_TILES)
// What both bfloat16 ways share: rows of channel pairs.
struct PairOperand {
  typedef uint32_t Element;
  static constexpr Accuracy kAccuracy = kCoarse;
  static TNT_INLINE void put(Element* x, int64_t ld, int64_t k, vf even, vf odd) {
    store(x + k / 2 * ld, bf16_pair(even, odd));
  }
  // Pairs of one row, in place: the row ends up as bfloat16 in the first half of its own memory. `row`
  // has room for K rounded up to 32 elements.
  static TNT_INLINE const u32_any* to_pairs(float* row, int64_t K) {
    for (int64_t k = K; k < round_up(K, L); ++k) row[k] = 0.0f;
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    for (int64_t k = 0; k < K; k += L) store_io(to + k, load(row + k));
    return reinterpret_cast<const u32_any*>(row);
  }
};
#endif

#if defined(__AVX512BF16__) && !defined(TNT_TILES)
struct DotGemm : PairOperand {
  static constexpr int kPanel = 8;

  static int64_t panel_elements(int64_t K) { return (K + 1) / 2 * kPanel; }
  static void pack_row(Element* panel, int64_t i, float* row, int64_t K) {
    const u32_any* pairs = to_pairs(row, K);
    for (int64_t k = 0; k < (K + 1) / 2; ++k) panel[k * kPanel + i] = pairs[k];
  }
  static TNT_INLINE void pack_inputs(Element* w, int64_t K, int64_t o, int64_t k, vf even, vf odd) {
    Element* low = w + o / kPanel * panel_elements(K) + k / 2 * kPanel;
    store_halves(low, low + panel_elements(K), from_bits(bf16_pair(even, odd)));
  }
  static int64_t packed_elements(int64_t out, int64_t K) {
    return round_up(out, L) / kPanel * panel_elements(K);
  }
  static int64_t operand_rows(int64_t K) { return (K + 1) / 2; }
  static TNT_INLINE void pad(Element*, int64_t, int64_t) {}

  template <int V>
  static TNT_INLINE void panel(const Element* w, const float* bias, const Element* x, int64_t ld, int64_t K,
                               float* y, int64_t rows) {
    __m512 acc[kPanel][V];
    for (int o = 0; o < kPanel; ++o)
      for (int v = 0; v < V; ++v) acc[o][v] = _mm512_set1_ps(bias[o]);
    for (int64_t k = 0; k < (K + 1) / 2; ++k) {
      __m512bh xv[V];
      for (int v = 0; v < V; ++v) xv[v] = (__m512bh)load(x + k * ld + v * L);
      for (int o = 0; o < kPanel; ++o) {
        const __m512bh wo = (__m512bh)_mm512_set1_epi32(static_cast<int>(w[k * kPanel + o]));
        for (int v = 0; v < V; ++v) acc[o][v] = _mm512_dpbf16_ps(acc[o][v], xv[v], wo);
      }
    }
    for (int o = 0; o < kPanel; ++o)
      if (o < rows)
        for (int v = 0; v < V; ++v) store(y + o * ld + v * L, (vf)acc[o][v]);
  }

  static void run(const Packed<DotGemm>& m, const Element* x, int64_t ld, float* y) {
    for (int64_t p = 0; p < m.panels(); ++p) {
      const Element* w = m.w + p * panel_elements(m.in);
      const float* bias = m.bias + p * kPanel;
      float* to = y + p * kPanel * ld;
      const int64_t rows = m.out - p * kPanel;
      int64_t at = 0;
      for (; at + 2 * L <= ld; at += 2 * L) panel<2>(w, bias, x + at, ld, m.in, to + at, rows);
      if (at < ld) panel<1>(w, bias, x + at, ld, m.in, to + at, rows);
    }
  }

  static void begin() {}
  static void end() {}
};
typedef DotGemm Bf16Gemm;
#elif defined(TNT_TILES)
// A tile: 16 outputs x 32 channels of weights; B tile: 16 channel pairs x 16 words; C: 16 outputs x 16
// words of float32, which is y as it lies. Two outputs tiles by two word tiles are in flight.
struct TileGemm : PairOperand {
  static constexpr int kPanel = 16;

  static int64_t panel_elements(int64_t K) { return round_up(K, 32) / 32 * 256; }
  static void pack_row(Element* panel, int64_t i, float* row, int64_t K) {
    const u32_any* pairs = to_pairs(row, K);
    for (int64_t k = 0; k < (K + 1) / 2; ++k) panel[k / 16 * 256 + i * 16 + k % 16] = pairs[k];
  }
  static TNT_INLINE void pack_inputs(Element* w, int64_t K, int64_t o, int64_t k, vf even, vf odd) {
    const vu pairs = bf16_pair(even, odd);
    Element* tile = w + o / kPanel * panel_elements(K) + k / 32 * 256 + k % 32 / 2;
    for (int i = 0; i < L; ++i) tile[i * 16] = pairs[i];
  }
  static int64_t packed_elements(int64_t out, int64_t K) {
    return round_up(out, L) / kPanel * panel_elements(K);
  }
  // Channels are padded to whole tiles. The weights there are zero, and so must the operand be: what an
  // earlier, wider product left behind may be NaN.
  static int64_t operand_rows(int64_t K) { return round_up(K, 32) / 2; }
  static TNT_INLINE void pad(Element* x, int64_t ld, int64_t K) {
    const int64_t from = (K + 1) / 2;
    memset(x + from * ld, 0, static_cast<size_t>((operand_rows(K) - from) * ld) * 4);
  }

  static void run(const Packed<TileGemm>& m, const Element* x, int64_t ld, float* y) {
    const int64_t steps = round_up(m.in, 32) / 32, stride = ld * 4, step = 16 * ld;
    const int64_t panels = m.panels(), size = panel_elements(m.in);
    for (int64_t p = 0; p < panels; p += 2) {
      const bool two_panels = p + 1 < panels;
      const Element *w0 = m.w + p * size, *w1 = two_panels ? w0 + size : w0;
      float *y0 = y + p * 16 * ld, *y1 = y0 + 16 * ld;
      for (int64_t at = 0; at < ld; at += 32) {
        const bool two_words = at + 16 < ld;
        TNT_TILE_ZERO(0);
        TNT_TILE_ZERO(1);
        TNT_TILE_ZERO(2);
        TNT_TILE_ZERO(3);
        for (int64_t s = 0; s < steps; ++s) {
          const Element* b = x + s * step + at;
          TNT_TILE_LOAD(4, w0 + s * 256, 64);
          TNT_TILE_LOAD(6, b, stride);
          TNT_TILE_DOT(0, 4, 6);
          if (two_words) {
            TNT_TILE_LOAD(7, b + 16, stride);
            TNT_TILE_DOT(1, 4, 7);
          }
          if (two_panels) {
            TNT_TILE_LOAD(5, w1 + s * 256, 64);
            TNT_TILE_DOT(2, 5, 6);
            if (two_words) TNT_TILE_DOT(3, 5, 7);
          }
        }
        TNT_TILE_STORE(0, y0 + at, stride);
        if (two_words) TNT_TILE_STORE(1, y0 + at + 16, stride);
        if (two_panels) {
          TNT_TILE_STORE(2, y1 + at, stride);
          if (two_words) TNT_TILE_STORE(3, y1 + at + 16, stride);
        }
      }
    }
    for (int64_t o = 0; o < m.out; ++o) {
      if (m.bias[o] == 0.0f) continue;
      for (int64_t at = 0; at < ld; at += L) store(y + o * ld + at, load(y + o * ld + at) + m.bias[o]);
    }
  }

  static void begin() { tiles_begin(); }
  static void end() { tiles_end(); }
};
typedef TileGemm Bf16Gemm;
#endif

#if defined(__AVX512BF16__) || defined(TNT_TILES)
#define TNT_BF16_GEMM 1
#endif

// Rows of y that a product may write: whole tiles.
TNT_INLINE int64_t output_rows(int64_t out) { return round_up(out, 16); }

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
