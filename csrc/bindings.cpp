// Python's side of the CPU kernels: checks sizes, releases the GIL, calls the active tier.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using tnt::DType;
using tnt::Param;

DType dtype_of(int code) {
  if (code != tnt::kFloat32 && code != tnt::kBFloat16)
    throw std::invalid_argument("dtype code " + std::to_string(code) +
                                " is neither 0 (float32) nor 1 (bfloat16)");
  return static_cast<DType>(code);
}

const void* address(uintptr_t p) { return reinterpret_cast<const void*>(p); }
void* writable(uintptr_t p) { return reinterpret_cast<void*>(p); }
float* floats(uintptr_t p) { return reinterpret_cast<float*>(p); }

std::vector<Param> params_of(const std::vector<uintptr_t>& pointers, const std::vector<int>& dtypes,
                             size_t count) {
  if (pointers.size() != count || dtypes.size() != count)
    throw std::invalid_argument("got " + std::to_string(pointers.size()) + " parameter pointers and " +
                                std::to_string(dtypes.size()) + " dtypes, need " + std::to_string(count));
  std::vector<Param> params;
  for (size_t i = 0; i < count; ++i) params.push_back({address(pointers[i]), dtype_of(dtypes[i])});
  return params;
}

void need(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

template <class Args>
void call(bool (*kernel)(const Args&), const Args& args) {
  bool done;
  {
    py::gil_scoped_release release;
    done = kernel(args);
  }
  if (!done) throw std::bad_alloc();
}

// Checked sizes and parameters of a call; x, out and compute types as given.
tnt::InnerBlockArgs inner_block_args(uintptr_t x, uintptr_t out, int io_dtype, int compute_dtype,
                                     int64_t sentences, int64_t m, int64_t c, int64_t hidden, int64_t heads,
                                     int parts, float scale, float eps1, float eps2,
                                     const std::vector<uintptr_t>& weights,
                                     const std::vector<int>& weight_dtypes, uintptr_t drop_path1,
                                     uintptr_t drop_path2, uint64_t seed, const std::vector<double>& drops,
                                     int threads) {
  need(parts >= 1 && parts <= 3, "inner_block: parts must be 1 (attention), 2 (mlp) or 3 (both)");
  need(sentences >= 0 && m >= 1 && c >= 1 && threads >= 1,
       "inner_block: sentences >= 0, m, c and threads >= 1 needed");
  const bool attention = parts & tnt::kAttention, mlp = parts & tnt::kMlp;
  need(!attention || (heads >= 1 && c % heads == 0), "inner_block: heads must divide c");
  need(!mlp || hidden >= 1, "inner_block: hidden must be at least 1");
  need(drops.size() == 4, "inner_block: four rates of dropout needed");
  for (double rate : drops) need(rate >= 0 && rate <= 1, "inner_block: rates of dropout must lie in [0, 1]");
  const std::vector<Param> w = params_of(weights, weight_dtypes, 14);
  need(!attention || (w[2].ptr && w[4].ptr && w[6].ptr), "inner_block: qk, v and proj weights are needed");
  need(!mlp || (w[10].ptr && w[12].ptr), "inner_block: fc1 and fc2 weights are needed");
  return {address(x),
          writable(out),
          dtype_of(io_dtype),
          dtype_of(compute_dtype),
          sentences,
          m,
          c,
          hidden,
          heads,
          parts,
          scale,
          eps1,
          eps2,
          w[0],
          w[1],
          w[2],
          w[3],
          w[4],
          w[5],
          w[6],
          w[7],
          w[8],
          w[9],
          w[10],
          w[11],
          w[12],
          w[13],
          static_cast<const float*>(address(drop_path1)),
          static_cast<const float*>(address(drop_path2)),
          seed,
          {drops[0], drops[1], drops[2], drops[3]},
          threads};
}

void inner_block(uintptr_t x, uintptr_t out, int io_dtype, int compute_dtype, int64_t sentences, int64_t m,
                 int64_t c, int64_t hidden, int64_t heads, int parts, float scale, float eps1, float eps2,
                 const std::vector<uintptr_t>& weights, const std::vector<int>& weight_dtypes,
                 uintptr_t drop_path1, uintptr_t drop_path2, uint64_t seed, const std::vector<double>& drops,
                 int threads) {
  const tnt::InnerBlockArgs args =
      inner_block_args(x, out, io_dtype, compute_dtype, sentences, m, c, hidden, heads, parts, scale, eps1,
                       eps2, weights, weight_dtypes, drop_path1, drop_path2, seed, drops, threads);
  if (sentences == 0) return;
  need(x != 0 && out != 0, "inner_block: x and out must not be null");
  call(tnt::active_tier().kernels->inner_block, args);
}

void inner_block_backward(uintptr_t x, uintptr_t grad, uintptr_t grad_x, int io_dtype, int compute_dtype,
                          int64_t sentences, int64_t m, int64_t c, int64_t hidden, int64_t heads, int parts,
                          float scale, float eps1, float eps2, const std::vector<uintptr_t>& weights,
                          const std::vector<int>& weight_dtypes, uintptr_t drop_path1, uintptr_t drop_path2,
                          uint64_t seed, const std::vector<double>& drops,
                          const std::vector<uintptr_t>& grads, int threads) {
  tnt::InnerBlockGradientArgs args = {
      inner_block_args(x, 0, io_dtype, compute_dtype, sentences, m, c, hidden, heads, parts, scale, eps1,
                       eps2, weights, weight_dtypes, drop_path1, drop_path2, seed, drops, threads),
      address(grad),
      writable(grad_x),
      {}};
  need(grads.size() == weights.size(), "inner_block_backward: a gradient, or 0, for each weight needed");
  for (size_t i = 0; i < grads.size(); ++i) {
    need(grads[i] == 0 || weights[i] != 0, "inner_block_backward: gradient of an absent parameter");
    args.grads[i] = floats(grads[i]);
  }
  need(sentences >= 1, "inner_block_backward: sentences >= 1 needed");
  need(x != 0 && grad != 0, "inner_block_backward: x and grad must not be null");
  call(tnt::active_tier().gradients->inner_block, args);
}

tnt::PixelEmbedArgs pixel_embed_args(uintptr_t image, int image_dtype, const std::vector<int64_t>& strides,
                                     int64_t batch, int64_t channels, int64_t height, int64_t width,
                                     uintptr_t weight, uintptr_t bias, uintptr_t position,
                                     const std::vector<int>& param_dtypes, uintptr_t out, int out_dtype,
                                     int compute_dtype, int64_t c, int64_t kernel, int64_t patch_h,
                                     int64_t patch_w, int64_t stride, bool legacy, int threads) {
  need(strides.size() == 4, "pixel_embed: four strides needed");
  need(batch >= 0 && channels >= 1 && height >= 1 && width >= 1 && c >= 1 && threads >= 1,
       "pixel_embed: batch >= 0, channels, height, width, c and threads >= 1 needed");
  need(kernel >= 1 && kernel % 2 == 1, "pixel_embed: kernel must be odd");
  need(stride >= 1 && patch_h >= 1 && patch_w >= 1, "pixel_embed: stride and patch must be at least 1");
  need(height % patch_h == 0 && width % patch_w == 0, "pixel_embed: patch must divide the image");
  need(!legacy || (patch_h % stride == 0 && patch_w % stride == 0),
       "pixel_embed: legacy needs stride to divide patch");
  const std::vector<Param> p = params_of({weight, bias, position}, param_dtypes, 3);
  need(p[0].ptr != nullptr, "pixel_embed: weight is needed");
  need(batch == 0 || image != 0, "pixel_embed: image must not be null");
  return {address(image),
          dtype_of(image_dtype),
          {strides[0], strides[1], strides[2], strides[3]},
          batch,
          channels,
          height,
          width,
          p[0],
          p[1],
          p[2],
          writable(out),
          dtype_of(out_dtype),
          dtype_of(compute_dtype),
          c,
          kernel,
          patch_h,
          patch_w,
          stride,
          legacy,
          threads};
}

void pixel_embed(uintptr_t image, int image_dtype, const std::vector<int64_t>& strides, int64_t batch,
                 int64_t channels, int64_t height, int64_t width, uintptr_t weight, uintptr_t bias,
                 uintptr_t position, const std::vector<int>& param_dtypes, uintptr_t out, int out_dtype,
                 int compute_dtype, int64_t c, int64_t kernel, int64_t patch_h, int64_t patch_w,
                 int64_t stride, bool legacy, int threads) {
  const tnt::PixelEmbedArgs args = pixel_embed_args(
      image, image_dtype, strides, batch, channels, height, width, weight, bias, position, param_dtypes, out,
      out_dtype, compute_dtype, c, kernel, patch_h, patch_w, stride, legacy, threads);
  if (batch == 0) return;
  need(out != 0, "pixel_embed: out must not be null");
  call(tnt::active_tier().kernels->pixel_embed, args);
}

void pixel_embed_backward(uintptr_t grad, int grad_dtype, uintptr_t image, int image_dtype,
                          const std::vector<int64_t>& strides, int64_t batch, int64_t channels,
                          int64_t height, int64_t width, uintptr_t weight, int weight_dtype,
                          uintptr_t grad_image, uintptr_t grad_weight, uintptr_t grad_bias,
                          uintptr_t grad_position, int compute_dtype, int64_t c, int64_t kernel,
                          int64_t patch_h, int64_t patch_w, int64_t stride, bool legacy, int threads) {
  const tnt::PixelEmbedGradientArgs args = {
      pixel_embed_args(image, image_dtype, strides, batch, channels, height, width, weight, 0, 0,
                       {weight_dtype, 0, 0}, 0, grad_dtype, compute_dtype, c, kernel, patch_h, patch_w,
                       stride, legacy, threads),
      address(grad),
      writable(grad_image),
      floats(grad_weight),
      floats(grad_bias),
      floats(grad_position)};
  need(batch == 0 || grad != 0, "pixel_embed_backward: grad must not be null");
  call(tnt::active_tier().gradients->pixel_embed, args);
}

tnt::WordToSentenceArgs word_to_sentence_args(uintptr_t words, int words_dtype, uintptr_t tokens,
                                              uintptr_t out, int tokens_dtype, int64_t token_batch_stride,
                                              int64_t batch, int64_t n, int64_t m, int64_t c, int64_t d,
                                              int64_t norm1_size, const std::vector<uintptr_t>& weights,
                                              const std::vector<int>& weight_dtypes, float eps1, float eps2,
                                              int compute_dtype, int threads) {
  need(batch >= 0 && n >= 1 && m >= 1 && c >= 1 && d >= 1 && threads >= 1,
       "word_to_sentence: batch >= 0, n, m, c, d and threads >= 1 needed");
  need(norm1_size == m * c || norm1_size == c, "word_to_sentence: norm1 must normalise m * c values or c");
  const std::vector<Param> w = params_of(weights, weight_dtypes, 6);
  need(w[2].ptr != nullptr, "word_to_sentence: weight is needed");
  need(batch == 0 || words != 0, "word_to_sentence: words must not be null");
  return {address(words),
          dtype_of(words_dtype),
          address(tokens),
          writable(out),
          dtype_of(tokens_dtype),
          token_batch_stride,
          batch,
          n,
          m * c,
          d,
          norm1_size,
          w[0],
          w[1],
          w[2],
          w[3],
          w[4],
          w[5],
          eps1,
          eps2,
          dtype_of(compute_dtype),
          threads};
}

void word_to_sentence(uintptr_t words, int words_dtype, uintptr_t tokens, uintptr_t out, int tokens_dtype,
                      int64_t token_batch_stride, int64_t batch, int64_t n, int64_t m, int64_t c, int64_t d,
                      int64_t norm1_size, const std::vector<uintptr_t>& weights,
                      const std::vector<int>& weight_dtypes, float eps1, float eps2, int compute_dtype,
                      int threads) {
  const tnt::WordToSentenceArgs args =
      word_to_sentence_args(words, words_dtype, tokens, out, tokens_dtype, token_batch_stride, batch, n, m, c,
                            d, norm1_size, weights, weight_dtypes, eps1, eps2, compute_dtype, threads);
  if (batch == 0) return;
  need(tokens != 0 && out != 0, "word_to_sentence: tokens and out must not be null");
  call(tnt::active_tier().kernels->word_to_sentence, args);
}

void word_to_sentence_backward(uintptr_t grad, int grad_dtype, uintptr_t words, int words_dtype,
                               uintptr_t grad_words, int64_t batch, int64_t n, int64_t m, int64_t c,
                               int64_t d, int64_t norm1_size, const std::vector<uintptr_t>& weights,
                               const std::vector<int>& weight_dtypes, const std::vector<uintptr_t>& grads,
                               float eps1, float eps2, int compute_dtype, int threads) {
  need(grads.size() == 6, "word_to_sentence_backward: six pointers to gradients needed");
  need(batch == 0 || grad != 0, "word_to_sentence_backward: grad must not be null");
  tnt::WordToSentenceGradientArgs args = {
      word_to_sentence_args(words, words_dtype, 0, 0, grad_dtype, 0, batch, n, m, c, d, norm1_size, weights,
                            weight_dtypes, eps1, eps2, compute_dtype, threads),
      address(grad),
      writable(grad_words),
      {}};
  for (size_t i = 0; i < grads.size(); ++i) args.grads[i] = floats(grads[i]);
  need(args.call.norm2_weight.ptr || !(args.grads[4] || args.grads[5]),
       "word_to_sentence_backward: gradients of a norm2 that is absent");
  call(tnt::active_tier().gradients->word_to_sentence, args);
}

void add_layer_norm(uintptr_t x, uintptr_t y, uintptr_t sum, int x_dtype, int y_dtype, uintptr_t weight,
                    uintptr_t bias, int weight_dtype, uintptr_t out, int out_dtype, int64_t rows, int64_t d,
                    float eps, int threads) {
  need(rows >= 0 && d >= 1 && threads >= 1, "add_layer_norm: rows >= 0, d and threads >= 1 needed");
  if (rows == 0) return;
  need(x != 0 && out != 0, "add_layer_norm: x and out must not be null");
  need(y == 0 || sum != 0, "add_layer_norm: y needs sum_out");
  const DType wd = dtype_of(weight_dtype);
  const tnt::AddLayerNormArgs args = {address(x),
                                      address(y),
                                      writable(sum),
                                      dtype_of(x_dtype),
                                      dtype_of(y_dtype),
                                      {address(weight), wd},
                                      {address(bias), wd},
                                      writable(out),
                                      dtype_of(out_dtype),
                                      rows,
                                      d,
                                      eps,
                                      threads};
  call(tnt::active_tier().kernels->add_layer_norm, args);
}

tnt::OuterAttentionArgs outer_attention_args(uintptr_t qkv, uintptr_t out, int io_dtype, int compute_dtype,
                                             int64_t batch, int64_t n, int64_t heads, int64_t head_dim,
                                             float scale, int threads) {
  need(batch >= 0 && n >= 1 && heads >= 1 && head_dim >= 1 && threads >= 1,
       "outer_attention: batch >= 0, n, heads, head_dim and threads >= 1 needed");
  return {address(qkv), writable(out), dtype_of(io_dtype), dtype_of(compute_dtype), batch, n, heads, head_dim,
          scale,        threads};
}

void outer_attention(uintptr_t qkv, uintptr_t out, int io_dtype, int compute_dtype, int64_t batch, int64_t n,
                     int64_t heads, int64_t head_dim, float scale, int threads) {
  const tnt::OuterAttentionArgs args =
      outer_attention_args(qkv, out, io_dtype, compute_dtype, batch, n, heads, head_dim, scale, threads);
  if (batch == 0) return;
  need(qkv != 0 && out != 0, "outer_attention: qkv and out must not be null");
  call(tnt::active_tier().kernels->outer_attention, args);
}

void outer_attention_backward(uintptr_t qkv, uintptr_t grad, uintptr_t grad_qkv, int io_dtype,
                              int compute_dtype, int64_t batch, int64_t n, int64_t heads, int64_t head_dim,
                              float scale, int threads) {
  const tnt::OuterAttentionGradientArgs args = {
      outer_attention_args(qkv, 0, io_dtype, compute_dtype, batch, n, heads, head_dim, scale, threads),
      address(grad), writable(grad_qkv)};
  if (batch == 0) return;
  need(qkv != 0 && grad != 0 && grad_qkv != 0,
       "outer_attention_backward: qkv, grad and grad_qkv must not be null");
  call(tnt::active_tier().gradients->outer_attention, args);
}

void layer_norm_backward(uintptr_t x, uintptr_t residual, uintptr_t grad, int x_dtype, int grad_dtype,
                         uintptr_t weight, uintptr_t bias, int weight_dtype, uintptr_t grad_x, uintptr_t out,
                         uintptr_t grad_weight, uintptr_t grad_bias, int64_t rows, int64_t d, float eps,
                         int threads) {
  need(rows >= 1 && d >= 1 && threads >= 1, "layer_norm_backward: rows, d and threads >= 1 needed");
  need(x != 0 && grad != 0, "layer_norm_backward: x and grad must not be null");
  need(grad_x == 0 || residual != 0, "layer_norm_backward: grad_x needs residual");
  const DType wd = dtype_of(weight_dtype);
  const tnt::LayerNormGradientArgs args = {address(x),
                                           address(residual),
                                           address(grad),
                                           dtype_of(x_dtype),
                                           dtype_of(grad_dtype),
                                           {address(weight), wd},
                                           {address(bias), wd},
                                           writable(grad_x),
                                           writable(out),
                                           static_cast<float*>(writable(grad_weight)),
                                           static_cast<float*>(writable(grad_bias)),
                                           rows,
                                           d,
                                           eps,
                                           threads};
  call(tnt::active_tier().gradients->layer_norm, args);
}

void gelu_backward(uintptr_t h, uintptr_t grad, uintptr_t out, int dtype, uintptr_t grad_bias, int64_t rows,
                   int64_t hidden, int threads) {
  need(rows >= 1 && hidden >= 1 && threads >= 1, "gelu_backward: rows, hidden and threads >= 1 needed");
  need(h != 0 && grad != 0, "gelu_backward: h and grad must not be null");
  const tnt::GeluGradientArgs args = {
      address(h), writable(grad), writable(out), dtype_of(dtype), static_cast<float*>(writable(grad_bias)),
      rows,       hidden,         threads};
  call(tnt::active_tier().gradients->gelu, args);
}

// 64 words spread evenly over a buffer, mixed: tells cheaply whether its contents have changed.
uint64_t sample(uintptr_t p, uint64_t nbytes) {
  constexpr uint64_t kSamples = 64;
  const char* bytes = static_cast<const char*>(address(p));
  uint64_t hash = 1469598103934665603ull ^ nbytes;
  const uint64_t words = nbytes / 4, count = words < kSamples ? words : kSamples;
  for (uint64_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, bytes + words * i / count * 4, 4);
    hash = (hash ^ word) * 1099511628211ull;
  }
  for (uint64_t i = words * 4; i < nbytes; ++i)
    hash = (hash ^ static_cast<uint8_t>(bytes[i])) * 1099511628211ull;
  return hash;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  info["openmp"] = "yes";
#else
  info["openmp"] = "no: the kernels run on one thread";
#endif
  return info;
}

}  // namespace

