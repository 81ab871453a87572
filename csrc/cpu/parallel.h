// Work shared out over torch's own threads: one OpenMP runtime serves both.
#pragma once

#include "simd.h"

namespace tnt {
namespace TNT_TIER {
namespace {

// Packs the weights, then runs every group, each thread with scratch of its own. A group's result does
// not depend on the thread that computes it, so neither does a call's on the number of threads.
template <class G, class Op>
bool parallel_groups(Op& op, int64_t groups, int threads) {
  threads = static_cast<int>(most(1, least(threads, groups)));
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
    const typename Op::Scratch& mine = scratch[thread_index()].scratch;
#pragma omp for schedule(dynamic, Op::kGroupsAtATime)
    for (int64_t g = 0; g < groups; ++g) op.run(g, mine);
    G::end();
  }
  free(scratch);
  return true;
}

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
