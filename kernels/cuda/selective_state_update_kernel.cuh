// Device code of selective_state_update, memory-bound. A lane has 16 bytes of a channel's state, so a channel is 1 to 32
// lanes of a warp. A thread takes kRows batch rows of its channel, all in flight before the first is used; what a row has
// once (step, input, gate, output) is loaded and computed by one lane and handed round.
#pragma once

#include "common.cuh"
#include "early_launch.cuh"
#include "mamba/selective_state_update.h"

namespace mamba::update {

using Params = mamba_selective_state_update_params;

constexpr int kThreads = 128;

// V values of B or C, in one access where alignment allows.
template <typename T, int V> __device__ __forceinline__ Vec<T, V> load_row(const T* p, bool vector) {
  if (vector) return load_vec<T, V>(p);
  Vec<T, V> r;
#pragma unroll
  for (int i = 0; i < V; i++) r.v[i] = p[i];
  return r;
}

// d_state = kLanes * V states, V of them (16 bytes) to a lane; blockIdx.y: kRows rows of the batch.
template <typename T, typename S, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Params p, int group_dim, bool vector) {
  static_assert(kRows == 1 || kRows == 2 || kRows == 4);
  constexpr int V = 16 / sizeof(S), N = kLanes * V;
  constexpr int kEach = kRows > kLanes ? kRows / kLanes : 1;  // rows whose scalars a lane has
  constexpr int kSpan = kLanes > kRows ? kLanes / kRows : 1;  // lanes that have the same row's
  let_next_start();
  const int channel = (blockIdx.x * kThreads + threadIdx.x) / kLanes, q = threadIdx.x % kLanes;
  const bool active = channel < p.dim;
  const int c = active ? channel : p.dim - 1;  // idle lanes shadow the last channel, for the shuffles
  const int g = p.ngroups == 1 ? 0 : c / group_dim, b0 = blockIdx.y * kRows, rows = min(kRows, p.batch - b0);
  const int64_t row_stride = int64_t(p.dim) * N;
  const int64_t at = b0 * row_stride + int64_t(c) * N + q * V;
  const S* state_in = static_cast<const S*>(p.state_in) + at;
  S* state_out = static_cast<S*>(p.state_out) + at;
  if (threadIdx.x % 8 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (r < rows) prefetch_line(state_in + r * row_stride);
    }
  }
  wait_for_previous();

  float A[V];
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    *reinterpret_cast<float4*>(A + i) = *reinterpret_cast<const float4*>(p.A + int64_t(c) * N + q * V + i);
  }
  const float bias = p.delta_bias ? load_early(p.delta_bias + c) : 0.0f, D = p.D ? load_early(p.D + c) : 0.0f;
  uint4 raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    if (r < rows) raw[r] = *reinterpret_cast<const uint4*>(state_in + r * row_stride);
  }
  T u[kEach], delta[kEach], z[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int64_t b = b0 + min(q / kSpan * kEach + e, rows - 1);
    u[e] = static_cast<const T*>(p.u)[b * p.u_batch_stride + c];
    delta[e] = static_cast<const T*>(p.delta)[b * p.delta_batch_stride + c];
    z[e] = p.z ? load_early(static_cast<const T*>(p.z) + b * p.z_batch_stride + c) : from_float<T>(0.0f);
  }
  Vec<T, V> B[kRows], C[kRows];
  const T* B_row = static_cast<const T*>(p.B) + b0 * p.B_batch_stride + g * N + q * V;
  const T* C_row = static_cast<const T*>(p.C) + b0 * p.C_batch_stride + g * N + q * V;
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    if (r < rows) {
      B[r] = load_row<T, V>(B_row, vector);
      C[r] = load_row<T, V>(C_row, vector);
      B_row += p.B_batch_stride, C_row += p.C_batch_stride;
    }
  }

  float dt[kEach], dx[kEach], y[kRows];
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    dt[e] = to_float(delta[e]) + bias;
    if (p.delta_softplus) dt[e] = softplus<true>(dt[e]);
    dx[e] = dt[e] * to_float(u[e]);
    dt[e] *= kLog2e;
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    constexpr unsigned kAll = ~0u;
    const float dt_r = kRows == 1 ? dt[0] : __shfl_sync(kAll, dt[r % kEach], r / kEach * kSpan, kLanes);
    const float dx_r = kRows == 1 ? dx[0] : __shfl_sync(kAll, dx[r % kEach], r / kEach * kSpan, kLanes);
    pair_t<S>* pairs = reinterpret_cast<pair_t<S>*>(&raw[r]);
    y[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      float2 h = to_float2(pairs[i / 2]);
      h.x = fmaf(ex2(dt_r * A[i]), h.x, dx_r * to_float(B[r].v[i]));
      h.y = fmaf(ex2(dt_r * A[i + 1]), h.y, dx_r * to_float(B[r].v[i + 1]));
      y[r] = fmaf(to_float(C[r].v[i]), h.x, y[r]);
      y[r] = fmaf(to_float(C[r].v[i + 1]), h.y, y[r]);
      pairs[i / 2] = from_float2<S>(h.x, h.y);
    }
    if (active && r < rows) store_16(state_out + r * row_stride, raw[r]);
  }

  // Sums over the lanes: as long as there are rows to share out, each half keeps half of them.
  constexpr int kShared = kRows < kLanes ? kRows : kLanes;
