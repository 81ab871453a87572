// Gradients of the pixel embedding. Those of the parameters are sums over all words: the patches are cut into
// slices, of which each is summed on its own, and the slices' sums are added in order. Their number depends
// on the sizes alone, so the bits are the same on every run and every GPU of an architecture. The gradient of
// a pixel is gathered from the words that see it.
#include "mma.cuh"
#include "plan.h"
#include "stage.cuh"

namespace tnt {
namespace cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;

// A cut of the patches into slices.
struct Slices {
  int count, size;  // slices; patches of each but the last

  Slices(int patches, int most, int multiple) {
    const int least = static_cast<int>(ceil_div(ceil_div(patches, most), multiple)) * multiple;
    size = least;
    count = static_cast<int>(ceil_div(patches, size));
  }
  TNT_HOST_DEVICE int begin(int slice) const { return slice * size; }
  TNT_HOST_DEVICE int end(int slice, int patches) const {
    return patches - slice * size < size ? patches : slice * size + size;
  }
};

// sums[slice, i] = sum over the slice's patches of grad[patch, i], i < m * c.
__global__ void __launch_bounds__(kThreads) sum_words_kernel(const void* grad, int type, int size, int total,
                                                             Slices slices, int blocks_across, float* sums) {
  const int slice = static_cast<int>(blockIdx.x) / blocks_across;
  const int i = static_cast<int>(blockIdx.x) % blocks_across * kThreads + static_cast<int>(threadIdx.x);
  if (i >= size) return;
  float sum = 0;
  const int end = slices.end(slice, total);
#pragma unroll 8
  for (int patch = slices.begin(slice); patch < end; ++patch)
    sum += load_as_float(grad, type, int64_t{patch} * size + i);
  sums[int64_t{slice} * size + i] = sum;
}

// out[i] = sum over the rows of from[row, i], i < size. A column is summed by 8 threads, 8 rows apart.
constexpr int kParts = 8;
__global__ void __launch_bounds__(kParts* kLanes)
    add_rows_kernel(const float* from, int rows, int64_t size, float* out) {
  float* parts = reinterpret_cast<float*>(shared_memory());  // [kParts, kLanes]
  const int lane = threadIdx.x % kLanes, part = threadIdx.x / kLanes;
  const int64_t i = int64_t{blockIdx.x} * kLanes + lane;
  float sum = 0;
  if (i < size)
#pragma unroll 8
    for (int row = part; row < rows; row += kParts) sum += from[row * size + i];
  parts[part * kLanes + lane] = sum;
  __syncthreads();
  if (part != 0 || i >= size) return;
  for (int other = 1; other < kParts; ++other) sum += parts[other * kLanes + lane];
  out[i] = sum;
}

// Rows of the product of a weight's gradient are taps, its inner dimension is words, its columns are
// channels. TNT's own shape: a block's warps stage a patch each and the gradient of its words, then every
// warp takes all of these patches and a share of the taps.
constexpr int kTapTiles = (Field::kWindowRows * 8 + kRows - 1) / kRows;  // 11
constexpr int kTilesOfWarp = (kTapTiles + kWarps - 1) / kWarps;          // 3

template <class T, int kTiles>
struct GradientShape {
  typedef typename Mma<T>::Element Element;
  static constexpr int kField = Field::size(sizeof(Element));
  static constexpr int kPitch = kTiles * kColumns + 4;  // of a word's gradient: no bank is met twice
  static constexpr int kPatch = kField + kRows * kPitch;
  static constexpr int kBytes = kWarps * kPatch * static_cast<int>(sizeof(Element));
};

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, Mma<T>::kDepth == 16 && kTiles <= 3 ? 3 : 2)
    weight_gradient_kernel(const PixelEmbed args, const Patches patches, const void* grad, int grad_type,
                           bool units, Slices slices, float* sums) {
  typedef GradientShape<T, kTiles> Shape;
  typedef typename Shape::Element Element;
  constexpr int kSize = sizeof(Element);
  Element* shared = reinterpret_cast<Element*>(shared_memory());
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, c = static_cast<int>(args.c);
  const int slice = static_cast<int>(blockIdx.x), end = slices.end(slice, patches.total);

  float products[kTilesOfWarp][kTiles][4] = {};
  for (int first = slices.begin(slice); first < end; first += kWarps) {
    if (first + warp < end) {
      Element* mine = shared + warp * Shape::kPatch;
      stage(args, patches, patches.at(first + warp), units, lane, mine);
      for (int i = lane * 4; i < kRows * c; i += kLanes * 4) {
        const float4 four = load_four(grad, grad_type, int64_t{first + warp} * kRows * c + i);
        Element* to = mine + Shape::kField + i / c * Shape::kPitch + i % c;
        to[0] = Numbers<Element>::from_float(four.x);
        to[1] = Numbers<Element>::from_float(four.y);
        to[2] = Numbers<Element>::from_float(four.z);
        to[3] = Numbers<Element>::from_float(four.w);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int p = 0; p < kWarps && first + p < end; ++p) {
      const Element *field = shared + p * Shape::kPatch, *words = field + Shape::kField;
#pragma unroll 1
      for (int word = 0; word < kRows; word += Mma<T>::kDepth) {
        uint2 b[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          b[tile] = Mma<T>::pack_b(lane, [&](int k, int column) {
            return words[(word + k) * Shape::kPitch + tile * kColumns + column];
          });
#pragma unroll
        for (int i = 0; i < kTilesOfWarp; ++i) {
          const auto a = Mma<T>::make_a(lane, [&](int row, int k) {
            const int window_row = 2 * (warp + i * kWarps) + row / 8;
            const int last = Field::kWindowRows - 1;  // rows behind it go to no tap
            return field[Field::window(kSize, word + k) +
                         Field::window_row(kSize, window_row < last ? window_row : last) + row % 8];
          });
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            Mma<T>::multiply(products[i][tile], a, Mma<T>::unpack_b(b[tile]));
        }
      }
    }
    __syncthreads();
  }

  float* out = sums + int64_t{slice} * c * patches.inputs;
#pragma unroll
  for (int i = 0; i < kTilesOfWarp; ++i)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Place place = place_in_d(lane, j);
        const int tap = Field::tap((warp + i * kWarps) * kRows + place.row);
        const int channel = tile * kColumns + place.column;
        if (tap >= 0 && channel < c) out[int64_t{channel} * patches.inputs + tap] = products[i][tile][j];
      }
}

// Any shape: one warp takes 16 taps, 32 channels and a slice of the patches.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    weight_gradient_any_kernel(const PixelEmbed args, const Patches patches, const void* grad, int grad_type,
                               Slices slices, int tap_tiles, int passes, float* sums) {
  typedef typename Mma<T>::Element Element;
  const int lane = threadIdx.x % kLanes, c = static_cast<int>(args.c);
  const int job = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / kLanes);
  const int tap_tile = job % tap_tiles, pass = job / tap_tiles % passes, slice = job / tap_tiles / passes;
  if (slice >= slices.count) return;

  float products[kPassTiles][4] = {};
  const int end = slices.end(slice, patches.total);
  for (int number = slices.begin(slice); number < end; ++number) {
    const Patch patch = patches.at(number);
    for (int word = 0; word < patches.m; word += Mma<T>::kDepth) {
      const auto a = Mma<T>::make_a(lane, [&](int row, int k) {
        return gather<Element>(args, patches, patch, word + k, tap_tile * kRows + row);
      });
#pragma unroll
      for (int tile = 0; tile < kPassTiles; ++tile) {
        const uint2 b = Mma<T>::pack_b(lane, [&](int k, int column) {
          const int channel = (pass * kPassTiles + tile) * kColumns + column;
          if (word + k >= patches.m || channel >= c) return Numbers<Element>::from_float(0.0f);
          const int64_t at = (int64_t{number} * patches.m + word + k) * c + channel;
          return Numbers<Element>::from_float(load_as_float(grad, grad_type, at));
        });
        Mma<T>::multiply(products[tile], a, Mma<T>::unpack_b(b));
      }
    }
  }

  float* out = sums + int64_t{slice} * c * patches.inputs;
