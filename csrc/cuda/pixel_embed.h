// The pixel embedding on a GPU: what the kernels take. Plain C++17: no CUDA, Python or torch header here.
#pragma once

#include <cstdint>

namespace tnt {
namespace cuda {

enum Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUint8 = 3 };

constexpr int kMostByteChannels = 8;  // channels that an image of kUint8 may have

// Convolution of every patch on its own, plus the word position. Pointers are of the device.
struct PixelEmbed {
  const void* image;  // [batch, channels, height, width], any strides
  int image_type;
  int64_t image_strides[4];  // elements: batch, channel, row, column
  int64_t batch, channels, height, width;
  const void* weight;  // [c, channels, kernel, kernel], contiguous
  int weight_type;
  const void* bias;  // [c] or null
  int bias_type;
  const void* position;  // [m, c] or null
  int position_type;
  void* out;  // [batch * n, m, c], contiguous
  int out_type;
  int compute_type;  // of the products' operands; kFloat32: TF32 in three parts, or FMA before sm_80
  bool allow_tf32;   // kFloat32 operands may be rounded to TF32
  int64_t c;
  int kernel, patch_h, patch_w, stride;
  bool legacy;  // the convolution sees the whole image, not the patch alone
  float scale[kMostByteChannels], shift[kMostByteChannels];  // kUint8: pixel * scale + shift is convolved
};

// Gradients of a call; null where not asked for. They are overwritten.
struct PixelEmbedGradients {
  const void* grad;  // [batch * n, m, c], contiguous: gradient of the result
  int grad_type;
  void* image;  // [batch, channels, height, width], contiguous
  int image_type;
  float* weight;    // [c, channels, kernel, kernel]
  float* bias;      // [c]
  float* position;  // [m, c]
};

// All return a cudaError_t (0: success), launch on `stream`, a cudaStream_t, and allocate nothing.
// `workspace` is device memory of as many bytes as the function beside says, aligned to 16.
int64_t pixel_embed_workspace(const PixelEmbed& args);
int pixel_embed(const PixelEmbed& args, void* workspace, void* stream);

int64_t pixel_embed_backward_workspace(const PixelEmbed& args, const PixelEmbedGradients& gradients);
int pixel_embed_backward(const PixelEmbed& args, const PixelEmbedGradients& gradients, void* workspace,
                         void* stream);

const char* error_name(int error);

}  // namespace cuda
}  // namespace tnt
