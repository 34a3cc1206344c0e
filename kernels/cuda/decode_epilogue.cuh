// What follows a product in a layer: the sums of its rows, and where they go. Four lanes to a row.
#pragma once

#include "decode_columns.cuh"
#include "decode_conv.cuh"
#include "decode_vector.cuh"

namespace mamba::decode {

// A row's result from its terms in shared memory, times the norm's scale where there is one. All lanes call.
template <bool kHeld, bool kNormed, typename T, int kFamily>
__device__ __forceinline__ float row_sum(const Worker<T, kFamily>& w, const Shape& shape, int stage, int row) {
  float v = 0.0f;
  if constexpr (kHeld) {
    static_assert(kWarps == 12);
    auto four = [](const float4& t) { return t.x + t.y + (t.z + t.w); };
    const float4* at = reinterpret_cast<const float4*>(w.partial(stage) + row * kHeldTerms) + w.lane % 4;
    const float4 a = at[0], b = at[4], c = at[8];
    float square = 0.0f;
    if (kNormed) {
      const float4* of = reinterpret_cast<const float4*>(w.partial(stage) + kHeldRows * kHeldTerms) + w.lane % 4;
      const float4 d = of[0], e = of[4], f = of[8];
      square = four(d) + four(e) + four(f);
    }
    v = four(a) + four(b) + four(c);
#pragma unroll
    for (int o = 1; o <= 2; o *= 2) {
      if (kNormed) square += __shfl_xor_sync(~0u, square, o);
      v += __shfl_xor_sync(~0u, v, o);
    }
    return kNormed ? v * norm_scale(w, stage == kOut, square) : v;
  }
  const float* terms = w.partial(stage) + row * shape.terms;
  if constexpr (sizeof(T) == 2) {
    static_assert(kWarps % 4 == 0 && kWarps / 4 <= 3);
    if (shape.whole) {
      v = w.lane % 4 == 0 ? *terms : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < 3; i++) {
        const int k = w.lane % 4 + 4 * i;
        if (4 * k >= shape.terms) break;
        const float4 t = reinterpret_cast<const float4*>(terms)[k];
        v += t.x + t.y + (t.z + t.w);
      }
    }
  } else if (w.lane % 4 < shape.terms) {
    v = terms[w.lane % 4];
  }
  v += __shfl_xor_sync(~0u, v, 1);
  v += __shfl_xor_sync(~0u, v, 2);
  return kNormed ? v * norm_scale(w, stage) : v;
}

// Of the block's rows of in_proj the one that four lanes sum up for item i: of x or, in the upper half of eight lanes, of the
// gate; behind those of the gate come Mamba-2's others.
template <typename T, int kFamily> __device__ __forceinline__ int in_row(const Worker<T, kFamily>& w, int i) {
  const int n = w.channels.count, item = min(i, w.conv_items - 1);
  return item >= n || (w.lane & 4) ? n + item : item;
}

// Behind in_proj: the convolution of x (in Mamba-2 of B and C too) and the gate's silu, side by side in the two halves of
// eight lanes; in Mamba-2 the heads' dt. Then, of Mamba-1, the block's part of dt, B and C; and the weights for the layer to
// come, while their latency costs nothing. first_row: in_row() of the first item.
template <bool kHeld, typename T, int kFamily>
__device__ __forceinline__ void finish_in(const Worker<T, kFamily>& w, const Shape& shape, const Pass& pass, const Layer& l,
                                          Convolution<T>& conv, int first_row, uint32_t epoch) {
  const int n = w.channels.count;
  const bool speaks = w.lane % 4 == 0, gate = w.lane & 4;
  Columns<T> columns;
  if constexpr (kFamily == 1) columns.load(w);
#pragma unroll 1
  for (int base = w.warp * 4; base < w.conv_items; base += kThreads / 8) {
    const int i = base + w.lane / 8;
    if (base >= kThreads / 8 && w.lane % 8 == 0 && i < w.conv_items) {
      conv.load(w, pass.layer, pass.step, i);
      conv.begin(w, l, i);
    }
    float v = row_sum<kHeld, true>(w, shape, kIn, base < kThreads / 8 ? first_row : in_row(w, i));
    if (i >= w.conv_items || !speaks || (gate && i >= n)) continue;
    if (gate || w.convolves(i)) {
      v = rounded<T>(v);
      v = silu(gate ? v : conv.finish(v));
      if (!gate) v = rounded<T>(v);
    } else {  // Mamba-2: a head's dt
      v = softplus<true>(v + l.dt_bias[w.x_rows.first + i - n - w.bc]);
    }
    if (i < n) (gate ? w.z : w.u)[i] = v;
    else send(w.sent_x + w.x_rows.first + i - n, v, epoch);
  }
  if constexpr (kFamily == 1) {
    block_sync();
    columns.send(w);
  }
  w.fetch_norm(pass.more ? w.layers[pass.layer + 1].norm : w.has_head(pass.step) ? w.p.norm_f : w.layers[0].norm);
  if (kFamily == 2) w.fetch(w.gated, l.gated_norm, w.p.d_inner * sizeof(T));
  cp_async_commit();
  if (w.lane % 8 == 0 && (pass.more || pass.next_step < w.p.n_steps)) conv.load(w, pass.next, pass.next_step, w.tid / 8);
}

// Behind out_proj: the residual's new part. Then the state and the columns of x_proj of the layer to come.
template <bool kHeld, typename T, int kFamily>
__device__ __forceinline__ void finish_out(const Worker<T, kFamily>& w, const Shape& shape, const Pass& pass, uint32_t epoch) {
#pragma unroll 1
  for (int base = w.warp * 8; base < w.out_rows.count; base += kThreads / 4) {
    const int r = base + w.lane / 4, row = min(r, w.out_rows.count - 1);
    float v = row_sum<kHeld, kFamily == 2>(w, shape, kOut, row);
    if (r >= w.out_rows.count || w.lane % 4 != 0) continue;
    v += w.residual[r];
    if (!w.p.residual_fp32) v = rounded<T>(v);
    w.residual[r] = v;
    send(w.sent_hidden + w.out_rows.first + r, v, epoch);
  }
  if (pass.more || pass.next_step < w.p.n_steps) {
    w.fetch_state(pass.next, pass.next_step);
    if (kFamily == 1) w.fetch_x(pass.next);
  }
  cp_async_commit();
}

}  // namespace mamba::decode
