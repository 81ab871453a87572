// What the kernels take and what a SIMD tier offers: plain structs of pointers and sizes.
// No Python and no torch header here or in anything below csrc/cpu/.
#pragma once

#include <cstdint>

namespace tnt {

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

// A contiguous parameter tensor; ptr is null where the layer has none.
struct Param {
  const void* ptr;
  DType dtype;
};

enum Parts : int { kAttention = 1, kMlp = 2 };

// y = x + Attn(LN(x)); out = y + MLP(LN(y)); either half alone through `parts`.
struct InnerBlockArgs {
  const void* x;  // [sentences, m, c], contiguous
  void* out;      // [sentences, m, c], contiguous
  DType io_dtype;
  DType compute_dtype;
  int64_t sentences, m, c, hidden, heads;
  int parts;
  float scale, eps1, eps2;
  Param norm1_weight, norm1_bias;        // [c]
  Param qk_weight, qk_bias;              // [2c, c], [2c]
  Param v_weight, v_bias;                // [c, c], [c]
  Param proj_weight, proj_bias;          // [c, c], [c]
  Param norm2_weight, norm2_bias;        // [c]
  Param fc1_weight, fc1_bias;            // [hidden, c], [hidden]
  Param fc2_weight, fc2_bias;            // [c, hidden], [c]
  const float *drop_path1, *drop_path2;  // [sentences] factor of each branch, or null
  uint64_t seed;                         // of dropout
  double drops[4];  // rates of dropout: attention probabilities, proj's output, GELU's output, fc2's output
  int threads;
};

// Convolution of every patch on its own, plus the word position.
struct PixelEmbedArgs {
  const void* image;  // [batch, channels, height, width], any strides
  DType image_dtype;
  int64_t strides[4];  // elements: batch, channel, row, column
  int64_t batch, channels, height, width;
  Param weight;    // [c, channels, kernel, kernel]
  Param bias;      // [c]
  Param position;  // [m, c]
  void* out;       // [batch * n, m, c], contiguous
  DType out_dtype;
  DType compute_dtype;
  int64_t c, kernel, patch_h, patch_w, stride;
  bool legacy;  // the convolution sees the whole image, not the patch alone
  int threads;
};

// out[:, 0] = tokens[:, 0]; out[:, 1:] = tokens[:, 1:] + LN2(Linear(LN1(words))).
struct WordToSentenceArgs {
  const void* words;  // [batch * n, m * c], contiguous
  DType words_dtype;
  const void* tokens;  // [batch, n + 1, d], rows contiguous
  void* out;           // [batch, n + 1, d], contiguous
  DType tokens_dtype;
  int64_t token_batch_stride;  // elements; 0 where one set of tokens serves the whole batch
  int64_t batch, n, in_features, d;
  int64_t norm1_size;              // in_features, or c: every word normalised on its own
  Param norm1_weight, norm1_bias;  // [norm1_size]
  Param weight, bias;              // [d, in_features], [d]
  Param norm2_weight, norm2_bias;  // [d]
  float eps1, eps2;
  DType compute_dtype;
  int threads;
};

// sum = x + y; out = LN(sum).
struct AddLayerNormArgs {
  const void* x;  // [rows, d], contiguous
  const void* y;  // [rows, d], contiguous, or null
  void* sum;      // [rows, d] in x_dtype, or null
  DType x_dtype, y_dtype;
  Param weight, bias;  // [d]
  void* out;           // [rows, d]
  DType out_dtype;
  int64_t rows, d;
  float eps;
  int threads;
};

// softmax(scale * q k^T) v per head; q, k and v stand side by side in qkv.
struct OuterAttentionArgs {
  const void* qkv;  // [batch, n, 3 * heads * head_dim], contiguous
  void* out;        // [batch, n, heads * head_dim], contiguous
  DType io_dtype;
  DType compute_dtype;
  int64_t batch, n, heads, head_dim;
  float scale;
  int threads;
};

// Gradients of a call. A pointer to a gradient is null where it is not asked for; those of parameters are
// float32 whatever the parameter's dtype. Nothing is added to what they point to: it is overwritten.
struct InnerBlockGradientArgs {
  InnerBlockArgs call;  // its `out` is not used
  const void* grad;     // [sentences, m, c] in io_dtype, contiguous: gradient of the result
  void* grad_x;         // [sentences, m, c] in io_dtype
  float* grads[14];     // of norm1_weight ... fc2_bias, in their order in InnerBlockArgs
};

struct PixelEmbedGradientArgs {
  PixelEmbedArgs call;   // its `out` is not used
  const void* grad;      // [batch * n, m, c] in out_dtype, contiguous
  void* grad_image;      // [batch, channels, height, width] in image_dtype, contiguous
  float* grad_weight;    // [c, channels, kernel, kernel]
  float* grad_bias;      // [c]
  float* grad_position;  // [m, c]
};

struct WordToSentenceGradientArgs {
  WordToSentenceArgs call;  // its `out` and `tokens` are not used
  const void* grad;         // [batch, n + 1, d] in tokens_dtype, contiguous; that of the tokens is the same
  void* grad_words;         // [batch * n, m * c] in words_dtype
  float* grads[6];          // of norm1_weight ... norm2_bias
};

struct OuterAttentionGradientArgs {
  OuterAttentionArgs call;
  const void* grad;  // [batch, n, heads * head_dim] in io_dtype, contiguous
  void* grad_qkv;    // [batch, n, 3 * heads * head_dim] in io_dtype, contiguous
};

// grad_x = residual + the gradient of x through out = LN(x); out again where it is not null.
struct LayerNormGradientArgs {
  const void* x;         // [rows, d], contiguous
  const void* residual;  // [rows, d] in x_dtype, contiguous
  const void* grad;      // [rows, d] in grad_dtype, contiguous
  DType x_dtype, grad_dtype;
  Param weight, bias;              // [d]
  void* grad_x;                    // [rows, d] in x_dtype, or null; may be the residual
  void* out;                       // [rows, d] in grad_dtype, or null
  float *grad_weight, *grad_bias;  // [d]
  int64_t rows, d;
  float eps;
  int threads;
};

// grad, of gelu(h), becomes that of h; out = gelu(h) again where it is not null.
struct GeluGradientArgs {
  const void* h;     // [rows, hidden], contiguous
  void* grad;        // [rows, hidden], contiguous
  void* out;         // [rows, hidden], or null
  DType dtype;       // of the three
  float* grad_bias;  // [hidden] sums over the rows of the gradient of h
  int64_t rows, hidden;
  int threads;
};

// A kernel returns false when its scratch memory could not be had; nothing has been written then.
struct Kernels {
  bool (*inner_block)(const InnerBlockArgs&);
  bool (*pixel_embed)(const PixelEmbedArgs&);
  bool (*word_to_sentence)(const WordToSentenceArgs&);
  bool (*add_layer_norm)(const AddLayerNormArgs&);
  bool (*outer_attention)(const OuterAttentionArgs&);
};

struct GradientKernels {
  bool (*inner_block)(const InnerBlockGradientArgs&);
  bool (*pixel_embed)(const PixelEmbedGradientArgs&);
  bool (*word_to_sentence)(const WordToSentenceGradientArgs&);
  bool (*outer_attention)(const OuterAttentionGradientArgs&);
  bool (*layer_norm)(const LayerNormGradientArgs&);
  bool (*gelu)(const GeluGradientArgs&);
};

}  // namespace tnt
