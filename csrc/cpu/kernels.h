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
  Param norm1_weight, norm1_bias;  // [c]
  Param qk_weight, qk_bias;        // [2c, c], [2c]
  Param v_weight, v_bias;          // [c, c], [c]
  Param proj_weight, proj_bias;    // [c, c], [c]
  Param norm2_weight, norm2_bias;  // [c]
  Param fc1_weight, fc1_bias;      // [hidden, c], [hidden]
  Param fc2_weight, fc2_bias;      // [c, hidden], [c]
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

// A kernel returns false when its scratch memory could not be had; nothing has been written then.
struct Kernels {
  bool (*inner_block)(const InnerBlockArgs&);
  bool (*pixel_embed)(const PixelEmbedArgs&);
  bool (*word_to_sentence)(const WordToSentenceArgs&);
  bool (*add_layer_norm)(const AddLayerNormArgs&);
  bool (*outer_attention)(const OuterAttentionArgs&);
};

}  // namespace tnt
