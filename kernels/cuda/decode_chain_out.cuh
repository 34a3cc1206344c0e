// The chain's last kernels: out_proj with the residual, and the head.
#pragma once

#include "decode_chain_row.cuh"

namespace mamba::decode::chain {

// A warp has one row of out_proj and adds it to the residual.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    out_kernel(const __grid_constant__ Params p, const __grid_constant__ Layer l, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int row = blockIdx.x * kBlockWarps + threadIdx.x / 32, own = row < p.d_model ? row : p.d_model - 1;
  const int64_t b = blockIdx.y;
  const T* const rows[1] = {static_cast<const T*>(l.out_proj) + int64_t(own) * p.d_inner};
  float sum[1], scale = 1.0f;
  warp_dots<T, 1, 10>(rows, x, p.d_inner, vector, sum, [&] {
    predecessor();
    if (p.family == 2) {
      scale = normed<T>(s.y + b * p.d_inner, l.gated_norm, p.d_inner, p.gated_norm_eps, x);
      return;
    }
    for (int i = threadIdx.x; i < p.d_inner; i += kBlock) x[i] = s.y[b * p.d_inner + i];
    __syncthreads();
  });
  if (threadIdx.x % 32 || row >= p.d_model) return;
  float* hidden = s.hidden + b * p.d_model + row;
  const float v = *hidden + sum[0] * scale;
  *hidden = p.residual_fp32 ? v : to_float(from_float<T>(v));
}

// A warp takes two rows of the head at a time.
template <typename T>
__global__ void __launch_bounds__(kBlock) head_kernel(const __grid_constant__ Params p, const __grid_constant__ Buffers s, bool vector) {
  extern __shared__ float x[];
  const int stride = gridDim.x * kBlockWarps * 2, begin = (blockIdx.x * kBlockWarps + threadIdx.x / 32) * 2;
  const int64_t b = blockIdx.y;
  float scale = 0.0f;
  bool waiting = true;
  for (int row = begin; waiting || row < p.vocab_size; row += stride) {
    const T* w = static_cast<const T*>(p.lm_head);
    const T* const rows[2] = {w + int64_t(min(row, p.vocab_size - 1)) * p.d_model,
                              w + int64_t(min(row + 1, p.vocab_size - 1)) * p.d_model};
    float sum[2];
    warp_dots<T, 2, 5>(rows, x, p.d_model, vector, sum, [&] {
      if (!waiting) return;
      predecessor();
      scale = normed<T>(s.hidden + b * p.d_model, p.norm_f, p.d_model, p.norm_eps, x);
      waiting = false;
    });
    const int lane = threadIdx.x % 32;
    if (lane < 2 && row + lane < p.vocab_size) p.logits[b * p.vocab_size + row + lane] = (lane ? sum[1] : sum[0]) * scale;
  }
}

}  // namespace mamba::decode::chain
