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

// dt, B and C, when all blocks have added their parts: by the block together. (By every warp that needs them, without a barrier,
// was slower: 0.171 against 0.161 ms a token at 768 x 24.) `turn` says which half of w.sums holds the words of a layer ago.
template <typename T> __device__ __forceinline__ void take_sums(const Worker<T, 1>& w, int turn) {
  constexpr int kDepth = 2, kStep = 2 * kThreads;
  const int rows = w.plan.x_rows, blocks = w.plan.blocks;
  const Word *from = w.sent_x, *before = w.sums + turn * rows;
  Word* after = w.sums + (turn ^ 1) * rows;
#pragma unroll 1
  for (int first = 2 * w.tid; first < rows; first += kDepth * kStep) {
    ulonglong2 v[kDepth] = {}, old[kDepth] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      if (first + k * kStep < rows) old[k] = *reinterpret_cast<const ulonglong2*>(before + first + k * kStep);
    }
    bool all;
    do {
      all = true;
#pragma unroll
      for (int k = 0; k < kDepth; k++) {
        if (first + k * kStep < rows) v[k] = peek(from + sum_place(first + k * kStep));
      }
#pragma unroll
      for (int k = 0; k < kDepth; k++) {
        if (first + k * kStep < rows) {
          all &= sum_whole(v[k].x - old[k].x, blocks) && sum_whole(v[k].y - old[k].y, blocks);
        }
      }
    } while (!all);
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      const int i = first + k * kStep;
      if (i >= rows) continue;
      *reinterpret_cast<float2*>(w.xdb + i) =
          make_float2(sum_value(v[k].x - old[k].x, blocks), sum_value(v[k].y - old[k].y, blocks));
      *reinterpret_cast<ulonglong2*>(after + i) = v[k];
    }
  }
}

}  // namespace mamba::decode
