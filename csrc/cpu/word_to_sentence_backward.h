// Gradients of word_to_sentence, recomputed from the words; a sentence per lane. Two passes over a number of
// blocks of sentences: the first leaves what the linear layer took and the gradient of what it gave, the
// second sums their products. There the rows of the weight's gradient are shared out, so no thread needs a
// copy of it, and every element is summed over the sentences in their order.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "tokens.h"
#include "weight_gradient.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// All bits set in the lanes below n.
TNT_INLINE vu lanes_below(int64_t n) {
  vu mask;
  for (int i = 0; i < L; ++i) mask[i] = i < n ? ~0u : 0u;
  return mask;
}
TNT_INLINE vf keep(vf v, vu mask) { return from_bits(bits(v) & mask); }

template <class G, class Words, class Tokens>
struct WordToSentenceBackward {
  typedef typename G::Element Element;
  typedef WeightGradient<G> W;
  typedef typename W::Row Row;
  typedef typename W::Column Column;
  static constexpr int64_t kVectors = 2, kBlock = kVectors * L;  // sentences of a block

  const WordToSentenceGradientArgs& args;
  const WordToSentenceArgs& call;
  const int64_t inputs, d, sentences, norm1_size;
  const int64_t blocks;
  const int threads;
  const int64_t together;  // blocks between two second passes
  const bool norm2;        // there is a second LayerNorm
  // What is needed: gradients of the weight, of LN1's result, of the linear layer's; the latter itself.
  const bool of_weight, of_normal, of_linear, linear;

  Affine affine1, affine2;
  Packed<G> weight;
  PackedTransposed<G> transposed;
  Row* rows;               // [d, together * kBlock] gradient of the linear layer's result
  Column* columns;         // [together * kBlock, inputs] what it took
  float* weight_gradient;  // [d, inputs], rounded up to whole tiles
  float* parts;            // [together][sums] vector gradients of one block
  float* sums;             // [2 * norm1_size + 3 * d] and over all blocks

  // Lanes without a sentence are zero throughout: an infinite parameter, or a variance and an eps of zero,
  // would make NaN of them.
  struct Scratch {
    float* x;      // [inputs, kBlock] words, normalised
    float* rstd1;  // [inputs / norm1_size, kBlock]
    float* y;      // [max(d, inputs), kBlock] what a product wrote
    float* rstd2;  // [kBlock]
    float* g;      // [d, kBlock] gradient
    float* lanes;  // [2, max(d, norm1_size), L] gradients of a LayerNorm's gain and shift, a lane each
    Element* a;    // operand of the next product
  };

  explicit WordToSentenceBackward(const WordToSentenceGradientArgs& a)
      : args(a),
        call(a.call),
        inputs(call.in_features),
        d(call.d),
        sentences(call.batch * call.n),
        norm1_size(call.norm1_size),
        blocks((sentences + kBlock - 1) / kBlock),
        threads(static_cast<int>(most(1, least(call.threads, blocks)))),
        together(least(blocks, round_up(most(512, 2 * threads * kBlock), 2 * kChain) / kBlock)),
        norm2(call.norm2_weight.ptr != nullptr),
        of_weight(a.grads[2] != nullptr),
        of_normal(a.grad_words != nullptr || a.grads[0] != nullptr || a.grads[1] != nullptr),
        of_linear(of_weight || of_normal || a.grads[3] != nullptr),
        linear(norm2 && (of_linear || a.grads[4] != nullptr)) {}

  int64_t sums_size() const { return 2 * norm1_size + 3 * d; }
  int64_t row_size() const { return gradient_columns(inputs); }

