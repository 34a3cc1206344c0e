// Hopper's warpgroup matrix instructions (sm_90a): shared-memory descriptors, fences, the forms the SSD scan uses.
#pragma once

#include "ssd_mma.cuh"
#include "tensor_copy.cuh"

namespace mamba {
namespace ssd {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of accumulators or fragments over a wait.
template <int kN>
__device__ __forceinline__ void pin(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; n++) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
template <int kN>
__device__ __forceinline__ void pin(uint32_t (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; n++) asm volatile("" : "+r"(d[n][0]), "+r"(d[n][1]), "+r"(d[n][2]), "+r"(d[n][3])::"memory");
}

// Tiles are [rows][64] 16-bit elements with the 128-byte swizzle of Tile<64>, at multiples of 1,024 bytes. Eight rows
// are 1,024 bytes; tiles of further columns follow `tile_bytes` apart (used only where columns are M or N).
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t tile_bytes = 0) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(tile_bytes >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}

// The same, `bytes` further (a multiple of 16 that stays within shared memory).
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// kMore: than at launch.
template <int kKeep, bool kMore>
__device__ __forceinline__ void set_registers() {
  if constexpr (kMore)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kKeep));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kKeep));
}

// Operand lists of the instructions below, for 64 by N outputs: d[n] holds the four accumulators a thread has of columns 8n to
// 8n + 7; the operands behind them are two descriptors and whether to add, or four registers and a descriptor.
#define MAMBA_ACC(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MAMBA_ACC_8(n)                                                                                      \
  MAMBA_ACC(n), MAMBA_ACC(n + 1), MAMBA_ACC(n + 2), MAMBA_ACC(n + 3), MAMBA_ACC(n + 4), MAMBA_ACC(n + 5), \
      MAMBA_ACC(n + 6), MAMBA_ACC(n + 7)
#define MAMBA_ACC_64 MAMBA_ACC_8(0)
#define MAMBA_ACC_80 MAMBA_ACC_8(0), MAMBA_ACC(8), MAMBA_ACC(9)
#define MAMBA_ACC_128 MAMBA_ACC_8(0), MAMBA_ACC_8(8)
#define MAMBA_OUT_64                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MAMBA_OUT_80 MAMBA_OUT_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MAMBA_OUT_128                                                                        \
  MAMBA_OUT_80 ", %40, %41, %42, %43, %44, %45, %46, %47, "                                  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MAMBA_SHARED_64 "%32, %33"
#define MAMBA_SHARED_80 "%40, %41"
#define MAMBA_ADD_64 "%34"
#define MAMBA_ADD_80 "%42"
#define MAMBA_REGS_64 "{%32, %33, %34, %35}, %36"
#define MAMBA_REGS_80 "{%40, %41, %42, %43}, %44"
#define MAMBA_REGS_128 "{%64, %65, %66, %67}, %68"

// Both operands in shared memory; DOWN: which of them have depth down the rows.
#define MAMBA_WGMMA_SHARED(NAME, N, TYPE, DOWN)                                                              \
  static __device__ __forceinline__ void NAME(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {      \
    asm volatile(                                                                                            \
        "{\n.reg .pred add;\nsetp.ne.b32 add, " MAMBA_ADD_##N ", 0;\n"                                       \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " "                                  \
        "{" MAMBA_OUT_##N "}, " MAMBA_SHARED_##N ", add, 1, 1, " DOWN ";\n}"                                 \
        : MAMBA_ACC_##N                                                                                      \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                       \
  }
// The first operand in registers.
#define MAMBA_WGMMA_REGS(N, TYPE)                                                                            \
  static __device__ __forceinline__ void regs_columns(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " "                         \
                 "{" MAMBA_OUT_##N "}, " MAMBA_REGS_##N ", 1, 1, 1, 1;"                                      \
                 : MAMBA_ACC_##N                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
  }

// The instructions name the type of their operands, so each type has them spelled out: one text serves both.
//   rows_rows     d (+)= a b for 64 x 64 outputs and 16 of depth, both operands rows of depth in shared memory
//   rows_columns  the same for 64 x 64 or 64 x 80 outputs, b with depth down the rows
//   columns_columns  the same, both operands in shared memory with depth down the rows
//   regs_columns  d += a b for 64 x 64, 64 x 80 or 64 x 128 outputs and 16 of depth: a in registers, b in shared memory
//                 with depth down the rows
template <typename T>
struct Wgmma;

#define MAMBA_WGMMA(T, TYPE)                            \
  template <>                                           \
  struct Wgmma<T> {                                     \
    MAMBA_WGMMA_SHARED(rows_rows, 64, TYPE, "0, 0")       \
    MAMBA_WGMMA_SHARED(rows_columns, 64, TYPE, "0, 1")    \
    MAMBA_WGMMA_SHARED(rows_columns, 80, TYPE, "0, 1")    \
    MAMBA_WGMMA_SHARED(columns_columns, 64, TYPE, "1, 1") \
    MAMBA_WGMMA_SHARED(columns_columns, 80, TYPE, "1, 1") \
    MAMBA_WGMMA_REGS(64, TYPE)                            \
    MAMBA_WGMMA_REGS(80, TYPE)                            \
    MAMBA_WGMMA_REGS(128, TYPE)                           \
  };

MAMBA_WGMMA(__nv_bfloat16, "bf16")
MAMBA_WGMMA(__half, "f16")

#undef MAMBA_WGMMA
#undef MAMBA_WGMMA_REGS
#undef MAMBA_WGMMA_SHARED
#undef MAMBA_REGS_128
#undef MAMBA_REGS_80
#undef MAMBA_REGS_64
#undef MAMBA_ADD_80
#undef MAMBA_ADD_64
#undef MAMBA_SHARED_80
#undef MAMBA_SHARED_64
#undef MAMBA_OUT_128
#undef MAMBA_OUT_80
#undef MAMBA_OUT_64
#undef MAMBA_ACC_128
#undef MAMBA_ACC_80
#undef MAMBA_ACC_64
#undef MAMBA_ACC_8
#undef MAMBA_ACC

}  // namespace ssd
}  // namespace mamba
