// selective_scan, tactic "ring": a warp's shared memory, what fills it, and words that cross blocks.
#pragma once

#include "selective_scan.cuh"

namespace mamba::scan {

constexpr int kRingWarps = 16;  // of a block, at most

// A warp's shared memory.
template <typename T> struct Ring {
  static constexpr int kWidth = 32, kTokens = 16;   // channels of a group, tokens of a tile
  static constexpr int kRow = kTokens + 4;          // of a state of B or C as float32; the padding avoids bank conflicts
  static constexpr int kElements = 16 / sizeof(T);  // of one copy
  uint64_t before[kState][kWidth];  // the states before the tile
  float bc[2 * kState][kRow];       // B and C as float32, time innermost
  T u[kTokens][kWidth], delta[kTokens][kWidth], z[kTokens][kWidth];  // y takes the place of z
  T raw[kTokens][2 * kState];                                        // B and C as they are
};

template <typename T> int ring_bytes(const Tactic& t) {
  return t.groups * t.warps * int(sizeof(Ring<T>)) + t.groups * kState * 32 * int(sizeof(float));  // A of every group
}

// ---- across the blocks of a cluster ----

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}
__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
#else
  return 1;
#endif
}
// All threads of the cluster arrive, then wait; what they wrote to shared memory before they arrived is seen after.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  __syncthreads();
}
// The address of `p` in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t cluster_address(const void* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(p)), "r"(rank));
  return address;
#else
  return smem_address(p);
#endif
}
template <bool kRemote> __device__ __forceinline__ void hand_on(uint32_t address, uint64_t value) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kRemote) {
    asm volatile("st.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
    return;
  }
  asm volatile("st.relaxed.cluster.shared::cta.b64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
#else
  asm volatile("st.relaxed.cta.shared.b64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
#endif
}
__device__ __forceinline__ uint64_t look(const uint64_t* place) {
  uint64_t value;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.relaxed.cluster.shared::cta.b64 %0, [%1];" : "=l"(value) : "r"(smem_address(place)) : "memory");
#else
  asm volatile("ld.relaxed.cta.shared.b64 %0, [%1];" : "=l"(value) : "r"(smem_address(place)) : "memory");
#endif
  return value;
}
// ---- copies ----

// What a lane copies: 16 bytes of u, delta and z, or of B or C, of every few tokens.
template <typename T> struct RingCopier {
  using R = Ring<T>;
  static constexpr int kRuns = 32 / R::kElements, kApart = 32 / kRuns;  // copies of a token, tokens at once
  static constexpr int kStateRuns = 2 * kState / R::kElements, kStatesApart = 32 / kStateRuns;
  struct Column {
    const char* first;  // this lane's first access in the row
    int step;           // bytes from token to token
    __device__ __forceinline__ const T* at(int t) const { return reinterpret_cast<const T*>(first + int64_t(t) * step); }
  };
  Column u, delta, z, y, bc;
  int n, token, run;  // tokens of the row; this lane's first of a tile, and its first channel of the group
  bool in;            // whether its channels are

  __device__ __forceinline__ RingCopier(const Args<T>& p, int b, int n, int group, int c0, int end) : n(n) {
    const int lane = threadIdx.x % 32;
    token = lane / kRuns, run = lane % kRuns * R::kElements, in = c0 + run < end;
    auto column = [&](const T* base, const Strides& s, int first, int element) {
      const int step = int(p.reverse ? -s.token : s.token) * int(sizeof(T));
      const T* row = base + b * s.batch + (p.reverse ? n - 1 : 0) * s.token + element;
      return Column{reinterpret_cast<const char*>(row) + int64_t(first) * step, step};
    };
    const int c = in ? c0 + run : 0;
    u = column(p.u, p.u_stride, token, c), delta = column(p.delta, p.delta_stride, token, c);
    z = p.z ? column(p.z, p.z_stride, token, c) : u, y = column(p.y, p.y_stride, token, c);
    const int bc_token = lane / kStateRuns, state = lane % kStateRuns * R::kElements;
    bc = state < kState ? column(p.B, p.B_stride, bc_token, group * kState + state)
                        : column(p.C, p.C_stride, bc_token, group * kState + state - kState);
  }
  // Copies a tile from token t0 on, as far as the row goes.
  __device__ __forceinline__ void fill(T (&to)[R::kTokens][R::kWidth], const Column& from, int t0) const {
    T* dst = &to[token][run];
#pragma unroll
    for (int i = 0; i < R::kTokens; i += kApart) {
      if (in && t0 + i + token < n) cp_async<16>(dst + i * R::kWidth, from.at(t0 + i));
    }
  }
  __device__ __forceinline__ void fill_states(R& s, int t0) const {
    const int lane = threadIdx.x % 32;
    T* dst = &s.raw[0][0] + lane * R::kElements;
#pragma unroll
    for (int i = 0; i < R::kTokens; i += kStatesApart) {
      if (t0 + i + lane / kStateRuns < n) cp_async<16>(dst + i * 2 * kState, bc.at(t0 + i));
    }
  }
  __device__ __forceinline__ void write_y(const R& s, int t0) const {
    const T* src = &s.z[token][run];
#pragma unroll
    for (int i = 0; i < R::kTokens; i += kApart) {
      if (in && t0 + i + token < n) {
        store_vec<T, R::kElements>(const_cast<T*>(y.at(t0 + i)), load_vec<T, R::kElements>(src + i * R::kWidth));
      }
    }
  }
};

// B and C as float32, time innermost: a lane has one row. Zeros past the end of the row, where anything may lie.
template <typename T> __device__ __forceinline__ void ring_states(Ring<T>& s, int valid) {
  constexpr int kTokens = Ring<T>::kTokens;
  const int lane = threadIdx.x % 32;
  float f[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; t++) f[t] = to_float(s.raw[t][lane]);
  if (valid < kTokens) {
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      if (t >= valid) f[t] = 0.0f;
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; t += 4) *reinterpret_cast<float4*>(&s.bc[lane][t]) = make_float4(f[t], f[t + 1], f[t + 2], f[t + 3]);
}

}  // namespace mamba::scan
