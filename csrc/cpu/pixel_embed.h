// Pixel embedding: every patch is convolved on its own straight from the image, bias and word position
// are added, and the words leave token-major. There is no unfold buffer.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "tokens.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class G, class In, class Out>
struct PixelEmbed {
  typedef typename G::Element Element;
  static constexpr int kGroupsAtATime = 4;

  const PixelEmbedArgs& args;
  const int64_t pad, rows, columns;    // padding; patches down and across
  const int64_t words_h, words_w, m;   // words of a patch
  const int64_t field_h, field_w;      // a patch with its border
  const int64_t phase_row, field_row;  // columns of one phase; of all phases
  const int64_t inputs;                // channels * kernel * kernel
  const int64_t vectors, lanes, together, ld;

  Packed<G> weight;
  float* position;  // [m, c]

  struct Scratch {
    float* field;  // [channels, field_h, stride, phase_row]
    float* taps;   // [inputs, lanes] one patch's rows of the operand before conversion
    float* y;      // [c, ld]
    Element* a;    // [inputs, ld]
  };

  explicit PixelEmbed(const PixelEmbedArgs& a)
      : args(a),
        pad(a.kernel / 2),
        rows(a.height / a.patch_h),
        columns(a.width / a.patch_w),
        words_h((a.patch_h + a.stride - 1) / a.stride),
        words_w((a.patch_w + a.stride - 1) / a.stride),
        m(words_h * words_w),
        field_h(a.patch_h + 2 * pad),
        field_w(a.patch_w + 2 * pad),
        phase_row((field_w + a.stride - 1) / a.stride),
        field_row(phase_row * a.stride),
        inputs(a.channels * a.kernel * a.kernel),
        vectors((m + L - 1) / L),
        lanes(vectors * L),
        together(vectors >= 2 ? 1 : 2),
        ld(together * lanes) {}

  int64_t patches() const { return args.batch * rows * columns; }

  void plan(Arena& arena) {
    weight.plan(arena, args.c, inputs);
    position = arena.take<float>(m * args.c);
  }
  void plan(Arena& arena, Scratch& s) const {
    s.field = arena.take<float>(args.channels * field_h * field_row);
    s.taps = arena.take<float>(round_up(inputs, 2) * lanes);
    s.y = arena.take<float>(output_rows(args.c) * ld);
    s.a = arena.take<Element>(G::operand_rows(inputs) * ld);
  }

  int64_t jobs() const { return weight.panels(); }
  void pack(int64_t i) {
    if (i == 0) read_vector(args.position, m * args.c, position);
    weight.pack(i, {args.weight, args.c, {}}, {args.bias, args.c, {}});
  }

  // The patch and what the convolution sees around it: zeros, or the image itself where `legacy`.
  void read_field(int64_t patch, float* field) const {
    const int64_t b = patch / (rows * columns), top = patch / columns % rows * args.patch_h,
                  left = patch % columns * args.patch_w;
    const int64_t from_h = args.legacy ? most(0, pad - top) : pad;
    const int64_t from_w = args.legacy ? most(0, pad - left) : pad;
    const int64_t to_h = args.legacy ? least(field_h, args.height - top + pad) : pad + args.patch_h;
    const int64_t to_w = args.legacy ? least(field_w, args.width - left + pad) : pad + args.patch_w;
    if (args.legacy) memset(field, 0, static_cast<size_t>(args.channels * field_h * field_row) * 4);
    const int64_t* stride = args.strides;
    const In* image = static_cast<const In*>(args.image) + b * stride[0];
    for (int64_t ch = 0; ch < args.channels; ++ch) {
      for (int64_t y = from_h; y < to_h; ++y) {
        const In* row = image + ch * stride[1] + (top + y - pad) * stride[2] + (left - pad) * stride[3];
        float* to = field + (ch * field_h + y) * field_row;
        for (int64_t phase = 0; phase < args.stride; ++phase) {
          int64_t at = phase >= from_w ? 0 : (from_w - phase + args.stride - 1) / args.stride;
          for (int64_t x = at * args.stride + phase; x < to_w; ++at, x += args.stride)
            to[phase * phase_row + at] = load_scalar(row + x * stride[3]);
        }
      }
    }
  }

  // Rows of the operand: the pixel that kernel position (ch, ky, kx) meets, for every word.
  // A row of the field holds its columns by phase (column % stride), so that words are neighbours.
  void read_taps(const float* field, float* taps) const {
    for (int64_t ch = 0; ch < args.channels; ++ch)
      for (int64_t ky = 0; ky < args.kernel; ++ky)
        for (int64_t kx = 0, phase = 0, column = 0; kx < args.kernel; ++kx, taps += lanes) {
          const float* from = field + (ch * field_h + ky) * field_row + phase * phase_row + column;
          for (int64_t y = 0; y < words_h; ++y, from += args.stride * field_row) {
            if (words_w == 4)
              memcpy(taps + y * 4, from, 16);
            else
              for (int64_t x = 0; x < words_w; ++x) taps[y * words_w + x] = from[x];
          }
          if (++phase == args.stride) {
            phase = 0;
            ++column;
          }
        }
  }

  void run(int64_t group, const Scratch& s) const {
    const int64_t first = group * together, count = least(together, patches() - first);
    for (int64_t i = 0; i < count; ++i) {
      read_field(first + i, s.field);
      read_taps(s.field, s.taps);
      for (int64_t k = 0; k < inputs; k += 2)  // taps has a row of zeros behind an odd last one
        for (int64_t at = 0; at < lanes; at += L)
          G::put(s.a + i * lanes + at, ld, k, load(s.taps + k * lanes + at),
                 load(s.taps + (k + 1) * lanes + at));
    }
    G::pad(s.a, ld, inputs);
    G::run(weight, s.a, ld, s.y);
    Out* out = static_cast<Out*>(args.out) + first * m * args.c;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t at = 0; at < lanes; at += L)
        store_words<Out, float>(out + (i * m + at) * args.c, args.c, static_cast<int>(least(L, m - at)),
                                args.c, s.y + i * lanes + at, ld, position + at * args.c, args.c);
  }
};

template <class G, class In, class Out>
bool run_pixel_embed(const PixelEmbedArgs& args) {
  PixelEmbed<G, In, Out> embed(args);
  return parallel_groups<G>(embed, (embed.patches() + embed.together - 1) / embed.together, args.threads);
}

template <class G>
bool pixel_embed_by_dtype(const PixelEmbedArgs& args) {
  if (args.image_dtype == kFloat32)
    return args.out_dtype == kFloat32 ? run_pixel_embed<G, float, float>(args)
                                      : run_pixel_embed<G, float, uint16_t>(args);
  return args.out_dtype == kFloat32 ? run_pixel_embed<G, uint16_t, float>(args)
                                    : run_pixel_embed<G, uint16_t, uint16_t>(args);
}

inline bool pixel_embed(const PixelEmbedArgs& args) {
#if defined(TNT_BF16_GEMM)
  if (args.compute_dtype == kBFloat16) return pixel_embed_by_dtype<Bf16Gemm>(args);
#endif
  return pixel_embed_by_dtype<F32Gemm>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
