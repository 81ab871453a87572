// Work shared out over torch's own threads: one OpenMP runtime serves both.
#pragma once

#include "simd.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// Packs the weights, then runs `body` on every thread, each with scratch of its own. `after` runs last, while
// the scratch memory is still there.
template <class G, class Op, class Body, class After>
bool in_parallel(Op& op, int threads, Body body, After after) {
  struct PerThread {
    typename Op::Scratch scratch;
    char other_cache_line[64];
  };
  PerThread* scratch = static_cast<PerThread*>(malloc(sizeof(PerThread) * static_cast<size_t>(threads)));
  if (scratch == nullptr) return false;
  Arena arena;
  const auto plan = [&] {
    op.plan(arena);
    for (int t = 0; t < threads; ++t) op.plan(arena, scratch[t].scratch);
  };
  plan();
  if (!arena.commit()) {
    free(scratch);
    return false;
  }
  plan();

  const int64_t jobs = op.jobs();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < jobs; ++i) op.pack(i);
    G::begin();
    body(scratch[thread_index()].scratch);
    G::end();
  }
  after();
  free(scratch);
  return true;
}

// Every group once. A group's result does not depend on the thread that computes it, so neither does a
// call's on the number of threads.
template <class G, class Op, class After>
bool parallel_groups(Op& op, int64_t groups, int threads, After after) {
  threads = static_cast<int>(most(1, least(threads, groups)));
  const auto body = [&](const typename Op::Scratch& mine) {
#pragma omp for schedule(dynamic, Op::kGroupsAtATime)
    for (int64_t g = 0; g < groups; ++g) op.run(g, mine);
  };
  return in_parallel<G>(op, threads, body, after);
}

template <class G, class Op>
bool parallel_groups(Op& op, int64_t groups, int threads) {
  return parallel_groups<G>(op, groups, threads, [] {});
}

// How a sum over many groups is cut up so that it does not depend on the number of threads: each chunk is
// summed in order by one thread, then the chunks' sums are added in order.
struct Chunks {
  int64_t groups, size, count;

  // At least `smallest` groups in a chunk, and at most 256 chunks: each has a copy of the sums.
  Chunks(int64_t all, int64_t smallest)
      : groups(all), size(most(smallest, (all + 255) / 256)), count((all + size - 1) / size) {}
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return least(groups, (chunk + 1) * size); }
};

// sums [count, n]: adds all chunks to the first.
inline void add_chunks(float* sums, int64_t count, int64_t n, int threads) {
  constexpr int64_t kBlock = 1024;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t to = least(n, from + kBlock);
    for (int64_t chunk = 1; chunk < count; ++chunk)
      for (int64_t i = from; i < to; ++i) sums[i] += sums[chunk * n + i];
  }
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
