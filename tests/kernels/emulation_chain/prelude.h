// What the chain of selective_scan needs of a GPU beyond the emulation of the smaller kernels: blocks whose warps wait
// for each other, shared memory, barriers in it.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cuda_runtime.h"

#define __shared__
#define __align__(n)
#define blockDim emulation::block_size

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) { return cudaSuccess; }

namespace emulation {
inline thread_local dim3 block_size;
inline std::barrier<>* whole_block;
}  // namespace emulation
namespace mamba::scan {
alignas(16) inline char shared[232448];
}

inline void __syncwarp() { emulation::warp->meet.arrive_and_wait(); }
inline void __syncthreads() { emulation::whole_block->arrive_and_wait(); }

// An mbarrier is one word: its phase in the top bit, then the arrivals of a phase, then those still missing.
inline std::atomic<uint64_t>& word_of(uint64_t* barrier) { return *reinterpret_cast<std::atomic<uint64_t>*>(barrier); }
inline void emulated_init(uint64_t* barrier, int arrivals) { word_of(barrier) = uint64_t(arrivals) << 32 | uint32_t(arrivals); }
inline void emulated_arrive(uint64_t* barrier) {
  uint64_t old = word_of(barrier).load(), next;
  do {
    uint64_t high = old >> 32, missing = uint32_t(old);
    if (missing == 0) std::abort();
    if (--missing == 0) missing = high & 0x7fffffff, high ^= 0x80000000;
    next = high << 32 | missing;
  } while (!word_of(barrier).compare_exchange_weak(old, next));
}
inline void emulated_wait(uint64_t* barrier, int parity) {
  while (int(word_of(barrier).load() >> 63) == parity) sched_yield();
}
