// Gradients of pixel_embed. Those of the parameters are sums over all words: the patches are cut into a few
// chunks, each summed by one thread, and the chunks' sums are added in order. That of the image goes patch
// by patch, or, where the convolution of a patch sees its neighbours, image by image: no two threads add to
// the same pixel.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "patches.h"
#include "tokens.h"
#include "weight_gradient.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class G, class In, class Out>
struct PixelEmbedBackward {
  typedef typename G::Element Element;
  typedef WeightGradient<G> W;
  typedef typename W::Row Row;
  typedef typename W::Column Column;

  const PixelEmbedGradientArgs& args;
  const PixelEmbedArgs& call;
  const Patches patches, plain;  // their fields by phases of the stride, and as they lie
  const int64_t c, m, inputs, lanes, total;
  const int64_t together, ld;  // patches and lanes per group
  const Chunks chunks;
  const int threads;
  const bool of_words, of_parameters;  // needed: the bias' or position's gradient; or the weight's
  const int64_t row_size, part;        // of the weight's gradient; of all that a chunk sums

  PackedTransposed<G> transposed;
  float* parts;  // [chunks][weight: c x row_size, rounded up to whole tiles; words: m x c]

  struct Scratch {
    float* field;     // a patch with its border
    float* windows;   // [2, row_size + L] what two words see
    float* g;         // [c, ld] gradient of a group's words
    Row* rows;        // [c, ld] the same
    Column* columns;  // [ld, inputs]
    Element* a;       // [c, ld]
    float* y;         // [inputs, ld] gradient of the taps
    float* image;     // [channels, height, width] where `legacy`
  };

  explicit PixelEmbedBackward(const PixelEmbedGradientArgs& a)
      : args(a),
        call(a.call),
        patches(call, call.stride),
        plain(call, 1),
        c(call.c),
        m(patches.m),
        inputs(patches.inputs),
        lanes(patches.lanes),
        total(call.batch * patches.per_image),
        together(patches_together(lanes)),
        ld(together * lanes),
        chunks((total + together - 1) / together, 8),
        threads(static_cast<int>(most(1, least(call.threads, chunks.groups)))),
        of_words(a.grad_bias != nullptr || a.grad_position != nullptr),
        of_parameters(of_words || a.grad_weight != nullptr),
        row_size(gradient_columns(inputs)),
        part(gradient_rows(c) * row_size + m * c) {}

  // 64 lanes or more, and an even number of vectors: what a product takes best.
  static int64_t patches_together(int64_t lanes) {
    const int64_t enough = (64 + lanes - 1) / lanes;
    return enough * lanes % (2 * L) == 0 ? enough : enough + 1;
  }

  void plan(Arena& arena) {
    if (args.grad_image != nullptr) transposed.plan(arena, inputs, c);
    parts = arena.take<float>(of_parameters ? most(1, chunks.count) * part : 0);
  }
  void plan(Arena& arena, Scratch& s) const {
    s.field = arena.take<float>(most(patches.field_size(), plain.field_size()) + L);
    s.g = arena.take<float>(round_up(c, 2) * ld);
    s.windows = arena.take<float>(2 * (row_size + L));
    s.rows = arena.take<Row>(W::row_elements(c, ld));
    s.columns = arena.take<Column>(W::column_elements(inputs, ld));
    if (args.grad_image == nullptr) return;
    s.a = arena.take<Element>(G::operand_rows(c) * ld);
    s.y = arena.take<float>(output_rows(inputs) * ld);
    if (call.legacy) s.image = arena.take<float>(call.channels * call.height * call.width);
  }

  int64_t jobs() const { return args.grad_image != nullptr ? transposed.strips() : 0; }
  void pack(int64_t i) { transposed.pack(i, {call.weight, c, {}}); }

