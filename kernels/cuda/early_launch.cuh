// Programmatic dependent launch, for kernels of a few microseconds: such a kernel is started while the one before it
// in the stream still runs, brings its data into the L2 cache, and waits there. Before Hopper all of it does nothing.
#pragma once

#ifndef __CUDACC_RTC__
#include "common.cuh"
#endif

namespace mamba {

// To be called first: kernels behind this one in the stream may start as soon as every block of it has.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Nothing in global memory may be read or written before this: the kernel ahead may still be writing it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A line of 128 bytes into the L2 cache, where later writes of the kernel ahead are seen: allowed before the wait.
__device__ __forceinline__ void prefetch_line(const void* p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// 16 bytes in one access: an assignment of values just computed is split into its words by the compiler.
__device__ __forceinline__ void store_16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_8(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

// A load that stays where it is written instead of sinking to its use.
__device__ __forceinline__ float load_early(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
template <typename T> __device__ __forceinline__ T load_early(const T* p) {
  uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return *reinterpret_cast<T*>(&v);
}

#ifndef __CUDACC_RTC__
// Launches a kernel that calls wait_for_previous, with `shared` bytes of dynamic shared memory, in clusters of `cluster` blocks.
template <typename... P>
int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, int shared, int cluster, cudaStream_t stream, P... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = attributes, config.numAttrs = compute_major() < 9 ? 0 : cluster > 1 ? 2 : 1;
  const bool launched = cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess;
  return launched && cudaGetLastError() == cudaSuccess ? MAMBA_OK : MAMBA_ERROR_CUDA;
}
template <typename... P>
int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, int shared, cudaStream_t stream, P... arguments) {
  return launch_early(kernel, grid, block, shared, 1, stream, arguments...);
}
template <typename... P>
int launch_early(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, P... arguments) {
  return launch_early(kernel, grid, block, 0, stream, arguments...);
}
#endif

}  // namespace mamba
