// What a call needs besides its arguments: checks, and the packed parameters. Host side.
#pragma once

#include "patches.h"

namespace tnt {
namespace cuda {

inline int64_t type_size(int type) { return type == kFloat32 ? 4 : type == kUint8 ? 1 : 2; }

inline bool is_real(int type) { return type == kFloat32 || type == kBFloat16 || type == kFloat16; }

// Sizes that the kernels can count. Patches, words of a patch and taps are counted in 32 bits, the elements
// of images and words in 64.
inline bool is_valid(const PixelEmbed& a) {
  constexpr int64_t kMost = 0x7fffffff;
  if (a.batch < 0 || a.channels < 1 || a.c < 1 || a.kernel < 1 || a.kernel % 2 == 0 || a.patch_h < 1 ||
      a.patch_w < 1 || a.stride < 1 || a.height < 1 || a.width < 1)
    return false;
  if (a.height > kMost / 2 || a.width > kMost / 2 || a.height % a.patch_h != 0 || a.width % a.patch_w != 0)
    return false;
  if (a.legacy && (a.patch_h % a.stride != 0 || a.patch_w % a.stride != 0)) return false;
  const int64_t words = ceil_div(a.patch_h, a.stride) * ceil_div(a.patch_w, a.stride);
  if (a.kernel > 4096 || a.channels > kMost / 64 / a.kernel / a.kernel || a.c > kMost / 64) return false;
  if (a.patch_h > kMost / 64 / a.patch_w || words > kMost / 64 / a.c) return false;
  if (a.height > kMost / a.width) return false;
  const int64_t per_image = (a.height / a.patch_h) * (a.width / a.patch_w);
  if (per_image > kMost || a.batch > kMost / per_image || a.batch * per_image > kMost / ceil_div(words, 16))
    return false;
  return a.image_type >= kFloat32 && a.image_type <= kUint8 && is_real(a.weight_type) &&
         is_real(a.bias_type) && is_real(a.position_type) && is_real(a.out_type) && is_real(a.compute_type) &&
         (a.image_type != kUint8 || a.channels <= kMostByteChannels);
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every eight pixels of a row can be read at once.
inline bool can_stage_units(const PixelEmbed& a) {
  const int64_t size = type_size(a.image_type), unit = a.image_type == kUint8 ? 8 : 16;
  if (reinterpret_cast<uintptr_t>(a.image) % static_cast<uintptr_t>(unit) != 0) return false;
  for (int i = 0; i < 3; ++i)
    if (a.image_strides[i] * size % unit != 0) return false;
  return a.image_strides[3] == 1;
}

inline int depth(int compute_type) { return compute_type == kFloat32 ? 8 : 16; }

constexpr int kPassTiles = 4;  // column tiles that the kernels of any shape take at a time

// The weight as fragments b of the products, [steps, tiles, lanes], and the bias and position of each word
// as fragments d, [word_tiles, tiles, lanes].
struct Packing {
  bool field;  // the inner dimension is that of Field; otherwise the taps in order
  int steps, tiles, word_tiles;

  int64_t weights() const { return int64_t{steps} * tiles * 32; }
  int64_t words() const { return int64_t{word_tiles} * tiles * 32; }
  int64_t bytes() const { return weights() * 8 + words() * 16; }
};

// Tiles that a kernel of TNT's own shape is compiled for, or 0: 16, 24, 40 and 48 channels.
inline int field_tiles(int64_t c) {
  if (c % 4 != 0 || c > 48) return 0;
  return c <= 16 ? 2 : c <= 24 ? 3 : c <= 40 ? 5 : 6;
}

inline Packing packing(const PixelEmbed& a, bool field) {
  const Patches patches(a);
  const int inner = field ? Field::kWindowRows * 8 : patches.inputs;
  return {field, static_cast<int>(ceil_div(inner, depth(a.compute_type))),
          field ? field_tiles(a.c) : static_cast<int>(ceil_div(a.c, 8 * kPassTiles)) * kPassTiles,
          static_cast<int>(ceil_div(patches.m, 16))};
}

inline bool can_use_field(const PixelEmbed& a) { return Field::fits(Patches(a)) && field_tiles(a.c) != 0; }

}  // namespace cuda
}  // namespace tnt
