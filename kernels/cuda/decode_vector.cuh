// The vector that a product multiplies: from the words that the blocks sent, or from the embedding, into shared memory,
// times a norm's weight where there is one. The norm's own scale comes behind the product, when all squares are known:
// the functions add this thread's to `square`.
//
// On tensor cores a warp takes the chunks that it multiplies itself: no other warp waits for it.
#pragma once

#include "decode_block.cuh"

namespace mamba::decode {

// Whose chunks a warp takes: of a TensorProduct (or a PackedProduct of 8 bits), of a PackedProduct of 4 bits, whose steps are
// 128 values, or of a HeldProduct.
enum Taking { kTiled, kTiled4, kHeldTiles };

// Which values a thread takes, kValues neighbours a turn; kHeld: one turn.
template <Taking kTaking, int kValues, typename T, int kFamily> struct Taker {
  static constexpr bool kHeld = kTaking == kHeldTiles;
  static constexpr int kHalves = kTaking == kTiled4 ? 2 : 1;  // chunks of 64 values in a step
  static constexpr int kLanes = 64 / kValues;  // that a chunk takes
  const Worker<T, kFamily>& w;
  const Shape& s;
  int turns;

  __device__ __forceinline__ Taker(const Worker<T, kFamily>& worker, const Shape& shape) : w(worker), s(shape) {
    constexpr int kTurn = kThreads * kValues;
    if (kHeld) turns = 1;
    else if (Vector<T>::kTensor) turns = ((s.steps + kWarps - 1) / kWarps * s.segments * kHalves * kLanes + 31) / 32;
    else turns = (s.width + kTurn - 1) / kTurn;
  }
  __device__ __forceinline__ static int place_of(int i) { return Vector<T>::template offset<kHeld>(i); }
  // The first of this thread's values of a turn; negative: none.
  __device__ __forceinline__ int at(int turn) const {
    if constexpr (kHeld) {
      const int i = (w.warp * 32 + w.lane) * kValues;
      return i < s.width ? i : -1;
    } else if constexpr (Vector<T>::kTensor) {
      const int chunk = turn * (32 / kLanes) + w.lane / kLanes, q = chunk / kHalves;
      const int step = w.warp + kWarps * (q >> s.segment_shift());
      return step < s.steps ? (((q & (s.segments - 1)) * s.steps + step) * kHalves + chunk % kHalves) * 64 +
                                  w.lane % kLanes * kValues
                            : -1;
    } else {
      const int i = (turn * kThreads + w.tid) * kValues;
      return i < s.width ? i : -1;
    }
  }

  // f(i, where, a, b, before(i)) gets the two words with the values from i on, which belong to offset `where`; before(i) is
  // called ahead of the wait.
  template <typename Before, typename F>
  __device__ __forceinline__ void receive(const Word* from, uint32_t epoch, Before&& before, F&& f) const {
    constexpr int kDepth = 4;
    auto ready = [&](const ulonglong2& v) { return word_epoch(v.x) == epoch && word_epoch(v.y) == epoch; };
    auto look = [&](int i) { return peek(from + i / kValues * 2); };
    if constexpr (kHeld) {
      const int i = at(0);
      if (i < 0) return;
      const auto known = before(i);
      const int where = keep(place_of(i));
      ulonglong2 v;
      do v = look(i);
      while (!ready(v));
      f(i, where, word_data(v.x), word_data(v.y), known);
      return;
    }
    if (w.lane == 0 && at(0) >= 0) {  // a cheap wait first: one lane's load, not four of every lane
      while (!ready(look(at(0)))) {
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += kDepth) {
      ulonglong2 v[kDepth] = {};
      int i[kDepth];
#pragma unroll
      for (int k = 0; k < kDepth; k++) i[k] = turn + k < turns ? at(turn + k) : -1;
      bool all;
      do {
        all = true;
#pragma unroll
        for (int k = 0; k < kDepth; k++) {
          if (i[k] >= 0) v[k] = look(i[k]);
        }
#pragma unroll
        for (int k = 0; k < kDepth; k++) {
          if (i[k] >= 0) all &= ready(v[k]);
        }
      } while (!all);
#pragma unroll
      for (int k = 0; k < kDepth; k++) {
        if (i[k] >= 0) f(i[k], place_of(i[k]), word_data(v[k].x), word_data(v[k].y), before(i[k]));
      }
    }
  }
};

// Values i and i + 1 of the residual stream, with the norm's weights.
template <typename T, int kFamily>
__device__ __forceinline__ void place_normed(const Worker<T, kFamily>& w, int i, int where, float a, float b, pair_t<T> weight,
                                             float& square) {
  square = fmaf(a, a, fmaf(b, b, square));
  const float2 f = to_float2(weight);
  w.x.place(i, where, w.p.d_model, a * f.x, b * f.y);
}
template <typename T> __device__ __forceinline__ pair_t<T> pair_at(const T* from) {
  return *reinterpret_cast<const pair_t<T>*>(from);
}

// The first layer's: a row of the embedding. The residual begins with the block's part of it.
template <Taking kTaking, int kBits, typename T, int kFamily>
__device__ __forceinline__ void take_embedding(const Worker<T, kFamily>& w, const Shape& shape, int64_t token, float& square) {
  const EmbeddingRow<T, kBits> row(w.p, token);
  const Taker<kTaking, 2, T, kFamily> taker(w, shape);
#pragma unroll 1
  for (int turn = 0; turn < taker.turns; turn++) {
    const int i = taker.at(turn);
    if (i < 0) continue;
    place_normed(w, i, taker.place_of(i), row[i], row[i + 1], pair_at(w.norm + i), square);
  }
#pragma unroll 1
  for (int i = w.tid / 4; i < w.out_rows.count; i += kThreads / 4) {  // by the lanes that add to it
    if (w.lane % 4 == 0) w.residual[i] = row[w.out_rows.first + i];
  }
}

template <Taking kTaking, typename T, int kFamily>
__device__ __forceinline__ void take_hidden(const Worker<T, kFamily>& w, const Shape& shape, uint32_t epoch, float& square) {
  Taker<kTaking, 2, T, kFamily>(w, shape).receive(
      w.sent_hidden, epoch, [&](int i) { return pair_at(w.norm + i); },
      [&](int i, int where, uint32_t a, uint32_t b, pair_t<T> weight) {
        place_normed(w, i, where, __uint_as_float(a), __uint_as_float(b), weight, square);
      });
}

// y for out_proj, in Mamba-2 behind the gated norm.
template <Taking kTaking, typename T, int kFamily>
__device__ __forceinline__ void take_inner(const Worker<T, kFamily>& w, const Shape& shape, uint32_t epoch, float& square) {
  constexpr int kPack = Worker<T, kFamily>::kPack;
  constexpr bool kHeld = kTaking == kHeldTiles;
  struct Weights {
    pair_t<T> low, high;
  };
  auto weights = [&](int i) {
    Weights f{};
    if (kFamily == 2) {
      f.low = pair_at(w.gated + i);
      if (kPack == 2) f.high = pair_at(w.gated + i + 2);
    }
    return f;
  };
  const Taker<kTaking, 2 * kPack, T, kFamily> taker(w, shape);
  taker.receive(w.sent_y, epoch, weights, [&](int i, int where, uint32_t a, uint32_t b, Weights weight) {
    if constexpr (kPack == 2) {
      if (kFamily == 1) {
        if (kHeld) {
          *reinterpret_cast<uint32_t*>(w.x.at + where) = a;
          *reinterpret_cast<uint32_t*>(w.x.at + where + 8) = b;
        } else {
          *reinterpret_cast<uint2*>(w.x.at + where) = make_uint2(a, b);
        }
        return;
      }
      const float2 v = to_float2(*reinterpret_cast<pair_t<T>*>(&a)), v2 = to_float2(*reinterpret_cast<pair_t<T>*>(&b));
      square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v2.x, v2.x, fmaf(v2.y, v2.y, square))));
      const float2 f = to_float2(weight.low), f2 = to_float2(weight.high);
      w.x.place(i, where, w.p.d_inner, v.x * f.x, v.y * f.y);
      w.x.place(i + 2, where + (kHeld ? 8 : 4), w.p.d_inner, v2.x * f2.x, v2.y * f2.y);
    } else {
      float2 v = make_float2(__uint_as_float(a), __uint_as_float(b));
      if (kFamily == 2) {
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, square));
        const float2 f = to_float2(weight.low);
        v.x *= f.x, v.y *= f.y;
      }
      w.x.place(i, where, w.p.d_inner, v.x, v.y);
    }
  });
}

// A norm's scale: 1 / the root of the mean square.
template <typename T, int kFamily>
__device__ __forceinline__ float norm_scale(const Worker<T, kFamily>& w, bool gated, float total) {
  total = total * (gated ? w.inner_part : w.model_part) + (gated ? w.p.gated_norm_eps : w.p.norm_eps);
  return rsqrtf(total) / Vector<T>::kShrink;
}
// By every four lanes, from the sums that the warps left.
template <typename T, int kFamily> __device__ __forceinline__ float norm_scale(const Worker<T, kFamily>& w, int stage) {
  static_assert(kWarps % 4 == 0 && kWarps <= 16);
  float total = 0.0f;
  if (w.lane % 4 < kWarps / 4) {
    const float4 v = reinterpret_cast<const float4*>(w.square(stage))[w.lane % 4];
    total = v.x + v.y + (v.z + v.w);
  }
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  return norm_scale(w, stage == kOut, total);
}

}  // namespace mamba::decode
