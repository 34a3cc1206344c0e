// The vector that a product multiplies: from the words that the blocks sent, or from the embedding, into shared memory,
// times a norm's weight where there is one. The norm's own scale comes behind the product, when all squares are known:
// the functions add this thread's to `square`.
#pragma once

#include "decode_block.cuh"

namespace mamba::decode {

// Values i and i + 1 of the residual stream.
template <typename T, int kFamily>
__device__ __forceinline__ void place_normed(const Worker<T, kFamily>& w, int i, float a, float b, float& square) {
  square = fmaf(a, a, fmaf(b, b, square));
  const float2 f = to_float2(*reinterpret_cast<const pair_t<T>*>(w.norm + i));
  w.x.place(i, w.p.d_model, a * f.x, b * f.y);
}

// The first layer's: a row of the embedding. The residual begins with the block's part of it.
template <typename T, int kFamily>
__device__ __forceinline__ void take_embedding(const Worker<T, kFamily>& w, int64_t token, float& square) {
  const T* row = static_cast<const T*>(w.p.embedding) + token * w.p.d_model;
#pragma unroll 1
  for (int i = 2 * w.tid; i < w.p.d_model; i += 2 * kThreads) {
    const float2 v = to_float2(*reinterpret_cast<const pair_t<T>*>(row + i));
    place_normed(w, i, v.x, v.y, square);
  }
#pragma unroll 1
  for (int i = w.tid / 4; i < w.out_rows.count; i += kThreads / 4) {  // by the lanes that add to it
    if (w.lane % 4 == 0) w.residual[i] = to_float(row[w.out_rows.first + i]);
  }
}

template <typename T, int kFamily>
__device__ __forceinline__ void take_hidden(const Worker<T, kFamily>& w, uint32_t epoch, float& square) {
  receive<kThreads>(w.sent_hidden, w.p.d_model, epoch, w.tid, [&](int i, uint32_t a, uint32_t b) {
    place_normed(w, i, __uint_as_float(a), __uint_as_float(b), square);
  });
}

// u for x_proj, y for out_proj (in Mamba-2 behind the gated norm).
template <typename T, int kFamily>
__device__ __forceinline__ void take_inner(const Worker<T, kFamily>& w, const Word* from, uint32_t epoch, float& square) {
  constexpr int kPack = Worker<T, kFamily>::kPack;
  receive<kThreads>(from, w.p.d_inner / kPack, epoch, w.tid, [&](int i, uint32_t a, uint32_t b) {
    if constexpr (kPack == 2) {
      if (kFamily == 1) {
        *reinterpret_cast<uint2*>(w.x.at + i * 4) = make_uint2(a, b);
        return;
      }
      const float2 v = to_float2(*reinterpret_cast<pair_t<T>*>(&a)), v2 = to_float2(*reinterpret_cast<pair_t<T>*>(&b));
      square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v2.x, v2.x, fmaf(v2.y, v2.y, square))));
      const float2 f = to_float2(reinterpret_cast<const pair_t<T>*>(w.gated)[i]);
      const float2 f2 = to_float2(reinterpret_cast<const pair_t<T>*>(w.gated)[i + 1]);
      w.x.place(2 * i, w.p.d_inner, v.x * f.x, v.y * f.y);
      w.x.place(2 * i + 2, w.p.d_inner, v2.x * f2.x, v2.y * f2.y);
    } else {
      float2 v = make_float2(__uint_as_float(a), __uint_as_float(b));
      if (kFamily == 2) {
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, square));
        const float2 f = to_float2(*reinterpret_cast<const pair_t<T>*>(w.gated + i));
        v.x *= f.x, v.y *= f.y;
      }
      w.x.place(i, w.p.d_inner, v.x, v.y);
    }
  });
}

// A norm's scale, by a whole warp: 1 / the root of the mean square, from the sums that the threads left.
template <typename T, int kFamily>
__device__ __forceinline__ float norm_scale(const Worker<T, kFamily>& w, bool gated) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; i++) total += w.squares[w.lane + 32 * i];
  total = warp_sum(total) * (gated ? w.inner_part : w.model_part) + (gated ? w.p.gated_norm_eps : w.p.norm_eps);
  return rsqrtf(total) / Vector<T>::kShrink;
}

}  // namespace mamba::decode
