// Pixel embedding: every patch is convolved on its own straight from the image, bias and word position
// are added, and the words leave token-major. There is no unfold buffer.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "patches.h"
#include "tokens.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class G, class In, class Out>
struct PixelEmbed {
  typedef typename G::Element Element;
  static constexpr int kGroupsAtATime = 4;

  const PixelEmbedArgs& args;
  const Patches patches;
  const int64_t m, inputs, lanes;
  const int64_t together, ld;  // patches and lanes per group

  Packed<G> weight;
  float* position;  // [m, c]

  struct Scratch {
    float* field;  // a patch with its border
    float* taps;   // [inputs, lanes] one patch's rows of the operand before conversion
    float* y;      // [c, ld]
    Element* a;    // [inputs, ld]
  };

  explicit PixelEmbed(const PixelEmbedArgs& a)
      : args(a),
        patches(a, a.stride),
        m(patches.m),
        inputs(patches.inputs),
        lanes(patches.lanes),
        together(lanes >= 2 * L ? 1 : 2),
        ld(together * lanes) {}

  int64_t total() const { return args.batch * patches.per_image; }

  void plan(Arena& arena) {
    weight.plan(arena, args.c, inputs);
    position = arena.take<float>(m * args.c);
  }
  void plan(Arena& arena, Scratch& s) const {
    s.field = arena.take<float>(patches.field_size());
    s.taps = arena.take<float>(round_up(inputs, 2) * lanes);
    s.y = arena.take<float>(output_rows(args.c) * ld);
    s.a = arena.take<Element>(G::operand_rows(inputs) * ld);
  }

  int64_t jobs() const { return weight.panels(); }
  void pack(int64_t i) {
    if (i == 0) read_vector(args.position, m * args.c, position);
    weight.pack(i, {args.weight, args.c, {}}, {args.bias, args.c, {}});
  }

  void run(int64_t group, const Scratch& s) const {
    const int64_t first = group * together, count = least(together, total() - first);
    for (int64_t i = 0; i < count; ++i) {
      patches.read_field(static_cast<const In*>(args.image), args.strides, first + i, s.field);
      patches.read_taps(s.field, s.taps);
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
  return parallel_groups<G>(embed, (embed.total() + embed.together - 1) / embed.together, args.threads);
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
