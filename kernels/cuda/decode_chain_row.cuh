// Rows of a matrix times a vector, whose first weights are under way before the vector is there.
#pragma once

#include "decode_chain.cuh"

namespace mamba::decode::chain {

constexpr int kBlock = 256, kBlockWarps = kBlock / 32;

struct Buffers {  // one batch row's scratch; strides are the vectors' own lengths
  float *hidden, *u, *z, *x, *y;
};

// The kernel before: its results are visible from here on.
__device__ __forceinline__ void predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float warp_total(float v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

template <typename T> __device__ __forceinline__ float dot_vec(const Vec<T, 8>& w, const float* x, float sum) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum = fmaf(to_float(w.v[i]), x[i], sum);
  return sum;
}

// kRows rows of a matrix times x in shared memory by one warp, kAhead loads of each under way; the first precede ready().
template <typename T, int kRows, int kAhead, typename F>
__device__ __forceinline__ void warp_dots(const T* const (&rows)[kRows], const float* x, int width, bool vector,
                                          float (&sum)[kRows], F&& ready) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < kRows; r++) sum[r] = 0.0f;
  if (!vector) {
    ready();
    for (int i = lane; i < width; i += 32) {
#pragma unroll
      for (int r = 0; r < kRows; r++) sum[r] = fmaf(to_float(rows[r][i]), x[i], sum[r]);
    }
  } else {
    Vec<T, 8> w[kAhead][kRows];
    auto fetch = [&](int at) {
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int i = at + a * 256 + lane * 8;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          if (i < width) w[a][r] = load_vec<T, 8>(rows[r] + i);
        }
      }
    };
    fetch(0);
    ready();
    for (int at = 0; at < width; at += kAhead * 256) {
      if (at) fetch(at);
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int i = at + a * 256 + lane * 8;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          if (i < width) sum[r] = dot_vec(w[a][r], x + i, sum[r]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) sum[r] = warp_total(sum[r]);
}

// This thread's part of one row times x, by kLanes threads of which it is the lane-th.
template <int kLanes, typename T>
__device__ __forceinline__ float row_dot(const T* row, const float* x, int width, int lane) {
  float sum = 0.0f;
  for (int i = lane; i < width; i += kLanes) sum = fmaf(to_float(row[i]), x[i], sum);
  return sum;
}

// The same by loads of 16 bytes, the first ones under way before x is there.
template <typename T, int kLanes> struct RowAhead {
  static constexpr int kAhead = 3;
  Vec<T, 8> ahead[kAhead];

  __device__ __forceinline__ void begin(const T* row, int width, int lane) {
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = (a * kLanes + lane) * 8;
      if (i < width) ahead[a] = load_vec<T, 8>(row + i);
    }
  }
  __device__ __forceinline__ float finish(const T* row, const float* x, int width, int lane) const {
    float sum = 0.0f;
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = (a * kLanes + lane) * 8;
      if (i < width) sum = dot_vec(ahead[a], x + i, sum);
    }
    for (int i = (kAhead * kLanes + lane) * 8; i < width; i += kLanes * 8) sum = dot_vec(load_vec<T, 8>(row + i), x + i, sum);
    return sum;
  }
};

// hidden times the norm's weight into shared memory; returns the norm's scale.
template <typename T>
__device__ __forceinline__ float normed(const float* hidden, const void* weight, int width, float eps, float* x) {
  __shared__ float parts[kBlockWarps];
  float square = 0.0f;
  for (int i = threadIdx.x; i < width; i += kBlock) {
    const float v = hidden[i];
    square = fmaf(v, v, square);
    x[i] = v * to_float(static_cast<const T*>(weight)[i]);
  }
  square = warp_total(square);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = square;
  __syncthreads();
  square = 0.0f;
  for (int i = 0; i < kBlockWarps; i++) square += parts[i];
  return rsqrtf(square / width + eps);
}

}  // namespace mamba::decode::chain
