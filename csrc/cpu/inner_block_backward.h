// Gradients of the inner block. For each group of sentences everything is computed again from x, kept in the
// first two cache levels, and gone through backwards; no activation comes from memory but x itself.
#pragma once

#include "inner_block.h"
#include "weight_gradient.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// Positions of the parameters in InnerBlockGradientArgs::grads.
enum InnerParameter : int {
  kNorm1Weight,
  kNorm1Bias,
  kQkWeight,
  kQkBias,
  kVWeight,
  kVBias,
  kProjWeight,
  kProjBias,
  kNorm2Weight,
  kNorm2Bias,
  kFc1Weight,
  kFc1Bias,
  kFc2Weight,
  kFc2Bias,
  kInnerParameters
};

// What has to be computed so that every gradient asked for is there, from the last layer to the first.
struct Wanted {
  bool fc2, fc1, norm2, proj, qkv, norm1;  // gradients of what these layers put out

  explicit Wanted(const InnerBlockGradientArgs& a) {
    const auto any = [&](int first, int last) {
      bool found = false;
      for (int i = first; i <= last; ++i) found |= a.grads[i] != nullptr;
      return found;
    };
    norm1 = any(kNorm1Weight, kNorm1Bias) || a.grad_x != nullptr;
    qkv = norm1 || any(kQkWeight, kVBias);
    proj = qkv || any(kProjWeight, kProjBias);
    const bool attention = a.call.parts & kAttention, mlp = a.call.parts & kMlp;
    const bool before = attention ? proj : a.grad_x != nullptr;
    norm2 = mlp && (before || any(kNorm2Weight, kNorm2Bias));
    fc1 = norm2 || any(kFc1Weight, kFc1Bias);
    fc2 = fc1 || any(kFc2Weight, kFc2Bias);
    proj = proj && attention;
  }
};

template <class G, class IO>
struct InnerBlockBackward {
  typedef typename G::Element Element;
  typedef WeightGradient<G> W;
  typedef typename W::Row Row;
  typedef typename W::Column Column;
  static constexpr int kGroupsAtATime = 1;
  static constexpr int64_t kLanes = 4 * L;  // lanes of a group, or as many as one sentence needs

  const InnerBlockGradientArgs& args;
  const InnerBlockArgs& call;
  const int64_t m, c, hidden, heads, head_dim;
  const int64_t lanes;     // lanes per sentence: m rounded up to whole vectors
  const int64_t together;  // sentences per group
  const int64_t ld;        // lanes per group; those behind the last sentence hold zeros
  const bool attention, mlp;
  const Wanted wanted;
  const InnerDropout dropout;
  const Chunks chunks;
  int64_t offset[kInnerParameters + 1];  // of each gradient in a chunk's sums

  Affine norm1, norm2;
  Packed<G> qkv, proj, fc1;
  PackedTransposed<G> qkv_back, proj_back, fc1_back, fc2_back;
  float* sums;  // [chunks, offset[kInnerParameters]]

  // Sums over the groups of a chunk: matrices [gradient_rows, gradient_columns], vectors a lane each.
  struct Totals {
    float *qkv, *proj, *fc1, *fc2;
    float *norm1_gain, *norm1_shift, *qkv_bias, *proj_bias;  // [c, L], [3c, L]
    float *norm2_gain, *norm2_shift, *fc1_bias, *fc2_bias;   // [c, L], [hidden, L]
    float* begin;
    int64_t size;
  };

  struct Scratch {
    float* x;                // [c, ld] the residual stream
    float* d;                // [c, ld] its gradient
    float *normal1, *rstd1;  // [c, ld], [ld] of the first LayerNorm
    float *normal2, *rstd2;
    float* qkv;       // [3c, ld], queries scaled for exp2
    float* d_qkv;     // [3c, ld]
    float* p;         // [heads, sentences, vectors, m, L] numerators of the softmax
    float* over;      // [heads, sentences, vectors, L] inverse denominators
    float* o;         // [c, ld] what attention puts out
    float* h;         // [hidden, ld] what fc1 puts out, then GELU's derivative there
    float* y;         // [max(3c, hidden), ld] what a product wrote
    float* ds;        // [m, L]
    float* turned;    // [L, L]
    Element* a;       // operand of the next product
    Row* rows;        // a gradient, and
    Column* columns;  // an input of a layer, as the gradient of its weight needs them
    Totals total;
  };

