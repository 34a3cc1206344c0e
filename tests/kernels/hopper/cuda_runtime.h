// CUDA C++ on a CPU for kernels whose warps wait for each other: every thread of a block is a thread, a collective of a
// warp meets at a barrier, shared memory is one array and its addresses are offsets.
#pragma once
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__
using std::max;
using std::min;
inline int64_t max(int64_t a, int b) { return a > b ? a : b; }
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t v) { float f; std::memcpy(&f, &v, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t v; std::memcpy(&v, &f, 4); return v; }
inline float __int_as_float(int32_t v) { return __uint_as_float(uint32_t(v)); }
inline int32_t __float_as_int(float f) { return int32_t(__float_as_uint(f)); }
template <typename T> T __ldcg(const T* p) { return *p; }
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
namespace emu {
alignas(1024) inline uint8_t smem[262144];
inline thread_local dim3 thread, block;

struct Warp {
  std::barrier<> meet{32};
  uint64_t v[32][4];
};
inline thread_local Warp* warp;
inline thread_local int lane;
inline std::barrier<>* all;

// What every lane shows the others, until `done`.
inline void gather(const uint64_t (&mine)[4]) {
  std::memcpy(warp->v[lane], mine, sizeof(mine));
  warp->meet.arrive_and_wait();
}
inline void done() { warp->meet.arrive_and_wait(); }
template <typename T> T exchange(T v, int source) {
  uint64_t mine[4] = {};
  std::memcpy(mine, &v, sizeof(T));
  gather(mine);
  T result;
  std::memcpy(&result, warp->v[source], sizeof(T));
  done();
  return result;
}

// mbarriers, by address.
struct Barrier {
  int count, pending, phase = 0;
  long bytes = 0;
};
inline std::mutex mutex;
inline std::condition_variable changed;
inline std::map<uint32_t, Barrier> barriers;
inline void settle(Barrier& at) {
  if (at.pending < 0) std::fprintf(stderr, "more arrivals than an mbarrier counts\n"), std::abort();
  if (at.pending > 0 || at.bytes != 0) return;
  at.phase++, at.pending = at.count;
  changed.notify_all();
}

// A tensor map: [batch, tokens, columns] of 16 bits.
struct Map {
  const void* base;
  int columns, tokens, batch;  // columns: of a head or group
  int64_t token, row;
  uint16_t* at(int col, int of, int t, int b) const {
    return static_cast<uint16_t*>(const_cast<void*>(base)) + b * row + t * token + of * columns + col;
  }
};

template <typename F> void run(dim3 grid, int threads, F kernel) {
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      std::memset(smem, 0xff, sizeof(smem));
      barriers.clear();
      std::barrier<> everyone(threads);
      all = &everyone;
      std::vector<std::unique_ptr<Warp>> warps;
      for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Warp>());
      std::vector<std::thread> started;
      for (int i = 0; i < threads; i++)
        started.emplace_back([&, i] {
          thread = dim3(i), block = dim3(x, y), lane = i % 32, warp = warps[i / 32].get();
          kernel();
          warp->meet.arrive_and_drop();
        });
      for (auto& t : started) t.join();
    }
}
}  // namespace emu

#define threadIdx emu::thread
#define blockIdx emu::block
inline void __syncthreads() { emu::all->arrive_and_wait(); }
inline void __syncwarp() { emu::warp->meet.arrive_and_wait(); }
template <typename T> T __shfl_sync(unsigned, T v, int source, int width = 32) {
  return emu::exchange(v, emu::lane / width * width + source % width);
}
template <typename T> T __shfl_up_sync(unsigned, T v, int by, int width = 32) {
  return emu::exchange(v, emu::lane % width < by ? emu::lane : emu::lane - by);
}
