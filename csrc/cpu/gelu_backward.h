// Backward of the GELU between two linear layers: its output again for the gradient of the second layer's
// weight, and the gradient of the first layer's output with its sum, the gradient of the bias, in one pass.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class T>
struct GeluBackward {
  static constexpr int kGroupsAtATime = 1;
  static constexpr Accuracy kAccuracy = sizeof(T) == 4 ? kFull : kCoarse;

  const GeluGradientArgs& args;
  const int64_t hidden, padded;
  const Chunks chunks;  // of rows
  float* sums;          // [chunks, padded]

  struct Scratch {};

  explicit GeluBackward(const GeluGradientArgs& a)
      : args(a), hidden(a.hidden), padded(round_up(a.hidden, L)), chunks(a.rows, 16) {}

  void plan(Arena& arena) { sums = arena.take<float>(chunks.count * padded); }
  void plan(Arena&, Scratch&) const {}
  int64_t jobs() const { return 0; }
  void pack(int64_t) {}

  void run(int64_t chunk, const Scratch&) const {
    float* sum = sums + chunk * padded;
    for (int64_t r = chunks.begin(chunk); r < chunks.end(chunk); ++r) {
      const T* h = static_cast<const T*>(args.h) + r * hidden;
      T* grad = static_cast<T*>(args.grad) + r * hidden;
      T* out = args.out != nullptr ? static_cast<T*>(args.out) + r * hidden : nullptr;
      int64_t k = 0;
      for (; k + L <= hidden; k += L) {
        vf value, slope;
        gelu_and_derivative<kAccuracy>(load_io(h + k), value, slope);
        const vf g = load_io(grad + k) * slope;
        store_io(grad + k, g);
        store(sum + k, load(sum + k) + g);
        if (out != nullptr) store_io(out + k, value);
      }
      if (k == hidden) continue;
      const int left = static_cast<int>(hidden - k);
      vf value, slope;
      gelu_and_derivative<kAccuracy>(load_part(h + k, left), value, slope);
      const vf g = load_part(grad + k, left) * slope;
      store_part(grad + k, g, left);
      store(sum + k, load(sum + k) + g);
      if (out != nullptr) store_part(out + k, value, left);
    }
  }

  void finish() const {
    if (args.grad_bias == nullptr) return;
    add_chunks(sums, chunks.count, padded, args.threads);
    memcpy(args.grad_bias, sums, static_cast<size_t>(hidden) * 4);
  }
};

template <class T>
bool run_gelu_backward(const GeluGradientArgs& args) {
  GeluBackward<T> op(args);
  return parallel_groups<F32Gemm>(op, op.chunks.count, args.threads, [&] { op.finish(); });
}

inline bool gelu_backward(const GeluGradientArgs& args) {
  return args.dtype == kFloat32 ? run_gelu_backward<float>(args) : run_gelu_backward<uint16_t>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
