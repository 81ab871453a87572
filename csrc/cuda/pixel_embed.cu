// Pixel embedding. One warp takes two patches of TNT's own shape, or 16 words of a patch of any shape: words
// are the rows of the products, taps their inner dimension, channels their columns.
#include "mma.cuh"
#include "plan.h"
#include "stage.cuh"

namespace tnt {
namespace cuda {
namespace {

constexpr int kWarps = 4;  // per block; they share nothing

// Packed parameters: the operands b of all products, and what their sums start from.
struct Packed {
  const uint2* weight;  // [steps, tiles, lanes]
  const float4* words;  // [word_tiles, tiles, lanes]
};

Packed packed_in(void* workspace, const Packing& packing) {
  float4* words = static_cast<float4*>(workspace);
  return {reinterpret_cast<uint2*>(words + packing.words()), words};
}

template <class T>
__global__ void __launch_bounds__(128) pack_kernel(const PixelEmbed args, const Patches patches,
                                                   const Packing packing, uint2* weight, float4* words) {
  typedef Numbers<typename Mma<T>::Element> N;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(i % kLanes), c = static_cast<int>(args.c);
  const int tile = static_cast<int>(i / kLanes % packing.tiles);
  const int64_t step = i / kLanes / packing.tiles;
  if (step < packing.steps)
    weight[i] = Mma<T>::pack_b(lane, [&](int k, int column) {
      const int place = static_cast<int>(step) * Mma<T>::kDepth + k, channel = tile * kColumns + column;
      const int tap = packing.field ? Field::tap(place) : place < patches.inputs ? place : -1;
      if (tap < 0 || channel >= c) return N::from_float(0.0f);
      const int64_t at = int64_t{channel} * patches.inputs + tap;
      return N::from_float(load_as_float(args.weight, args.weight_type, at));
    });
  if (step >= packing.word_tiles) return;
  float start[4];
  for (int j = 0; j < 4; ++j) {
    const Place place = place_in_d(lane, j);
    const int64_t word = step * kRows + place.row;
    const int channel = tile * kColumns + place.column;
    const bool real = word < patches.m && channel < c;
    start[j] = real && args.bias != nullptr ? load_as_float(args.bias, args.bias_type, channel) : 0.0f;
    if (real && args.position != nullptr)
      start[j] += load_as_float(args.position, args.position_type, word * c + channel);
  }
  words[i] = {start[0], start[1], start[2], start[3]};
}

// Fragments a of a product, straight from a field: `window` is where the window of this lane's first word
// starts, plus the lane's own columns; that of its second word lies 8 rows below. The unused first column of
// a window is masked: what lies there may be infinite.
template <class T>
struct FieldOperand {
  static constexpr int kSize = 2, kSteps = (Field::kWindowRows + 1) / 2;

  static TNT_DEVICE typename Mma<T>::A load(const T* window, int step, int lane) {
    const uint32_t mask = lane % 4 == 0 ? 0xffff0000u : ~0u;
    typename Mma<T>::A a{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * step + i / 2;
      if (row >= Field::kWindowRows) continue;
      const T* at = window + Field::window_row(kSize, row) + i % 2 * 8 * Field::pitch(kSize);
      a.r[i] = *reinterpret_cast<const uint32_t*>(at) & mask;
    }
    return a;
  }
  static TNT_DEVICE int first_column(int lane) { return lane % 4 * 2; }
};

template <bool kOnce>
struct FieldOperand32 {
  static constexpr int kSize = 4, kSteps = Field::kWindowRows;

  static TNT_DEVICE typename Mma32<kOnce>::A load(const float* window, int step, int lane) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = window[Field::window_row(kSize, step) + i % 2 * 8 * Field::pitch(kSize) + i / 2 * 4];
    if (lane % 4 == 0) x[0] = x[1] = 0.0f;
    return Mma32<kOnce>::split(x);
  }
  static TNT_DEVICE int first_column(int lane) { return lane % 4; }
};
template <>
struct FieldOperand<Exact> : FieldOperand32<false> {};
template <>
struct FieldOperand<Tf32> : FieldOperand32<true> {};

// Two neighbouring channels of a word.
TNT_DEVICE void put_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = {x, y}; }
template <class T>
TNT_DEVICE void put_pair(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = Numbers<T>::pair(x, y);
}

// The words of `count` patches leave through shared memory, so that whole lines are written.
template <class Out, int kPatches, int kTiles>
TNT_DEVICE void write_words(const float (&sums)[kPatches][kTiles][4], void* out, int first, int count, int c,
                            int lane, uint4* scratch) {
  Out* words = reinterpret_cast<Out*>(scratch);
  __syncwarp();
#pragma unroll
  for (int p = 0; p < kPatches; ++p)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const Place place = place_in_d(lane, i);
        const int channel = tile * kColumns + place.column;
        if (channel < c)
          put_pair(words + (p * kRows + place.row) * c + channel, sums[p][tile][i], sums[p][tile][i + 1]);
      }
  __syncwarp();
  const int size = kRows * c * static_cast<int>(sizeof(Out)) / 16;  // of a patch
  uint4* to = static_cast<uint4*>(out) + int64_t{first} * size;
  constexpr int kMost = kPatches * kRows * kTiles * kColumns * static_cast<int>(sizeof(Out)) / 16;
#pragma unroll
  for (int i = lane; i < kMost; i += kLanes)
    if (i < count * size) to[i] = scratch[i];
}

