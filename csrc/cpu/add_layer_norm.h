// sum = x + y; out = LN(sum): the residual and the LayerNorm behind it in one pass over each row.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace tnt {
namespace TNT_TIER {
namespace {

struct RowMoments {
  float rest, rstd;
};

// Takes the mean off a row [d]: (row - rest) * rstd is then normalised.
TNT_INLINE RowMoments centre(float* row, int64_t d, float eps) {
  const int64_t whole = d / L * L;
  // Four partial sums: a row is too short to hide the latency of one.
  vf total[4] = {};
  float tail = 0;
  for (int64_t k = 0; k < whole; k += L) total[k / L % 4] += load(row + k);
  for (int64_t k = whole; k < d; ++k) tail += row[k];
  const float mean = (hsum((total[0] + total[1]) + (total[2] + total[3])) + tail) / static_cast<float>(d);

  // The mean as it was rounded leaves a rest: summed along with the squares, and taken off at the end.
  vf squares[4] = {}, rests[4] = {};
  float tail_rest = 0;
  tail = 0;
  for (int64_t k = 0; k < whole; k += L) {
    const vf v = load(row + k) - mean;
    store(row + k, v);
    squares[k / L % 4] += v * v;
    rests[k / L % 4] += v;
  }
  for (int64_t k = whole; k < d; ++k) {
    row[k] -= mean;
    tail += row[k] * row[k];
    tail_rest += row[k];
  }
  const float rest =
      (hsum((rests[0] + rests[1]) + (rests[2] + rests[3])) + tail_rest) / static_cast<float>(d);
  const float variance =
      (hsum((squares[0] + squares[1]) + (squares[2] + squares[3])) + tail) / static_cast<float>(d) -
      rest * rest;
  return {rest, 1.0f / __builtin_sqrtf(variance + eps)};
}

template <class X, class Y, class Out>
struct AddLayerNorm {
  static constexpr int kGroupsAtATime = 4;
  static constexpr int64_t kRows = 16;  // rows per group

  const AddLayerNormArgs& args;
  const int64_t d;
  float *gain, *shift;

  struct Scratch {
    float* row;  // [d]
  };

  explicit AddLayerNorm(const AddLayerNormArgs& a) : args(a), d(a.d) {}

  void plan(Arena& arena) {
    gain = arena.take<float>(d);
    shift = arena.take<float>(d);
  }
  void plan(Arena& arena, Scratch& s) const { s.row = arena.take<float>(d); }

  int64_t jobs() const { return 1; }
  void pack(int64_t) {
    read_vector(args.weight, d, gain, 1.0f);
    read_vector(args.bias, d, shift);
  }

  void run(int64_t group, const Scratch& s) const {
    const int64_t end = least(args.rows, (group + 1) * kRows);
    for (int64_t r = group * kRows; r < end; ++r) one_row(r, s.row);
  }

  void one_row(int64_t r, float* row) const {
    const X* x = static_cast<const X*>(args.x) + r * d;
    const Y* y = args.y != nullptr ? static_cast<const Y*>(args.y) + r * d : nullptr;
    X* sum_out = args.sum != nullptr ? static_cast<X*>(args.sum) + r * d : nullptr;
    Out* out = static_cast<Out*>(args.out) + r * d;
    const int64_t whole = d / L * L;

    for (int64_t k = 0; k < whole; k += L) {
      vf v = load_io(x + k);
      if (y != nullptr) v += load_io(y + k);
      if (sum_out != nullptr) store_io(sum_out + k, v);
      store(row + k, v);
    }
    for (int64_t k = whole; k < d; ++k) {
      float v = load_scalar(x + k);
      if (y != nullptr) v += load_scalar(y + k);
      if (sum_out != nullptr) store_scalar(sum_out + k, v);
      row[k] = v;
    }
    const RowMoments found = centre(row, d, args.eps);

    for (int64_t k = 0; k < whole; k += L)
      store_io(out + k, (load(row + k) - found.rest) * found.rstd * load(gain + k) + load(shift + k));
    for (int64_t k = whole; k < d; ++k)
      store_scalar(out + k, (row[k] - found.rest) * found.rstd * gain[k] + shift[k]);
  }
};

template <class X, class Y, class Out>
bool run_add_layer_norm(const AddLayerNormArgs& args) {
  typedef AddLayerNorm<X, Y, Out> Op;
  Op op(args);
  return parallel_groups<F32Gemm>(op, (args.rows + Op::kRows - 1) / Op::kRows, args.threads);
}

template <class X, class Y>
bool add_layer_norm_by_out(const AddLayerNormArgs& args) {
  return args.out_dtype == kFloat32 ? run_add_layer_norm<X, Y, float>(args)
                                    : run_add_layer_norm<X, Y, uint16_t>(args);
}

inline bool add_layer_norm(const AddLayerNormArgs& args) {
  if (args.x_dtype == kFloat32)
    return args.y_dtype == kFloat32 ? add_layer_norm_by_out<float, float>(args)
                                    : add_layer_norm_by_out<float, uint16_t>(args);
  return args.y_dtype == kFloat32 ? add_layer_norm_by_out<uint16_t, float>(args)
                                  : add_layer_norm_by_out<uint16_t, uint16_t>(args);
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
