// Gradients of the outer attention, a head per job: no sum crosses threads. Scores and probabilities of a
// block of queries, a query per lane, are computed again from q and k; the gradients of keys and values
// gather over the blocks.
#pragma once

#include "outer_attention.h"
#include "weight_gradient.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class G, class IO>
struct OuterAttentionBackward {
  typedef typename G::Element Element;
  typedef WeightGradient<G> W;
  typedef typename W::Row Row;
  typedef typename W::Column Column;
  static constexpr int kGroupsAtATime = 1;
  static constexpr int64_t kBlock = 2 * L;  // queries at a time

  const OuterAttentionArgs& call;
  const IO* const grad;
  IO* const grad_qkv;
  const int64_t n, hd, d;

  struct Scratch {
    Packed<G> keys, values;  // n outputs of head_dim inputs
    Packed<G> keys_back;     // head_dim outputs of n inputs
    float* tokens;           // [n, head_dim in whole vectors] keys or values less their mean
    float* x;    // [head_dim, kBlock] queries, then gradients of the result, then those of the queries
    Element* a;  // operand of the next product
    float* p;    // [n, kBlock] scores, then probabilities
    float* dp;   // [n, kBlock] their gradients
    Row* rows;   // [n, kBlock] probabilities or gradients of the scores, where they are not rows as they lie
    Column *queries, *grads;  // [kBlock, head_dim]
    float *dk, *dv;           // [n, head_dim] in whole vectors
  };

  explicit OuterAttentionBackward(const OuterAttentionGradientArgs& a)
      : call(a.call),
        grad(static_cast<const IO*>(a.grad)),
        grad_qkv(static_cast<IO*>(a.grad_qkv)),
        n(a.call.n),
        hd(a.call.head_dim),
        d(a.call.heads * a.call.head_dim) {}

  int64_t groups() const { return call.batch * call.heads; }

  void plan(Arena&) {}
  void plan(Arena& arena, Scratch& s) const {
    s.keys.plan(arena, n, hd);
    s.values.plan(arena, n, hd);
    plan_transposed(arena, s.keys_back, hd, n);
    s.tokens = arena.take<float>(n * round_up(hd, L));
    s.x = arena.take<float>(output_rows(hd) * kBlock);
    s.a = arena.take<Element>(most(G::operand_rows(hd), G::operand_rows(n)) * kBlock);
    s.p = arena.take<float>(output_rows(n) * kBlock);
    s.dp = arena.take<float>(output_rows(n) * kBlock);
    s.rows = W::kRowsAreOperand ? nullptr : arena.take<Row>(W::row_elements(n, kBlock));
    s.queries = arena.take<Column>(W::column_elements(hd, kBlock));
    s.grads = arena.take<Column>(W::column_elements(hd, kBlock));
    s.dk = arena.take<float>(gradient_rows(n) * gradient_columns(hd));
    s.dv = arena.take<float>(gradient_rows(n) * gradient_columns(hd));
  }
  int64_t jobs() const { return 0; }
  void pack(int64_t) {}

  void run(int64_t head, const Scratch& s) const {
    const int64_t b = head / call.heads, h = head % call.heads;
    const int64_t at = b * n * 3 * d + h * hd;
    const IO* q = static_cast<const IO*>(call.qkv) + at;
    const IO* g = grad + b * n * d + h * hd;
    const int64_t width = round_up(hd, L);
    centre(q + d, s.tokens);
    pack_tokens(s.tokens, width, s.keys);
    pack_tokens_transposed(s.tokens, width, s.keys_back);
    centre(q + 2 * d, s.tokens);
    pack_tokens(s.tokens, width, s.values);
    const size_t bytes = static_cast<size_t>(gradient_rows(n) * gradient_columns(hd)) * 4;
    memset(s.dk, 0, bytes);
    memset(s.dv, 0, bytes);
    for (int64_t first = 0; first < n; first += kBlock)
      one_block(q + first * 3 * d, g + first * d, grad_qkv + at + first * 3 * d, least(kBlock, n - first), s);
    store_rows(s.dk, grad_qkv + at + d);
    store_rows(s.dv, grad_qkv + at + 2 * d);
  }

  // Takes their mean off one head's keys or values. Softmax and its gradient do not see what all keys, or all
  // values, have in common, but it would dwarf the differences that they do see.
  void centre(const IO* from, float* to) const {
    const int64_t width = round_up(hd, L);
    for (int64_t k = 0; k < hd; k += L) {
      const int part = static_cast<int>(least(L, hd - k));
      vf sum[2] = {};
      for (int64_t j = 0; j < n; ++j) {
        const IO* at = from + j * 3 * d + k;
        const vf v = part == L ? load_io(at) : load_part(at, part);
        sum[j % 2] += v;
        store(to + j * width + k, v);
      }
      const vf mean = (sum[0] + sum[1]) * (1.0f / static_cast<float>(n));
      for (int64_t j = 0; j < n; ++j) store(to + j * width + k, load(to + j * width + k) - mean);
    }
  }

  // x as columns for a weight gradient, and times `factor` as the next operand.
  void turn(const Scratch& s, int64_t ld, float factor, Column* columns) const {
    for (int64_t at = 0; at < ld; at += L) {
      for (int64_t k = 0; k < hd; k += 2)
        G::put(s.a + at, ld, k, load(s.x + k * ld + at) * factor,
               k + 1 < hd ? load(s.x + (k + 1) * ld + at) * factor : splat(0.0f));
      for (int64_t k = 0; k < hd; k += L) {
        vf r[L];
        for (int i = 0; i < L; ++i) r[i] = k + i < hd ? load(s.x + (k + i) * ld + at) : splat(0.0f);
        W::put_columns(columns, gradient_columns(hd), k, at, r);
      }
    }
    G::pad(s.a, ld, hd);
  }