  // What every thread runs.
  void run(const Scratch& s) const {
    if (of_parameters) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) one_chunk(chunk, s);
    }
    if (args.grad_image != nullptr) {
      const int64_t at_a_time = call.legacy ? patches.per_image : together;
#pragma omp for schedule(dynamic, 1)
      for (int64_t first = 0; first < total; first += at_a_time)
        image_gradient(first, least(total, first + at_a_time), s);
    }
  }

  void one_chunk(int64_t chunk, const Scratch& s) const {
    float *weight = parts + chunk * part, *words = weight + gradient_rows(c) * row_size;
    for (int64_t group = chunks.begin(chunk); group < chunks.end(chunk); ++group) {
      const int64_t first = group * together, count = least(together, total - first);
      if (args.grad_weight != nullptr) add_products(first, count, s, weight);
      for (int64_t i = 0; of_words && i < count; ++i) add_words(first + i, words);
    }
  }

  void add_words(int64_t patch, float* words) const {
    const Out* grad = static_cast<const Out*>(args.grad) + patch * m * c;
    int64_t i = 0;
    for (; i + L <= m * c; i += L) store(words + i, load(words + i) + load_io(grad + i));
    for (; i < m * c; ++i) words[i] += load_scalar(grad + i);
  }

  void add_products(int64_t first, int64_t count, const Scratch& s, float* weight) const {
    load_gradient(first, count, s);
    for (int64_t k = 0; k < c; ++k)
      for (int64_t at = 0; at < ld; at += L) W::put_row(s.rows, ld, k, at, load(s.g + k * ld + at));
    float *even = s.windows, *odd = even + row_size + L;
    for (int64_t i = 0; i < count; ++i) {
      plain.read_field(static_cast<const In*>(call.image), call.strides, first + i, s.field);
      for (int64_t word = 0; word < m; word += 2) {
        const bool two = word + 1 < m;
        plain.read_window(s.field, word, even);
        if (two) plain.read_window(s.field, word + 1, odd);
        for (int64_t k = 0; k < inputs; k += L)
          W::put_words(s.columns, row_size, k, i * lanes + word, load(even + k),
                       two ? load(odd + k) : splat(0.0f));
      }
    }
    // A group that is not full must not meet what an earlier one left behind.
    const int64_t used = W::column_elements(inputs, count * lanes);
    memset(s.columns + used, 0,
           static_cast<size_t>(W::column_elements(inputs, ld) - used) * sizeof(*s.columns));
    W::accumulate(s.rows, ld, c, s.columns, inputs, weight);
  }

  void load_gradient(int64_t first, int64_t count, const Scratch& s) const {
    const Out* grad = static_cast<const Out*>(args.grad) + first * m * c;
    for (int64_t i = 0; i < together; ++i)
      for (int64_t at = 0; at < lanes; at += L)
        load_words(grad + (i * m + at) * c, c, i < count ? static_cast<int>(least(L, m - at)) : 0, c,
                   s.g + i * lanes + at, ld);
  }

  void finish() const {
    if (!of_parameters) return;
    add_chunks(parts, chunks.count, part, threads);
    for (int64_t k = 0; args.grad_weight != nullptr && k < c; ++k)
      memcpy(args.grad_weight + k * inputs, parts + k * row_size, static_cast<size_t>(inputs) * 4);
    const float* words = parts + gradient_rows(c) * row_size;
    if (args.grad_position != nullptr) memcpy(args.grad_position, words, static_cast<size_t>(m * c) * 4);
    for (int64_t k = 0; args.grad_bias != nullptr && k < c; ++k) {
      float sum = 0;
      for (int64_t word = 0; word < m; ++word) sum += words[word * c + k];
      args.grad_bias[k] = sum;
    }
  }

  // Of patches [first, end). They own their pixels, or, where `legacy`, are a whole image.
  void image_gradient(int64_t first, int64_t end, const Scratch& s) const {
    const int64_t size = call.channels * call.height * call.width;
    In* image = static_cast<In*>(args.grad_image) + patches.image_of(first) * size;
    if (call.legacy) memset(s.image, 0, static_cast<size_t>(size) * 4);
    for (int64_t group = first; group < end; group += together) {
      const int64_t count = least(together, end - group);
      load_gradient(group, count, s);
      for (int64_t k = 0; k < c; k += 2)
        for (int64_t at = 0; at < ld; at += L)
          G::put(s.a + at, ld, k, load(s.g + k * ld + at),
                 k + 1 < c ? load(s.g + (k + 1) * ld + at) : splat(0.0f));
      G::pad(s.a, ld, c);
      G::run(transposed, s.a, ld, s.y);
      for (int64_t i = 0; i < count; ++i) {
        memset(s.field, 0, static_cast<size_t>(patches.field_size()) * 4);
        patches.add_taps(s.y + i * lanes, ld, s.field);
        if (call.legacy)
          add_field(group + i, s.field, s.image);
        else
          write_field(group + i, s.field);
      }
    }
    for (int64_t i = 0; call.legacy && i < size; ++i) store_scalar(image + i, s.image[i]);
  }

  void write_field(int64_t patch, const float* field) const {
    In* image = static_cast<In*>(args.grad_image) +
                patches.image_of(patch) * call.channels * call.height * call.width;
    patches.for_each_run(patch,
                         [&](int64_t ch, int64_t row, int64_t column, int64_t count, int64_t at) TNT_LAMBDA {
                           In* to = image + (ch * call.height + row) * call.width + column;
                           for (int64_t i = 0; i < count; ++i)
                             store_scalar(to + i * call.stride, field[at + i]);
                         });
  }

  void add_field(int64_t patch, const float* field, float* image) const {
    patches.for_each_run(patch,
                         [&](int64_t ch, int64_t row, int64_t column, int64_t count, int64_t at) TNT_LAMBDA {
                           float* to = image + (ch * call.height + row) * call.width + column;
                           for (int64_t i = 0; i < count; ++i) to[i * call.stride] += field[at + i];
                         });
  }
};

template <class G, class In, class Out>
bool run_pixel_embed_backward(const PixelEmbedGradientArgs& args) {
  typedef PixelEmbedBackward<G, In, Out> Op;
  Op op(args);
  const auto body = [&](const typename Op::Scratch& mine) { op.run(mine); };
  return in_parallel<G>(op, op.threads, body, [&] { op.finish(); });
}

template <class G>
bool pixel_embed_backward_by_dtype(const PixelEmbedGradientArgs& args) {
  const bool wide = args.call.out_dtype == kFloat32;
  if (args.call.image_dtype == kFloat32)
    return wide ? run_pixel_embed_backward<G, float, float>(args)
                : run_pixel_embed_backward<G, float, uint16_t>(args);
  return wide ? run_pixel_embed_backward<G, uint16_t, float>(args)
              : run_pixel_embed_backward<G, uint16_t, uint16_t>(args);
}

inline bool pixel_embed_backward(const PixelEmbedGradientArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.call.compute_dtype == kBFloat16) return pixel_embed_backward_by_dtype<Bf16Gemm>(args);
#endif
  return pixel_embed_backward_by_dtype<F32Gemm>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