  void plan(Arena& arena) {
    affine1.plan(arena, norm1_size);
    affine2.plan(arena, d);
    if (linear) weight.plan(arena, d, inputs);
    if (of_normal) transposed.plan(arena, inputs, d);
    if (of_weight) {
      rows = arena.take<Row>(W::row_elements(d, together * kBlock));
      columns = arena.take<Column>(W::column_elements(inputs, together * kBlock));
      weight_gradient = arena.take<float>(gradient_rows(d) * row_size());
    }
    parts = arena.take<float>(together * sums_size());
    sums = arena.take<float>(sums_size());
  }
  void plan(Arena& arena, Scratch& s) const {
    s.x = arena.take<float>(inputs * kBlock);
    s.rstd1 = arena.take<float>(inputs / norm1_size * kBlock);
    s.y = arena.take<float>(output_rows(most(d, inputs)) * kBlock);
    s.rstd2 = arena.take<float>(kBlock);
    s.g = arena.take<float>(round_up(d, 2) * kBlock);
    s.lanes = arena.take<float>(2 * most(d, norm1_size) * L);
    s.a = arena.take<Element>(most(G::operand_rows(inputs), G::operand_rows(d)) * kBlock);
  }

  int64_t jobs() const { return (linear ? weight.panels() : 0) + (of_normal ? transposed.strips() : 0) + 1; }
  void pack(int64_t i) {
    if (linear) {
      if (i < weight.panels()) return weight.pack(i, {call.weight, d, {}}, {call.bias, d, {}});
      i -= weight.panels();
    }
    if (of_normal && i < transposed.strips()) return transposed.pack(i, {call.weight, d, {}});
    read_vector(call.norm1_weight, norm1_size, affine1.gain, 1.0f);
    read_vector(call.norm1_bias, norm1_size, affine1.shift);
    read_vector(call.norm2_weight, d, affine2.gain, 1.0f);
    read_vector(call.norm2_bias, d, affine2.shift);
  }

  // What every thread runs.
  void run(const Scratch& s) const {
    for (int64_t first = 0; first < blocks; first += together) {
      const int64_t count = least(together, blocks - first);
#pragma omp for schedule(dynamic, 1)
      for (int64_t slot = 0; slot < count; ++slot) one_block(first + slot, slot, count * kBlock, s);
      if (of_weight) {
#pragma omp for schedule(static)
        for (int share = 0; share < threads; ++share) add_products(share, count * kBlock);
      }
      add_parts(count);
    }
  }

  // Block `index`, the `slot`th since the last second pass, where the next will have `ld` sentences.
  void one_block(int64_t index, int64_t slot, int64_t ld, const Scratch& s) const {
    const int64_t first = index * kBlock, count = least(kBlock, sentences - first);
    vu alive[kVectors];
    for (int v = 0; v < kVectors; ++v) alive[v] = lanes_below(count - v * L);
    float* part[5] = {parts + slot * sums_size()};  // in the order of args.grads, without the weight
    for (int i = 1; i < 5; ++i) part[i] = part[i - 1] + (i < 3 ? norm1_size : d);

    if (of_weight || of_normal || linear) read_words(first, count, slot, s, alive);
    read_gradient(first, count, s);
    if (linear) {
      G::pad(s.a, kBlock, inputs);
      G::run(weight, s.a, kBlock, s.y);
      for (int64_t at = 0; at < kBlock; at += L)
        normalise(s.y + at, d, call.eps2, alive[at / L], s.rstd2 + at);
      norm_backward(s.y, s.g, d, d, affine2, s.rstd2, s, alive, part[3], part[4]);
    } else if (norm2) {
      add_lanes(s.g, part[4]);
    }
    if (args.grads[3] != nullptr) add_lanes(s.g, part[2]);
    for (int64_t o = 0; of_weight && o < d; ++o)
      for (int64_t at = 0; at < kBlock; at += L)
        W::put_row(rows, ld, o, slot * kBlock + at, load(s.g + o * kBlock + at));
    if (of_normal) words_gradient(first, count, s, alive, part[0], part[1]);
  }