  explicit InnerBlockBackward(const InnerBlockGradientArgs& a)
      : args(a),
        call(a.call),
        m(call.m),
        c(call.c),
        hidden(call.parts & kMlp ? call.hidden : 0),
        heads(call.parts & kAttention ? call.heads : 1),
        head_dim(c / heads),
        lanes(round_up(m, L)),
        together(most(1, kLanes / lanes)),
        ld(round_up(together * lanes, 2 * L)),
        attention(call.parts & kAttention),
        mlp(call.parts & kMlp),
        wanted(a),
        dropout(call),
        chunks((call.sentences + together - 1) / together, 16) {
    const int64_t sizes[kInnerParameters] = {c, c, 2 * c * c, 2 * c,      c * c,  c,          c * c,
                                             c, c, c,         hidden * c, hidden, c * hidden, c};
    offset[0] = 0;
    for (int i = 0; i < kInnerParameters; ++i)
      offset[i + 1] = offset[i] + (args.grads[i] != nullptr ? sizes[i] : 0);
  }

  void plan(Arena& arena) {
    if (attention) {
      norm1.plan(arena, c);
      qkv.plan(arena, 3 * c, c);
      proj.plan(arena, c, c);
      qkv_back.plan(arena, c, 3 * c);
      proj_back.plan(arena, c, c);
    }
    if (mlp) {
      norm2.plan(arena, c);
      fc1.plan(arena, hidden, c);
      fc1_back.plan(arena, c, hidden);
      fc2_back.plan(arena, hidden, c);
    }
    sums = arena.take<float>(chunks.count * offset[kInnerParameters]);
  }

  void plan(Arena& arena, Scratch& s) const {
    const int64_t widest = most(attention ? 3 * c : c, hidden);
    s.x = arena.take<float>(c * ld);
    s.d = arena.take<float>(c * ld);
    s.y = arena.take<float>(output_rows(widest) * ld);
    s.a = arena.take<Element>(G::operand_rows(widest) * ld);
    s.rows = W::kRowsAreOperand ? reinterpret_cast<Row*>(s.a) : arena.take<Row>(W::row_elements(widest, ld));
    s.columns = arena.take<Column>(W::column_elements(most(c, hidden), ld));
    s.turned = arena.take<float>(L * L);
    if (attention) {
      s.normal1 = arena.take<float>(c * ld);
      s.rstd1 = arena.take<float>(ld);
      s.qkv = arena.take<float>(output_rows(3 * c) * ld);
      s.d_qkv = arena.take<float>(3 * c * ld);
      s.p = arena.take<float>(heads * together * lanes * m);
      s.over = arena.take<float>(heads * together * lanes);
      s.o = arena.take<float>(c * ld);
      s.ds = arena.take<float>(m * L);
    }
    if (mlp) {
      s.normal2 = arena.take<float>(c * ld);
      s.rstd2 = arena.take<float>(ld);
      s.h = arena.take<float>(output_rows(hidden) * ld);
    }
    plan(arena, s.total);
  }

  void plan(Arena& arena, Totals& t) const {
    t.begin = arena.take<float>(0);
    const auto matrix = [&](int64_t rows, int64_t columns) {
      t.size += gradient_rows(rows) * gradient_columns(columns);
      return arena.take<float>(gradient_rows(rows) * gradient_columns(columns));
    };
    const auto vector = [&](int64_t n, bool asked) -> float* {
      if (!asked) return nullptr;
      t.size += round_up(n * L, 16);
      return arena.take<float>(round_up(n * L, 16));
    };
    const auto asked = [&](int i) { return args.grads[i] != nullptr; };
    t.size = 0;
    t.qkv = asked(kQkWeight) || asked(kVWeight) ? matrix(3 * c, c) : nullptr;
    t.proj = asked(kProjWeight) ? matrix(c, c) : nullptr;
    t.fc1 = asked(kFc1Weight) ? matrix(hidden, c) : nullptr;
    t.fc2 = asked(kFc2Weight) ? matrix(c, hidden) : nullptr;
    t.norm1_gain = vector(c, asked(kNorm1Weight));
    t.norm1_shift = vector(c, asked(kNorm1Bias));
    t.qkv_bias = vector(3 * c, asked(kQkBias) || asked(kVBias));
    t.proj_bias = vector(c, asked(kProjBias));
    t.norm2_gain = vector(c, asked(kNorm2Weight));
    t.norm2_shift = vector(c, asked(kNorm2Bias));
    t.fc1_bias = vector(hidden, asked(kFc1Bias));
    t.fc2_bias = vector(c, asked(kFc2Bias));
  }

