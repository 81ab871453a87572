// Dropout inside a kernel: whether an element is dropped is a function of a seed and of where it stands, so
// that a backward pass drops the same ones without having been told.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// High and low halves of a * b, lane by lane.
TNT_INLINE void multiply_wide(vu a, uint32_t b, vu& high, vu& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi64(b);
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#else
  typedef uint64_t vd __attribute__((vector_size(8 * L)));
  const vd product = __builtin_convertvector(a, vd) * static_cast<uint64_t>(b);
  low = __builtin_convertvector(product, vu);
  high = __builtin_convertvector(product >> 32, vu);
#endif
}

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words for
// a counter of four and a key of two.
TNT_INLINE void philox(vu (&c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c[0], 0xd2511f53u, high0, low0);
    multiply_wide(c[2], 0xcd9e8d57u, high1, low1);
    c[0] = high1 ^ c[1] ^ splat(key0);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ splat(key1);
    c[3] = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

// Factors of one place of dropout in a block: 0 where an element is dropped, 1 / (1 - rate) elsewhere.
struct DropoutPlace {
  uint32_t place;
  uint32_t key0, key1;
  uint32_t threshold;
  bool active, everything;
  float kept;

  DropoutPlace(uint32_t place, uint64_t seed, double rate)
      : place(place),
        key0(static_cast<uint32_t>(seed)),
        key1(static_cast<uint32_t>(seed >> 32)),
        threshold(rate < 1 ? static_cast<uint32_t>(rate * 4294967296.0) : 0),
        active(rate > 0),
        everything(rate >= 1),
        kept(rate < 1 ? static_cast<float>(1 / (1 - rate)) : 0.0f) {}

  // Channels k to k + 4 (k a multiple of 4) of words [word, word + L) of a sentence, a word per lane. The
  // counter is (k / 4, word, sentence, its high half and the place).
  TNT_INLINE void factors(int64_t sentence, int64_t word, int64_t k, vf (&f)[4]) const {
    vu lane;
    for (int i = 0; i < L; ++i) lane[i] = static_cast<uint32_t>(i);
    vu c[4] = {splat(static_cast<uint32_t>(k / 4)), lane + static_cast<uint32_t>(word),
               splat(static_cast<uint32_t>(sentence)),
               splat(static_cast<uint32_t>(sentence >> 32) * 4 + place)};
    philox(c, key0, key1);
    for (int i = 0; i < 4; ++i)
      f[i] = everything ? splat(0.0f) : c[i] >= splat(threshold) ? splat(kept) : splat(0.0f);
  }

  // to = from with these factors, n rows [n, ld] from channel `first` (a multiple of 4) on, one vector of
  // lanes.
  TNT_INLINE void apply(const float* from, float* to, int64_t ld, int64_t n, int64_t sentence, int64_t word,
                        int64_t first = 0) const {
    for (int64_t k = 0; k < n; k += 4) {
      vf f[4];
      factors(sentence, word, first + k, f);
      for (int i = 0; i < 4; ++i)
        if (k + i < n) store(to + (k + i) * ld, load(from + (k + i) * ld) * f[i]);
    }
  }
};

// Dropout of the probabilities [m, L] of one head for one vector of queries.
struct HeadDropout {
  const DropoutPlace& place;
  int64_t sentence, word, channel;
  float* to;  // [m, L]
};

// The places of an inner block, in the order of its computation. Attention probabilities count as channels,
// those of a head from head * (m rounded up to 4) on.
struct InnerDropout {
  DropoutPlace probabilities, projection, hidden, output;

  explicit InnerDropout(const InnerBlockArgs& a)
      : probabilities(0, a.seed, a.drops[0]),
        projection(1, a.seed, a.drops[1]),
        hidden(2, a.seed, a.drops[2]),
        output(3, a.seed, a.drops[3]) {}
};

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
