// Patches of an image and their words, as the convolution of pixel_embed sees them. A patch with its border
// is read into a field, [channels, field_h, phases, phase_row]: the columns of a row lie by phase
// (column % phases). With as many phases as the stride, what neighbouring words see lies side by side; with
// one, what a word sees does.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace tnt {
namespace TNT_TIER {
namespace {

struct Patches {
  const int64_t channels, height, width, kernel, patch_h, patch_w, stride, phases;
  const bool legacy;
  const int64_t pad, rows, columns, per_image;  // padding; patches down, across and in all
  const int64_t words_h, words_w, m;            // words of a patch
  const int64_t field_h, field_w;               // a patch with its border
  const int64_t phase_row, field_row;           // columns of one phase; of all phases
  const int64_t inputs;                         // channels * kernel * kernel
  const int64_t lanes;                          // m rounded up to whole vectors

  Patches(const PixelEmbedArgs& a, int64_t phase_count)
      : channels(a.channels),
        height(a.height),
        width(a.width),
        kernel(a.kernel),
        patch_h(a.patch_h),
        patch_w(a.patch_w),
        stride(a.stride),
        phases(phase_count),
        legacy(a.legacy),
        pad(a.kernel / 2),
        rows(a.height / a.patch_h),
        columns(a.width / a.patch_w),
        per_image(rows * columns),
        words_h((a.patch_h + a.stride - 1) / a.stride),
        words_w((a.patch_w + a.stride - 1) / a.stride),
        m(words_h * words_w),
        field_h(a.patch_h + 2 * pad),
        field_w(a.patch_w + 2 * pad),
        phase_row((field_w + phase_count - 1) / phase_count),
        field_row(phase_row * phase_count),
        inputs(a.channels * a.kernel * a.kernel),
        lanes(round_up(m, L)) {}

  int64_t field_size() const { return channels * field_h * field_row; }
  int64_t image_of(int64_t patch) const { return patch / per_image; }

  // Calls f(channel, row, column, count, at) for every run of pixels of the image that lies together in the
  // field: `count` pixels from (row, column) on, `phases` columns apart, at field[at]. They are those of the
  // patch, and where `legacy` those around it too.
  template <class F>
  TNT_INLINE void for_each_run(int64_t patch, F f) const {
    const int64_t top = patch / columns % rows * patch_h - pad, left = patch % columns * patch_w - pad;
    const int64_t from_h = legacy ? most(0, -top) : pad, from_w = legacy ? most(0, -left) : pad;
    const int64_t to_h = legacy ? least(field_h, height - top) : pad + patch_h;
    const int64_t to_w = legacy ? least(field_w, width - left) : pad + patch_w;
    for (int64_t ch = 0; ch < channels; ++ch) {
      for (int64_t y = from_h; y < to_h; ++y) {
        for (int64_t phase = 0; phase < phases; ++phase) {
          const int64_t first = phase >= from_w ? 0 : (from_w - phase + phases - 1) / phases;
          const int64_t x = first * phases + phase;
          if (x >= to_w) continue;
          f(ch, top + y, left + x, (to_w - x + phases - 1) / phases,
            (ch * field_h + y) * field_row + phase * phase_row + first);
        }
      }
    }
  }

  // The patch and what the convolution sees around it: zeros, or the image itself where `legacy`.
  // `strides` of the image in elements: batch, channel, row, column.
  template <class T>
  TNT_INLINE void read_field(const T* image, const int64_t* strides, int64_t patch, float* field) const {
    if (legacy) memset(field, 0, static_cast<size_t>(field_size()) * 4);
    const T* of_batch = image + image_of(patch) * strides[0];
    for_each_run(patch, [&](int64_t ch, int64_t row, int64_t column, int64_t count, int64_t at) TNT_LAMBDA {
      const T* from = of_batch + ch * strides[1] + row * strides[2] + column * strides[3];
      const int64_t step = phases * strides[3];
      if (step == 1)
        for (int64_t i = 0; i < count; ++i) field[at + i] = load_scalar(from + i);
      else
        for (int64_t i = 0; i < count; ++i) field[at + i] = load_scalar(from + i * step);
    });
  }

  // Calls f(tap, at) for every kernel position (channel, ky, kx): field[at] is the first word's pixel there.
  template <class F>
  TNT_INLINE void for_each_tap(F f) const {
    int64_t tap = 0;
    for (int64_t ch = 0; ch < channels; ++ch)
      for (int64_t ky = 0; ky < kernel; ++ky)
        for (int64_t kx = 0, phase = 0, column = 0; kx < kernel; ++kx, ++tap) {
          f(tap, (ch * field_h + ky) * field_row + phase * phase_row + column);
          if (++phase == phases) {
            phase = 0;
            ++column;
          }
        }
  }

  // taps [inputs, lanes]: the pixel that a kernel position meets, for every word.
  void read_taps(const float* field, float* taps) const {
    for_each_tap([&](int64_t tap, int64_t at) TNT_LAMBDA {
      const float* from = field + at;
      float* to = taps + tap * lanes;
      for (int64_t y = 0; y < words_h; ++y, from += stride * field_row, to += words_w) {
        if (words_w == 4)
          memcpy(to, from, 16);
        else
          for (int64_t x = 0; x < words_w; ++x) to[x] = from[x];
      }
    });
  }

  // The way back, for gradients: adds taps [inputs, ld] to the pixels they came from.
  void add_taps(const float* taps, int64_t ld, float* field) const {
    for_each_tap([&](int64_t tap, int64_t at) TNT_LAMBDA {
      const float* from = taps + tap * ld;
      float* to = field + at;
      for (int64_t y = 0; y < words_h; ++y, to += stride * field_row, from += words_w)
        for (int64_t x = 0; x < words_w; ++x) to[x] += from[x];
    });
  }

  // window [inputs]: what one word sees, from a field of one phase. Reads and writes up to L - 1 elements
  // past the end of both.
  void read_window(const float* field, int64_t word, float* window) const {
    const float* corner = field + word / words_w * stride * field_row + word % words_w * stride;
    for (int64_t ch = 0; ch < channels; ++ch)
      for (int64_t ky = 0; ky < kernel; ++ky, window += kernel) {
        const float* from = corner + (ch * field_h + ky) * field_row;
        for (int64_t kx = 0; kx < kernel; kx += L) store(window + kx, load(from + kx));
      }
  }
};

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
