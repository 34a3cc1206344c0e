// The chain's middle: x_proj (Mamba-1), then dt, the scan's update and the gate.
#pragma once

#include "decode_chain_row.cuh"

namespace mamba::decode::chain {

// A block has two rows of x_proj, its warps share the width.
template <typename T>
__global__ void __launch_bounds__(kMiddleThreads, kMiddleBlocks)
    x_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s,
             bool vector) {
  constexpr int kWarps = kMiddleThreads / 32;
  extern __shared__ __align__(128) unsigned char smem[];
  let_next_start();
  float(*parts)[2] = reinterpret_cast<float(*)[2]>(smem);
  const int count = p.dt_rank + 2 * p.d_state, row = 2 * blockIdx.x;
  const int64_t b = blockIdx.y;
  const T* w = static_cast<const T*>(l.x_proj);
  const T* const rows[2] = {w + int64_t(row) * p.d_inner, w + int64_t(min(row + 1, count - 1)) * p.d_inner};
  const float* u = s.u + b * p.d_inner;
  float sum[2];
  if (vector) {
    RowsAhead<T, kMiddleThreads, 2, sizeof(T) == 4 ? 1 : 2, true> product;
    product.begin(rows, p.d_inner, threadIdx.x);
    wait_for_previous();
    product.finish(rows, p.d_inner, threadIdx.x, sum, [&](int i) { return __ldcg(reinterpret_cast<const float4*>(u + i)); });
  } else {
    wait_for_previous();
    for (int r = 0; r < 2; r++) sum[r] = row_dot<kMiddleThreads>(rows[r], u, p.d_inner, threadIdx.x);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] = warp_total(sum[r]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][r] = sum[r];
  }
  __syncthreads();
  const int r = threadIdx.x;
  if (r >= 2 || row + r >= count) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; i++) total += parts[i][r];
  s.x[b * count + row + r] = total;
}

// kN neighbours of a vector that is `length` long, by one access if they lie for it.
template <int kN> struct Few : Vec<float, kN> {
  using Vec<float, kN>::v;
  __device__ __forceinline__ void load(const float* p, int at, int length, bool wide) {
    if (wide) {
      if (at < length) static_cast<Vec<float, kN>&>(*this) = load_vec<float, kN>(p + at);
    } else {
#pragma unroll
      for (int i = 0; i < kN; i++) {
        if (at + i < length) v[i] = p[at + i];
      }
    }
  }
  __device__ __forceinline__ void store(float* p, int at, int length, bool wide) const {
    if (wide) {
      if (at < length) store_vec<float, kN>(p + at, *this);
    } else {
#pragma unroll
      for (int i = 0; i < kN; i++) {
        if (at + i < length) p[at + i] = v[i];
      }
    }
  }
};

// Eight lanes have one channel. `wide`: states, A, B and C lie for accesses of several values; `vector`: dt_proj does for 16
// bytes.
template <typename T, int kFamily>
__global__ void __launch_bounds__(kMiddleThreads, kFamily == 2 ? 2 : sizeof(T) == 4 ? 3 : kMiddleBlocks)
    scan_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool wide,
                bool vector) {
  constexpr int kN = kFamily == 1 ? 2 : 4, kGroups = kFamily == 1 ? 1 : 4;  // of kN states a lane, under way from the start
  extern __shared__ __align__(128) unsigned char smem[];
  let_next_start();
  const int sub = threadIdx.x % 8, channel = blockIdx.x * (blockDim.x / 8) + threadIdx.x / 8, N = p.d_state, R = p.dt_rank;
  const int c = channel < p.d_inner ? channel : p.d_inner - 1;
  const uint32_t at = blockIdx.y * p.d_inner + c;
  const int head = kFamily == 2 ? c / (p.d_inner / p.nheads) : c, bc = 2 * (kFamily == 2 ? p.ngroups : 1) * N;
  const float bias = kFamily == 1 ? l.dt_bias[c] : 0.0f, D = l.D[head], A_head = kFamily == 2 ? l.A[head] : 0.0f;
  const T* const w[1] = {static_cast<const T*>(l.dt_proj) + int64_t(c) * R};
  const float *before = l.ssm_state_in + int64_t(at) * N, *A = l.A + (kFamily == 1 ? int64_t(c) * N : 0);
  float* after = l.ssm_state_out + int64_t(at) * N;
  RowsAhead<T, 8, 1, sizeof(T) == 4 ? 1 : 3, false> product;
  if (kFamily == 1 && vector) product.begin(w, R, sub);
  Few<kN> h[kGroups], a[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    const int i = (g * 8 + sub) * kN;
    h[g].load(before, i, N, wide);
    if (kFamily == 1) a[g].load(A, i, N, wide);
  }
  wait_for_previous();
  const float u = __ldcg(s.u + at), z = __ldcg(s.z + at);
  float* x = reinterpret_cast<float*>(smem);
  const int x_rows = kFamily == 2 ? bc + p.nheads : R + bc;
  for (int i = threadIdx.x; i < x_rows; i += blockDim.x) x[i] = __ldcg(s.x + int64_t(blockIdx.y) * x_rows + i);
  __syncthreads();
  const float *B_at = x + (kFamily == 2 ? head / (p.nheads / p.ngroups) * N : R), *C_at = B_at + bc / 2;
  float dt, decay = 0.0f;
  if (kFamily == 2) {  // a head has one decay
    dt = x[bc + head];
    decay = ex2(dt * kLog2e * A_head);
  } else {
    float sum[1];
    if (vector) product.finish(w, R, sub, sum, [&](int i) { return *reinterpret_cast<const float4*>(x + i); });
    else sum[0] = row_dot<8>(w[0], x, R, sub);
    dt = sum[0];
#pragma unroll
    for (int o = 4; o; o /= 2) dt += __shfl_xor_sync(~0u, dt, o);
    dt = softplus<true>(dt + bias);
  }
  const float du = dt * u;
  float y = 0.0f;
  auto update = [&](int i, Few<kN>& h, const Few<kN>& a) {
    Few<kN> B, C;
    B.load(B_at, i, N, wide), C.load(C_at, i, N, wide);
#pragma unroll
    for (int k = 0; k < kN; k++) {
      if (i + k >= N) continue;
      if (kFamily == 1) decay = ex2(dt * kLog2e * a.v[k]);
      h.v[k] = fmaf(decay, h.v[k], du * B.v[k]);
      y = fmaf(C.v[k], h.v[k], y);
    }
    if (channel < p.d_inner) h.store(after, i, N, wide);
  };
#pragma unroll
  for (int g = 0; g < kGroups; g++) update((g * 8 + sub) * kN, h[g], a[g]);
#pragma unroll 1
  for (int i = (kGroups * 8 + sub) * kN; i < N; i += 8 * kN) {
    Few<kN> h, a;
    h.load(before, i, N, wide);
    if (kFamily == 1) a.load(A, i, N, wide);
    update(i, h, a);
  }
#pragma unroll
  for (int o = 4; o; o /= 2) y += __shfl_xor_sync(~0u, y, o);
  if (sub == 0 && channel < p.d_inner) s.y[at] = to_float(from_float<T>(fmaf(D, u, y) * z));
}

}  // namespace mamba::decode::chain