#pragma unroll
  for (int o = kLanes / 2, n = kRows / 2; o >= 1; o /= 2, n /= 2) {
    if (o * kShared >= kLanes) {
      const bool upper = q & o;
#pragma unroll
      for (int i = 0; i < n; i++) {
        const float give = upper ? y[i] : y[i + n];
        y[i] = (upper ? y[i + n] : y[i]) + __shfl_xor_sync(~0u, give, o);
      }
    } else {
      y[0] += __shfl_xor_sync(~0u, y[0], o);
    }
  }
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int r = q / kSpan * kEach + e;
    float out = fmaf(D, to_float(u[e]), y[e]);
    if (p.z) out *= silu(to_float(z[e]));
    if (active && r < rows && q % kSpan == 0) {
      static_cast<T*>(p.y)[(b0 + r) * p.y_batch_stride + c] = from_float<T>(out);
    }
  }
}

// Any d_state, any alignment: eight lanes to a channel, states in strides of eight.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) generic_kernel(const __grid_constant__ Params p) {
  let_next_start();
  wait_for_previous();
  const int channel = (blockIdx.x * kThreads + threadIdx.x) / 8, q = threadIdx.x % 8, N = p.d_state;
  const bool active = channel < p.dim;
  const int c = active ? channel : p.dim - 1, g = c / (p.dim / p.ngroups);
  const int64_t b = blockIdx.y;
  const float x = to_float(static_cast<const T*>(p.u)[b * p.u_batch_stride + c]);
  const float bias = p.delta_bias ? p.delta_bias[c] : 0.0f;
  const float v = to_float(static_cast<const T*>(p.delta)[b * p.delta_batch_stride + c]) + bias;
  const float dt = p.delta_softplus ? softplus<true>(v) : v;
  const T* B = static_cast<const T*>(p.B) + b * p.B_batch_stride + g * N;
  const T* C = static_cast<const T*>(p.C) + b * p.C_batch_stride + g * N;
  const int64_t at = (b * p.dim + c) * N;
  float y = 0.0f;
  for (int n = q; n < N && active; n += 8) {
    float h = to_float(static_cast<const S*>(p.state_in)[at + n]);
    h = fmaf(ex2(dt * kLog2e * p.A[int64_t(c) * N + n]), h, dt * x * to_float(B[n]));
    y = fmaf(to_float(C[n]), h, y);
    static_cast<S*>(p.state_out)[at + n] = from_float<S>(h);
  }
#pragma unroll
  for (int o = 1; o < 8; o *= 2) y += __shfl_xor_sync(~0u, y, o);
  if (p.D) y = fmaf(p.D[c], x, y);
  if (p.z) y *= silu(to_float(static_cast<const T*>(p.z)[b * p.z_batch_stride + c]));
  if (active && q == 0) static_cast<T*>(p.y)[b * p.y_batch_stride + c] = from_float<T>(y);
}

}  // namespace mamba::update