  // Scores to the numerators of their softmax, in place, for one vector of queries; returns 1 / their sum.
  vf softmax(float* scores, int64_t ld) const {
    vf top[4];
    for (int i = 0; i < 4; ++i) top[i] = load(scores);
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      for (int i = 0; i < 4; ++i) top[i] = max_keep(top[i], load(scores + (j + i) * ld));
    for (; j < n; ++j) top[0] = max_keep(top[0], load(scores + j * ld));
    const vf highest = max_keep(max_keep(top[0], top[1]), max_keep(top[2], top[3]));
    vf total[2] = {};
    for (j = 0; j < n; ++j) {
      const vf e = exp2_<G::kAccuracy>(load(scores + j * ld) - highest);
      total[j % 2] += e;
      store(scores + j * ld, e);
    }
    return splat(1.0f) / (total[0] + total[1]);
  }

  // Numerators to probabilities, in place and as rows; returns sum p dp for one vector of queries.
  vf probabilities(const Scratch& s, int64_t ld, int64_t at, vf inverse) const {
    vf total[2] = {};
    for (int64_t j = 0; j < n; ++j) {
      const vf p = load(s.p + j * ld + at) * inverse;
      store(s.p + j * ld + at, p);
      if (!W::kRowsAreOperand) W::put_row(s.rows, ld, j, at, p);
      total[j % 2] += p * load(s.dp + j * ld + at);
    }
    return total[0] + total[1];
  }

  // Gradients of the scores of one vector of queries, p (dp - sum p dp) scale, as operand and as rows.
  void softmax_backward(const Scratch& s, int64_t ld, int64_t at, vf mean) const {
    const auto of = [&](int64_t j) TNT_LAMBDA {
      return load(s.p + j * ld + at) * (load(s.dp + j * ld + at) - mean) * call.scale;
    };
    for (int64_t j = 0; j < n; j += 2) {
      const vf even = of(j), odd = j + 1 < n ? of(j + 1) : splat(0.0f);
      G::put(s.a + at, ld, j, even, odd);
      if (!W::kRowsAreOperand) {
        W::put_row(s.rows, ld, j, at, even);
        W::put_row(s.rows, ld, j + 1, at, odd);
      }
    }
  }

  static Row* rows(const Scratch& s, void* in_place) {
    return W::kRowsAreOperand ? static_cast<Row*>(in_place) : s.rows;
  }

  // Queries q [count, hd] with gradients g of their results; writes their own to dq.
  void one_block(const IO* q, const IO* g, IO* dq, int64_t count, const Scratch& s) const {
    const int64_t ld = count <= L && W::kWords <= L ? L : 2 * L;
    const auto words = [&](int64_t at) TNT_LAMBDA { return static_cast<int>(most(0, least(L, count - at))); };
    for (int64_t at = 0; at < ld; at += L) load_words(q + at * 3 * d, 3 * d, words(at), hd, s.x + at, ld);
    // softmax(scale * s) = 2^(scale * log2(e) * s) / sum: the factor goes into the queries.
    turn(s, ld, call.scale * 1.44269504f, s.queries);
    G::run(s.keys, s.a, ld, s.p);
    vf inverse[2], mean[2];
    for (int64_t at = 0; at < ld; at += L) inverse[at / L] = softmax(s.p + at, ld);

    for (int64_t at = 0; at < ld; at += L) load_words(g + at * d, d, words(at), hd, s.x + at, ld);
    turn(s, ld, 1.0f, s.grads);
    G::run(s.values, s.a, ld, s.dp);
    for (int64_t at = 0; at < ld; at += L) mean[at / L] = probabilities(s, ld, at, inverse[at / L]);
    W::accumulate(rows(s, s.p), ld, n, s.grads, hd, s.dv);

    for (int64_t at = 0; at < ld; at += L) softmax_backward(s, ld, at, mean[at / L]);
    G::pad(s.a, ld, n);
    W::accumulate(rows(s, s.a), ld, n, s.queries, hd, s.dk);
    G::run(s.keys_back, s.a, ld, s.x);
    for (int64_t at = 0; at < ld; at += L)
      store_words<IO, IO>(dq + at * 3 * d, 3 * d, words(at), hd, s.x + at, ld);
  }

  void store_rows(const float* from, IO* to) const {
    for (int64_t j = 0; j < n; ++j) {
      const float* row = from + j * gradient_columns(hd);
      int64_t k = 0;
      for (; k + L <= hd; k += L) store_io(to + j * 3 * d + k, load(row + k));
      if (k < hd) store_part(to + j * 3 * d + k, load(row + k), static_cast<int>(hd - k));
    }
  }
};

template <class G, class IO>
bool run_outer_attention_backward(const OuterAttentionGradientArgs& args) {
  OuterAttentionBackward<G, IO> backward(args);
  return parallel_groups<G>(backward, backward.groups(), args.call.threads);
}

inline bool outer_attention_backward(const OuterAttentionGradientArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.call.compute_dtype == kBFloat16)
    return args.call.io_dtype == kFloat32 ? run_outer_attention_backward<Bf16Gemm, float>(args)
                                          : run_outer_attention_backward<Bf16Gemm, uint16_t>(args);
#endif
  return args.call.io_dtype == kFloat32 ? run_outer_attention_backward<F32Gemm, float>(args)
                                        : run_outer_attention_backward<F32Gemm, uint16_t>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
