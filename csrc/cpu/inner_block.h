// The inner transformer block of TNT on one group of sentences at a time: tokens are read once and
// written once, everything between stays in the first two cache levels.
#pragma once

#include "dropout.h"
#include "gemm.h"
#include "parallel.h"
#include "tokens.h"

namespace tnt {
namespace TNT_TIER {
namespace {

#if defined(__AVX512F__)
constexpr int kKeys = 16;  // scores held in registers at a time
#else
constexpr int kKeys = 8;
#endif

// Scores of N keys for one vector of queries: s[j] = sum_d q[d] * k[d, j].
// q [head_dim, ld] at this vector's lanes, keys [head_dim, ld] at the first of the N keys.
template <int N>
TNT_INLINE void scores(const float* q, const float* keys, int64_t ld, int64_t head_dim, float* to) {
  vf s[N] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    const vf qd = load(q + d * ld);
    for (int j = 0; j < N; ++j) s[j] += qd * keys[d * ld + j];
  }
  for (int j = 0; j < N; ++j) store(to + j * L, s[j]);
}

// N channels of the weighted sum of values: out[d] = factor * sum_j p[j] * v[d, j].
template <int N>
TNT_INLINE void weighted_values(const float* p, const float* values, int64_t ld, int64_t m, vf factor,
                                float* out) {
  vf sum[N] = {};
  for (int64_t j = 0; j < m; ++j) {
    const vf pj = load(p + j * L);
    for (int d = 0; d < N; ++d) sum[d] += pj * values[d * ld + j];
  }
  for (int d = 0; d < N; ++d) store(out + d * ld, sum[d] * factor);
}

// The same for all m keys and for all channels of a head.
TNT_INLINE void all_scores(const float* q, const float* keys, int64_t ld, int64_t m, int64_t head_dim,
                           float* to) {
  int64_t j = 0;
  for (; j + kKeys <= m; j += kKeys) scores<kKeys>(q, keys + j, ld, head_dim, to + j * L);
  for (; j + 4 <= m; j += 4) scores<4>(q, keys + j, ld, head_dim, to + j * L);
  for (; j < m; ++j) scores<1>(q, keys + j, ld, head_dim, to + j * L);
}

TNT_INLINE void all_weighted_values(const float* p, const float* values, int64_t ld, int64_t m,
                                    int64_t head_dim, vf factor, float* out) {
  int64_t d = 0;
  for (; d + 6 <= head_dim; d += 6) weighted_values<6>(p, values + d * ld, ld, m, factor, out + d * ld);
  for (; d + 2 <= head_dim; d += 2) weighted_values<2>(p, values + d * ld, ld, m, factor, out + d * ld);
  for (; d < head_dim; ++d) weighted_values<1>(p, values + d * ld, ld, m, factor, out + d * ld);
}

// One head of one sentence for one vector of queries. p [m, L] keeps the numerators of the softmax, whose
// inverse denominator is returned.
template <Accuracy A>
TNT_INLINE vf attend(const float* q, const float* keys, const float* values, int64_t ld, int64_t m,
                     int64_t head_dim, float* p, float* out, const HeadDropout* dropout) {
  all_scores(q, keys, ld, m, head_dim, p);
  vf top = load(p);
  for (int64_t j = 1; j < m; ++j) top = max_keep(top, load(p + j * L));
  vf total = {};
  for (int64_t j = 0; j < m; ++j) {
    const vf e = exp2_<A>(load(p + j * L) - top);
    store(p + j * L, e);
    total += e;
  }
  const vf inverse_total = splat(1.0f) / total;

  if (dropout != nullptr)
    dropout->place.apply(p, dropout->to, L, m, dropout->sentence, dropout->word, dropout->channel);
  all_weighted_values(dropout != nullptr ? dropout->to : p, values, ld, m, head_dim, inverse_total, out);
  return inverse_total;
}

template <class G, class IO>
struct InnerBlock {
  typedef typename G::Element Element;
  static constexpr int kGroupsAtATime = 4;

  const InnerBlockArgs& args;
  const int64_t m, c, head_dim;
  const int64_t vectors;   // vectors per sentence
  const int64_t lanes;     // lanes per sentence: m rounded up to whole vectors
  const int64_t together;  // sentences per group: two vectors at least, so that a product fills its registers
  const int64_t ld;        // lanes per group
  const bool attention, mlp;
  const InnerDropout dropout;

