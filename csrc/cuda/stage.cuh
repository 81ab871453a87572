// Reads images, as the type that the products take: a patch into shared memory, or a pixel at a time.
#pragma once

#include <type_traits>

#include "numbers.cuh"

namespace tnt {
namespace cuda {

// Eight elements in a row of shared memory, at a multiple of eight.
TNT_DEVICE void store_unit(float* to, const float (&x)[8]) {
  uint4* v = reinterpret_cast<uint4*>(to);
  v[0] = {as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])};
  v[1] = {as_bits(x[4]), as_bits(x[5]), as_bits(x[6]), as_bits(x[7])};
}
template <class T>
TNT_DEVICE void store_unit(T* to, const float (&x)[8]) {
  typedef Numbers<T> N;
  *reinterpret_cast<uint4*>(to) = {N::pair(x[0], x[1]), N::pair(x[2], x[3]), N::pair(x[4], x[5]),
                                   N::pair(x[6], x[7])};
}

// Eight pixels that lie together, aligned to 16 bytes, those of uint8 to 8; as they lie, and as floats.
template <class Image>
struct Unit {
  uint4 bits;

  TNT_DEVICE void load(const Image* from, bool inside) {
    bits = load_stream(reinterpret_cast<const uint4*>(from), inside);
  }
  TNT_DEVICE void unpack(float (&x)[8]) const {
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(Image{static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16)});
  }
};
template <>
struct Unit<float> {
  uint4 low, high;

  TNT_DEVICE void load(const float* from, bool inside) {
    low = load_stream(reinterpret_cast<const uint4*>(from), inside);
    high = load_stream(reinterpret_cast<const uint4*>(from) + 1, inside);
  }
  TNT_DEVICE void unpack(float (&x)[8]) const {
    const uint32_t all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = as_float(all[i]);
  }
};
template <>
struct Unit<uint8_t> {
  uint2 bits;

  TNT_DEVICE void load(const uint8_t* from, bool inside) {
    bits = load_stream(reinterpret_cast<const uint2*>(from), inside);
  }
  TNT_DEVICE void unpack(float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>((i < 4 ? bits.x : bits.y) >> i % 4 * 8 & 0xff);
  }
};

// A pixel of a channel as the convolution takes it.
template <class Image>
TNT_DEVICE float normalized(const PixelEmbed& args, Image pixel, int channel) {
  if constexpr (std::is_same<Image, uint8_t>::value)
    return to_float(pixel) * args.scale[channel] + args.shift[channel];
  return to_float(pixel);
}

// Rows that lie together: whole units, zeros beyond what the patch sees.
template <class Image, class T>
TNT_DEVICE void stage_units(const PixelEmbed& args, const Patches& patches, const Patch& patch, int lane,
                            T* field) {
  const Image* image = static_cast<const Image*>(args.image);
  constexpr int kRounds = (Field::kAllUnits + kLanes - 1) / kLanes;
  Unit<Image> units[kRounds];
  bool inside[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const FieldUnit at(i * kLanes + lane);
    inside[i] = at.number < Field::kAllUnits && patches.sees(patch, at.row, at.column);
    units[i].load(image + patches.offset(patch, at.channel, at.row, at.column), inside[i]);
  }
  __syncwarp();  // nothing is stored before all loads are under way: ptxas would wait for each in turn
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const FieldUnit at(i * kLanes + lane);
    if (at.number >= Field::kAllUnits) continue;
    T* to = field + Field::at(sizeof(T), at.channel, at.row, at.column);
    if constexpr (std::is_same<Image, T>::value && sizeof(T) == 2) {
      *reinterpret_cast<uint4*>(to) = units[i].bits;
    } else {
      float x[8];
      units[i].unpack(x);
      if (std::is_same<Image, uint8_t>::value && inside[i])
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = x[j] * args.scale[at.channel] + args.shift[at.channel];
      store_unit(to, x);
    }
  }
}

// Any strides: pixel by pixel, in the order in which they lie.
template <class Image, class T>
TNT_DEVICE void stage_pixels(const PixelEmbed& args, const Patches& patches, const Patch& patch, int lane,
                             T* field) {
  const Image* image = static_cast<const Image*>(args.image);
  const float zeros[8] = {};
  for (int unit = lane; unit < Field::size(sizeof(T)) / Field::kUnit; unit += kLanes)
    store_unit(field + unit * Field::kUnit, zeros);
  __syncwarp();
  const int before = patches.legacy ? Field::kAbove : 0, side = Field::kPatch + before;
  const bool channels_last = patches.strides[1] < patches.strides[3];
#pragma unroll 4
  for (int i = lane; i < Field::kChannels * side * side; i += kLanes) {
    const int line = i / side, inner = i % side;
    const int channel = channels_last ? i % Field::kChannels : line / side;
    const int column = (channels_last ? i / Field::kChannels % side : inner) - before;
    const int row = (channels_last ? line / Field::kChannels : line % side) - before;
    if (!patches.sees(patch, row, column)) continue;
    const Image pixel = image[patches.offset(patch, channel, row, column)];
    field[Field::at(sizeof(T), channel, row, column)] =
        Numbers<T>::from_float(normalized(args, pixel, channel));
  }
}

template <class Image, class T>
TNT_DEVICE void stage_as(const PixelEmbed& args, const Patches& patches, const Patch& patch, bool units,
                         int lane, T* field) {
  if (units)
    stage_units<Image>(args, patches, patch, lane, field);
  else
    stage_pixels<Image>(args, patches, patch, lane, field);
}

// A patch of TNT's own shape into a Field, by one warp. `units`: see can_stage_units.
template <class T>
TNT_DEVICE void stage(const PixelEmbed& args, const Patches& patches, const Patch& patch, bool units,
                      int lane, T* field) {
  if (args.image_type == kFloat32)
    stage_as<float>(args, patches, patch, units, lane, field);
  else if (args.image_type == kBFloat16)
    stage_as<BFloat16>(args, patches, patch, units, lane, field);
  else if (args.image_type == kFloat16)
    stage_as<Float16>(args, patches, patch, units, lane, field);
  else
    stage_as<uint8_t>(args, patches, patch, units, lane, field);
}

// What a word of any patch sees at a tap; zero where there is no such word or tap.
template <class T>
TNT_DEVICE T gather(const PixelEmbed& args, const Patches& patches, const Patch& patch, int word, int tap) {
  if (word >= patches.m || tap >= patches.inputs) return Numbers<T>::from_float(0.0f);
  const Pixel pixel = patches.pixel(patch, word, tap);
  if (!pixel.inside) return Numbers<T>::from_float(0.0f);
  const int64_t at = patches.offset(patch, pixel.channel, pixel.row, pixel.column);
  if (args.image_type != kUint8)
    return Numbers<T>::from_float(load_as_float(args.image, args.image_type, at));
  const uint8_t byte = __ldg(static_cast<const uint8_t*>(args.image) + at);
  return Numbers<T>::from_float(normalized(args, byte, pixel.channel));
}

}  // namespace cuda
}  // namespace tnt
