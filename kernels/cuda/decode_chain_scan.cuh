// The chain's middle: x_proj (Mamba-1), then dt, the scan's update and the gate.
#pragma once

#include "decode_chain_row.cuh"

namespace mamba::decode::chain {

// A block has one row of x_proj, its warps share the width.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    x_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  __shared__ float parts[kBlockWarps];
  const int64_t b = blockIdx.y, row = blockIdx.x;
  const T* w = static_cast<const T*>(l.x_proj) + row * p.d_inner;
  const float* u = s.u + b * p.d_inner;
  float sum;
  if (vector) {
    RowAhead<T, kBlock> product;
    product.begin(w, p.d_inner, threadIdx.x);
    predecessor();
    sum = product.finish(w, u, p.d_inner, threadIdx.x);
  } else {
    predecessor();
    sum = row_dot<kBlock>(w, u, p.d_inner, threadIdx.x);
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < kBlockWarps; i++) sum += parts[i];
  s.x[b * gridDim.x + row] = sum;
}

// Eight lanes have one channel.
template <typename T, int kFamily>
__global__ void __launch_bounds__(kBlock)
    scan_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  const int sub = threadIdx.x % 8, channel = blockIdx.x * (kBlock / 8) + threadIdx.x / 8, N = p.d_state, R = p.dt_rank;
  const int c = channel < p.d_inner ? channel : p.d_inner - 1;
  const int64_t b = blockIdx.y, at = b * p.d_inner + c;
  const int head = kFamily == 2 ? c / (p.d_inner / p.nheads) : c, bc = 2 * (kFamily == 2 ? p.ngroups : 1) * N;
  const float bias = l.dt_bias[head], D = l.D[head];
  const T* w = static_cast<const T*>(l.dt_proj) + int64_t(c) * R;
  RowAhead<T, 8> product;
  float A[2] = {0.0f, 0.0f};
  if (kFamily == 1) {
    if (vector) product.begin(w, R, sub);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (sub + 8 * i < N) A[i] = l.A[int64_t(c) * N + sub + 8 * i];
    }
  }
  predecessor();
  const float* x = s.x + b * (kFamily == 2 ? bc + p.nheads : R + bc);
  const float *B = x + (kFamily == 2 ? head / (p.nheads / p.ngroups) * N : R), *C = B + bc / 2;
  float first[2] = {0.0f, 0.0f};  // states, under way while dt is computed
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (sub + 8 * i < N) first[i] = l.ssm_state_in[at * N + sub + 8 * i];
  }
  float dt = 0.0f, decay = 0.0f;
  if (kFamily == 2) {  // a head has one decay
    dt = x[bc + head];
    decay = ex2(dt * kLog2e * l.A[head]);
  } else {
    dt = vector ? product.finish(w, x, R, sub) : row_dot<8>(w, x, R, sub);
#pragma unroll
    for (int o = 4; o; o /= 2) dt += __shfl_xor_sync(~0u, dt, o);
    dt = softplus<true>(dt + bias);
  }
  const float u = s.u[at], du = dt * u;
  float y = 0.0f;
  auto update = [&](int i, float h, float a) {
    if (kFamily == 1) decay = ex2(dt * kLog2e * a);
    h = fmaf(decay, h, du * B[i]);
    if (channel < p.d_inner) l.ssm_state_out[at * N + i] = h;
    y = fmaf(C[i], h, y);
  };
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (sub + 8 * i < N) update(sub + 8 * i, first[i], A[i]);
  }
#pragma unroll 7
  for (int i = sub + 16; i < N; i += 8) update(i, l.ssm_state_in[at * N + i], kFamily == 1 ? l.A[int64_t(c) * N + i] : 0.0f);
#pragma unroll
  for (int o = 4; o; o /= 2) y += __shfl_xor_sync(~0u, y, o);
  if (sub == 0 && channel < p.d_inner) s.y[at] = to_float(from_float<T>(fmaf(D, u, y) * s.z[at]));
}

}  // namespace mamba::decode::chain
