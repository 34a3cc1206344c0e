// The chain's last kernels: out_proj with the residual, and the head.
#pragma once

#include "decode_chain_product.cuh"

namespace mamba::decode::chain {

template <typename T, int kDepth, int kBits>
__global__ void __launch_bounds__(kProductThreads, kBits < 16 ? 3 : 4)
    out_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s,
               bool vector) {
  extern __shared__ __align__(128) unsigned char smem[];
  let_next_start();
  const int64_t b = blockIdx.y;
  const Share mine = share(ceil_div(p.d_model, 2), gridDim.x, blockIdx.x, 0);
  const Packing f = packing<kBits>(p, p.d_inner);
  const Product<T, kDepth, kBits> product(smem, p.d_inner, mine.count, f);
  auto rows = [&](int unit, int r) {
    return row_of<T, kBits>(l.out_proj, min(2 * (mine.first + unit) + r, p.d_model - 1), p.d_inner, f);
  };
  const auto ahead = product.begin(p.family == 2 ? static_cast<const T*>(l.gated_norm) : nullptr, vector, rows);
  wait_for_previous();
  float* hidden = s.hidden + b * p.d_model + 2 * mine.first;
  const int count = min(2 * mine.count, p.d_model - 2 * mine.first);
  const float residual = int(threadIdx.x) < count ? __ldcg(hidden + threadIdx.x) : 0.0f;
  product.place(s.y + b * p.d_inner);
  product.run(ahead, vector, rows);
  const float scale = p.family == 2 ? product.scale(p.gated_norm_eps) : 1.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kProductThreads) {
    const float v = (i == int(threadIdx.x) ? residual : __ldcg(hidden + i)) + product.total(i) * scale;
    hidden[i] = p.residual_fp32 ? v : to_float(from_float<T>(v));
  }
}

template <typename T, int kDepth, int kBits>
__global__ void __launch_bounds__(kProductThreads, kBits < 16 ? 3 : 4)
    head_kernel(const __grid_constant__ Params p, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ __align__(128) unsigned char smem[];
  let_next_start();
  const int64_t b = blockIdx.y;
  const Share mine = share(ceil_div(p.vocab_size, 2), gridDim.x, blockIdx.x, 0);
  const Packing f = packing<kBits>(p, p.d_model);
  const Product<T, kDepth, kBits> product(smem, p.d_model, mine.count, f);
  auto rows = [&](int unit, int r) {
    return row_of<T, kBits>(p.lm_head, min(2 * (mine.first + unit) + r, p.vocab_size - 1), p.d_model, f);
  };
  const auto ahead = product.begin(static_cast<const T*>(p.norm_f), vector, rows);
  wait_for_previous();
  product.place(s.hidden + b * p.d_model);
  product.run(ahead, vector, rows);
  const float scale = product.scale(p.norm_eps);
  float* logits = p.logits + b * p.vocab_size + 2 * mine.first;
  const int count = min(2 * mine.count, p.vocab_size - 2 * mine.first);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kProductThreads) logits[i] = product.total(i) * scale;
}

}  // namespace mamba::decode::chain
