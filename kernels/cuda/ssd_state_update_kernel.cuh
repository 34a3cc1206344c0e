// Device code of ssd_state_update: one token of Mamba-2. The state is read and written once; everything else is small, so
// the kernel is a copy with arithmetic: 16-byte accesses, several rows in flight in every thread.
#pragma once

#include "common.cuh"
#include "early_launch.cuh"
#include "mamba/ssd_state_update.h"

namespace mamba::ssd_update {

using Params = mamba_ssd_state_update_params;

constexpr int kThreads = 128;

struct Plan {
  int lanes, lanes_log2;  // threads that share a state row, a power of two up to 32
};

struct Decay {
  float dt, keep;
};

template <typename T> __device__ __forceinline__ Decay decay_of(const Params& p, int batch, int head) {
  float dt = to_float(static_cast<const T*>(p.dt)[batch * p.dt_batch_stride + head]);
  if (p.dt_bias) dt += p.dt_bias[head];
  if (p.dt_softplus) dt = softplus<true>(dt);
  dt = fminf(fmaxf(dt, p.dt_min), p.dt_max);
  return {dt, ex2(dt * p.A[head] * kLog2e)};
}

// A row of the state is kVecs 16-byte vectors for each of `lanes` >= kRows threads; a thread works on kRows rows at once.
// What a row has once (input, skip, gate, output) belongs to lanes / kRows of its lanes.
template <typename T, typename S, int kVecs, int kRows>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Params p, const Plan plan) {
  constexpr int kWidth = 16 / sizeof(S);
  let_next_start();
  const int lanes = plan.lanes, lane = threadIdx.x & (lanes - 1), rows_per_pass = kThreads >> plan.lanes_log2;
  const int head = blockIdx.y, batch = blockIdx.z;
  const int row0 = blockIdx.x * rows_per_pass * kRows + (threadIdx.x >> plan.lanes_log2);
  const int64_t at = ((int64_t(batch) * p.nheads + head) * p.headdim + row0) * p.d_state + lane * kWidth;
  const int64_t pass = int64_t(rows_per_pass) * p.d_state;
  const S* in = static_cast<const S*>(p.state_in) + at;
  S* out = static_cast<S*>(p.state_out) + at;
  if (threadIdx.x % 8 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int v = 0; v < kVecs; v++) {
        if (row0 + r * rows_per_pass < p.headdim) prefetch_line(in + r * pass + v * lanes * kWidth);
      }
    }
  }
  wait_for_previous();

  // The state first: it is what takes long.
  uint4 state[kRows][kVecs];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      if (row0 + r * rows_per_pass < p.headdim) {
        state[r][v] = *reinterpret_cast<const uint4*>(in + r * pass + v * lanes * kWidth);
      }
    }
  }
  const int shift = plan.lanes_log2 - (kRows == 1 ? 0 : kRows == 2 ? 1 : kRows == 4 ? 2 : 3);
  const int own_row = row0 + (lane >> shift) * rows_per_pass;  // the row whose output this lane computes
  const int channel = head * p.headdim + min(own_row, p.headdim - 1);
  const T x = static_cast<const T*>(p.x)[batch * p.x_batch_stride + channel];
  const T z = p.z ? load_early(static_cast<const T*>(p.z) + batch * p.z_batch_stride + channel) : from_float<T>(0.0f);
  const float D = p.D ? load_early(p.D + (p.d_per_channel ? channel : head)) : 0.0f;
  const int group = p.ngroups == 1 ? 0 : head / (p.nheads / p.ngroups);
  const T* B_row = static_cast<const T*>(p.B) + batch * p.B_batch_stride + group * p.d_state + lane * kWidth;
  const T* C_row = static_cast<const T*>(p.C) + batch * p.C_batch_stride + group * p.d_state + lane * kWidth;
  Vec<T, kWidth> B[kVecs], C[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    B[v] = load_vec<T, kWidth>(B_row + v * lanes * kWidth);
    C[v] = load_vec<T, kWidth>(C_row + v * lanes * kWidth);
  }
  const Decay decay = decay_of<T>(p, batch, head);

  float y[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const float dtx = decay.dt * __shfl_sync(~0u, to_float(x), r << shift, lanes);
    y[r] = 0.0f;
#pragma unroll
    for (int v = 0; v < kVecs; v++) {
      pair_t<S>* pairs = reinterpret_cast<pair_t<S>*>(&state[r][v]);
#pragma unroll
      for (int e = 0; e < kWidth; e += 2) {
        float2 h = to_float2(pairs[e / 2]);
        h.x = fmaf(h.x, decay.keep, dtx * to_float(B[v].v[e]));
        h.y = fmaf(h.y, decay.keep, dtx * to_float(B[v].v[e + 1]));
        y[r] = fmaf(h.x, to_float(C[v].v[e]), y[r]);
        y[r] = fmaf(h.y, to_float(C[v].v[e + 1]), y[r]);
        pairs[e / 2] = from_float2<S>(h.x, h.y);
      }
      if (row0 + r * rows_per_pass < p.headdim) store_16(out + r * pass + v * lanes * kWidth, state[r][v]);
    }
  }

  // Sums over the lanes: as long as there are rows to share out, each half keeps half of them.
  int o = lanes / 2;
