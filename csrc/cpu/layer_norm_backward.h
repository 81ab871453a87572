// Backward of a LayerNorm in front of a residual branch: grad_x = residual + LN'(grad), and the LayerNorm's
// output again for the gradient of the weight behind it, in one pass over each row.
#pragma once

#include "add_layer_norm.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class X, class Y>
struct LayerNormBackward {
  static constexpr int kGroupsAtATime = 1;

  const LayerNormGradientArgs& args;
  const int64_t d;
  const int64_t padded;  // whole vectors; what lies behind d is zero in every row of scratch
  const Chunks chunks;   // of rows
  float *gain, *shift;
  float* sums;  // [chunks, 2, padded] gradients of the weight and of the bias

  struct Scratch {
    float* row;   // [padded] of x, then normalised
    float* grad;  // [padded]
  };

  explicit LayerNormBackward(const LayerNormGradientArgs& a)
      : args(a), d(a.d), padded(round_up(a.d, L)), chunks(a.rows, 16) {}

  void plan(Arena& arena) {
    gain = arena.take<float>(padded);
    shift = arena.take<float>(padded);
    sums = arena.take<float>(chunks.count * 2 * padded);
  }
  void plan(Arena& arena, Scratch& s) const {
    s.row = arena.take<float>(padded);
    s.grad = arena.take<float>(padded);
  }

  int64_t jobs() const { return 1; }
  void pack(int64_t) {
    read_vector(args.weight, d, gain, 1.0f);
    read_vector(args.bias, d, shift);
  }

  void run(int64_t chunk, const Scratch& s) const {
    float* sum = sums + chunk * 2 * padded;
    for (int64_t r = chunks.begin(chunk); r < chunks.end(chunk); ++r) one_row(r, s.row, s.grad, sum);
  }

  template <class T>
  TNT_INLINE vf read(const T* from, int64_t k) const {
    return k + L <= d ? load_io(from + k) : load_part(from + k, static_cast<int>(d - k));
  }
  template <class T>
  TNT_INLINE void write(T* to, int64_t k, vf v) const {
    if (k + L <= d)
      store_io(to + k, v);
    else
      store_part(to + k, v, static_cast<int>(d - k));
  }

  void one_row(int64_t r, float* row, float* grad, float* sum) const {
    const X* x = static_cast<const X*>(args.x) + r * d;
    const Y* g = static_cast<const Y*>(args.grad) + r * d;
    Y* out = args.out != nullptr ? static_cast<Y*>(args.out) + r * d : nullptr;
    for (int64_t k = 0; k < padded; k += L) {
      store(row + k, read(x, k));
      store(grad + k, read(g, k));
    }
    const RowMoments found = centre(row, d, args.eps);

    vf mean[2] = {}, slope[2] = {};
    for (int64_t k = 0; k < padded; k += L) {
      const vf normal = (load(row + k) - found.rest) * found.rstd, dy = load(grad + k);
      const vf scaled = dy * load(gain + k);
      store(row + k, normal);
      store(grad + k, scaled);
      mean[k / L % 2] += scaled;
      slope[k / L % 2] += scaled * normal;
      store(sum + k, load(sum + k) + dy * normal);
      store(sum + padded + k, load(sum + padded + k) + dy);
      if (out != nullptr) write(out, k, normal * load(gain + k) + load(shift + k));
    }
    if (args.grad_x == nullptr) return;
    const X* residual = static_cast<const X*>(args.residual) + r * d;
    X* to = static_cast<X*>(args.grad_x) + r * d;
    const float inverse = 1.0f / static_cast<float>(d);
    const float a = hsum(mean[0] + mean[1]) * inverse, b = hsum(slope[0] + slope[1]) * inverse;
    for (int64_t k = 0; k < padded; k += L)
      write(to, k, read(residual, k) + (load(grad + k) - a - load(row + k) * b) * found.rstd);
  }

  void finish() const {
    add_chunks(sums, chunks.count, 2 * padded, args.threads);
    const size_t bytes = static_cast<size_t>(d) * 4;
    if (args.grad_weight != nullptr) memcpy(args.grad_weight, sums, bytes);
    if (args.grad_bias != nullptr) memcpy(args.grad_bias, sums + padded, bytes);
  }
};

template <class X, class Y>
bool run_layer_norm_backward(const LayerNormGradientArgs& args) {
  LayerNormBackward<X, Y> op(args);
  return parallel_groups<F32Gemm>(op, op.chunks.count, args.threads, [&] { op.finish(); });
}

inline bool layer_norm_backward(const LayerNormGradientArgs& args) {
  if (args.x_dtype == kFloat32)
    return args.grad_dtype == kFloat32 ? run_layer_norm_backward<float, float>(args)
                                       : run_layer_norm_backward<float, uint16_t>(args);
  return args.grad_dtype == kFloat32 ? run_layer_norm_backward<uint16_t, float>(args)
                                     : run_layer_norm_backward<uint16_t, uint16_t>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