  // Normalises one vector of lanes of x [n, kBlock].
  TNT_INLINE void normalise(float* x, int64_t n, float eps, vu mask, float* rstd) const {
    const Moments found = moments(x, kBlock, n, eps);
    for (int64_t k = 0; k < n; ++k) store(x + k * kBlock, keep(found.normal(load(x + k * kBlock)), mask));
    store(rstd, found.rstd);
  }

  // Words into x, normalised; LN1's result into the operand and into the columns of this slot.
  void read_words(int64_t first, int64_t count, int64_t slot, const Scratch& s, const vu* alive) const {
    const Words* words = static_cast<const Words*>(call.words) + first * inputs;
    for (int64_t at = 0; at < kBlock; at += L) {
      float* x = s.x + at;
      load_words(words + at * inputs, inputs, static_cast<int>(most(0, least(L, count - at))), inputs, x,
                 kBlock);
      for (int64_t from = 0; from < inputs; from += norm1_size)
        normalise(x + from * kBlock, norm1_size, call.eps1, alive[at / L],
                  s.rstd1 + from / norm1_size * kBlock + at);
      for (int64_t k = 0, channel = 0; k < inputs; k += L) {
        vf r[L];
        for (int i = 0; i < L; ++i) {
          r[i] = splat(0.0f);
          if (k + i >= inputs) continue;
          r[i] = keep(load(x + (k + i) * kBlock) * affine1.gain[channel] + affine1.shift[channel],
                      alive[at / L]);
          if (++channel == norm1_size) channel = 0;
        }
        for (int i = 0; linear && i < L; i += 2)
          if (k + i < inputs) G::put(s.a + at, kBlock, k + i, r[i], r[i + 1]);
        if (of_weight) W::put_columns(columns, row_size(), k, slot * kBlock + at, r);
      }
    }
  }

  // Gradient of the block's sentences into g; that of the class tokens lies between the images.
  void read_gradient(int64_t first, int64_t count, const Scratch& s) const {
    const Tokens* grad = static_cast<const Tokens*>(args.grad);
    for (int64_t at = 0; at < kBlock; at += L) {
      const Tokens* row[L];
      for (int i = 0; i < L; ++i) {
        const int64_t sentence = first + least(at + i, count - 1);
        row[i] = grad + (sentence + sentence / call.n + 1) * d;
      }
      load_rows([&](int i) TNT_LAMBDA { return row[i]; }, static_cast<int>(most(0, least(L, count - at))), d,
                s.g + at, kBlock);
    }
  }

  // Backward of the LayerNorms of `size` rows each that `normal` [n, kBlock] holds, in place in grad.
  void norm_backward(const float* normal, float* grad, int64_t n, int64_t size, const Affine& affine,
                     const float* rstd, const Scratch& s, const vu* alive, float* gain, float* shift) const {
    float *gain_lanes = s.lanes, *shift_lanes = s.lanes + size * L;
    memset(s.lanes, 0, static_cast<size_t>(2 * size * L) * 4);
    for (int64_t from = 0; from < n; from += size)
      for (int64_t at = 0; at < kBlock; at += L) {
        float* g = grad + from * kBlock + at;
        layer_norm_backward(normal + from * kBlock + at, g, kBlock, size, affine.gain,
                            load(rstd + from / size * kBlock + at), gain_lanes, shift_lanes,
                            [&](int64_t k, vf v)
                                TNT_LAMBDA { store(g + k * kBlock, keep(v, alive[at / L])); });
      }
    for (int64_t k = 0; k < size; ++k) {
      gain[k] = hsum(load(gain_lanes + k * L));
      shift[k] = hsum(load(shift_lanes + k * L));
    }
  }

  // Sums of g [d, kBlock] along the sentences.
  void add_lanes(const float* g, float* to) const {
    for (int64_t k = 0; k < d; ++k) {
      vf sum = {};
      for (int64_t at = 0; at < kBlock; at += L) sum += load(g + k * kBlock + at);
      to[k] = hsum(sum);
    }
  }

