// What follows a product in a layer: the sums of its rows, and where they go. Four lanes to a row.
#pragma once

#include "decode_conv.cuh"

namespace mamba::decode {

// A row's result from its terms in shared memory. All lanes call.
template <typename T, int kFamily>
__device__ __forceinline__ float row_sum(const Worker<T, kFamily>& w, const Shape& shape, float scale, int row) {
  float v = 0.0f;
  if constexpr (sizeof(T) == 2) {
    const float2* from = reinterpret_cast<const float2*>(w.partial + row * shape.terms) + w.lane % 4 * shape.segments;
    if (shape.whole) {
      v = w.lane % 4 == 0 ? w.partial[row] : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i < shape.segments) v += from[i].x + from[i].y;
      }
    }
  } else if (w.lane % 4 < shape.terms) {
    v = w.partial[row * shape.terms + w.lane % 4];
  }
  v += __shfl_xor_sync(~0u, v, 1);
  v += __shfl_xor_sync(~0u, v, 2);
  return v * scale;
}

// Behind in_proj: the convolution of x (in Mamba-2 of B and C too), the gate's silu, in Mamba-2 the heads' dt. Then the
// weights for the layer to come, while their latency costs nothing.
template <typename T, int kFamily>
__device__ __forceinline__ void finish_in(const Worker<T, kFamily>& w, const Pass& pass, const Layer& l,
                                          const Shape& shape, float scale, Convolution<T>& conv, uint32_t epoch) {
  const int n = w.channels.count, quad = w.tid / 4, quads = kThreads / 4;
  const bool speaks = w.lane % 4 == 0;
  w.fetch_norm(pass.more ? w.layers[pass.layer + 1].norm : w.has_head(pass.step) ? w.p.norm_f : w.layers[0].norm);
  if (kFamily == 2) w.fetch(w.gated, l.gated_norm, w.p.d_inner * sizeof(T));
  cp_async_commit();
#pragma unroll 1
  for (int base = w.warp * 8; base < w.conv_items; base += quads) {
    const int i = base + w.lane / 4, item = min(i, w.conv_items - 1);
    float u = row_sum(w, shape, scale, item < n ? item : item + n), z = row_sum(w, shape, scale, item < n ? n + item : 0);
    if (i < w.conv_items && speaks) {
      if (w.convolves(i)) {
        u = rounded<T>(u);
        u = rounded<T>(silu(conv.finish(w, l, i, u)));
      } else {  // Mamba-2: a head's dt
        u = softplus<true>(u + l.dt_bias[w.x_rows.first + i - n - w.bc]);
      }
      if (i < n) w.u[i] = u, w.z[i] = silu(rounded<T>(z));
      if (kFamily == 2 && i >= n) send(w.sent_x + w.x_rows.first + i - n, u, epoch);
    }
    if (kFamily == 1) w.send_channel(w.sent_u, i, u, 4, speaks && i < n, epoch);
    const bool again = base + quads < w.conv_items;
    if (speaks && (again || pass.more || pass.next_step < w.p.n_steps)) {
      conv.load(w, again ? pass.layer : pass.next, again ? pass.step : pass.next_step, again ? i + quads : quad);
      if (again) conv.begin(w, l, i + quads);
    }
  }
}

// Behind x_proj (dt before its own product, B and C: to all blocks) and behind out_proj (the residual's new part).
template <typename T, int kFamily>
__device__ __forceinline__ void finish_rows(const Worker<T, kFamily>& w, int stage, const Shape& shape, float scale,
                                            uint32_t epoch) {
#pragma unroll 1
  for (int base = w.warp * 8; base < shape.rows; base += kThreads / 4) {
    const int r = base + w.lane / 4, row = min(r, shape.rows - 1);
    float v = row_sum(w, shape, scale, row);
    if (r >= shape.rows || w.lane % 4 != 0) continue;
    if (stage == kX) {
      send(w.sent_x + w.x_rows.first + r, v, epoch);
    } else {
      v += w.residual[r];
      if (!w.p.residual_fp32) v = rounded<T>(v);
      w.residual[r] = v;
      send(w.sent_hidden + w.out_rows.first + r, v, epoch);
    }
  }
}

}  // namespace mamba::decode