template <class T>
constexpr TNT_HOST_DEVICE int patches_of_a_warp() {
  return sizeof(typename Mma<T>::Element) == 4 ? 1 : 2;
}

// Shared memory: a warp's fields, then the words that it writes.
template <class T>
int64_t field_bytes() {
  return int64_t{patches_of_a_warp<T>()} * Field::size(sizeof(typename Mma<T>::Element)) *
         static_cast<int64_t>(sizeof(typename Mma<T>::Element));
}

// Blocks on a multiprocessor, 0: as many as ptxas thinks best, which for 16-bit operands costs it spills.
template <class T, int kTiles>
constexpr TNT_HOST_DEVICE int blocks_at_a_time() {
  return Mma<T>::kDepth != 16 ? 0 : kTiles <= 3 ? 4 : 3;
}

template <class T, int kTiles>
__global__ void __launch_bounds__(kWarps* kLanes, blocks_at_a_time<T, kTiles>())
    pixel_embed_kernel(const PixelEmbed args, const Patches patches, const Packed packed, bool units,
                       int warp_bytes) {
  typedef typename Mma<T>::Element Element;
  typedef FieldOperand<T> Operand;
  constexpr int kPatches = patches_of_a_warp<T>();
  constexpr int kField = Field::size(sizeof(Element));

  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, c = static_cast<int>(args.c);
  const int first = (static_cast<int>(blockIdx.x) * kWarps + warp) * kPatches;
  if (first >= patches.total) return;
  const int count = patches.total - first < kPatches ? patches.total - first : kPatches;
  uint4* mine = shared_memory() + warp * (warp_bytes / 16);
  Element* field = reinterpret_cast<Element*>(mine);

#pragma unroll 1
  for (int p = 0; p < kPatches; ++p)
    stage(args, patches, patches.at(first + (p < count ? p : 0)), units, lane, field + p * kField);
  __syncwarp();

  float sums[kPatches][kTiles][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float4 start = __ldg(packed.words + tile * kLanes + lane);
#pragma unroll
    for (int p = 0; p < kPatches; ++p) {
      sums[p][tile][0] = start.x;
      sums[p][tile][1] = start.y;
      sums[p][tile][2] = start.z;
      sums[p][tile][3] = start.w;
    }
  }
  const Element* window = field + Field::window(sizeof(Element), lane / 4) + Operand::first_column(lane);
#pragma unroll Mma < T> ::kInstruction ? Operand::kSteps : 1
  for (int step = 0; step < Operand::kSteps; ++step) {
    typename Mma<T>::A a[kPatches];
#pragma unroll
    for (int p = 0; p < kPatches; ++p) a[p] = Operand::load(window + p * kField, step, lane);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto b = Mma<T>::unpack_b(__ldg(packed.weight + (step * kTiles + tile) * kLanes + lane));
#pragma unroll
      for (int p = 0; p < kPatches; ++p) Mma<T>::multiply(sums[p][tile], a[p], b);
    }
  }

  uint4* scratch = mine + kPatches * kField * sizeof(Element) / 16;
  if (args.out_type == kFloat32)
    write_words<float>(sums, args.out, first, count, c, lane, scratch);
  else if (args.out_type == kBFloat16)
    write_words<BFloat16>(sums, args.out, first, count, c, lane, scratch);
  else
    write_words<Float16>(sums, args.out, first, count, c, lane, scratch);
}

