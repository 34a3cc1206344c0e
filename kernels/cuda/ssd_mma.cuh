// Building blocks of the SSD kernels: tensor-core and copy instructions, swizzled tiles, dtype traits.
#pragma once

#include "common.cuh"

namespace mamba {
namespace ssd {

// A step's decay is clamped here in log2 units: 2^-150 is already 0, and the running sum keeps its precision
// behind a step that wipes the state.
constexpr float kMinLog2Decay = -150.f;

template <typename T>
struct Traits;

template <>
struct Traits<__half> {
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    __half2 v = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return __half22float2(*reinterpret_cast<__half2*>(&v));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    __half2 v = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Traits<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    __nv_bfloat162 v = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// 16 bytes from global to shared memory; zeros when `valid` is false (nothing is read then).
__device__ __forceinline__ void copy_async_16(uint32_t dst, const void* src, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

// The compiler may split a uint4 store whose registers do not lie together.
__device__ __forceinline__ void store_global_16(void* at, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Four 8 x 8 matrices to shared memory, the inverse of ldmatrix.
__device__ __forceinline__ void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
#else
  // Lane l holds the pair (row l / 4, columns 2 (l % 4)) of every matrix; lane 8 m + r knows where its row r is.
  const int lane = threadIdx.x & 31;
  const uint32_t v[4] = {a, b, c, d};
#pragma unroll
  for (int m = 0; m < 4; m++) {
    const uint32_t row = __shfl_sync(0xffffffffu, address, 8 * m + (lane >> 2));
    store_shared(row + (lane & 3) * 4, v[m]);
  }
#endif
}

// A tile of rows of kCols 16-bit elements in shared memory, rows dense, its 16-byte pieces permuted so that the eight
// rows an ldmatrix phase touches lie in different banks.
template <int kCols>
struct Tile {
  static constexpr int kRowBytes = kCols * 2;
  static constexpr bool kXor = kRowBytes % 64 == 0;
  static_assert(kXor || kRowBytes % 128 == 32, "no swizzle for this row length");

  static __device__ __forceinline__ int flip(int row) {
    if constexpr (kRowBytes % 128 == 0) return row & 7;
    if constexpr (kRowBytes == 64) return (row >> 1) & 3;
    return (row >> 2) & 1;
  }
  // Byte offset of piece `piece` of row `row`.
  static __device__ __forceinline__ uint32_t offset(int row, int piece) {
    return row * kRowBytes + ((piece ^ flip(row)) << 4);
  }
  // The address `pieces` (a constant multiple of 2, or of 4 if the row has four) further along the same row, from an
  // address whose own piece lies below that multiple. Tiles start at multiples of their row length.
  static __device__ __forceinline__ uint32_t along(uint32_t address, int pieces) {
    return kXor ? address ^ (pieces << 4) : address + (pieces << 4);
  }
  // This lane's part of a 16 x 16 ldmatrix at the tile's origin: matrices rows 0-7 and 8-15, then columns 8-15.
  static __device__ __forceinline__ uint32_t lane_16x16() {
    const int lane = threadIdx.x & 31;
    return offset(lane & 15, lane >> 4);
  }
  // The same for 8 rows x 32 columns.
  static __device__ __forceinline__ uint32_t lane_8x32() {
    const int lane = threadIdx.x & 31;
    return offset(lane & 7, lane >> 3);
  }
};

}  // namespace ssd
}  // namespace mamba