#if TNT_HAVE_CUDA
void bind_cuda(py::module_& native);  // cuda_bindings.cpp
#endif

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native kernels of tnt_kernels. Pointers are integers; 0 means absent.";
  module.def("tiers", [] {
    std::vector<std::pair<std::string, std::string>> list;
    for (const tnt::Tier& t : tnt::tiers()) list.emplace_back(t.name, t.why_not);
    return list;
  });
  module.def("tier", [] { return std::string(tnt::active_tier().name); });
  module.def("set_tier", &tnt::set_tier, py::arg("name"));
  module.def("build_info", &build_info);
  module.def("sample", &sample, py::arg("ptr"), py::arg("nbytes"));
  module.def("inner_block", &inner_block, py::arg("x"), py::arg("out"), py::arg("io_dtype"),
             py::arg("compute_dtype"), py::arg("sentences"), py::arg("m"), py::arg("c"), py::arg("hidden"),
             py::arg("heads"), py::arg("parts"), py::arg("scale"), py::arg("eps1"), py::arg("eps2"),
             py::arg("weights"), py::arg("weight_dtypes"), py::arg("drop_path1"), py::arg("drop_path2"),
             py::arg("seed"), py::arg("drops"), py::arg("threads"));
  module.def("inner_block_backward", &inner_block_backward, py::arg("x"), py::arg("grad"), py::arg("grad_x"),
             py::arg("io_dtype"), py::arg("compute_dtype"), py::arg("sentences"), py::arg("m"), py::arg("c"),
             py::arg("hidden"), py::arg("heads"), py::arg("parts"), py::arg("scale"), py::arg("eps1"),
             py::arg("eps2"), py::arg("weights"), py::arg("weight_dtypes"), py::arg("drop_path1"),
             py::arg("drop_path2"), py::arg("seed"), py::arg("drops"), py::arg("grads"), py::arg("threads"));
  module.def("pixel_embed", &pixel_embed, py::arg("image"), py::arg("image_dtype"), py::arg("strides"),
             py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("weight"),
             py::arg("bias"), py::arg("position"), py::arg("param_dtypes"), py::arg("out"),
             py::arg("out_dtype"), py::arg("compute_dtype"), py::arg("c"), py::arg("kernel"),
             py::arg("patch_h"), py::arg("patch_w"), py::arg("stride"), py::arg("legacy"),
             py::arg("threads"));
  module.def("pixel_embed_backward", &pixel_embed_backward, py::arg("grad"), py::arg("grad_dtype"),
             py::arg("image"), py::arg("image_dtype"), py::arg("strides"), py::arg("batch"),
             py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("weight"),
             py::arg("weight_dtype"), py::arg("grad_image"), py::arg("grad_weight"), py::arg("grad_bias"),
             py::arg("grad_position"), py::arg("compute_dtype"), py::arg("c"), py::arg("kernel"),
             py::arg("patch_h"), py::arg("patch_w"), py::arg("stride"), py::arg("legacy"),
             py::arg("threads"));
  module.def("word_to_sentence", &word_to_sentence, py::arg("words"), py::arg("words_dtype"),
             py::arg("tokens"), py::arg("out"), py::arg("tokens_dtype"), py::arg("token_batch_stride"),
             py::arg("batch"), py::arg("n"), py::arg("m"), py::arg("c"), py::arg("d"), py::arg("norm1_size"),
             py::arg("weights"), py::arg("weight_dtypes"), py::arg("eps1"), py::arg("eps2"),
             py::arg("compute_dtype"), py::arg("threads"));
  module.def("word_to_sentence_backward", &word_to_sentence_backward, py::arg("grad"), py::arg("grad_dtype"),
             py::arg("words"), py::arg("words_dtype"), py::arg("grad_words"), py::arg("batch"), py::arg("n"),
             py::arg("m"), py::arg("c"), py::arg("d"), py::arg("norm1_size"), py::arg("weights"),
             py::arg("weight_dtypes"), py::arg("grads"), py::arg("eps1"), py::arg("eps2"),
             py::arg("compute_dtype"), py::arg("threads"));
  module.def("outer_attention", &outer_attention, py::arg("qkv"), py::arg("out"), py::arg("io_dtype"),
             py::arg("compute_dtype"), py::arg("batch"), py::arg("n"), py::arg("heads"), py::arg("head_dim"),
             py::arg("scale"), py::arg("threads"));
  module.def("outer_attention_backward", &outer_attention_backward, py::arg("qkv"), py::arg("grad"),
             py::arg("grad_qkv"), py::arg("io_dtype"), py::arg("compute_dtype"), py::arg("batch"),
             py::arg("n"), py::arg("heads"), py::arg("head_dim"), py::arg("scale"), py::arg("threads"));
  module.def("add_layer_norm", &add_layer_norm, py::arg("x"), py::arg("y"), py::arg("sum_out"),
             py::arg("x_dtype"), py::arg("y_dtype"), py::arg("weight"), py::arg("bias"),
             py::arg("weight_dtype"), py::arg("out"), py::arg("out_dtype"), py::arg("rows"), py::arg("d"),
             py::arg("eps"), py::arg("threads"));
  module.def("layer_norm_backward", &layer_norm_backward, py::arg("x"), py::arg("residual"), py::arg("grad"),
             py::arg("x_dtype"), py::arg("grad_dtype"), py::arg("weight"), py::arg("bias"),
             py::arg("weight_dtype"), py::arg("grad_x"), py::arg("out"), py::arg("grad_weight"),
             py::arg("grad_bias"), py::arg("rows"), py::arg("d"), py::arg("eps"), py::arg("threads"));
  module.def("gelu_backward", &gelu_backward, py::arg("h"), py::arg("grad"), py::arg("out"), py::arg("dtype"),
             py::arg("grad_bias"), py::arg("rows"), py::arg("hidden"), py::arg("threads"));
#if TNT_HAVE_CUDA
  bind_cuda(module);
#endif
}