  Affine norm1, norm2;
  Packed<G> qkv, proj, fc1, fc2;

  struct Scratch {
    float* x;    // [c, ld] the residual stream
    float* y;    // [max(3c, hidden), ld] what a product wrote
    float* t;    // [c, ld] attention output
    float* p;    // [m, L] scores of one head
    Element* a;  // operand of the next product
  };

  explicit InnerBlock(const InnerBlockArgs& a)
      : args(a),
        m(a.m),
        c(a.c),
        head_dim(a.heads > 0 ? a.c / a.heads : a.c),
        vectors((a.m + L - 1) / L),
        lanes(vectors * L),
        together(vectors >= 2 ? 1 : 2),
        ld(together * lanes),
        attention(a.parts & kAttention),
        mlp(a.parts & kMlp),
        dropout(a) {}

  void plan(Arena& arena) {
    if (attention) {
      norm1.plan(arena, c);
      qkv.plan(arena, 3 * c, c);
      proj.plan(arena, c, c);
    }
    if (mlp) {
      norm2.plan(arena, c);
      fc1.plan(arena, args.hidden, c);
      fc2.plan(arena, c, args.hidden);
    }
  }

  void plan(Arena& arena, Scratch& s) const {
    const int64_t widest = most(attention ? 3 * c : c, mlp ? args.hidden : c);
    s.x = arena.take<float>(c * ld);
    s.y = arena.take<float>(output_rows(widest) * ld);
    s.t = arena.take<float>(round_up(c, 2) * ld);
    s.p = arena.take<float>(m * L);
    s.a = arena.take<Element>(most(G::operand_rows(c), mlp ? G::operand_rows(args.hidden) : 0) * ld);
  }

  int64_t jobs() const {
    return (attention ? qkv.panels() + proj.panels() : 0) + (mlp ? fc1.panels() + fc2.panels() : 0);
  }

  // Packing job i of jobs(); job 0 also reads the LayerNorms.
  void pack(int64_t i) {
    if (i == 0) {
      if (attention) read_affine(norm1, args.norm1_weight, args.norm1_bias);
      if (mlp) read_affine(norm2, args.norm2_weight, args.norm2_bias);
    }
    if (attention) {
      if (i < qkv.panels())
        return qkv.pack(i, {args.qk_weight, 2 * c, args.v_weight}, {args.qk_bias, 2 * c, args.v_bias});
      i -= qkv.panels();
      if (i < proj.panels()) return proj.pack(i, {args.proj_weight, c, {}}, {args.proj_bias, c, {}});
      i -= proj.panels();
    }
    if (i < fc1.panels())
      return fc1.pack(i, {args.fc1_weight, args.hidden, {}}, {args.fc1_bias, args.hidden, {}});
    fc2.pack(i - fc1.panels(), {args.fc2_weight, c, {}}, {args.fc2_bias, c, {}});
  }

  void read_affine(Affine& affine, const Param& weight, const Param& bias) const {
    read_vector(weight, c, affine.gain, 1.0f);
    read_vector(bias, c, affine.shift);
  }

  void normalise(const Scratch& s, const Affine& affine, float eps) const {
    for (int64_t at = 0; at < ld; at += L)
      layer_norm(s.x + at, ld, c, affine, eps,
                 [&](int64_t k, vf even, vf odd) TNT_LAMBDA { G::put(s.a + at, ld, k, even, odd); });
    G::pad(s.a, ld, c);
  }

  // Adds the branch in y. `factors`, if given, has one for each sentence from the group's first on.
  void add_residual(const Scratch& s, const float* factors, int64_t count) const {
    if (factors == nullptr) {
      for (int64_t i = 0; i < c * ld; i += L) store(s.x + i, load(s.x + i) + load(s.y + i));
      return;
    }
    for (int64_t at = 0; at < ld; at += L) {
      const vf factor = splat(at / lanes < count ? factors[at / lanes] : 0.0f);
      for (int64_t i = at; i < c * ld; i += ld) store(s.x + i, load(s.x + i) + load(s.y + i) * factor);
    }
  }

  // y [n, ld] through f into the operand.
  template <class F>
  TNT_INLINE void to_operand(const Scratch& s, const float* y, int64_t n, F f) const {
    for (int64_t k = 0; k < n; k += 2)
      for (int64_t at = 0; at < ld; at += L)
        G::put(s.a + at, ld, k, f(load(y + k * ld + at)),
               k + 1 < n ? f(load(y + (k + 1) * ld + at)) : splat(0.0f));
    G::pad(s.a, ld, n);
  }

