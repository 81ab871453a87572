// Runs the CUDA kernels on a CPU, as they are written: every thread of a block is a fiber, and the fibers
// meet at barriers, shuffles and products of a warp. Products take their operands from the lanes by the
// layout that the PTX manual gives for mma.sync. For a CPU csrc/cuda/ptx.cuh includes this file, not CUDA.
//
// With TNT_EMULATE_OLD the GPU has no TF32 or bfloat16 products, like sm_75. With run_backwards() the threads
// run in the opposite order: a result that changes shows a race.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define TNT_DEVICE inline

typedef int cudaError_t;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
inline const char* cudaGetErrorName(int error) {
  return error == 0 ? "cudaSuccess" : "cudaErrorInvalidValue";
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct Index {
  unsigned x;
};

namespace emulator {

constexpr int kLanes = 32;

[[noreturn]] inline void fail(const char* message) {
  fprintf(stderr, "emulator: %s\n", message);
  abort();
}

// Stacks last: to make them anew for every block takes most of the time. Nor do fibers change places by
// swapcontext, which asks the kernel for the signal mask: only their first entry does.
struct Thread {
  jmp_buf place;
  bool started = false;
  const char* waits_at = nullptr;  // the name of the barrier that it has reached
  bool of_block = false;           // the barrier is the block's, not the warp's
  bool done = false;
};

struct Warp {
  uint32_t a[kLanes][4], b[kLanes][2];  // what lanes show each other
};

constexpr size_t kStack = 64 * 1024;
inline char* stack(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

struct Block {
  jmp_buf scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int current = 0;
  std::function<void()> body;
};

inline Block*& block() {
  static Block* running = nullptr;
  return running;
}
inline bool& backwards() {
  static bool value = false;
  return value;
}

inline int lane() { return block()->current % kLanes; }
inline Warp& warp() { return block()->warps[static_cast<size_t>(block()->current / kLanes)]; }

inline void wait(const char* name, bool of_block = false) {
  Block* b = block();
  Thread& t = b->threads[static_cast<size_t>(b->current)];
  t.waits_at = name;
  t.of_block = of_block;
  if (_setjmp(t.place) == 0) _longjmp(b->scheduler, 1);
}

inline void enter() {
  Block* b = block();
  b->body();
  b->threads[static_cast<size_t>(b->current)].done = true;
  _longjmp(b->scheduler, 1);
}

// Runs a thread until it waits or is done.
inline void resume(Block& b) {
  Thread& t = b.threads[static_cast<size_t>(b.current)];
  if (_setjmp(b.scheduler) != 0) return;
  if (t.started) _longjmp(t.place, 1);
  t.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack(static_cast<size_t>(b.current));
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Threads [first, end) go on if all that are not done wait at the same place; `all` must not have left.
inline bool release(Block& b, int first, int end, bool of_block) {
  const char* name = nullptr;
  bool any = false, same = true, gone = false;
  for (int i = first; i < end; ++i) {
    const Thread& t = b.threads[static_cast<size_t>(i)];
    if (t.done) {
      gone = true;
      continue;
    }
    if (t.waits_at == nullptr || t.of_block != of_block) return false;
    if (any && strcmp(name, t.waits_at) != 0) same = false;
    name = t.waits_at;
    any = true;
  }
  if (!any) return false;
  if (!same) fail("lanes wait at different places");
  if (gone) fail("a lane left while others wait for it");
  for (int i = first; i < end; ++i) b.threads[static_cast<size_t>(i)].waits_at = nullptr;
  return true;
}

inline void run_block(int threads, const std::function<void()>& body);

}  // namespace emulator

inline Index threadIdx, blockIdx, blockDim;
inline uint4 shared_bytes_of_block[(48 << 10) / 16];  // what every GPU gives without being asked

inline void emulator::run_block(int threads, const std::function<void()>& body) {
  Block b;
  b.threads.resize(static_cast<size_t>(threads));
  b.warps.resize(static_cast<size_t>((threads + kLanes - 1) / kLanes));
  b.body = body;
  block() = &b;
  for (bool left = true; left;) {
    left = false;
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      b.current = backwards() ? threads - 1 - i : i;
      const Thread& t = b.threads[static_cast<size_t>(b.current)];
      if (t.done || t.waits_at != nullptr) continue;
      threadIdx.x = static_cast<unsigned>(b.current);
      resume(b);
      moved = true;
    }
    for (int first = 0; first < threads; first += kLanes)
      moved |= release(b, first, first + kLanes < threads ? first + kLanes : threads, false);
    moved |= release(b, 0, threads, true);
    for (const Thread& t : b.threads) left |= !t.done;
    if (left && !moved) fail("no thread can go on");
  }
  block() = nullptr;
}

inline void __syncthreads() { emulator::wait("__syncthreads", true); }
inline void __syncwarp() { emulator::wait("__syncwarp"); }

template <class T>
T __ldg(const T* from) {
  return *from;
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  static_assert(sizeof(T) == 4, "32 bits");
  memcpy(&emulator::warp().a[emulator::lane()][0], &value, 4);
  emulator::wait("__shfl_sync");
  T got;
  memcpy(&got, &emulator::warp().a[from % emulator::kLanes][0], 4);
  emulator::wait("__shfl_sync, read");
  return got;
}

namespace tnt {
namespace cuda {

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float half_to_float(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline uint16_t float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t floats_to_halves(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline uint32_t floats_to_bfloat16s(float low, float high) {
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
}
inline float bfloat16_to_float(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

// PTX ISA, "Matrix fragments for mma.m16n8k16" (.f16, .bf16) and "mma.m16n8k8" (.tf32): lane and register of
// element (row, k) of a and (k, column) of b.
template <class Number>
inline void emulate_mma16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number number) {
  const int lane = emulator::lane();
  emulator::Warp& warp = emulator::warp();
  memcpy(warp.a[lane], a, 16);
  memcpy(warp.b[lane], b, 8);
  emulator::wait("mma 16");
  for (int i = 0; i < 4; ++i) {
    const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane % 4) * 2 + (i & 1);
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int ra = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0), la = (row % 8) * 4 + (k % 8) / 2;
      const int rb = k >= 8 ? 1 : 0, lb = column * 4 + (k % 8) / 2;
      const uint32_t x = warp.a[la][ra] >> (k % 2 * 16), y = warp.b[lb][rb] >> (k % 2 * 16);
      sum += number(static_cast<uint16_t>(x)) * number(static_cast<uint16_t>(y));
    }
    d[i] += sum;
  }
  emulator::wait("mma 16, read");
}
inline void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma16(d, a, b, half_to_float);
}

#if !defined(TNT_EMULATE_OLD)
#define TNT_TF32 1
#define TNT_MMA_BFLOAT16 1
inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma16(d, a, b, bfloat16_to_float);
}

inline float round_to_tf32(float x) {
  const uint32_t bits = as_bits(x);
  return std::isfinite(x) ? as_float((bits + 0x1000) & 0xffffe000u) : x;
}
inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const int lane = emulator::lane();
  emulator::Warp& warp = emulator::warp();
  memcpy(warp.a[lane], a, 16);
  memcpy(warp.b[lane], b, 8);
  emulator::wait("mma tf32");
  for (int i = 0; i < 4; ++i) {
    const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane % 4) * 2 + (i & 1);
    for (int k = 0; k < 8; ++k) {
      const int ra = (row >= 8 ? 1 : 0) + (k >= 4 ? 2 : 0), la = (row % 8) * 4 + k % 4;
      const int rb = k >= 4 ? 1 : 0, lb = column * 4 + k % 4;
      d[i] += as_float(warp.a[la][ra] & 0xffffe000u) * as_float(warp.b[lb][rb] & 0xffffe000u);
    }
  }
  emulator::wait("mma tf32, read");
}
#endif

inline uint4* shared_memory() { return shared_bytes_of_block; }

inline uint4 load_stream(const uint4* from, bool inside) {
  if (!inside) return {};
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("a load of 16 bytes is not aligned");
  return *from;
}
inline uint2 load_stream(const uint2* from, bool inside) {
  if (!inside) return {};
  if (reinterpret_cast<uintptr_t>(from) % 8 != 0) emulator::fail("a load of 8 bytes is not aligned");
  return *from;
}

template <class T>
struct Same {
  typedef T type;
};

template <class... P>
int launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, void*,
           typename Same<P>::type... args) {
  if (shared_bytes > static_cast<int64_t>(sizeof(shared_bytes_of_block)))
    emulator::fail("too much shared memory");
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    memset(shared_bytes_of_block, 0xff, sizeof(shared_bytes_of_block));  // NaN in every type
    emulator::run_block(threads, [&] { kernel(args...); });
    for (size_t byte = static_cast<size_t>(shared_bytes); byte < sizeof(shared_bytes_of_block); ++byte)
      if (reinterpret_cast<unsigned char*>(shared_bytes_of_block)[byte] != 0xff)
        emulator::fail("a store beyond the shared memory that was asked for");
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace tnt