#pragma unroll
  for (int tile = 0; tile < kPassTiles; ++tile)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Place place = place_in_d(lane, j);
      const int tap = tap_tile * kRows + place.row;
      const int channel = (pass * kPassTiles + tile) * kColumns + place.column;
      if (tap < patches.inputs && channel < c)
        out[int64_t{channel} * patches.inputs + tap] = products[tile][j];
    }
}

// turned[tap, channel], rows padded with zeros to a multiple of four channels.
__global__ void __launch_bounds__(kThreads)
    turn_weight_kernel(const void* weight, int type, int inputs, int c, int pitch, float* turned) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= int64_t{inputs} * pitch) return;
  const int64_t tap = i / pitch, channel = i % pitch;
  turned[i] = channel < c ? load_as_float(weight, type, channel * inputs + tap) : 0.0f;
}

// The words down or across an image (or a patch, which is then `words` long) whose kernels reach a pixel.
struct Reach {
  int first, last;

  TNT_HOST_DEVICE Reach(int pixel, int words, int kernel, int stride) {
    const int before = pixel + kernel / 2;
    first = before < kernel ? 0 : (before - kernel) / stride + 1;
    last = before / stride < words ? before / stride : words - 1;
  }
};

// One thread a pixel of a channel.
__global__ void __launch_bounds__(kThreads, 8)
    image_gradient_kernel(const Patches patches, const void* grad, int grad_type, bool fours, int c,
                          int pitch, const float* weight, void* out, int out_type, int blocks_of_plane) {
  const int plane = static_cast<int>(blockIdx.x) / blocks_of_plane;  // image, channel
  const int64_t pixel = int64_t{static_cast<int>(blockIdx.x) % blocks_of_plane} * kThreads + threadIdx.x;
  const int size = patches.height * patches.width;
  if (pixel >= size) return;
  const int image = plane / patches.channels, channel = plane % patches.channels;
  const int y = static_cast<int>(pixel) / patches.width, x = static_cast<int>(pixel) % patches.width;
  const int words_h = patches.m / patches.words_w, words_w = patches.words_w;
  const int top = y / patches.patch_h * patches.patch_h, left = x / patches.patch_w * patches.patch_w;

  // Words are counted from the patch's corner, or, where they see the whole image, from the image's.
  const int from_y = patches.legacy ? 0 : top, from_x = patches.legacy ? 0 : left;
  const int down = patches.legacy ? patches.height / patches.stride : words_h;
  const int across = patches.legacy ? patches.width / patches.stride : words_w;
  const Reach rows(y - from_y, down, patches.kernel, patches.stride);
  const Reach columns(x - from_x, across, patches.kernel, patches.stride);
  const int first_row = from_y / patches.patch_h * words_h, first_column = from_x / patches.patch_w * words_w;

  float sum = 0;
  for (int row = rows.first; row <= rows.last; ++row)
    for (int column = columns.first; column <= columns.last; ++column) {
      const int ky = y - from_y - row * patches.stride + patches.pad;
      const int kx = x - from_x - column * patches.stride + patches.pad;
      const int word_y = first_row + row, word_x = first_column + column;
      const int patch = image * patches.per_image + word_y / words_h * patches.columns + word_x / words_w;
      const int word = word_y % words_h * words_w + word_x % words_w;
      const int64_t at = (int64_t{patch} * patches.m + word) * c;
      const float* factors =
          weight + ((int64_t{channel} * patches.kernel + ky) * patches.kernel + kx) * pitch;
      if (fours)
        for (int i = 0; i < c; i += 4) {
          const float4 g = load_four(grad, grad_type, at + i);
          const float4 w = __ldg(reinterpret_cast<const float4*>(factors + i));
          sum += g.x * w.x + g.y * w.y + g.z * w.z + g.w * w.w;
        }
      else
        for (int i = 0; i < c; ++i) sum += load_as_float(grad, grad_type, at + i) * __ldg(factors + i);
    }
  store_float(out, out_type, int64_t{plane} * size + pixel, sum);
}