  int64_t jobs() const {
    return (attention ? qkv.panels() + proj.panels() + qkv_back.strips() + proj_back.strips() : 0) +
           (mlp ? fc1.panels() + fc1_back.strips() + fc2_back.strips() : 0);
  }

  // Packing job i of jobs(); job 0 also reads the LayerNorms.
  void pack(int64_t i) {
    if (i == 0) {
      if (attention) read_affine(norm1, call.norm1_weight, call.norm1_bias);
      if (mlp) read_affine(norm2, call.norm2_weight, call.norm2_bias);
    }
    const Rows qkv_rows = {call.qk_weight, 2 * c, call.v_weight};
    const auto forward = [&](Packed<G>& packed, const Rows& rows, const Rows& bias) {
      if (i >= 0 && i < packed.panels()) packed.pack(i, rows, bias);
      i -= packed.panels();
    };
    const auto transposed = [&](PackedTransposed<G>& packed, const Rows& rows) {
      if (i >= 0 && i < packed.strips()) packed.pack(i, rows);
      i -= packed.strips();
    };
    if (attention) {
      forward(qkv, qkv_rows, {call.qk_bias, 2 * c, call.v_bias});
      forward(proj, {call.proj_weight, c, {}}, {call.proj_bias, c, {}});
      transposed(qkv_back, qkv_rows);
      transposed(proj_back, {call.proj_weight, c, {}});
    }
    if (mlp) {
      forward(fc1, {call.fc1_weight, hidden, {}}, {call.fc1_bias, hidden, {}});
      transposed(fc1_back, {call.fc1_weight, hidden, {}});
      transposed(fc2_back, {call.fc2_weight, c, {}});
    }
  }

  void read_affine(Affine& affine, const Param& weight, const Param& bias) const {
    read_vector(weight, c, affine.gain, 1.0f);
    read_vector(bias, c, affine.shift);
  }

  // The operand of a product from value(k, at): channel k of n at lane at.
  template <class F>
  TNT_INLINE void put_operand(const Scratch& s, int64_t n, F value) const {
    for (int64_t k = 0; k < n; k += 2)
      for (int64_t at = 0; at < ld; at += L)
        G::put(s.a + at, ld, k, value(k, at), k + 1 < n ? value(k + 1, at) : splat(0.0f));
    G::pad(s.a, ld, n);
  }

  // The same for the gradient of what a layer puts out: operand of the product that takes it to the layer's
  // input, rows of the gradient of its weight, and, summed into bias [n, L] if given, that of its bias.
  template <class F>
  TNT_INLINE void put_gradient(const Scratch& s, int64_t n, float* bias, F value) const {
    for (int64_t k = 0; k < n; k += 2) {
      vf sum[2] = {};
      for (int64_t at = 0; at < ld; at += L) {
        const vf even = value(k, at), odd = k + 1 < n ? value(k + 1, at) : splat(0.0f);
        G::put(s.a + at, ld, k, even, odd);
        if (!W::kRowsAreOperand) {
          W::put_row(s.rows, ld, k, at, even);
          W::put_row(s.rows, ld, k + 1, at, odd);
        }
        sum[0] += even;
        sum[1] += odd;
      }
      if (bias == nullptr) continue;
      for (int i = 0; i < 2; ++i)
        if (k + i < n) store(bias + (k + i) * L, load(bias + (k + i) * L) + sum[i]);
    }
    G::pad(s.a, ld, n);
  }

  // Columns of a weight's gradient from value(k, at).
  template <class F>
  TNT_INLINE void put_columns(const Scratch& s, int64_t n, F value) const {
    for (int64_t at = 0; at < ld; at += L)
      for (int64_t k = 0; k < gradient_columns(n); k += L) {
        vf r[L];
        for (int i = 0; i < L; ++i) r[i] = k + i < n ? value(k + i, at) : splat(0.0f);
        W::put_columns(s.columns, gradient_columns(n), k, at, r);
      }
  }

