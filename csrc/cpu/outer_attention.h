// Attention of the outer transformer, a query per lane: both products are the broadcast-weight products of
// gemm.h with keys and values as the weights, and the softmax between them is vertical.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "tokens.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// One head's tokens [m.out, m.in], row j at from + j * stride, as a weight matrix: a token per output.
template <class G, class IO>
TNT_INLINE void pack_tokens(const IO* from, int64_t stride, const Packed<G>& m) {
  for (int64_t j = 0; j < m.out; ++j) {
    const IO* token = from + j * stride;
    int64_t k = 0;
    for (; k + L <= m.in; k += L) store(m.row + k, load_io(token + k));
    for (; k < m.in; ++k) m.row[k] = load_scalar(token + k);
    G::pack_row(m.w + j / G::kPanel * G::panel_elements(m.in), j % G::kPanel, m.row, m.in);
  }
}

// The same tokens transposed: [m.in, m.out] in memory, a token per input.
template <class G>
TNT_INLINE void plan_transposed(Arena& arena, Packed<G>& m, int64_t outputs, int64_t inputs) {
  m.out = outputs;
  m.in = inputs;
  m.w = arena.take<typename G::Element>(G::packed_elements(outputs, inputs));
  m.bias = arena.take<float>(round_up(outputs, L) + G::kPanel);
}

template <class G, class IO>
TNT_INLINE void pack_tokens_transposed(const IO* from, int64_t stride, const Packed<G>& m) {
  for (int64_t o = 0; o < m.out; o += L) {
    const int width = static_cast<int>(least(L, m.out - o));
    for (int64_t j = 0; j < m.in; j += 2) {
      const IO* at = from + j * stride + o;
      const vf even = width == L ? load_io(at) : load_part(at, width);
      vf odd = splat(0.0f);
      if (j + 1 < m.in) odd = width == L ? load_io(at + stride) : load_part(at + stride, width);
      G::pack_inputs(m.w, m.in, o, j, even, odd);
    }
  }
}

template <class G, class IO>
struct OuterAttention {
  typedef typename G::Element Element;
  static constexpr int kGroupsAtATime = 1;
  static constexpr int64_t kBlock = 2 * L;  // queries at a time

  const OuterAttentionArgs& args;
  const int64_t n, hd, d;
  const int64_t blocks;  // blocks of queries per head
  const int64_t splits;  // jobs per head: more than one where there are few heads for many threads

  struct Scratch {
    Packed<G> keys;    // n outputs of head_dim inputs
    Packed<G> values;  // head_dim outputs of n inputs
    float* x;          // [head_dim, kBlock] queries, then the result
    Element* q;        // [head_dim, kBlock] operand
    float* s;          // [n, kBlock] scores; their exponentials, as the next operand, take the same place
  };

  explicit OuterAttention(const OuterAttentionArgs& a)
      : args(a),
        n(a.n),
        hd(a.head_dim),
        d(a.heads * a.head_dim),
        blocks((a.n + kBlock - 1) / kBlock),
        splits(least(blocks, (4 * a.threads + a.batch * a.heads - 1) / (a.batch * a.heads))) {}

  int64_t groups() const { return args.batch * args.heads * splits; }

  void plan(Arena&) {}
  void plan(Arena& arena, Scratch& s) const {
    s.keys.plan(arena, n, hd);
    plan_transposed(arena, s.values, hd, n);
    s.x = arena.take<float>(output_rows(hd) * kBlock);
    s.q = arena.take<Element>(G::operand_rows(hd) * kBlock);
    s.s = arena.take<float>(most(output_rows(n), G::operand_rows(n)) * kBlock);
  }
  int64_t jobs() const { return 0; }
  void pack(int64_t) {}

