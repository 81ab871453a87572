#include "dispatch.h"

#include <atomic>
#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tnt {

#define TNT_DECLARE(tier)                 \
  namespace tier {                        \
  extern const Kernels kernels;           \
  extern const GradientKernels gradients; \
  }
#if TNT_HAVE_AMX
TNT_DECLARE(amx)
#endif
#if TNT_HAVE_AMX_EMULATED
TNT_DECLARE(amx_emulated)
#endif
#if TNT_HAVE_AVX512_BF16
TNT_DECLARE(avx512_bf16)
#endif
#if TNT_HAVE_AVX512
TNT_DECLARE(avx512)
#endif
#if TNT_HAVE_AVX2
TNT_DECLARE(avx2)
#endif
TNT_DECLARE(portable)

namespace {

// What each tier needs, by the names of the instruction sets.
struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
  bool amx_granted = false;
};

#if defined(__x86_64__) || defined(__i386__)
uint64_t enabled_state() {  // XCR0: register state that the operating system saves
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Tile data is off until a process asks for it.
bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return f;
  const uint64_t state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tile = (state & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = ymm && fma && f16c && (b & (1u << 5));
  const uint32_t f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  f.avx512 = f.avx2 && zmm && (b & f_dq_bw_vl) == f_dq_bw_vl;
  const bool amx_tile = d & (1u << 24), amx_bf16 = d & (1u << 22);
  uint32_t a1 = 0, b1, c1, d1;
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
  f.avx512_bf16 = f.avx512 && (a1 & (1u << 5));
  f.amx = f.avx512_bf16 && tile && amx_tile && amx_bf16;
  f.amx_granted = f.amx && request_tiles();
  return f;
}
#else
Features detect() { return {}; }
#endif

std::vector<Tier> make_tiers() {
  const Features f = detect();
  (void)f;
  std::vector<Tier> list;
  const auto add = [&](const char* name, const Kernels& kernels, const GradientKernels& gradients,
                       bool usable, const char* why_not) {
    list.push_back({name, &kernels, &gradients, usable ? "" : why_not});
  };
#if TNT_HAVE_AMX
  add("amx", amx::kernels, amx::gradients, f.amx_granted,
      f.amx ? "the operating system refuses AMX tile data to this process"
            : "this processor or operating system has no AMX-BF16");
#endif
#if TNT_HAVE_AVX512_BF16
  add("avx512_bf16", avx512_bf16::kernels, avx512_bf16::gradients, f.avx512_bf16,
      "this processor has no AVX512-BF16");
#endif
#if TNT_HAVE_AVX512
  add("avx512", avx512::kernels, avx512::gradients, f.avx512,
      "this processor has no AVX-512 (F, BW, DQ, VL)");
#endif
#if TNT_HAVE_AVX2
  add("avx2", avx2::kernels, avx2::gradients, f.avx2, "this processor has no AVX2 with FMA and F16C");
#endif
  add("portable", portable::kernels, portable::gradients, true, "");
#if TNT_HAVE_AMX_EMULATED
  // For tests only, so never first.
  add("amx_emulated", amx_emulated::kernels, amx_emulated::gradients, f.avx512_bf16,
      "this processor has no AVX512-BF16");
#endif
  return list;
}

const Tier* best() {
  for (const Tier& t : tiers())
    if (t.why_not.empty()) return &t;
  return &tiers().back();
}

std::atomic<const Tier*>& active() {
  static std::atomic<const Tier*> tier{best()};
  return tier;
}

}  // namespace

const std::vector<Tier>& tiers() {
  static const std::vector<Tier> list = make_tiers();
  return list;
}

const Tier& active_tier() { return *active().load(); }

void set_tier(const std::string& name) {
  if (name == "auto") {
    active().store(best());
    return;
  }
  std::string known;
  for (const Tier& t : tiers()) {
    if (name == t.name) {
      if (!t.why_not.empty()) throw std::runtime_error("tier '" + name + "' cannot run: " + t.why_not);
      active().store(&t);
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + t.name;
  }
  throw std::invalid_argument("tier '" + name + "' is not built; built tiers: auto, " + known);
}

}  // namespace tnt