  void normalise(const Scratch& s, const Affine& affine, float eps, float* normal, float* rstd) const {
    for (int64_t at = 0; at < ld; at += L) {
      const Moments found = moments(s.x + at, ld, c, eps);
      store(rstd + at, found.rstd);
      for (int64_t k = 0; k < c; ++k) store(normal + k * ld + at, found.normal(load(s.x + k * ld + at)));
    }
    put_operand(s, c, [&](int64_t k, int64_t at) TNT_LAMBDA {
      return load(normal + k * ld + at) * affine.gain[k] + affine.shift[k];
    });
  }

  // Factor of the branch at this vector of lanes.
  TNT_INLINE float factor(const float* drop_path, int64_t at, int64_t first, int64_t count) const {
    const int64_t sentence = at / lanes;
    return drop_path == nullptr ? 1.0f : sentence < count ? drop_path[first + sentence] : 0.0f;
  }

  // The first half as it was computed: x becomes the residual stream behind it.
  void attention_again(const Scratch& s, int64_t first, int64_t count) const {
    normalise(s, norm1, call.eps1, s.normal1, s.rstd1);
    G::run(qkv, s.a, ld, s.qkv);
    const float scaled = call.scale * 1.44269504f;
    for (int64_t i = 0; i < c * ld; i += L) store(s.qkv + i, load(s.qkv + i) * scaled);
    for (int64_t h = 0; h < heads; ++h) {
      const float* q = s.qkv + h * head_dim * ld;
      for (int64_t from = 0; from < together * lanes; from += lanes)
        for (int64_t at = from; at < from + lanes; at += L) {
          const HeadDropout drop = head_dropout(s, h, first, from, at);
          store(s.over + h * together * lanes + at,
                attend<G::kAccuracy>(q + at, q + c * ld + from, q + 2 * c * ld + from, ld, m, head_dim,
                                     numerators(s, h, at), s.o + h * head_dim * ld + at,
                                     dropout.probabilities.active ? &drop : nullptr));
        }
    }
    if (!mlp) return;
    put_operand(s, c, [&](int64_t k, int64_t at) TNT_LAMBDA { return load(s.o + k * ld + at); });
    G::run(proj, s.a, ld, s.y);
    drop(dropout.projection, s.y, c, first);
    for (int64_t at = 0; at < ld; at += L) {
      const vf f = splat(factor(call.drop_path1, at, first, count));
      for (int64_t i = at; i < c * ld; i += ld) store(s.x + i, load(s.x + i) + load(s.y + i) * f);
    }
  }

  TNT_INLINE HeadDropout head_dropout(const Scratch& s, int64_t head, int64_t first, int64_t from,
                                      int64_t at) const {
    return {dropout.probabilities, first + from / lanes, at - from, head * round_up(m, 4), s.ds};
  }

  // Dropout of y [n, ld] in place.
  void drop(const DropoutPlace& place, float* y, int64_t n, int64_t first) const {
    if (!place.active) return;
    for (int64_t at = 0; at < together * lanes; at += L)
      place.apply(y + at, y + at, ld, n, first + at / lanes, at % lanes);
  }

  // y = gradient of a branch, from d, the gradient of the stream it was added to.
  void branch_gradient(const Scratch& s, const float* drop_path, const DropoutPlace& place, int64_t first,
                       int64_t count) const {
    for (int64_t at = 0; at < ld; at += L) {
      const float f = factor(drop_path, at, first, count);
      for (int64_t i = at; i < c * ld; i += ld) store(s.y + i, load(s.d + i) * f);
    }
    drop(place, s.y, c, first);
  }

  TNT_INLINE float* numerators(const Scratch& s, int64_t head, int64_t at) const {
    return s.p + (head * together * lanes + at) * m;
  }