// What lies in the workspace: sums of slices, and the turned weight.
struct Layout {
  bool field;
  int tap_tiles, passes;  // of the kernel of any shape
  Slices of_words, of_weight;
  int64_t words, weight;  // elements of one slice
  int64_t sums_at, weight_at, turned_at, bytes;
  int pitch;

  Layout(const PixelEmbed& a, const PixelEmbedGradients& g, const Patches& p)
      : field(can_use_field(a) && is_aligned(g.grad)),
        tap_tiles(static_cast<int>(ceil_div(p.inputs, kRows))),
        passes(static_cast<int>(ceil_div(a.c, kPassTiles * kColumns))),
        of_words(p.total, 256, 1),
        of_weight(p.total, field ? 528 : most_slices(), field ? kWarps : 1),
        words(p.m * a.c),
        weight(a.c * p.inputs),
        pitch(static_cast<int>(ceil_div(a.c, 4)) * 4) {
    int64_t at = 0;
    const auto take = [&](bool wanted, int64_t elements) {
      const int64_t start = at;
      if (wanted) at += ceil_div(elements * 4, 16) * 16;
      return start;
    };
    const bool wants_words = g.bias != nullptr || g.position != nullptr;
    take(wants_words, words * of_words.count);
    sums_at = take(wants_words, words);
    weight_at = take(g.weight != nullptr, weight * of_weight.count);
    turned_at = take(g.image != nullptr, int64_t{p.inputs} * pitch);
    bytes = at;
  }