  // From the gradient g of the linear layer's result to that of the words.
  void words_gradient(int64_t first, int64_t count, const Scratch& s, const vu* alive, float* gain,
                      float* shift) const {
    for (int64_t k = 0; k < d; k += 2)
      for (int64_t at = 0; at < kBlock; at += L)
        G::put(s.a + at, kBlock, k, load(s.g + k * kBlock + at),
               k + 1 < d ? load(s.g + (k + 1) * kBlock + at) : splat(0.0f));
    G::pad(s.a, kBlock, d);
    G::run(transposed, s.a, kBlock, s.y);
    if (count < kBlock)
      for (int64_t k = 0; k < inputs; ++k)
        memset(s.y + k * kBlock + count, 0, static_cast<size_t>(kBlock - count) * 4);
    norm_backward(s.x, s.y, inputs, norm1_size, affine1, s.rstd1, s, alive, gain, shift);
    if (args.grad_words == nullptr) return;
    Words* to = static_cast<Words*>(args.grad_words) + first * inputs;
    for (int64_t at = 0; at < count; at += L)
      store_words<Words, Words>(to + at * inputs, inputs, static_cast<int>(least(L, count - at)), inputs,
                                s.y + at, kBlock);
  }

  // A thread's share of the rows of the weight's gradient, over ld sentences.
  void add_products(int64_t share, int64_t ld) const {
    const int64_t tiles = gradient_rows(d) / 16, from = tiles * share / threads * 16,
                  to = least(d, tiles * (share + 1) / threads * 16);
    if (from < to)
      W::accumulate(rows + from * ld, ld, to - from, columns, inputs, weight_gradient + from * row_size());
  }

  // The vector gradients of the first `count` slots.
  void add_parts(int64_t count) const {
    constexpr int64_t kAtATime = 64;
#pragma omp for schedule(static)
    for (int64_t from = 0; from < sums_size(); from += kAtATime) {
      const int64_t to = least(from + kAtATime, sums_size());
      for (int64_t slot = 0; slot < count; ++slot)
        for (int64_t k = from; k < to; ++k) sums[k] += parts[slot * sums_size() + k];
    }
  }

  void finish() const {
    const float* from = sums;
    for (int i = 0; i < 6; ++i) {
      if (i == 2) continue;  // the weight
      const int64_t n = i < 2 ? norm1_size : d;
      if (args.grads[i] != nullptr) memcpy(args.grads[i], from, static_cast<size_t>(n) * 4);
      from += n;
    }
    for (int64_t o = 0; of_weight && o < d; ++o)
      memcpy(args.grads[2] + o * inputs, weight_gradient + o * row_size(), static_cast<size_t>(inputs) * 4);
  }
};

template <class G, class Words, class Tokens>
bool run_word_to_sentence_backward(const WordToSentenceGradientArgs& args) {
  typedef WordToSentenceBackward<G, Words, Tokens> Op;
  Op op(args);
  const auto body = [&](const typename Op::Scratch& mine) { op.run(mine); };
  return in_parallel<G>(op, op.threads, body, [&] { op.finish(); });
}

template <class G>
bool word_to_sentence_backward_by_dtype(const WordToSentenceGradientArgs& args) {
  const bool wide = args.call.tokens_dtype == kFloat32;
  if (args.call.words_dtype == kFloat32)
    return wide ? run_word_to_sentence_backward<G, float, float>(args)
                : run_word_to_sentence_backward<G, float, uint16_t>(args);
  return wide ? run_word_to_sentence_backward<G, uint16_t, float>(args)
              : run_word_to_sentence_backward<G, uint16_t, uint16_t>(args);
}

inline bool word_to_sentence_backward(const WordToSentenceGradientArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.call.compute_dtype == kBFloat16) return word_to_sentence_backward_by_dtype<Bf16Gemm>(args);
#endif
  return word_to_sentence_backward_by_dtype<F32Gemm>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