  // columns = gelu(h), h = gelu'(h), both through dropout
  void activate(const Scratch& s, int64_t first) const {
    const int64_t columns = gradient_columns(hidden);
    for (int64_t at = 0; at < ld; at += L)
      for (int64_t k = 0; k < columns; k += L) {
        float* h = s.h + k * ld + at;
        const int64_t here = most(0, least(L, hidden - k));
        if (here == L)
          activate(h, s.turned);
        else
          for (int i = 0; i < L; ++i) store(s.turned + i * L, i < here ? activate(h + i * ld) : splat(0.0f));
        if (dropout.hidden.active && at < together * lanes) {
          dropout.hidden.apply(h, h, ld, here, first + at / lanes, at % lanes, k);
          dropout.hidden.apply(s.turned, s.turned, L, here, first + at / lanes, at % lanes, k);
        }
        if (s.total.fc2 == nullptr) continue;
        vf r[L];
        for (int i = 0; i < L; ++i) r[i] = load(s.turned + i * L);
        W::put_columns(s.columns, columns, k, at, r);
      }
  }
  TNT_INLINE void activate(float* h, float* to) const {
    for (int i = 0; i < L; ++i) store(to + i * L, activate(h + i * ld));
  }
  TNT_INLINE vf activate(float* h) const {
    vf value, slope;
    gelu_and_derivative<G::kAccuracy>(load(h), value, slope);
    store(h, slope);
    return value;
  }

  void mlp_backward(const Scratch& s, int64_t first, int64_t count) const {
    const Totals& t = s.total;
    normalise(s, norm2, call.eps2, s.normal2, s.rstd2);
    G::run(fc1, s.a, ld, s.h);

    activate(s, first);
    branch_gradient(s, call.drop_path2, dropout.output, first, count);
    put_gradient(s, c, t.fc2_bias, [&](int64_t k, int64_t at) TNT_LAMBDA { return load(s.y + k * ld + at); });
    if (t.fc2 != nullptr) W::accumulate(s.rows, ld, c, s.columns, hidden, t.fc2);
    if (!wanted.fc1) return;

    G::run(fc2_back, s.a, ld, s.y);
    put_gradient(s, hidden, t.fc1_bias, [&](int64_t k, int64_t at) TNT_LAMBDA {
      return load(s.y + k * ld + at) * load(s.h + k * ld + at);
    });
    if (t.fc1 != nullptr) {
      put_columns(s, c, [&](int64_t k, int64_t at) TNT_LAMBDA {
        return load(s.normal2 + k * ld + at) * norm2.gain[k] + norm2.shift[k];
      });
      W::accumulate(s.rows, ld, hidden, s.columns, c, t.fc1);
    }
    if (!wanted.norm2) return;

    G::run(fc1_back, s.a, ld, s.y);
    norm_backward(s, norm2, s.normal2, s.rstd2, t.norm2_gain, t.norm2_shift);
  }

  // Adds to d what comes back through a LayerNorm from y, the gradient of its result.
  void norm_backward(const Scratch& s, const Affine& affine, const float* normal, const float* rstd,
                     float* grad_gain, float* grad_shift) const {
    for (int64_t at = 0; at < ld; at += L)
      layer_norm_backward(normal + at, s.y + at, ld, c, affine.gain, load(rstd + at), grad_gain, grad_shift,
                          [&](int64_t k, vf v)
                              TNT_LAMBDA { store(s.d + k * ld + at, load(s.d + k * ld + at) + v); });
  }

  void attention_backward(const Scratch& s, int64_t first, int64_t count) const {
    const Totals& t = s.total;
    branch_gradient(s, call.drop_path1, dropout.projection, first, count);
    put_gradient(s, c, t.proj_bias,
                 [&](int64_t k, int64_t at) TNT_LAMBDA { return load(s.y + k * ld + at); });
    if (t.proj != nullptr) {
      put_columns(s, c, [&](int64_t k, int64_t at) TNT_LAMBDA { return load(s.o + k * ld + at); });
      W::accumulate(s.rows, ld, c, s.columns, c, t.proj);
    }
    if (!wanted.qkv) return;

    G::run(proj_back, s.a, ld, s.y);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t from = 0; from < together * lanes; from += lanes) one_head(s, h, first, from);
    put_gradient(s, 3 * c, t.qkv_bias,
                 [&](int64_t k, int64_t at) TNT_LAMBDA { return load(s.d_qkv + k * ld + at); });
    if (t.qkv != nullptr) {
      put_columns(s, c, [&](int64_t k, int64_t at) TNT_LAMBDA {
        return load(s.normal1 + k * ld + at) * norm1.gain[k] + norm1.shift[k];
      });
      W::accumulate(s.rows, ld, 3 * c, s.columns, c, t.qkv);
    }
    if (!wanted.norm1) return;

