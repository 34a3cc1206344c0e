// CUDA C++ on a CPU for kernels whose blocks wait for each other: every thread of every block is a fiber. Fibers run in a
// random order, and asynchronous copies land at a random time, so that a missing wait shows.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __CUDA_ARCH__ 900

using std::max;
using std::min;

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t v) { float f; std::memcpy(&f, &v, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t v; std::memcpy(&v, &f, 4); return v; }
inline float __int_as_float(int32_t v) { return __uint_as_float(uint32_t(v)); }
inline int32_t __float_as_int(float f) { return int32_t(__float_as_uint(f)); }
template <typename V> V __ldcg(const V* p) { return *p; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { std::memset(p, v, n); return cudaSuccess; }

namespace emulation {

struct Meet {
  int arrived = 0;
  unsigned generation = 0;
  uint32_t in[32][6], out[32][6];
};
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
struct Warp { std::map<unsigned, Meet> meets; };
struct Block {
  dim3 index;
  std::vector<unsigned char> shared;
  unsigned char* base;
  std::map<int, Barrier> barriers;
  std::vector<Warp> warps;
};
struct Copy { void* to; const void* from; int bytes; };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  Block* block;
  Warp* warp;
  int lane;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline dim3 grid_size, block_size;  // of the kernel that runs
inline ucontext_t scheduler;
inline Fiber* current;
inline std::mt19937 dice;
inline const std::function<void()>* body;

inline void yield() { swapcontext(&current->context, &scheduler); }
template <typename F> void wait_until(F&& ready) { while (!ready()) yield(); }

inline void block_barrier(int id, int threads) {
  Barrier& b = current->block->barriers[id];
  const unsigned now = b.generation;
  if (++b.arrived == threads) b.arrived = 0, b.generation++;
  wait_until([&] { return b.generation != now; });
}

// All lanes of `mask` meet; afterwards meet.out holds what each brought.
inline Meet& gather(unsigned mask, const uint32_t* words, int count) {
  Meet& m = current->warp->meets[mask];
  const unsigned now = m.generation;
  std::memcpy(m.in[current->lane], words, size_t(count) * 4);
  if (++m.arrived == __builtin_popcount(mask)) {
    std::memcpy(m.out, m.in, sizeof(m.in));
    m.arrived = 0, m.generation++;
  }
  wait_until([&] { return m.generation != now; });
  return m;
}
template <typename V> V shuffle(unsigned mask, V v, int source) {
  uint32_t word;
  std::memcpy(&word, &v, 4);
  const Meet& m = gather(mask, &word, 1);
  if (!(mask >> source & 1)) source = current->lane;
  std::memcpy(&v, &m.out[source][0], 4);
  return v;
}

// An mbarrier in its eight bytes: arrivals still missing, bytes still missing, the phase.
struct MBarrier {
  int16_t count, missing;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(MBarrier) == 8);
inline MBarrier& of(uint64_t* bar) { return *reinterpret_cast<MBarrier*>(bar); }
inline void settle(MBarrier& b) {
  if (b.missing == 0 && b.bytes == 0) b.missing = b.count, b.phase ^= 1;
  if (b.missing < 0) std::fprintf(stderr, "mbarrier: more arrivals than it counts\n"), std::abort();
}
inline void arrive(uint64_t* bar) { of(bar).missing--, settle(of(bar)); }
inline void expect(uint64_t* bar, uint32_t bytes) { of(bar).bytes += int(bytes), arrive(bar); }

struct Bulk { Copy copy; uint64_t* bar; };
inline std::vector<Bulk> bulks;
inline void bulk(void* to, const void* from, int bytes, uint64_t* bar) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "bulk copy: not aligned\n"), std::abort();
  }
  std::memset(to, 0xff, size_t(bytes));  // NaN until it lands
  bulks.push_back({{to, from, bytes}, bar});
}
inline void land(bool all) {
  for (size_t i = 0; i < bulks.size();) {
    if (!all && dice() % 4) { i++; continue; }
    const Bulk b = bulks[i];
    bulks[i] = bulks.back(), bulks.pop_back();
    std::memcpy(b.copy.to, b.copy.from, size_t(b.copy.bytes));
    of(b.bar).bytes -= b.copy.bytes, settle(of(b.bar));
  }
}
inline void finish_groups(size_t pending) {
  while (current->groups.size() > pending) {
    for (const Copy& c : current->groups.front()) std::memcpy(c.to, c.from, size_t(c.bytes));
    current->groups.pop_front();
  }
}

