// Boxes of a tensor by the copy engine, from Hopper on. Before, none of it does anything.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace mamba {

// What this thread has heard of being written to shared memory, the copy engine may read.
__device__ __forceinline__ void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// True for one lane of a warp, always the same. Not `lane == 0`, behind which the compiler puts every copy into a loop over the lanes.
__device__ __forceinline__ bool elected() {
  uint32_t is = threadIdx.x % 32 == 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(is));
#endif
  return is;
}

// Brings the description of a tensor near.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// The box at (column, token, batch) to `dst`, a multiple of 128 bytes; zeros where the tensor ends. Its bytes are counted at `bar`.
__device__ __forceinline__ void load_box(uint32_t dst, const CUtensorMap& map, int column, int token, int batch, uint64_t* bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst),
               "l"(&map), "r"(column), "r"(token), "r"(batch), "r"(smem_address(bar))
               : "memory");
#endif
}

// Of tensors of four dimensions.
__device__ __forceinline__ void load_box_of_part(uint32_t dst, const CUtensorMap& map, int column, int token, int part, int batch,
                                                 uint64_t* bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(dst),
               "l"(&map), "r"(column), "r"(token), "r"(part), "r"(batch), "r"(smem_address(bar))
               : "memory");
#endif
}

// A box out of shared memory, in this thread's bulk group; what lies past the end of the tensor is not written.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t src, int column, int token, int batch) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map), "r"(column), "r"(token),
               "r"(batch), "r"(src)
               : "memory");
#endif
}
__device__ __forceinline__ void store_box_of_part(const CUtensorMap& map, uint32_t src, int column, int token, int part, int batch) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map), "r"(column), "r"(token),
               "r"(part), "r"(batch), "r"(src)
               : "memory");
#endif
}
__device__ __forceinline__ void bulk_commit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
// Shared memory that this thread's bulk groups read may be written again.
__device__ __forceinline__ void bulk_wait_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

}  // namespace mamba