#pragma unroll
  for (int n = kRows / 2; n >= 1; n /= 2, o /= 2) {
    const bool upper = lane & o;
#pragma unroll
    for (int i = 0; i < n; i++) {
      const float give = upper ? y[i] : y[i + n];
      y[i] = (upper ? y[i + n] : y[i]) + __shfl_xor_sync(~0u, give, o);
    }
  }
  for (; o >= 1; o /= 2) y[0] += __shfl_xor_sync(~0u, y[0], o);
  if (own_row < p.headdim && (lane & ((1 << shift) - 1)) == 0) {
    float result = fmaf(D, to_float(x), y[0]);
    if (p.z) result *= silu(to_float(z));
    static_cast<T*>(p.y)[batch * p.y_batch_stride + channel] = from_float<T>(result);
  }
}

// Any d_state and alignment: a warp a row.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) any_kernel(const __grid_constant__ Params p) {
  let_next_start();
  wait_for_previous();
  const int head = blockIdx.y, batch = blockIdx.z, lane = threadIdx.x & 31;
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.headdim) return;
  const int group = head / (p.nheads / p.ngroups);
  const int64_t state_at = ((static_cast<int64_t>(batch) * p.nheads + head) * p.headdim + row) * p.d_state;
  const T* B = static_cast<const T*>(p.B) + batch * p.B_batch_stride + group * p.d_state;
  const T* C = static_cast<const T*>(p.C) + batch * p.C_batch_stride + group * p.d_state;
  const float x = to_float(static_cast<const T*>(p.x)[batch * p.x_batch_stride + head * p.headdim + row]);
  const Decay decay = decay_of<T>(p, batch, head);
  float y = 0.f;
  for (int n = lane; n < p.d_state; n += 32) {
    const float old = to_float(static_cast<const S*>(p.state_in)[state_at + n]);
    const float h = fmaf(old, decay.keep, decay.dt * x * to_float(B[n]));
    y = fmaf(h, to_float(C[n]), y);
    static_cast<S*>(p.state_out)[state_at + n] = from_float<S>(h);
  }
  for (int d = 16; d > 0; d /= 2) y += __shfl_xor_sync(0xffffffffu, y, d);
  if (lane > 0) return;
  const int channel = head * p.headdim + row;
  if (p.D) y = fmaf(p.D[p.d_per_channel ? channel : head], x, y);
  if (p.z) y *= silu(to_float(static_cast<const T*>(p.z)[batch * p.z_batch_stride + channel]));
  static_cast<T*>(p.y)[batch * p.y_batch_stride + channel] = from_float<T>(y);
}

}  // namespace mamba::ssd_update
