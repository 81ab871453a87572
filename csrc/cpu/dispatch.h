// Chooses among the SIMD tiers that were built (TNT_HAVE_<TIER>) by what processor and kernel offer.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tnt {

struct Tier {
  const char* name;
  const Kernels* kernels;
  const GradientKernels* gradients;
  std::string why_not;  // empty: usable here
};

// Every tier that was built, best first.
const std::vector<Tier>& tiers();
const Tier& active_tier();
// "auto" takes the best usable one. Throws std::invalid_argument for a name that is not built,
// std::runtime_error for one that this machine cannot run.
void set_tier(const std::string& name);

}  // namespace tnt
