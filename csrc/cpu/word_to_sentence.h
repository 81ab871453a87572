// LayerNorm -> Linear -> LayerNorm of a sentence's words, added to its token, in one pass over a block of
// sentences: a sentence per lane, so that both LayerNorms are vertical.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "tokens.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class G, class Words, class Tokens>
struct WordToSentence {
  typedef typename G::Element Element;
  static constexpr int kGroupsAtATime = 1;

  const WordToSentenceArgs& args;
  const int64_t inputs, d, sentences;
  // Sentences per group. Every group reads all weights, which for wide models come from the third cache
  // level, so groups are large where there are enough of them for every thread.
  const int64_t block;

  Affine norm1, norm2;
  Packed<G> weight;

  struct Scratch {
    float* x;    // [inputs, block]
    float* y;    // [d, block]
    Element* a;  // [inputs, block]
  };

  explicit WordToSentence(const WordToSentenceArgs& a)
      : args(a),
        inputs(a.in_features),
        d(a.d),
        sentences(a.batch * a.n),
        block(sentences >= 32 * L * a.threads ? 4 * L : 2 * L) {}

  void plan(Arena& arena) {
    norm1.plan(arena, args.norm1_size);
    norm2.plan(arena, d);
    weight.plan(arena, d, inputs);
  }
  void plan(Arena& arena, Scratch& s) const {
    s.x = arena.take<float>(inputs * block);
    s.y = arena.take<float>(output_rows(d) * block);
    s.a = arena.take<Element>(G::operand_rows(inputs) * block);
  }

  int64_t jobs() const { return weight.panels(); }
  void pack(int64_t i) {
    if (i == 0) {
      read_vector(args.norm1_weight, args.norm1_size, norm1.gain, 1.0f);
      read_vector(args.norm1_bias, args.norm1_size, norm1.shift);
      read_vector(args.norm2_weight, d, norm2.gain, 1.0f);
      read_vector(args.norm2_bias, d, norm2.shift);
    }
    weight.pack(i, {args.weight, d, {}}, {args.bias, d, {}});
  }

  void run(int64_t group, const Scratch& s) const {
    const int64_t first = group * block, count = least(block, sentences - first);
    const Words* words = static_cast<const Words*>(args.words) + first * inputs;
    for (int64_t at = 0; at < block; at += L) {
      const int here = static_cast<int>(most(0, least(L, count - at)));
      load_words(words + at * inputs, inputs, here, inputs, s.x + at, block);
      normalise_words(s, at);
    }
    G::pad(s.a, block, inputs);
    G::run(weight, s.a, block, s.y);
    if (args.norm2_weight.ptr != nullptr)
      for (int64_t at = 0; at < block; at += L)
        layer_norm(s.y + at, block, d, norm2, args.eps2, [&](int64_t k, vf even, vf odd) TNT_LAMBDA {
          store(s.y + k * block + at, even);
          if (k + 1 < d) store(s.y + (k + 1) * block + at, odd);
        });
    add_to_tokens(s, first, count);
  }

  // One LayerNorm over all inputs, or one per word of norm1_size channels. A word of odd width would
  // split channel pairs between words, so those go through x.
  TNT_INLINE void normalise_words(const Scratch& s, int64_t at) const {
    const int64_t size = args.norm1_size;
    if (size == inputs || size % 2 == 0) {
      for (int64_t from = 0; from < inputs; from += size)
        layer_norm(s.x + from * block + at, block, size, norm1, args.eps1,
                   [&](int64_t k, vf even, vf odd)
                       TNT_LAMBDA { G::put(s.a + at, block, from + k, even, odd); });
      return;
    }
    for (int64_t from = 0; from < inputs; from += size) {
      float* x = s.x + from * block + at;
      layer_norm(x, block, size, norm1, args.eps1, [&](int64_t k, vf even, vf odd) TNT_LAMBDA {
        store(x + k * block, even);
        if (k + 1 < size) store(x + (k + 1) * block, odd);
      });
    }
    for (int64_t k = 0; k < inputs; k += 2)
      G::put(s.a + at, block, k, load(s.x + k * block + at),
             k + 1 < inputs ? load(s.x + (k + 1) * block + at) : splat(0.0f));
  }

  // Runs of sentences that share lanes and an image; the class token of an image goes with its first one.
  void add_to_tokens(const Scratch& s, int64_t first, int64_t count) const {
    const int64_t per_image = (args.n + 1) * d;
    for (int64_t at = 0; at < count;) {
      const int64_t b = (first + at) / args.n, i = (first + at) % args.n;
      const int64_t here = least(least(count - at, args.n - i), L - at % L);
      const Tokens* from = static_cast<const Tokens*>(args.tokens) + b * args.token_batch_stride;
      Tokens* to = static_cast<Tokens*>(args.out) + b * per_image;
      if (i == 0) memcpy(to, from, static_cast<size_t>(d) * sizeof(Tokens));
      store_lanes(to + (i + 1) * d, static_cast<int>(here), s.y + at, from + (i + 1) * d);
      at += here;
    }
  }

  // `here` sentences from lane 0 of y on (y may start inside a vector; block lanes lie behind one another).
  TNT_INLINE void store_lanes(Tokens* to, int here, const float* y, const Tokens* add) const {
    store_words<Tokens, Tokens>(to, d, here, d, y, block, add, d);
  }
};

template <class G, class Words, class Tokens>
bool run_word_to_sentence(const WordToSentenceArgs& args) {
  WordToSentence<G, Words, Tokens> op(args);
  return parallel_groups<G>(op, (op.sentences + op.block - 1) / op.block, args.threads);
}

template <class G>
bool word_to_sentence_by_dtype(const WordToSentenceArgs& args) {
  if (args.words_dtype == kFloat32)
    return args.tokens_dtype == kFloat32 ? run_word_to_sentence<G, float, float>(args)
                                         : run_word_to_sentence<G, float, uint16_t>(args);
  return args.tokens_dtype == kFloat32 ? run_word_to_sentence<G, uint16_t, float>(args)
                                       : run_word_to_sentence<G, uint16_t, uint16_t>(args);
}

inline bool word_to_sentence(const WordToSentenceArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.compute_dtype == kBFloat16) return word_to_sentence_by_dtype<Bf16Gemm>(args);
#endif
  return word_to_sentence_by_dtype<F32Gemm>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
