// The chain's first kernels: the embedding, and a layer's norm, in_proj and convolution.
#pragma once

#include "decode_chain_product.cuh"

namespace mamba::decode::chain {

// Nothing of a token starts before all that precedes it in the stream has ended: weights and states stand still from here on.
template <typename T, int kBits> __global__ void embed_kernel(const __grid_constant__ Params p, float* hidden) {
  wait_for_previous();
  let_next_start();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t b = blockIdx.y, token = p.input_ids[b];
  if (i < p.d_model) hidden[b * p.d_model + i] = EmbeddingRow<T, kBits>(p, token)[i];
}

// The convolution of one channel: its taps and state are loaded together, before the product.
template <typename T> struct Convolution {
  static constexpr int kMost = 4;  // taps; more are loaded one by one
  T w[kMost], h[kMost - 1], bias;

  __device__ __forceinline__ void load(const Layer& l, int64_t batch, int channels, int c, int taps) {
    if (taps > kMost) return;
    const T* weight = static_cast<const T*>(l.conv_weight) + int64_t(c) * taps;
    const T* before = static_cast<const T*>(l.conv_state_in) + (batch * channels + c) * (taps - 1);
    bias = static_cast<const T*>(l.conv_bias)[c], w[kMost - 1] = weight[taps - 1];
#pragma unroll
    for (int i = 0; i < kMost - 1; i++) {
      if (i < taps - 1) w[i] = weight[i], h[i] = before[i];
    }
  }
  // silu of the convolution; the state goes one token on.
  __device__ __forceinline__ float next(const Layer& l, int64_t batch, int channels, int c, int taps, float v) const {
    const T in = from_float<T>(v);
    T* after = static_cast<T*>(l.conv_state_out) + (batch * channels + c) * (taps - 1);
    float u;
    if (taps <= kMost) {
      u = fmaf(to_float(w[kMost - 1]), to_float(in), to_float(bias));
#pragma unroll
      for (int i = 0; i < kMost - 1; i++) {
        if (i >= taps - 1) continue;
        u = fmaf(to_float(w[i]), to_float(h[i]), u);
        if (i) after[i - 1] = h[i];
      }
    } else {
      const T* weight = static_cast<const T*>(l.conv_weight) + int64_t(c) * taps;
      const T* before = static_cast<const T*>(l.conv_state_in) + (batch * channels + c) * (taps - 1);
      u = fmaf(to_float(weight[taps - 1]), to_float(in), to_float(static_cast<const T*>(l.conv_bias)[c]));
#pragma unroll 1
      for (int i = 0; i < taps - 1; i++) {
        const T old = before[i];
        u = fmaf(to_float(weight[i]), to_float(old), u);
        if (i) after[i - 1] = old;
      }
    }
    after[taps - 2] = in;
    return to_float(from_float<T>(silu(u)));
  }
};

// What in_proj's rows are. A unit is a channel: its rows of x and z. Mamba-2 has units of two further rows behind them: B and
// C, which pass the convolution too, and dt.
template <int kFamily> struct InRows {
  int d_inner, bc, extra;

  __device__ __forceinline__ explicit InRows(const Params& p)
      : d_inner(p.d_inner), bc(kFamily == 2 ? 2 * p.ngroups * p.d_state : 0), extra(kFamily == 2 ? bc + p.nheads : 0) {}
  __device__ __forceinline__ int units() const { return d_inner + (extra + 1) / 2; }
  __device__ __forceinline__ int further(int unit, int r) const { return 2 * (unit - d_inner) + r; }
  __device__ __forceinline__ int row(int unit, int r) const {
    if (kFamily == 2 && unit >= d_inner) return 2 * d_inner + min(further(unit, r), extra - 1);
    return (kFamily == 2) == (r == 0) ? d_inner + unit : unit;  // Mamba-2 has z first
  }
  // Of the convolution, or -1.
  __device__ __forceinline__ int channel(int unit, int r) const {
    if (unit < d_inner) return r ? -1 : unit;
    return kFamily == 2 && further(unit, r) < bc ? d_inner + further(unit, r) : -1;
  }
};

template <typename T, int kFamily, int kDepth, int kBits>
__global__ void __launch_bounds__(kProductThreads, kBits < 16 ? 3 : 4)
    in_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s,
              bool vector) {
  extern __shared__ __align__(128) unsigned char smem[];
  let_next_start();
  const InRows<kFamily> in(p);
  const int64_t b = blockIdx.y;
  const Share mine = share(in.units(), gridDim.x, blockIdx.x, 0);
  const Packing f = packing<kBits>(p, p.d_model);
  const Product<T, kDepth, kBits> product(smem, p.d_model, mine.count, f);
  auto rows = [&](int unit, int r) {
    return row_of<T, kBits>(l.in_proj, in.row(min(mine.first + unit, in.units() - 1), r), p.d_model, f);
  };
  const auto ahead = product.begin(static_cast<const T*>(l.norm), vector, rows);
  const int conv_dim = p.d_inner + in.bc;
  Convolution<T> convolution;
  int channel = int(threadIdx.x) < 2 * mine.count ? in.channel(mine.first + threadIdx.x / 2, threadIdx.x % 2) : -1;
  if (channel >= 0) convolution.load(l, b, conv_dim, channel, p.d_conv);
  wait_for_previous();
  product.place(s.hidden + b * p.d_model);
  product.run(ahead, vector, rows);
  const float scale = product.scale(p.norm_eps);
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * mine.count; i += kProductThreads) {
    const int unit = mine.first + i / 2, r = i % 2;
    float v = product.total(i) * scale;
    if (i != int(threadIdx.x)) {
      channel = in.channel(unit, r);
      if (channel >= 0) convolution.load(l, b, conv_dim, channel, p.d_conv);
    }
    if (channel >= 0) v = convolution.next(l, b, conv_dim, channel, p.d_conv, v);
    if (unit < p.d_inner) {
      if (r == 0) s.u[b * p.d_inner + unit] = v;
      else s.z[b * p.d_inner + unit] = silu(to_float(from_float<T>(v)));
    } else if (const int k = in.further(unit, r); k < in.extra) {
      s.x[b * in.extra + k] = k < in.bc ? v : softplus<true>(v + l.dt_bias[k - in.bc]);
    }
  }
}

}  // namespace mamba::decode::chain