inline void enter() {
  (*body)();
  current->done = true;
  yield();
}

// Every block of the grid at once. Returns whether all came to their end.
template <typename F> bool run(dim3 grid, int threads, size_t shared, unsigned seed, F&& kernel) {
  constexpr size_t kStack = 128 << 10;
  constexpr unsigned char kGuard = 0xa5;
  const int blocks = int(grid.x * grid.y);
  grid_size = grid, block_size = dim3(unsigned(threads));
  dice.seed(seed);
  const std::function<void()> function = kernel;
  body = &function;
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int b = 0; b < blocks; b++) {
    all.push_back(std::make_unique<Block>());
    Block& block = *all.back();
    block.index = dim3(unsigned(b) % grid.x, unsigned(b) / grid.x);
    block.shared.assign(shared + 1024 + 256, kGuard);
    block.base = block.shared.data() + (1024 - reinterpret_cast<uintptr_t>(block.shared.data()) % 1024);
    std::memset(block.base, 0xff, shared);
    block.warps.resize(size_t(threads) / 32);
    for (int t = 0; t < threads; t++) {
      auto f = std::make_unique<Fiber>();
      f->stack = std::make_unique<char[]>(kStack);
      f->thread = dim3(unsigned(t)), f->block = &block, f->warp = &block.warps[size_t(t) / 32], f->lane = t % 32;
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.get(), f->context.uc_stack.ss_size = kStack, f->context.uc_link = nullptr;
      makecontext(&f->context, enter, 0);
      fibers.push_back(std::move(f));
    }
  }
  // Warps in a random order every round; now and then a warp sits out some rounds, to stretch the skew between them.
  const size_t warps = fibers.size() / 32;
  std::vector<size_t> order(warps), asleep(warps, 0);
  for (size_t i = 0; i < warps; i++) order[i] = i;
  size_t left = fibers.size();
  for (long round = 0; left && round < 400000; round++) {
    if (round % 8 == 0) std::shuffle(order.begin(), order.end(), dice);
    for (size_t w : order) {
      if (asleep[w]) { asleep[w]--; continue; }
      if (dice() % 512 == 0) asleep[w] = dice() % 200;
      for (size_t i = 0; i < 32; i++) {
        current = fibers[w * 32 + i].get();
        if (current->done) continue;
        swapcontext(&scheduler, &current->context);
        left -= current->done;
      }
    }
    land(false);
  }
  bool whole = left == 0 && bulks.empty();
  if (left) std::fprintf(stderr, "%zu threads never came to their end\n", left);
  bulks.clear();
  for (auto& b : all) {
    for (int i = 0; i < 64; i++) whole &= b->base[shared + size_t(i)] == kGuard;
  }
  return whole;
}
}  // namespace emulation

#define threadIdx emulation::current->thread
#define blockIdx emulation::current->block->index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size

inline void __syncwarp() { uint32_t none = 0; emulation::gather(~0u, &none, 1); }
template <typename V> V __shfl_xor_sync(unsigned mask, V v, int o) { return emulation::shuffle(mask, v, emulation::current->lane ^ o); }
template <typename V> V __shfl_down_sync(unsigned mask, V v, int by) {
  const int source = emulation::current->lane + by;
  return emulation::shuffle(mask, v, source < 32 ? source : emulation::current->lane);
}