// Any shape: operands are gathered from the image, results stored one by one.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, 6)
    pixel_embed_any_kernel(const PixelEmbed args, const Patches patches, const Packing packing,
                           const Packed packed) {
  const int lane = threadIdx.x % kLanes, c = static_cast<int>(args.c);
  const unsigned job = blockIdx.x * kWarps + threadIdx.x / kLanes;
  const int number = static_cast<int>(job / packing.word_tiles);
  const int word_tile = static_cast<int>(job % packing.word_tiles);
  if (number >= patches.total) return;
  const Patch patch = patches.at(number);

  for (int pass = 0; pass < packing.tiles; pass += kPassTiles) {
    float sums[kPassTiles][4] = {};
#pragma unroll
    for (int tile = 0; tile < kPassTiles; ++tile) {
      const float4 start =
          __ldg(packed.words + (int64_t{word_tile} * packing.tiles + pass + tile) * kLanes + lane);
      sums[tile][0] = start.x;
      sums[tile][1] = start.y;
      sums[tile][2] = start.z;
      sums[tile][3] = start.w;
    }
#pragma unroll 1
    for (int step = 0; step < packing.steps; ++step) {
      const auto a = Mma<T>::make_a(lane, [&](int row, int k) {
        const int word = word_tile * kRows + row, tap = step * Mma<T>::kDepth + k;
        return gather<typename Mma<T>::Element>(args, patches, patch, word, tap);
      });
#pragma unroll
      for (int tile = 0; tile < kPassTiles; ++tile) {
        const int64_t at = (int64_t{step} * packing.tiles + pass + tile) * kLanes + lane;
        Mma<T>::multiply(sums[tile], a, Mma<T>::unpack_b(__ldg(packed.weight + at)));
      }
    }
#pragma unroll
    for (int tile = 0; tile < kPassTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Place place = place_in_d(lane, i);
        const int word = word_tile * kRows + place.row;
        const int channel = (pass + tile) * kColumns + place.column;
        if (word < patches.m && channel < c)
          store_float(args.out, args.out_type, (int64_t{number} * patches.m + word) * c + channel,
                      sums[tile][i]);
      }
  }
}

template <class T>
int launch_pack(const PixelEmbed& args, const Packing& packing, const Packed& packed, void* stream) {
  const int64_t threads = packing.weights() > packing.words() ? packing.weights() : packing.words();
  return launch(pack_kernel<T>, ceil_div(threads, 128), 128, 0, stream, args, Patches(args), packing,
                const_cast<uint2*>(packed.weight), const_cast<float4*>(packed.words));
}

template <class T, int kTiles>
int launch_field(const PixelEmbed& args, const Packed& packed, void* stream) {
  const Patches patches(args);
  const int64_t patches_of_warp = patches_of_a_warp<T>();
  const int64_t warp_bytes = field_bytes<T>() + patches_of_warp * kRows * args.c * type_size(args.out_type);
  return launch(pixel_embed_kernel<T, kTiles>, ceil_div(patches.total, kWarps * patches_of_warp),
                kWarps * kLanes, kWarps * warp_bytes, stream, args, patches, packed, can_stage_units(args),
                static_cast<int>(warp_bytes));
}

template <class T>
int run(const PixelEmbed& args, void* workspace, void* stream) {
  const Packing packing = cuda::packing(args, can_use_field(args) && is_aligned(args.out));
  const Packed packed = packed_in(workspace, packing);
  if (const int error = launch_pack<T>(args, packing, packed, stream)) return error;
  if (!packing.field) {
    const Patches patches(args);
    return launch(pixel_embed_any_kernel<T>, ceil_div(int64_t{patches.total} * packing.word_tiles, kWarps),
                  kWarps * kLanes, 0, stream, args, patches, packing, packed);
  }
  if (packing.tiles == 2) return launch_field<T, 2>(args, packed, stream);
  if (packing.tiles == 3) return launch_field<T, 3>(args, packed, stream);
  if (packing.tiles == 5) return launch_field<T, 5>(args, packed, stream);
  return launch_field<T, 6>(args, packed, stream);
}

}  // namespace

int64_t pixel_embed_workspace(const PixelEmbed& args) {
  if (!is_valid(args)) return 0;
  const int64_t any = packing(args, false).bytes();
  const int64_t field = can_use_field(args) ? packing(args, true).bytes() : 0;
  return any > field ? any : field;
}

int pixel_embed(const PixelEmbed& args, void* workspace, void* stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.batch == 0) return cudaSuccess;
  if (args.compute_type == kBFloat16) return run<BFloat16>(args, workspace, stream);
  if (args.compute_type == kFloat16) return run<Float16>(args, workspace, stream);
  return args.allow_tf32 ? run<Tf32>(args, workspace, stream) : run<Exact>(args, workspace, stream);
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace tnt
