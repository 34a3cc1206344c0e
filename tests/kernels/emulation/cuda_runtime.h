// CUDA C++ on a CPU, as far as the memory-bound kernels use it: a block's threads are threads, a shuffle meets at a barrier.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __uint_as_float(uint32_t v) { float f; std::memcpy(&f, &v, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t v; std::memcpy(&v, &f, 4); return v; }
inline float __int_as_float(int32_t v) { return __uint_as_float(uint32_t(v)); }
inline int32_t __float_as_int(float f) { return int32_t(__float_as_uint(f)); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulation {
inline thread_local dim3 thread, block, grid;
struct Warp {
  std::barrier<> meet;
  uint32_t values[32];
  explicit Warp(int lanes) : meet(lanes) {}
};
inline thread_local Warp* warp;
inline thread_local int lane;

inline float exchange(float value, int source) {
  warp->values[lane] = __float_as_uint(value);
  warp->meet.arrive_and_wait();
  const float result = __uint_as_float(warp->values[source]);
  warp->meet.arrive_and_wait();
  return result;
}

template <typename F> void run(dim3 grid_size, dim3 block_size, bool shuffles, F&& kernel) {
  const int threads = int(block_size.x * block_size.y);
  auto one = [&](dim3 at, int i) {
    grid = grid_size, block = at, lane = i % 32;
    thread = dim3(unsigned(i) % block_size.x, unsigned(i) / block_size.x);
    kernel();
  };
  for (unsigned z = 0; z < grid_size.z; z++)
    for (unsigned y = 0; y < grid_size.y; y++)
      for (unsigned x = 0; x < grid_size.x; x++) {
        if (!shuffles) {
          for (int i = 0; i < threads; i++) one(dim3(x, y, z), i);
          continue;
        }
        for (int w = 0; w < threads; w += 32) {  // nothing waits for another warp
          Warp together(32);
          std::vector<std::thread> lanes;
          for (int i = w; i < w + 32; i++) {
            lanes.emplace_back([&, i] { warp = &together, one(dim3(x, y, z), i), together.meet.arrive_and_drop(); });
          }
          for (auto& t : lanes) t.join();
        }
      }
}
}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define gridDim emulation::grid

inline float __shfl_sync(unsigned, float v, int source, int width = 32) {
  return emulation::exchange(v, emulation::lane / width * width + source % width);
}
inline float __shfl_xor_sync(unsigned, float v, int mask) { return emulation::exchange(v, emulation::lane ^ mask); }