  void run(int64_t group, const Scratch& s) const {
    const int64_t head = group / splits, part = group % splits;
    const int64_t b = head / args.heads, h = head % args.heads;
    const IO* q = static_cast<const IO*>(args.qkv) + b * n * 3 * d + h * hd;
    IO* out = static_cast<IO*>(args.out) + b * n * d + h * hd;
    pack_tokens(q + d, 3 * d, s.keys);
    pack_tokens_transposed(q + 2 * d, 3 * d, s.values);
    for (int64_t block = part * blocks / splits; block < (part + 1) * blocks / splits; ++block)
      attend_block(q, out, block * kBlock, s);
  }

  void attend_block(const IO* q, IO* out, int64_t first, const Scratch& s) const {
    const int64_t count = least(kBlock, n - first), ld = count <= L ? L : 2 * L;
    // softmax(scale * s) = 2^(scale * log2(e) * s) / sum: the factor goes into the queries.
    const float factor = args.scale * 1.44269504f;
    for (int64_t at = 0; at < ld; at += L) {
      load_words(q + (first + at) * 3 * d, 3 * d, static_cast<int>(least(L, count - at)), hd, s.x + at, ld);
      for (int64_t k = 0; k < hd; k += 2)
        G::put(s.q + at, ld, k, load(s.x + k * ld + at) * factor,
               k + 1 < hd ? load(s.x + (k + 1) * ld + at) * factor : splat(0.0f));
    }
    G::pad(s.q, ld, hd);
    G::run(s.keys, s.q, ld, s.s);

    Element* p = reinterpret_cast<Element*>(s.s);
    vf inverse_total[2];
    for (int64_t at = 0; at < ld; at += L) {
      const float* scores = s.s + at;
      vf top[4];
      for (int i = 0; i < 4; ++i) top[i] = load(scores);
      int64_t j = 0;
      for (; j + 4 <= n; j += 4)
        for (int i = 0; i < 4; ++i) top[i] = max_keep(top[i], load(scores + (j + i) * ld));
      for (; j < n; ++j) top[0] = max_keep(top[0], load(scores + j * ld));
      inverse_total[at / L] = max_keep(max_keep(top[0], top[1]), max_keep(top[2], top[3]));
    }
    vf total[2] = {};
    for (int64_t j = 0; j < n; j += 2) {
      vf e[2][2];
      for (int64_t at = 0; at < ld; at += L) {
        const vf top = inverse_total[at / L];
        e[0][at / L] = exp2_<G::kAccuracy>(load(s.s + j * ld + at) - top);
        e[1][at / L] = j + 1 < n ? exp2_<G::kAccuracy>(load(s.s + (j + 1) * ld + at) - top) : splat(0.0f);
        total[at / L] += e[0][at / L] + e[1][at / L];
      }
      for (int64_t at = 0; at < ld; at += L) G::put(p + at, ld, j, e[0][at / L], e[1][at / L]);
    }
    for (int v = 0; v < 2; ++v) inverse_total[v] = splat(1.0f) / total[v];
    G::pad(p, ld, n);
    G::run(s.values, p, ld, s.x);
    for (int64_t at = 0; at < ld; at += L) {
      for (int64_t k = 0; k < hd; ++k)
        store(s.x + k * ld + at, load(s.x + k * ld + at) * inverse_total[at / L]);
      store_words<IO, IO>(out + (first + at) * d, d, static_cast<int>(least(L, count - at)), hd, s.x + at,
                          ld);
    }
  }
};

template <class G, class IO>
bool run_outer_attention(const OuterAttentionArgs& args) {
  OuterAttention<G, IO> attention(args);
  return parallel_groups<G>(attention, attention.groups(), args.threads);
}

inline bool outer_attention(const OuterAttentionArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.compute_dtype == kBFloat16)
    return args.io_dtype == kFloat32 ? run_outer_attention<Bf16Gemm, float>(args)
                                     : run_outer_attention<Bf16Gemm, uint16_t>(args);
#endif
  return args.io_dtype == kFloat32 ? run_outer_attention<F32Gemm, float>(args)
                                   : run_outer_attention<F32Gemm, uint16_t>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
