// Mamba-1's x_proj without an exchange of its own: a block multiplies the columns of its channels, for all rows, and adds
// what it gets to words that all blocks add to (decode_ring.cuh). A thread to a row, the last threads first: the first
// warps have been busy with the convolution.
#pragma once

#include "decode_block.cuh"

namespace mamba::decode {

template <typename T> struct Columns {
  using W = Worker<T, 1>;
  static constexpr int kAhead = 8, kPack = W::kPack;  // words of weights in registers; values in a word
  uint32_t ahead[kAhead] = {};

  __device__ __forceinline__ static int first_row(const W& w) { return kThreads - 1 - w.tid; }
  __device__ __forceinline__ static const uint32_t* words(const W& w, int row) {
    return reinterpret_cast<const uint32_t*>(w.x_columns) + row * w.plan.x_stride;
  }

  // What does not depend on u.
  __device__ __forceinline__ void load(const W& w) {
    const int row = first_row(w), count = w.channels.count / kPack;
    if (row >= w.plan.x_rows) return;
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      if (k < count) ahead[k] = words(w, row)[k];
    }
  }

  __device__ __forceinline__ static float add(const W& w, uint32_t word, int k, float sum) {
    if constexpr (kPack == 2) {
      const float2 f = to_float2(*reinterpret_cast<const pair_t<T>*>(&word)), u = reinterpret_cast<const float2*>(w.u)[k];
      return fmaf(f.x, u.x, fmaf(f.y, u.y, sum));
    } else {
      return fmaf(__uint_as_float(word), w.u[k], sum);
    }
  }

  __device__ __forceinline__ void send(const W& w) const {
    const int count = w.channels.count / kPack;
#pragma unroll 1
    for (int row = first_row(w), first = row; row < w.plan.x_rows; row += kThreads) {
      float even = 0.0f, odd = 0.0f;
      int k = 0;
      if (row == first) {
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
          if (i < count) (i % 2 ? odd : even) = add(w, ahead[i], i, i % 2 ? odd : even);
        }
        k = min(kAhead, count);
      }
#pragma unroll 4
      for (; k < count; k++) even = add(w, words(w, row)[k], k, even);
      add_to_sum(w.sent_x + sum_place(row), even + odd);
    }
  }
};

// dt, B and C, when all blocks have added their parts: by every warp that needs them where they are few, else by the block
// together. `turn` says which half of w.sums holds the words of a layer ago.
__device__ __forceinline__ bool take_alone(int x_rows) { return x_rows <= 128; }
template <typename T> __device__ __forceinline__ void take_sums(const Worker<T, 1>& w, int turn) {
  constexpr int kDepth = 2;
  const int rows = w.plan.x_rows, blocks = w.plan.blocks;
  const bool alone = take_alone(rows);
  const Word *from = w.sent_x, *before = w.sums + turn * rows;
  Word* after = w.sums + (turn ^ 1) * rows;
  const int step = alone ? 64 : 2 * kThreads;
#pragma unroll 1
  for (int first = 2 * (alone ? w.lane : w.tid); first < rows; first += kDepth * step) {
    ulonglong2 v[kDepth] = {}, old[kDepth] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      if (first + k * step < rows) old[k] = *reinterpret_cast<const ulonglong2*>(before + first + k * step);
    }
    bool all;
    do {
      all = true;
#pragma unroll
      for (int k = 0; k < kDepth; k++) {
        if (first + k * step < rows) v[k] = peek(from + sum_place(first + k * step));
      }
#pragma unroll
      for (int k = 0; k < kDepth; k++) {
        if (first + k * step < rows) {
          all &= sum_whole(v[k].x - old[k].x, blocks) && sum_whole(v[k].y - old[k].y, blocks);
        }
      }
    } while (!all);
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      const int i = first + k * step;
      if (i >= rows) continue;
      *reinterpret_cast<float2*>(w.xdb + i) =
          make_float2(sum_value(v[k].x - old[k].x, blocks), sum_value(v[k].y - old[k].y, blocks));
      *reinterpret_cast<ulonglong2*>(after + i) = v[k];
    }
  }
}

}  // namespace mamba::decode
