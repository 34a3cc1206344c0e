// Device helpers shared by every op: dtype load/store, vector I/O, fast math, barriers, dispatch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "mamba/common.h"

namespace mamba {

int sm_count();             // multiprocessors of the current device, read once
int compute_major();        // of the current device, read once
size_t max_shared_bytes();  // most dynamic shared memory of a block there

inline int launch_status() { return cudaGetLastError() == cudaSuccess ? MAMBA_OK : MAMBA_ERROR_CUDA; }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t ceil_div64(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- dtypes ------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two neighbours in one register (or two, for float).
template <typename T> struct Pair;
template <> struct Pair<float> { using type = float2; };
template <> struct Pair<__half> { using type = __half2; };
template <> struct Pair<__nv_bfloat16> { using type = __nv_bfloat162; };
template <typename T> using pair_t = typename Pair<T>::type;

__device__ __forceinline__ float2 to_float2(float2 v) { return v; }
__device__ __forceinline__ float2 to_float2(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 v) {  // a shift and a mask: bfloat16 is the upper half
  uint32_t bits = *reinterpret_cast<uint32_t*>(&v);
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <typename T> __device__ __forceinline__ pair_t<T> from_float2(float a, float b);
template <> __device__ __forceinline__ float2 from_float2<float>(float a, float b) { return make_float2(a, b); }
template <> __device__ __forceinline__ __half2 from_float2<__half>(float a, float b) {
  return __floats2half2_rn(a, b);
}
template <> __device__ __forceinline__ __nv_bfloat162 from_float2<__nv_bfloat16>(float a, float b) {
  return __floats2bfloat162_rn(a, b);
}

// N consecutive elements moved by the widest accesses their alignment (of N*sizeof(T)) allows.
template <typename T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
  T v[N];
};
template <typename T, int N> __device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <typename T, int N> __device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}
inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Calls f with a value of the I/O type: dispatch(dtype, [&](auto t) { using T = decltype(t); ... }).
template <typename F> int dispatch(int dtype, F&& f) {
  switch (dtype) {
    case MAMBA_F32: return f(float{});
    case MAMBA_F16: return f(__half{});
    case MAMBA_BF16: return f(__nv_bfloat16{});
    default: return MAMBA_ERROR_DTYPE;
  }
}

// ---- math --------------------------------------------------------------------------------------

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// One special-function instruction each; denormals flush, so ex2 needs no scaling around it.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// softplus(x) = max(x, 0) + log1p(e^-|x|), the logarithm as w * q(w) on [0, 1]: relative error 1.3e-6
// (3e-8 if kPrecise) however small the result is, with one special-function instruction instead of two.
template <bool kPrecise> __device__ __forceinline__ float softplus(float x) {
  float w = ex2(-kLog2e * fabsf(x));
  float q;
  if (kPrecise) {
    q = fmaf(5.232659162e-03f, w, -2.950510526e-02f);
    q = fmaf(q, w, 7.822574816e-02f);
    q = fmaf(q, w, -1.366322995e-01f);
    q = fmaf(q, w, 1.910600020e-01f);
    q = fmaf(q, w, -2.484298086e-01f);
    q = fmaf(q, w, 3.331909671e-01f);
    q = fmaf(q, w, -4.999949314e-01f);
    q = fmaf(q, w, 9.999999699e-01f);
  } else {
    q = fmaf(1.414093357e-02f, w, -6.640154759e-02f);
    q = fmaf(q, w, 1.492236169e-01f);
    q = fmaf(q, w, -2.350384887e-01f);
    q = fmaf(q, w, 3.310944699e-01f);
    q = fmaf(q, w, -4.998696560e-01f);
    q = fmaf(q, w, 9.999987316e-01f);
  }
  return fmaf(w, q, fmaxf(x, 0.0f));
}

// x * sigmoid(x); e^-x overflows to infinity for x < -88 and the quotient is then 0, as it should be.
__device__ __forceinline__ float silu(float x) { return x * rcp(1.0f + ex2(-kLog2e * x)); }

// ---- asynchronous copies and barriers ------------------------------------------------------------

// threadIdx.x where the compiler does not know it to be that: what is computed from it is not kept until then.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// kBytes of 4, 8 or 16; with valid = false the destination is filled with zeros and nothing is read.
template <int kBytes> __device__ __forceinline__ void cp_async(void* dst, const void* src, bool valid = true) {
  int n = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(dst)), "l"(src), "r"(n) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem_address(dst)), "l"(src), "n"(kBytes), "r"(n)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(arrivals) : "memory");
}
// The copy engine, and the other blocks of a cluster, see the barriers that this thread has set up.
__device__ __forceinline__ void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(smem_address(bar)) : "memory");
}
// An arrival that has the phase wait for `bytes` besides, which the copy engine or another block brings.
__device__ __forceinline__ void mbarrier_expect(uint64_t* bar, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes) : "memory");
#endif
}
// Arrives when `used`, an OR of loads from a buffer that is refilled behind the arrival, is in registers: a load that was only
// issued may be overtaken. gridDim.z is 1, which the compiler does not know, so the address depends on `used` and is `bar`.
__device__ __forceinline__ void mbarrier_arrive_after(uint64_t* bar, uint32_t used) { mbarrier_arrive(bar + (used & (gridDim.z - 1))); }
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(smem_address(bar)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(smem_address(bar)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace mamba