    G::run(qkv_back, s.a, ld, s.y);
    norm_backward(s, norm1, s.normal1, s.rstd1, t.norm1_gain, t.norm1_shift);
  }

  // Gradients of q, k and v of one head of the sentence whose lanes start at `from`; y holds that of the
  // head's result. With s = scale q k, p = softmax(s) and dropout's factors f: dv = (f p) dy, dp = f (v dy),
  // ds = p (dp - sum_j p_j dp_j).
  TNT_INLINE void one_head(const Scratch& s, int64_t h, int64_t first, int64_t from) const {
    const int64_t row = h * head_dim * ld;
    const float *q = s.qkv + row + from, *keys = q + c * ld, *values = keys + c * ld, *dy = s.y + row + from;
    float *dq = s.d_qkv + row + from, *dk = dq + c * ld, *dv = dk + c * ld;
    for (int64_t at = 0; at < lanes; at += L) {
      float* p = numerators(s, h, from + at);
      const vf over = load(s.over + h * together * lanes + from + at);
      const HeadDropout drop = head_dropout(s, h, first, from, from + at);
      all_scores(dy + at, values, ld, m, head_dim, s.ds);
      if (dropout.probabilities.active)
        drop.place.apply(s.ds, s.ds, L, m, drop.sentence, drop.word, drop.channel);
      vf mean = {};
      for (int64_t j = 0; j < m; ++j) {
        const vf probability = load(p + j * L) * over;
        store(p + j * L, probability);
        mean += probability * load(s.ds + j * L);
      }
      for (int64_t j = 0; j < m; ++j) store(s.ds + j * L, load(p + j * L) * (load(s.ds + j * L) - mean));
      all_weighted_values(s.ds, keys, ld, m, head_dim, splat(call.scale), dq + at);
      if (dropout.probabilities.active) drop.place.apply(p, p, L, m, drop.sentence, drop.word, drop.channel);
      // Sums over the queries: with the keys in the lanes they are vertical too. The queries carry
      // scale * log2(e).
      const int64_t queries = least(L, m - at);
      for (int64_t j = 0; j < m; j += L) {
        turn(p + j * L, m - j, s.turned);
        add_over_queries(s.turned, dy + at, queries, 1.0f, at > 0, dv + j);
        turn(s.ds + j * L, m - j, s.turned);
        add_over_queries(s.turned, q + at, queries, 0.693147181f, at > 0, dk + j);
      }
    }
  }

  // to [L queries, L keys] from up to L of n rows, a key each.
  TNT_INLINE void turn(const float* from, int64_t n, float* to) const {
    vf r[L];
    for (int i = 0; i < L; ++i) r[i] = i < n ? load(from + i * L) : splat(0.0f);
    transpose(r);
    for (int i = 0; i < L; ++i) store(to + i * L, r[i]);
  }

  // out[d] (+)= factor * sum over queries i of w[i] * x[d, i]
  TNT_INLINE void add_over_queries(const float* w, const float* x, int64_t queries, float scale, bool add,
                                   float* out) const {
    int64_t d = 0;
    for (; d + 6 <= head_dim; d += 6) over_queries<6>(w, x + d * ld, queries, scale, add, out + d * ld);
    for (; d + 2 <= head_dim; d += 2) over_queries<2>(w, x + d * ld, queries, scale, add, out + d * ld);
    for (; d < head_dim; ++d) over_queries<1>(w, x + d * ld, queries, scale, add, out + d * ld);
  }
  template <int N>
  TNT_INLINE void over_queries(const float* w, const float* x, int64_t queries, float scale, bool add,
                               float* out) const {
    vf sum[N] = {};
    for (int64_t i = 0; i < queries; ++i) {
      const vf wi = load(w + i * L);
      for (int d = 0; d < N; ++d) sum[d] += wi * x[d * ld + i];
    }
    for (int d = 0; d < N; ++d)
      store(out + d * ld, add ? load(out + d * ld) + sum[d] * scale : sum[d] * scale);
  }

  void read_tokens(const void* from, int64_t first, int64_t count, float* to) const {
    const IO* in = static_cast<const IO*>(from) + first * m * c;
    for (int64_t i = 0; i < together; ++i)
      for (int64_t at = 0; at < lanes; at += L)
        load_words(in + (i * m + at) * c, c, i < count ? static_cast<int>(least(L, m - at)) : 0, c,
                   to + i * lanes + at, ld);
  }

  void one_group(int64_t group, const Scratch& s) const {
    const int64_t first = group * together, count = least(together, call.sentences - first);
    read_tokens(call.x, first, count, s.x);
    read_tokens(args.grad, first, count, s.d);
    if (attention) attention_again(s, first, count);
    if (mlp && wanted.fc2) mlp_backward(s, first, count);
    if (wanted.proj) attention_backward(s, first, count);
    if (args.grad_x == nullptr) return;
    IO* out = static_cast<IO*>(args.grad_x) + first * m * c;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t at = 0; at < lanes; at += L)
        store_words<IO, IO>(out + (i * m + at) * c, c, static_cast<int>(least(L, m - at)), c,
                            s.d + i * lanes + at, ld);
  }

  void run(int64_t chunk, const Scratch& s) const {
    if (s.total.size > 0) memset(s.total.begin, 0, static_cast<size_t>(s.total.size) * 4);
    for (int64_t g = chunks.begin(chunk); g < chunks.end(chunk); ++g) one_group(g, s);
    keep(s.total, sums + chunk * offset[kInnerParameters]);
  }

  // A chunk's sums, without padding and lanes added up.
  void keep(const Totals& t, float* to) const {
    const auto matrix = [&](int i, const float* from, int64_t rows, int64_t columns) {
      if (args.grads[i] == nullptr) return;
      for (int64_t o = 0; o < rows; ++o)
        memcpy(to + offset[i] + o * columns, from + o * gradient_columns(columns),
               static_cast<size_t>(columns) * 4);
    };
    const auto vector = [&](int i, const float* from, int64_t n) {
      if (args.grads[i] == nullptr) return;
      for (int64_t k = 0; k < n; ++k) to[offset[i] + k] = hsum(load(from + k * L));
    };
    matrix(kQkWeight, t.qkv, 2 * c, c);
    if (t.qkv != nullptr) matrix(kVWeight, t.qkv + 2 * c * gradient_columns(c), c, c);
    matrix(kProjWeight, t.proj, c, c);
    matrix(kFc1Weight, t.fc1, hidden, c);
    matrix(kFc2Weight, t.fc2, c, hidden);
    vector(kNorm1Weight, t.norm1_gain, c);
    vector(kNorm1Bias, t.norm1_shift, c);
    vector(kQkBias, t.qkv_bias, 2 * c);
    if (t.qkv_bias != nullptr) vector(kVBias, t.qkv_bias + 2 * c * L, c);
    vector(kProjBias, t.proj_bias, c);
    vector(kNorm2Weight, t.norm2_gain, c);
    vector(kNorm2Bias, t.norm2_shift, c);
    vector(kFc1Bias, t.fc1_bias, hidden);
    vector(kFc2Bias, t.fc2_bias, c);
  }

  // Gradients of the parameters from the sums of all chunks.
  void finish() const {
    add_chunks(sums, chunks.count, offset[kInnerParameters], call.threads);
    for (int i = 0; i < kInnerParameters; ++i)
      if (args.grads[i] != nullptr)
        memcpy(args.grads[i], sums + offset[i], static_cast<size_t>(offset[i + 1] - offset[i]) * 4);
  }
};

template <class G, class IO>
bool run_inner_block_backward(const InnerBlockGradientArgs& args) {
  InnerBlockBackward<G, IO> backward(args);
  return parallel_groups<G>(backward, backward.chunks.count, args.call.threads, [&] { backward.finish(); });
}

inline bool inner_block_backward(const InnerBlockGradientArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.call.compute_dtype == kBFloat16)
    return args.call.io_dtype == kFloat32 ? run_inner_block_backward<Bf16Gemm, float>(args)
                                          : run_inner_block_backward<Bf16Gemm, uint16_t>(args);
#endif
  return args.call.io_dtype == kFloat32 ? run_inner_block_backward<F32Gemm, float>(args)
                                        : run_inner_block_backward<F32Gemm, uint16_t>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
