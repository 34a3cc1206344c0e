// CUDA C++ on a CPU for kernels whose blocks wait for each other: every thread of every block is a fiber. Fibers run in a
// random order, and asynchronous copies land at a random time, so that a missing wait shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
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
#include <utility>
#include <vector>

#include "sanitizer.h"

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
template <typename V> void __stcg(V* p, V v) { *p = v; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { std::memset(p, v, n); return cudaSuccess; }

namespace emulation {

struct Meet {
  int arrived = 0;
  unsigned generation = 0;
  uint32_t in[32][6], out[32][6];
  char order[2];  // what is done before a meeting that orders memory; of every other generation
};
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  char order[2];
};
struct Fiber;
struct Warp {
  std::map<std::pair<unsigned, char>, Meet> meets;  // by lanes and by what they meet for
  std::vector<std::unique_ptr<Fiber>> lanes;
  size_t left = 0, asleep = 0;
};
struct Block {
  dim3 index;
  std::vector<unsigned char> shared;
  unsigned char* base;
  alignas(16) unsigned char fixed[16];  // shared memory of a size known to the compiler
  std::map<int, Barrier> barriers;
  std::vector<Warp> warps;
};
struct Copy { void* to; const void* from; int bytes; };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* id;
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
inline void* scheduler_id;
inline Fiber* current;
inline std::mt19937 dice;
inline const std::function<void()>* body;
inline char end_of_kernel;

inline void yield() {
  become(scheduler_id);
  swapcontext(&current->context, &scheduler);
}
template <typename F> void wait_until(F&& ready) { while (!ready()) yield(); }

inline void block_barrier(int id, int threads) {
  const Unwatched bookkeeping;
  Barrier& b = current->block->barriers[id];
  const unsigned now = b.generation;
  release(&b.order[now % 2]);
  if (++b.arrived == threads) b.arrived = 0, b.generation++;
  wait_until([&] { return b.generation != now; });
  acquire(&b.order[now % 2]);
}

// All lanes of `mask` meet, for the same operation; afterwards meet.out holds what each brought. Memory is ordered by a
// meeting for nothing else alone.
constexpr char kSync = 'w', kShuffle = 's', kReduce = 'r', kAny = 'a', kBallot = 'b';
inline Meet& gather(unsigned mask, const uint32_t* words, int count, char operation) {
  Meet& m = current->warp->meets[{mask, operation}];
  const unsigned now = m.generation;
  std::memcpy(m.in[current->lane], words, size_t(count) * 4);
  if (operation == kSync) release(&m.order[now % 2]);
  if (++m.arrived == __builtin_popcount(mask)) {
    std::memcpy(m.out, m.in, sizeof(m.in));
    m.arrived = 0, m.generation++;
  }
  wait_until([&] { return m.generation != now; });
  if (operation == kSync) acquire(&m.order[now % 2]);
  return m;
}
template <typename V> V shuffle(unsigned mask, V v, int source) {
  const Unwatched bookkeeping;
  uint32_t word;
  std::memcpy(&word, &v, 4);
  const Meet& m = gather(mask, &word, 1, kShuffle);
  if (!(mask >> source & 1)) source = current->lane;
  std::memcpy(&v, &m.out[source][0], 4);
  return v;
}
// f(so far, a lane's word) over all lanes.
template <typename F> unsigned over_lanes(unsigned word, char operation, F&& f) {
  const Unwatched bookkeeping;
  const Meet& m = gather(~0u, &word, 1, operation);
  unsigned result = 0;
  for (int lane = 0; lane < 32; lane++) result = f(result, m.out[lane][0]);
  return result;
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
  release(&end_of_kernel);
  current->done = true;
  yield();
}

// How a block of the last kernel came to its end.
struct Ended {
  dim3 block;
  unsigned barriers, any;  // barriers of the whole block; rounds of __any_sync of its first warp
};
inline std::vector<Ended> ended;

inline std::unique_ptr<Block> start(dim3 index, int threads, size_t shared, unsigned char guard) {
  constexpr size_t kStack = 128 << 10;
  auto block = std::make_unique<Block>();
  block->index = index;
  block->shared.assign(shared + 1024 + 256, guard);
  block->base = block->shared.data() + (1024 - reinterpret_cast<uintptr_t>(block->shared.data()) % 1024);
  std::memset(block->base, 0xff, shared), std::memset(block->fixed, 0xff, sizeof block->fixed);
  block->warps.resize(size_t(threads) / 32);
  for (int t = 0; t < threads; t++) {
    auto f = std::make_unique<Fiber>();
    f->stack = std::make_unique<char[]>(kStack);
    f->id = new_thread();
    f->thread = dim3(unsigned(t)), f->block = block.get(), f->warp = &block->warps[size_t(t) / 32], f->lane = t % 32;
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.get(), f->context.uc_stack.ss_size = kStack, f->context.uc_link = nullptr;
    makecontext(&f->context, enter, 0);
    f->warp->left++;
    f->warp->lanes.push_back(std::move(f));
  }
  return block;
}

// Every block of the grid, as many as there are places at once; if they are fewer than blocks, in a random order, for none
// is promised. Returns whether all came to their end.
template <typename F>
bool run(dim3 grid, int threads, size_t shared, unsigned seed, F&& kernel, size_t places = SIZE_MAX) {
  const Unwatched bookkeeping;
  constexpr unsigned char kGuard = 0xa5;
  grid_size = grid, block_size = dim3(unsigned(threads));
  dice.seed(seed);
  const std::function<void()> function = kernel;
  body = &function, scheduler_id = this_thread();
  std::vector<dim3> waiting;
  for (unsigned i = grid.x * grid.y * grid.z; i-- > 0;) waiting.push_back({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
  if (places < waiting.size()) std::shuffle(waiting.begin(), waiting.end(), dice);
  std::vector<std::unique_ptr<Block>> blocks;  // that run
  std::vector<Warp*> order;
  bool whole = true;
  ended.clear();
  // Warps in a random order every round; now and then a warp sits out some rounds, to stretch the skew between them.
  long round = 0;
  for (; round < 400000; round++) {
    while (blocks.size() < places && !waiting.empty()) {
      blocks.push_back(start(waiting.back(), threads, shared, kGuard));
      waiting.pop_back();
      for (Warp& w : blocks.back()->warps) order.push_back(&w);
    }
    if (blocks.empty()) break;
    if (round % 8 == 0) std::shuffle(order.begin(), order.end(), dice);
    for (Warp* w : order) {
      if (w->asleep) { w->asleep--; continue; }
      if (dice() % 512 == 0) w->asleep = dice() % 200;
      for (auto& lane : w->lanes) {
        if (lane->done) continue;
        current = lane.get();
        become(current->id);
        swapcontext(&scheduler, &current->context);
        if (current->done) w->left--, end_thread(current->id);
      }
    }
    land(false);
    std::erase_if(order, [](const Warp* w) { return w->left == 0; });
    std::erase_if(blocks, [&](auto& b) {
      for (const Warp& w : b->warps) {
        if (w.left) return false;
      }
      for (int i = 0; i < 64; i++) whole &= b->base[shared + size_t(i)] == kGuard;
      ended.push_back({b->index, b->barriers[0].generation, b->warps[0].meets[{~0u, kAny}].generation});
      return true;
    });
  }
  acquire(&end_of_kernel);
  if (!blocks.empty()) std::fprintf(stderr, "%zu blocks never came to their end\n", blocks.size());
  whole &= blocks.empty() && bulks.empty();
  bulks.clear();
  return whole;
}
}  // namespace emulation

#define threadIdx emulation::current->thread
#define blockIdx emulation::current->block->index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size

inline void __syncwarp() {
  const emulation::Unwatched bookkeeping;
  const uint32_t none = 0;
  emulation::gather(~0u, &none, 1, emulation::kSync);
}
inline void __nanosleep(unsigned) { emulation::yield(); }
inline void __threadfence() {}  // fibers take turns; the sanitizer is to see the release and the acquire
template <typename V> V __shfl_xor_sync(unsigned mask, V v, int o) { return emulation::shuffle(mask, v, emulation::current->lane ^ o); }
template <typename V> V __shfl_down_sync(unsigned mask, V v, int by) {
  const int source = emulation::current->lane + by;
  return emulation::shuffle(mask, v, source < 32 ? source : emulation::current->lane);
}
template <typename V> V __shfl_up_sync(unsigned mask, V v, int by) {
  const int source = emulation::current->lane - by;
  return emulation::shuffle(mask, v, source >= 0 ? source : emulation::current->lane);
}
inline unsigned __reduce_or_sync(unsigned, unsigned v) {
  return emulation::over_lanes(v, emulation::kReduce, [](unsigned a, unsigned b) { return a | b; });
}
inline int __reduce_add_sync(unsigned, int v) {
  return int(emulation::over_lanes(unsigned(v), emulation::kReduce, [](unsigned a, unsigned b) { return a + b; }));
}
inline bool __any_sync(unsigned, bool v) {
  return emulation::over_lanes(v, emulation::kAny, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __ballot_sync(unsigned, bool v) {
  const unsigned bit = v ? 1u << emulation::current->lane : 0;
  return emulation::over_lanes(bit, emulation::kBallot, [](unsigned a, unsigned b) { return a | b; });
}
// Atomic and no more: they order nothing else.
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline int atomicMax(int* p, int v) {
  int old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return old;
}
