// What the kernels of the chain share, and rows of 16-byte loads that a few threads have in registers.
//
// Every kernel lets the next one start at once and waits for the one before only where it needs its results. Before that
// it may read whatever was there when the token began: the embedding's kernel alone waits first.
#pragma once

#include "decode_chain.cuh"
#include "early_launch.cuh"

namespace mamba::decode::chain {

// Blocks of four kernels in a row share a multiprocessor, one of each; so many of these would find registers.
constexpr int kProductThreads = 256;                    // of in_proj, out_proj and the head: 64 registers, four blocks
constexpr int kMiddleThreads = 320, kMiddleBlocks = 4;  // of x_proj, and the most of the scan: 48 registers

struct Buffers {  // one batch row's scratch; strides are the vectors' own lengths
  float *hidden, *u, *z, *x, *y;
};

__device__ __forceinline__ float warp_total(float v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// Sixteen bytes of weights times as many values.
template <typename T> __device__ __forceinline__ float dot16(const uint4& w, const float4& a, const float4& b, float sum) {
  if constexpr (sizeof(T) == 4) {
    sum = fmaf(__uint_as_float(w.x), a.x, fmaf(__uint_as_float(w.y), a.y, sum));
    return fmaf(__uint_as_float(w.z), a.z, fmaf(__uint_as_float(w.w), a.w, sum));
  } else {
    const pair_t<T>* v = reinterpret_cast<const pair_t<T>*>(&w);
    const float2 p = to_float2(v[0]), q = to_float2(v[1]), r = to_float2(v[2]), s = to_float2(v[3]);
    sum = fmaf(p.x, a.x, fmaf(p.y, a.y, fmaf(q.x, a.z, fmaf(q.y, a.w, sum))));
    return fmaf(r.x, b.x, fmaf(r.y, b.y, fmaf(s.x, b.z, fmaf(s.y, b.w, sum))));
  }
}

// This thread's part of one row times x, by kLanes threads of which it is the lane-th.
template <int kLanes, typename T>
__device__ __forceinline__ float row_dot(const T* row, const float* x, int width, int lane) {
  float sum = 0.0f;
#pragma unroll 2
  for (int i = lane; i < width; i += kLanes) sum = fmaf(to_float(row[i]), x[i], sum);
  return sum;
}

// The same for kRows rows by loads of 16 bytes, the first ones under way before x is there: `values(i)` gives four of it, if
// they are far away (kFar) all at a time.
template <typename T, int kLanes, int kRows, int kAhead, bool kFar> struct RowsAhead {
  static constexpr int kParts = sizeof(T) / 2;
  uint4 ahead[kAhead][kRows][kParts];  // as they lie: a conversion would wait for them

  __device__ __forceinline__ void begin(const T* const (&row)[kRows], int width, int lane) {
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = (a * kLanes + lane) * 8;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (i < width) load(row[r] + i, ahead[a][r]);
      }
    }
  }
  template <typename F>
  __device__ __forceinline__ void finish(const T* const (&row)[kRows], int width, int lane, float (&sum)[kRows],
                                         F&& values) const {
    float4 v[kAhead][2];
    auto take = [&](int a) {
      const int i = (a * kLanes + lane) * 8;
      if (i < width) v[a][0] = values(i), v[a][1] = values(i + 4);
    };
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      if (kFar) take(a);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) sum[r] = 0.0f;
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      if (!kFar) take(a);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if ((a * kLanes + lane) * 8 < width) sum[r] = dot(ahead[a][r], v[a][0], v[a][1], sum[r]);
      }
    }
#pragma unroll 1
    for (int i = (kAhead * kLanes + lane) * 8; i < width; i += kLanes * 8) {
      const float4 p = values(i), q = values(i + 4);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        uint4 w[kParts];
        load(row[r] + i, w);
        sum[r] = dot(w, p, q, sum[r]);
      }
    }
  }

 private:
  __device__ __forceinline__ static void load(const T* from, uint4 (&w)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; i++) w[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  __device__ __forceinline__ static float dot(const uint4 (&w)[kParts], const float4& a, const float4& b, float sum) {
    if constexpr (sizeof(T) == 4) return dot16<T>(w[kParts - 1], b, b, dot16<T>(w[0], a, a, sum));
    else return dot16<T>(w[0], a, b, sum);
  }
};

}  // namespace mamba::decode::chain
