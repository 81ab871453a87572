// The AMX tile instructions, and an emulation of them in plain C++ so that the code around them can be
// tested on any machine (tier amx_emulated).
#pragma once

#include "simd.h"

namespace tnt {
namespace TNT_TIER {
namespace {

#if defined(TNT_TIER_AMX)

// Every tile 16 rows of 64 bytes. A thread configures its own tiles; the process has asked the kernel
// for tile data before (dispatch.cpp).
inline void tiles_begin() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}
inline void tiles_end() { _tile_release(); }

#define TNT_TILE_ZERO(t) _tile_zero(t)
#define TNT_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TNT_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TNT_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#else

inline void tiles_begin() {}
inline void tiles_end() {}

thread_local uint32_t emulated_tiles[8][16][16];

inline void tile_load(int t, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tiles[t][r], static_cast<const char*>(from) + r * stride, 64);
}
inline void tile_store(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(to) + r * stride, emulated_tiles[t][r], 64);
}
inline void tile_dot(int c, int a, int b) {
  for (int r = 0; r < 16; ++r) {
    for (int n = 0; n < 16; ++n) {
      float sum;
      memcpy(&sum, &emulated_tiles[c][r][n], 4);
      for (int k = 0; k < 16; ++k) {
        const uint32_t x = emulated_tiles[a][r][k], y = emulated_tiles[b][k][n];
        sum += bf16_to_float(static_cast<uint16_t>(x)) * bf16_to_float(static_cast<uint16_t>(y));
        sum += bf16_to_float(static_cast<uint16_t>(x >> 16)) * bf16_to_float(static_cast<uint16_t>(y >> 16));
      }
      memcpy(&emulated_tiles[c][r][n], &sum, 4);
    }
  }
}

#define TNT_TILE_ZERO(t) memset(emulated_tiles[t], 0, sizeof(emulated_tiles[t]))
#define TNT_TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define TNT_TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define TNT_TILE_DOT(c, a, b) tile_dot(c, a, b)

#endif

}  // namespace
}  // namespace TNT_TIER
}  // namespace tnt
