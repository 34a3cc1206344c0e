// What the chain of selective_scan needs of a GPU beyond the emulation of the smaller kernels: blocks whose warps wait
// for each other, shared memory, barriers in it.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda.h"
#include "cuda_runtime.h"

#define __shared__
#define __align__(n)
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) { return cudaSuccess; }

namespace emulation {
constexpr int kShared = 232448, kBlocks = 2;  // bytes of a block; blocks of a cluster, at most
inline thread_local dim3 block_size, grid_size;
inline thread_local std::barrier<>* whole_block;
inline std::barrier<>* whole_cluster;
inline thread_local int rank;  // of the block in its cluster
alignas(16) inline char memory[kBlocks][kShared];
}  // namespace emulation

inline void __syncwarp() { emulation::warp->meet.arrive_and_wait(); }
inline void __syncthreads() { emulation::whole_block->arrive_and_wait(); }

// An mbarrier is one word: its phase in the top bit, the arrivals of a phase, what is still to be sent (in 8 bytes, from kNothing
// on: it may come before it is expected), and the arrivals still missing.
inline std::atomic<uint64_t>& word_of(uint64_t* barrier) { return *reinterpret_cast<std::atomic<uint64_t>*>(barrier); }
constexpr uint64_t kNothing = 0x4000;
inline void emulated_init(uint64_t* barrier, int arrivals) {
  word_of(barrier) = uint64_t(arrivals) << 32 | kNothing << 16 | uint16_t(arrivals);
}
inline void emulated_change(uint64_t* barrier, int arrives, int expected) {
  uint64_t old = word_of(barrier).load(), next;
  do {
    uint64_t high = old >> 32, sent = (old >> 16 & 0xffff) + expected, missing = (old & 0xffff) - arrives;
    if (missing > 0x7fff) std::abort();
    if (missing == 0 && sent == kNothing) missing = high & 0x7fffffff, high ^= 0x80000000;
    next = high << 32 | sent << 16 | missing;
  } while (!word_of(barrier).compare_exchange_weak(old, next));
}
inline void emulated_arrive(uint64_t* barrier) { emulated_change(barrier, 1, 0); }
inline void emulated_wait(uint64_t* barrier, int parity) {
  while (int(word_of(barrier).load() >> 63) == parity) sched_yield();
}
inline char* emulated_shared(uint32_t at) { return &emulation::memory[0][0] + at; }
// f(in the box, in the tensor, whether the tensor has it) for the columns of each token.
template <typename F> void for_each_run(const CUtensorMap& map, char* box, int token, int group, int batch, F&& f) {
  const int bytes = map.columns * map.element;
  for (int g = group; g < group + map.box_groups; g++) {
    for (int t = token; t < token + map.box_tokens; t++, box += bytes) {
      f(box, map.at + batch * map.batch_bytes + t * map.token_bytes + int64_t(g) * bytes, bytes, t < map.tokens && g < map.groups);
    }
  }
}
inline void emulated_load_box(uint32_t dst, const CUtensorMap& map, int column, int token, int group, int batch, uint64_t* barrier) {
  if (dst % 128 != 0 || column != 0) std::abort();
  for_each_run(map, emulated_shared(dst), token, group, batch, [](char* to, const char* from, int bytes, bool there) {
    std::memset(to, 0, bytes);
    if (there) std::memcpy(to, from, bytes);
  });
  emulated_change(barrier, 0, -map.box_groups * map.box_tokens * map.columns * map.element / 8);
}
inline void emulated_store_box(const CUtensorMap& map, uint32_t src, int column, int token, int group, int batch) {
  if (column != 0) std::abort();
  for_each_run(map, emulated_shared(src), token, group, batch, [](const char* from, char* to, int bytes, bool there) {
    if (there) std::memcpy(to, from, bytes);
  });
}
inline void emulated_send(uint32_t to, float2 v, uint32_t barrier) {
  std::memcpy(emulated_shared(to), &v, sizeof v);
  emulated_change(reinterpret_cast<uint64_t*>(emulated_shared(barrier)), 0, -1);
}
