// The chain's first kernels: the embedding, and a layer's norm, in_proj and convolution.
#pragma once

#include "decode_chain_row.cuh"

namespace mamba::decode::chain {

template <typename T> __global__ void embed_kernel(const __grid_constant__ Params p, float* hidden) {
  predecessor();
  const int i = blockIdx.x * kBlock + threadIdx.x;
  const int64_t b = blockIdx.y, token = p.input_ids[b];
  if (i < p.d_model) hidden[b * p.d_model + i] = to_float(static_cast<const T*>(p.embedding)[token * p.d_model + i]);
}

// Channel c of `channels`: v through the convolution and silu, its state one token on.
template <typename T>
__device__ __forceinline__ float convolved(const Layer& l, int64_t batch, int channels, int c, int taps, float v) {
  const float in = to_float(from_float<T>(v));
  const T* w = static_cast<const T*>(l.conv_weight) + int64_t(c) * taps;
  const T* before = static_cast<const T*>(l.conv_state_in) + (batch * channels + c) * (taps - 1);
  T* after = static_cast<T*>(l.conv_state_out) + (batch * channels + c) * (taps - 1);
  float u = fmaf(to_float(w[taps - 1]), in, to_float(static_cast<const T*>(l.conv_bias)[c]));
  for (int i = 0; i < taps - 1; i++) {
    const T h = before[i];
    u = fmaf(to_float(w[i]), to_float(h), u);
    if (i) after[i - 1] = h;
  }
  after[taps - 2] = from_float<T>(in);
  return to_float(from_float<T>(silu(u)));
}

// Mamba-1: a warp has one channel, its rows of x and z, then its convolution.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    in1_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int lane = threadIdx.x % 32, c = blockIdx.x * kBlockWarps + threadIdx.x / 32;
  const int own = c < p.d_inner ? c : p.d_inner - 1;
  const int64_t b = blockIdx.y;
  const T* weight = static_cast<const T*>(l.in_proj) + int64_t(own) * p.d_model;
  const T* const rows[2] = {weight, weight + int64_t(p.d_inner) * p.d_model};
  float sum[2], scale = 0.0f;
  warp_dots<T, 2, 5>(rows, x, p.d_model, vector, sum, [&] {
    predecessor();
    scale = normed<T>(s.hidden + b * p.d_model, l.norm, p.d_model, p.norm_eps, x);
  });
  if (lane || c >= p.d_inner) return;
  const float gate = to_float(from_float<T>(sum[1] * scale));
  s.u[b * p.d_inner + c] = convolved<T>(l, b, p.d_inner, c, p.d_conv, sum[0] * scale);
  s.z[b * p.d_inner + c] = silu(gate);
}

// Mamba-2: a warp has a channel's rows of x and z as above, or two rows of what follows them: B and C with their
// convolution, then dt.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    in2_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int lane = threadIdx.x % 32, item = blockIdx.x * kBlockWarps + threadIdx.x / 32;
  const int bc = 2 * p.ngroups * p.d_state, extra = bc + p.nheads, conv_dim = p.d_inner + bc;
  const bool channel = item < p.d_inner;
  const int64_t b = blockIdx.y;
  int at[2] = {p.d_inner + item, item};  // rows of in_proj
  if (!channel) {
    at[0] = 2 * p.d_inner + 2 * (item - p.d_inner), at[1] = at[0] + 1;
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = min(at[r], 2 * p.d_inner + extra - 1);
  }
  const T* weight = static_cast<const T*>(l.in_proj);
  const T* const rows[2] = {weight + int64_t(at[0]) * p.d_model, weight + int64_t(at[1]) * p.d_model};
  float sum[2], scale = 0.0f;
  warp_dots<T, 2, 5>(rows, x, p.d_model, vector, sum, [&] {
    predecessor();
    scale = normed<T>(s.hidden + b * p.d_model, l.norm, p.d_model, p.norm_eps, x);
  });
  if (channel) {
    if (lane) return;
    s.u[b * p.d_inner + item] = convolved<T>(l, b, conv_dim, item, p.d_conv, sum[0] * scale);
    s.z[b * p.d_inner + item] = silu(to_float(from_float<T>(sum[1] * scale)));
  } else if (lane < 2) {
    const int r = 2 * (item - p.d_inner) + lane;
    const float v = lane ? sum[1] : sum[0];
    if (r < bc) s.x[b * extra + r] = convolved<T>(l, b, conv_dim, p.d_inner + r, p.d_conv, v * scale);
    else if (r < extra) s.x[b * extra + r] = softplus<true>(v * scale + l.dt_bias[r - bc]);
  }
}

}  // namespace mamba::decode::chain
