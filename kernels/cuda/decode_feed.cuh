// The warp that feeds the ring: all weights of the block in the order in which the other warps use them.
#pragma once

#include "decode_block.cuh"

namespace mamba::decode {

// The matrix of a stage: bytes of a row, and log2 of the rows in a slot. `own`: its own bits.
struct Rows {
  int bytes, shift;
};
template <int kBits, typename T, int kFamily>
__device__ __forceinline__ Rows rows_of(const Block<T, kFamily>& b, Stage stage, int own) {
  const Shape& s = kBits == kMixed && own == 8 ? b.plan.wide[stage] : b.plan.shapes[stage];
  if constexpr (kBits < 16) return {s.packed.row_bytes, s.shift};
  else return {(stage == kOut ? b.p.d_inner : b.p.d_model) * int(sizeof(T)), s.shift};
}

// Rows that lie one behind the other.
__device__ __forceinline__ void feed_rows(Producer& out, const void* weight, Share s, const Rows& rows) {
  const int slot_rows = 1 << rows.shift, row = rows.bytes;
#pragma unroll 1
  for (int r = 0; r < s.count; r += slot_rows) {
    const char* from = static_cast<const char*>(weight) + int64_t(s.first + r) * row;
    out.push({from, min(slot_rows, s.count - r) * row});
  }
}

// in_proj: the block's rows of x, of z and, in Mamba-2 (where z comes first), of B, C and dt.
template <int kBits, typename T, int kFamily>
__device__ __forceinline__ void feed_in(Producer& out, const Block<T, kFamily>& b, const Layer& l) {
  const Params& p = b.p;
  const Rows rows = rows_of<kBits>(b, kIn, l.in_proj_bits);
  const int n = b.channels.count, row = rows.bytes, shift = rows.shift;
  // Rows [at, at + count) of a slot that lie in the stretch of `size` rows which begins at row `begin` of the list.
  auto part = [&](const void* weight, int64_t first, int begin, int size, int at, int count) {
    const int from = max(at, begin), to = min(at + count, begin + size);
    return Piece{static_cast<const char*>(weight) + (first + from - begin) * row, max(0, to - from) * row};
  };
  const int total = b.in_rows(), x_first = b.channels.first + (kFamily == 2 ? p.d_inner : 0);
  const int z_first = b.channels.first + (kFamily == 2 ? 0 : p.d_inner);
#pragma unroll 1
  for (int r = 0; r < total; r += 1 << shift) {
    const int count = min(1 << shift, total - r);
    out.push(part(l.in_proj, x_first, 0, n, r, count), part(l.in_proj, z_first, n, n, r, count),
             kFamily == 2 ? part(l.in_proj, 2 * p.d_inner + b.x_rows.first, 2 * n, b.x_rows.count, r, count) : Piece{});
  }
}

// Mamba-1's scan: the channels' rows of dt_proj and, behind them in the slot, of A.
template <typename T> __device__ __forceinline__ void feed_scan(Producer& out, const Block<T, 1>& b, const Layer& l) {
  const int n = b.channels.count, dt_row = b.p.dt_rank * int(sizeof(T)), a_row = b.p.d_state * 4;
  for (int c = 0; c < n; c += b.plan.slot_channels) {
    const int count = min(b.plan.slot_channels, n - c);
    const int64_t first = b.channels.first + c;
    out.push({static_cast<const char*>(l.dt_proj) + first * dt_row, count * dt_row},
             {reinterpret_cast<const char*>(l.A) + first * a_row, count * a_row});
  }
}

template <int kBits, typename T, int kFamily> __device__ void feed(const Block<T, kFamily>& b) {
  const Params& p = b.p;
  const Plan& plan = b.plan;
  Producer out(b.ring, plan.flight);
  for (int step = 0; step < p.n_steps; step++) {
    for (int i = 0; i < p.n_layer; i++) {
      const Layer& l = b.layers[i];
      feed_in<kBits>(out, b, l);
      if constexpr (kFamily == 1) feed_scan(out, b, l);
      feed_rows(out, l.out_proj, b.out_rows, rows_of<kBits>(b, kOut, l.out_proj_bits));
    }
    if (b.has_head(step)) feed_rows(out, p.lm_head, b.head_rows, rows_of<kBits>(b, kHead, p.head_bits));
  }
}

}  // namespace mamba::decode
