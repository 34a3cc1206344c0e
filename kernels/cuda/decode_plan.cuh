// How a model is laid over the blocks of the whole-stack decode kernel: who owns what, and the ring's slots.
#pragma once

#include "common.cuh"
#include "mamba/decode_stack.h"

namespace mamba::decode {

using Params = mamba_decode_stack_params;
using Layer = mamba_decode_layer;
struct Layers {  // as a kernel parameter, so that a pointer costs no memory access
  Layer layer[MAMBA_DECODE_MAX_LAYERS];
};

constexpr int kWarps = 12, kThreads = 32 * kWarps;  // that compute; one more warp feeds the ring
constexpr int kProductWarps = 8;  // of them multiply; another takes the sum of squares meanwhile
constexpr int kMaxConv = 4;

struct Share {
  int first, count;
};
// Block `block`'s share of `units`; the blocks from `offset` on take one unit more while there are units left over.
__host__ __device__ inline Share share(int units, int blocks, int block, int offset) {
  const int base = units / blocks, extra = units % blocks;
  const int k = block >= offset ? block - offset : block - offset + blocks;
  return {k * base + (k < extra ? k : extra), base + (k < extra)};
}

struct Plan {
  int blocks;
  int unit;            // channels are dealt in units, so that every piece of a weight is aligned to 16 bytes
  int channels_most;   // channels of the largest share
  int x_rows;          // rows that give dt, B and C: of x_proj or, in Mamba-2, the last of in_proj
  int x_offset, out_offset;  // where the shares' remainders go: not all to the same blocks
  int slot_bytes, slots;
  int flight;  // slots that a block has under way at most
  int shift_model, shift_inner;  // log2 of the rows of d_model and of d_inner values in a slot
  int slot_channels;           // channels of dt_proj and A in a slot
  int partials;                // floats for partial sums
  size_t shared_bytes;

  // Words of the exchange: u, what x_rows gave, y, hidden, and the best logit of every block.
  int words_u, words_x, words_y, words_hidden, words_best;
  __host__ __device__ int words() const { return words_u + words_x + words_y + words_hidden + words_best; }
};

// A matrix-vector product as one block sees it: `rows` rows of `width` values. Its results lie in shared memory in `terms`
// terms a row, which the epilogue adds.
struct Shape {
  int rows, width, shift, slots;  // a slot holds 2^shift rows
  int terms;
  int segments, steps;          // 16-bit: a tile is 16 / segments rows in so many pieces of steps * 64 values each
  int whole;                    // 16-bit: one warp computes a slot, not all warps
  int each, tasks, part_shift, turns;  // float: `each` rows a task of one warp, or 2^part_shift warps share a row
};
constexpr int kSplitRows = 128;

__host__ __device__ inline int segments_of(int width) { return width % 256 == 0 ? 4 : width % 128 == 0 ? 2 : 1; }

template <typename T> __host__ __device__ inline Shape shape_of(int rows, int width, int shift, bool head) {
  Shape s{};
  s.rows = rows, s.width = width, s.shift = shift, s.slots = rows ? ((rows - 1) >> shift) + 1 : 0;
  if (sizeof(T) == 2) {
    s.segments = segments_of(width);  // few rows: as many pieces as there are; else as few as make a tile fit a slot
    while (s.segments > 1 && rows > 16 / s.segments && (16 / s.segments) < (1 << shift)) s.segments /= 2;
    s.steps = width / (64 * s.segments);
    s.whole = head || rows > kSplitRows;
    s.terms = s.whole ? 1 : kProductWarps * s.segments;
  } else {
    s.turns = (width + 255) / 256;
    s.each = rows >= 2 * kProductWarps && shift > 0 ? 2 : 1;
    s.tasks = (rows + s.each - 1) / s.each;
    while (!head && s.part_shift < 2 && (s.tasks << (s.part_shift + 1)) <= kProductWarps && (2 << s.part_shift) <= s.turns) {
      s.part_shift++;
    }
    s.tasks <<= s.part_shift;
    s.terms = 1 << s.part_shift;
  }
  return s;
}

// Shared memory besides the ring, in the order in which the kernel carves it.
struct Carve {
  size_t shapes, x, xdb, partial, squares, residual, u, z, state, norm, gated, barriers, ring;
};
__host__ __device__ inline size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }
template <typename T> __host__ __device__ inline Carve carve(const Params& p, const Plan& plan) {
  Carve c;
  size_t at = 0;
  auto take = [&](size_t bytes) {
    const size_t here = at;
    at = up(at + bytes, 16);
    return here;
  };
  const int widest = p.d_inner > p.d_model ? p.d_inner : p.d_model;
  c.shapes = take(4 * sizeof(Shape));
  c.x = take(size_t(widest) * 4 + 64);
  c.xdb = take(size_t(plan.words_x) * 4);
  c.partial = take(size_t(plan.partials) * 4);
  c.squares = take(kThreads * 4 + 16);
  c.residual = take(size_t(p.d_model / plan.blocks + 1) * 4);
  c.u = take(size_t(plan.channels_most) * 4);
  c.z = take(size_t(plan.channels_most) * 4);
  c.state = take(size_t(plan.channels_most) * p.d_state * 4);
  c.norm = take(size_t(p.d_model) * sizeof(T));
  c.gated = take(p.family == 2 ? size_t(p.d_inner) * sizeof(T) : 0);
  c.barriers = take(2 * 64 * 8);
  c.ring = up(at, 128);
  return c;
}

}  // namespace mamba::decode
