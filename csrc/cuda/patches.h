// Patches of an image and their words, as the convolution of pixel_embed sees them. Host and device alike:
// tests/cuda runs this arithmetic on a CPU.
#pragma once

#include "pixel_embed.h"

#if defined(__CUDACC__)
#define TNT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TNT_HOST_DEVICE inline
#endif

namespace tnt {
namespace cuda {

TNT_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a patch lies.
struct Patch {
  int image;  // number in the batch
  int top, left;
};

// What a word sees at a tap, a kernel position (channel, ky, kx): an element of its image, or a zero.
struct Pixel {
  int channel, row, column;
  bool inside;
};

struct Patches {
  int64_t strides[4];             // elements: batch, channel, row, column
  int columns, per_image, total;  // patches across an image, of it, and in all
  int channels, height, width, kernel, pad, patch_h, patch_w, stride;
  int words_w, m;  // words across a patch, and in all
  int inputs;      // channels * kernel * kernel
  bool legacy;

  // Of arguments that are valid (plan.h): the counts fit.
  explicit Patches(const PixelEmbed& a)
      : strides{a.image_strides[0], a.image_strides[1], a.image_strides[2], a.image_strides[3]},
        columns(static_cast<int>(a.width / a.patch_w)),
        per_image(static_cast<int>(a.height / a.patch_h) * columns),
        total(static_cast<int>(a.batch) * per_image),
        channels(static_cast<int>(a.channels)),
        height(static_cast<int>(a.height)),
        width(static_cast<int>(a.width)),
        kernel(a.kernel),
        pad(a.kernel / 2),
        patch_h(a.patch_h),
        patch_w(a.patch_w),
        stride(a.stride),
        words_w(static_cast<int>(ceil_div(a.patch_w, a.stride))),
        m(static_cast<int>(ceil_div(a.patch_h, a.stride)) * words_w),
        inputs(static_cast<int>(a.channels) * a.kernel * a.kernel),
        legacy(a.legacy) {}

  TNT_HOST_DEVICE Patch at(int patch) const {
    const int image = patch / per_image, place = patch - image * per_image, row = place / columns;
    return {image, row * patch_h, (place - row * columns) * patch_w};
  }

  // Whether the convolution of a patch sees a pixel; row and column count from the patch's corner.
  TNT_HOST_DEVICE bool sees(const Patch& patch, int row, int column) const {
    if (!legacy) return row >= 0 && row < patch_h && column >= 0 && column < patch_w;
    const int y = patch.top + row, x = patch.left + column;
    return y >= 0 && y < height && x >= 0 && x < width;
  }

  TNT_HOST_DEVICE Pixel pixel(const Patch& patch, int word, int tap) const {
    const int channel = tap / (kernel * kernel), ky = tap / kernel % kernel, kx = tap % kernel;
    const int row = word / words_w * stride + ky - pad, column = word % words_w * stride + kx - pad;
    return {channel, row, column, sees(patch, row, column)};
  }

  // Elements from the image's start; row and column count from the patch's corner.
  TNT_HOST_DEVICE int64_t offset(const Patch& patch, int channel, int row, int column) const {
    return patch.image * strides[0] + channel * strides[1] + (patch.top + row) * strides[2] +
           (patch.left + column) * strides[3];
  }
};

// TNT's own shape: 3 channels, patches of 16 x 16, a kernel of 7 x 7, stride 4. A patch is staged in shared
// memory, a field, with the rows and columns before it that its words see; behind it they see none. A word's
// window is 8 columns wide, the first of them unused: it starts at an even element, and the 21 rows of a
// window, (channel, ky), are 8 taps of the product each.
struct Field {
  static constexpr int kChannels = 3, kPatch = 16, kKernel = 7, kStride = 4, kWords = 16;
  static constexpr int kAbove = 3, kLeft = 8;  // 8 columns, not 4, so that the patch itself is aligned
  static constexpr int kRows = kAbove + kPatch;
  static constexpr int kUnit = 8;  // columns that are staged together
  static constexpr int kUnits = (kLeft + kPatch) / kUnit, kAllUnits = kChannels * kRows * kUnits;
  static constexpr int kWindowRows = kChannels * kKernel;

  static TNT_HOST_DEVICE bool fits(const Patches& p) {
    return p.channels == kChannels && p.patch_h == kPatch && p.patch_w == kPatch && p.kernel == kKernel &&
           p.stride == kStride;
  }

  // Elements from one row to the next, such that the loads of a fragment meet every bank once.
  static constexpr TNT_HOST_DEVICE int pitch(int element_size) { return element_size == 4 ? 28 : 24; }
  static constexpr TNT_HOST_DEVICE int size(int element_size) {
    return kChannels * kRows * pitch(element_size);
  }

  static TNT_HOST_DEVICE int at(int element_size, int channel, int row, int column) {
    return (channel * kRows + kAbove + row) * pitch(element_size) + kLeft + column;
  }
  // Where a word's window starts, and how far behind it row i of the window lies.
  static TNT_HOST_DEVICE int window(int element_size, int word) {
    return at(element_size, 0, word / 4 * kStride - 3, word % 4 * kStride - 4);
  }
  static constexpr TNT_HOST_DEVICE int window_row(int element_size, int i) {
    return (i / kKernel * kRows + i % kKernel) * pitch(element_size);
  }
  // The tap at place k of the product's inner dimension, or -1 where there is none.
  static TNT_HOST_DEVICE int tap(int k) {
    return k % 8 == 0 || k / 8 >= kWindowRows ? -1 : k / 8 * kKernel + k % 8 - 1;
  }
};

// Eight columns of a field's row.
struct FieldUnit {
  int number, channel, row, column;

  explicit TNT_HOST_DEVICE FieldUnit(int i)
      : number(i),
        channel(i / (Field::kRows * Field::kUnits)),
        row(i / Field::kUnits % Field::kRows - Field::kAbove),
        column(i % Field::kUnits * Field::kUnit - Field::kLeft) {}
};

}  // namespace cuda
}  // namespace tnt