  int most_slices() const {
    const int64_t jobs = int64_t{tap_tiles} * passes;
    return jobs >= 4096 ? 1 : jobs <= 16 ? 256 : static_cast<int>(4096 / jobs);
  }
  float* at(void* workspace, int64_t byte) const {
    return reinterpret_cast<float*>(static_cast<char*>(workspace) + byte);
  }
};

int launch_add(const float* from, int rows, int64_t size, float* out, void* stream) {
  return launch(add_rows_kernel, ceil_div(size, kLanes), kParts * kLanes, kParts * kLanes * 4, stream, from,
                rows, size, out);
}

int sum_words(const PixelEmbed& args, const PixelEmbedGradients& g, const Patches& patches,
              const Layout& layout, void* workspace, void* stream) {
  float* slices = layout.at(workspace, 0);
  float* sums = g.position != nullptr ? g.position : layout.at(workspace, layout.sums_at);
  const int64_t across = ceil_div(layout.words, kThreads);
  int error = launch(sum_words_kernel, across * layout.of_words.count, kThreads, 0, stream, g.grad,
                     g.grad_type, static_cast<int>(layout.words), patches.total, layout.of_words,
                     static_cast<int>(across), slices);
  if (error == 0) error = launch_add(slices, layout.of_words.count, layout.words, sums, stream);
  if (error == 0 && g.bias != nullptr) error = launch_add(sums, patches.m, args.c, g.bias, stream);
  return error;
}

template <class T, int kTiles>
int launch_weight_gradient(const PixelEmbed& args, const PixelEmbedGradients& g, const Patches& patches,
                           const Layout& layout, float* sums, void* stream) {
  return launch(weight_gradient_kernel<T, kTiles>, layout.of_weight.count, kThreads,
                GradientShape<T, kTiles>::kBytes, stream, args, patches, g.grad, g.grad_type,
                can_stage_units(args), layout.of_weight, sums);
}