  // Dropout of y [n, ld] in place.
  void drop(const DropoutPlace& place, float* y, int64_t n, int64_t first) const {
    if (!place.active) return;
    for (int64_t at = 0; at < together * lanes; at += L)
      place.apply(y + at, y + at, ld, n, first + at / lanes, at % lanes);
  }

  void attention_half(const Scratch& s, int64_t first, int64_t count) const {
    normalise(s, norm1, args.eps1);
    G::run(qkv, s.a, ld, s.y);
    // softmax(scale * s) = 2^(scale * log2(e) * s) / sum: the factor goes into the queries.
    const float factor = args.scale * 1.44269504f;
    for (int64_t i = 0; i < c * ld; i += L) store(s.y + i, load(s.y + i) * factor);
    for (int64_t h = 0; h < args.heads; ++h) {
      const int64_t row = h * head_dim * ld;
      for (int64_t from = 0; from < ld; from += lanes)  // a sentence's first lane
        for (int64_t at = from; at < from + lanes; at += L) {
          const HeadDropout drop = {dropout.probabilities, first + from / lanes, at - from,
                                    h * round_up(m, 4), s.p};
          attend<G::kAccuracy>(s.y + row + at, s.y + c * ld + row + from, s.y + 2 * c * ld + row + from, ld,
                               m, head_dim, s.p, s.t + row + at,
                               dropout.probabilities.active ? &drop : nullptr);
        }
    }
    to_operand(s, s.t, c, [](vf v) TNT_LAMBDA { return v; });
    G::run(proj, s.a, ld, s.y);
    drop(dropout.projection, s.y, c, first);
    add_residual(s, args.drop_path1 ? args.drop_path1 + first : nullptr, count);
  }

  void mlp_half(const Scratch& s, int64_t first, int64_t count) const {
    normalise(s, norm2, args.eps2);
    G::run(fc1, s.a, ld, s.y);
    if (!dropout.hidden.active) {
      to_operand(s, s.y, args.hidden, [](vf v) TNT_LAMBDA { return gelu<G::kAccuracy>(v); });
    } else {
      for (int64_t i = 0; i < args.hidden * ld; i += L) store(s.y + i, gelu<G::kAccuracy>(load(s.y + i)));
      drop(dropout.hidden, s.y, args.hidden, first);
      to_operand(s, s.y, args.hidden, [](vf v) TNT_LAMBDA { return v; });
    }
    G::run(fc2, s.a, ld, s.y);
    drop(dropout.output, s.y, c, first);
    add_residual(s, args.drop_path2 ? args.drop_path2 + first : nullptr, count);
  }

  // Sentences [group * together, ...).
  void run(int64_t group, const Scratch& s) const {
    const int64_t first = group * together, count = least(together, args.sentences - first);
    const IO* in = static_cast<const IO*>(args.x) + first * m * c;
    IO* out = static_cast<IO*>(args.out) + first * m * c;
    for (int64_t i = 0; i < together; ++i)
      for (int64_t at = 0; at < lanes; at += L)
        load_words(in + (i * m + at) * c, c, i < count ? static_cast<int>(least(L, m - at)) : 0, c,
                   s.x + i * lanes + at, ld);
    if (attention) attention_half(s, first, count);
    if (mlp) mlp_half(s, first, count);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t at = 0; at < lanes; at += L)
        store_words<IO, IO>(out + (i * m + at) * c, c, static_cast<int>(least(L, m - at)), c,
                            s.x + i * lanes + at, ld);
  }
};

template <class G, class IO>
bool run_inner_block(const InnerBlockArgs& args) {
  InnerBlock<G, IO> block(args);
  const int64_t groups = (args.sentences + block.together - 1) / block.together;
  return parallel_groups<G>(block, groups, args.threads);
}

inline bool inner_block(const InnerBlockArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.compute_dtype == kBFloat16)
    return args.io_dtype == kFloat32 ? run_inner_block<Bf16Gemm, float>(args)
                                     : run_inner_block<Bf16Gemm, uint16_t>(args);
#endif
  return args.io_dtype == kFloat32 ? run_inner_block<F32Gemm, float>(args)
                                   : run_inner_block<F32Gemm, uint16_t>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
