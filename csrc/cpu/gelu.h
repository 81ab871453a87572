// The exact GELU in place.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace tnt {
namespace TNT_TIER {
namespace {

template <class T, Accuracy A>
void run_gelu(T* x, int64_t count, int threads) {
  constexpr int64_t kChunk = 4096;  // elements: a few pages, within the first cache level
  const int64_t chunks = (count + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(static_cast<int>(most(1, least(threads, chunks)))) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    T* at = x + chunk * kChunk;
    const int64_t n = least(kChunk, count - chunk * kChunk);
    int64_t i = 0;
    for (; i + L <= n; i += L) store_io(at + i, gelu<A>(load_io(at + i)));
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      store_part(at + i, gelu<A>(load_part(at + i, rest)), rest);
    }
  }
}

inline bool gelu_in_place(const GeluArgs& args) {
  if (args.dtype == kFloat32)
    run_gelu<float, kFull>(static_cast<float*>(args.x), args.count, args.threads);
  else
    run_gelu<uint16_t, kCoarse>(static_cast<uint16_t*>(args.x), args.count, args.threads);
  return true;
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