template <class T>
int weight_gradient(const PixelEmbed& args, const PixelEmbedGradients& g, const Patches& patches,
                    const Layout& layout, void* workspace, void* stream) {
  float* sums = layout.at(workspace, layout.weight_at);
  const int tiles = field_tiles(args.c);
  int error;
  if (!layout.field)
    error = launch(weight_gradient_any_kernel<T>,
                   ceil_div(int64_t{layout.of_weight.count} * layout.tap_tiles * layout.passes, kWarps),
                   kThreads, 0, stream, args, patches, g.grad, g.grad_type, layout.of_weight,
                   layout.tap_tiles, layout.passes, sums);
  else if (tiles == 2)
    error = launch_weight_gradient<T, 2>(args, g, patches, layout, sums, stream);
  else if (tiles == 3)
    error = launch_weight_gradient<T, 3>(args, g, patches, layout, sums, stream);
  else if (tiles == 5)
    error = launch_weight_gradient<T, 5>(args, g, patches, layout, sums, stream);
  else
    error = launch_weight_gradient<T, 6>(args, g, patches, layout, sums, stream);
  return error != 0 ? error : launch_add(sums, layout.of_weight.count, layout.weight, g.weight, stream);
}

int weight_gradient_of_type(const PixelEmbed& args, const PixelEmbedGradients& g, const Patches& patches,
                            const Layout& layout, void* workspace, void* stream) {
  if (args.compute_type == kBFloat16)
    return weight_gradient<BFloat16>(args, g, patches, layout, workspace, stream);
  if (args.compute_type == kFloat16)
    return weight_gradient<Float16>(args, g, patches, layout, workspace, stream);
  if (args.allow_tf32) return weight_gradient<Tf32>(args, g, patches, layout, workspace, stream);
  return weight_gradient<Exact>(args, g, patches, layout, workspace, stream);
}

int image_gradient(const PixelEmbed& args, const PixelEmbedGradients& g, const Patches& patches,
                   const Layout& layout, void* workspace, void* stream) {
  float* turned = layout.at(workspace, layout.turned_at);
  const int c = static_cast<int>(args.c);
  const int error =
      launch(turn_weight_kernel, ceil_div(int64_t{patches.inputs} * layout.pitch, kThreads), kThreads, 0,
             stream, args.weight, args.weight_type, patches.inputs, c, layout.pitch, turned);
  if (error != 0) return error;
  const int64_t blocks = ceil_div(args.height * args.width, kThreads);
  return launch(image_gradient_kernel, args.batch * args.channels * blocks, kThreads, 0, stream, patches,
                g.grad, g.grad_type, c % 4 == 0 && is_aligned(g.grad), c, layout.pitch, turned, g.image,
                g.image_type, static_cast<int>(blocks));
}

bool is_valid(const PixelEmbed& args, const PixelEmbedGradients& g) {
  return cuda::is_valid(args) && is_real(g.grad_type) &&
         (g.image == nullptr || (is_real(args.image_type) && is_real(g.image_type)));
}

}  // namespace

int64_t pixel_embed_backward_workspace(const PixelEmbed& args, const PixelEmbedGradients& gradients) {
  if (!is_valid(args, gradients) || args.batch == 0) return 0;
  return Layout(args, gradients, Patches(args)).bytes;
}

int pixel_embed_backward(const PixelEmbed& args, const PixelEmbedGradients& g, void* workspace,
                         void* stream) {
  if (!is_valid(args, g)) return cudaErrorInvalidValue;
  const Patches patches(args);
  const int64_t m = patches.m;
  if (args.batch == 0) {  // sums over no words
    int error = 0;
    if (g.weight != nullptr) error = launch_add(nullptr, 0, args.c * patches.inputs, g.weight, stream);
    if (error == 0 && g.bias != nullptr) error = launch_add(nullptr, 0, args.c, g.bias, stream);
    if (error == 0 && g.position != nullptr) error = launch_add(nullptr, 0, m * args.c, g.position, stream);
    return error;
  }
  const Layout layout(args, g, patches);
  int error = 0;
  if (g.bias != nullptr || g.position != nullptr)
    error = sum_words(args, g, patches, layout, workspace, stream);
  if (error == 0 && g.weight != nullptr)
    error = weight_gradient_of_type(args, g, patches, layout, workspace, stream);
  if (error == 0 && g.image != nullptr) error = image_gradient(args, g, patches, layout, workspace, stream);
  return error;
}

}  // namespace cuda
}  // namespace tnt
