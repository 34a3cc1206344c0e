// How a model is laid over the blocks of the whole-stack decode kernel: who owns what, and the ring's slots.
#pragma once

#include "decode_integers.cuh"
#include "mamba/decode_stack.h"

namespace mamba::decode {

using Params = mamba_decode_stack_params;
using Layer = mamba_decode_layer;
struct Layers {  // as a kernel parameter, so that a pointer costs no memory access
  Layer layer[MAMBA_DECODE_MAX_LAYERS];
};

constexpr int kWarps = 12, kThreads = 32 * kWarps;  // that compute; one more warp feeds the ring
constexpr int kMaxConv = 4;

constexpr int kMostBlocks = 255;  // as many sums of SumWord are exact

struct Share {
  int first, count;
};
// Block `block`'s share of `units`; the blocks from `offset` on take one unit more while there are units left over.
__host__ __device__ inline Share share(int units, int blocks, int block, int offset) {
  const int base = units / blocks, extra = units % blocks;
  const int k = block >= offset ? block - offset : block - offset + blocks;
  return {k * base + (k < extra ? k : extra), base + (k < extra)};
}

enum Stage { kIn, kOut, kHead };  // the products whose rows come through the ring: in_proj, out_proj, lm_head

// A matrix-vector product, the same for all blocks: up to `most` rows of `width` values. A block's results lie in shared
// memory in `terms` terms a row, which the epilogue adds.
struct Shape {
  int most, width, shift;       // a slot holds 2^shift rows
  int terms;
  int segments, steps;          // 16-bit: a tile is 16 / segments rows in so many pieces of steps * 64 values each
  int whole;                    // 16-bit: one warp computes a slot, not all warps
  int held;                     // 16-bit: HeldProduct covers it
  int each, part_shift, turns;  // float: `each` rows a task of one warp, or 2^part_shift warps share a row
  Packing packed;               // of integers; their steps are 64 bytes of a row
  // Segments are 1, 2 or 4.
  __host__ __device__ int segment_shift() const { return segments >> 1; }
  __host__ __device__ int tile_rows() const { return 16 >> segment_shift(); }
};
constexpr int kSplitRows = 128;
constexpr int kHeldUnits = 4;   // of a HeldProduct: a warp's chunks times its groups of 8 rows
constexpr int kHeldRows = 8 * kHeldUnits;  // places for so many rows, whatever the block has; behind them one for squares
constexpr int kHeldTerms = 52;  // floats from row to row, of which 4 * kWarps are terms: no bank conflicts

// `width` is 64 times the steps of a row: its values, or of integers its bytes.
inline int stepped_width(int bits, int width) { return bits ? width * bits / 8 : width; }
inline int segments_of(int width) { return width % 256 == 0 ? 4 : width % 128 == 0 ? 2 : 1; }

// `bits` of integers, 0: none. `chunks`: of 64 values, that a warp of a HeldProduct has; 0: none.
template <typename T>
inline Shape shape_of(const Params& p, int bits, int most, int width, int shift, int chunks, bool head) {
  Shape s{};
  s.most = most, s.width = width, s.shift = shift;
  if (sizeof(T) == 2) {
    if (bits) s.packed = packing_of(p, width, bits);
    const int stepped = stepped_width(bits, width);
    s.segments = segments_of(stepped);  // few rows: as many pieces as there are; else as few as make a tile fit a slot
    while (s.segments > 1 && most > 16 / s.segments && (16 / s.segments) < (1 << shift)) s.segments /= 2;
    s.steps = stepped / (64 * s.segments);
    s.whole = head || most > kSplitRows;
    s.terms = s.whole ? 1 : kWarps * s.segments;
    s.held = chunks && width <= 64 * chunks * kWarps && most <= 8 * kHeldUnits / chunks && shift >= 3;
  } else {
    s.turns = (width + 255) / 256;
    s.each = most >= 2 * kWarps && shift > 0 ? 2 : 1;
    const int tasks = (most + s.each - 1) / s.each;
    while (!head && s.part_shift < 2 && (tasks << (s.part_shift + 1)) <= kWarps && (2 << s.part_shift) <= s.turns) {
      s.part_shift++;
    }
    s.terms = 1 << s.part_shift;
  }
  return s;
}

// Shared memory besides the ring, in the order in which the kernel carves it: where each part begins.
struct Carve {
  unsigned x, xdb, sums, x_columns, partial, squares, residual, u, z, state, norm, gated, barriers, ring;
};

struct Plan {
  int blocks;
  int unit;            // channels are dealt in units, so that every piece of a weight is aligned to 16 bytes
  int channels_most;   // channels of the largest share
  int x_rows;          // rows that give dt, B and C: of x_proj or, in Mamba-2, the last of in_proj
  int x_stride;        // Mamba-1: four-byte words of a row of the block's columns of x_proj in shared memory, an odd number
  int x_offset, out_offset;  // where the shares' remainders go: not all to the same blocks
  int slot_bytes, slots;
  int flight;  // slots that a block has under way at most
  int slot_channels;           // channels of dt_proj and A in a slot
  int held;                    // in_proj and out_proj are Shape::held
  int partials;                // floats for partial sums, twice over
  size_t shared_bytes;
  Shape shapes[3];  // of the stages
  Shape wide[3];    // of those matrices that are int8 in a model of int4
  Carve at;

  // Words of the exchange: what x_rows gave, y, hidden, and the best logit of every block.
  int words_x, words_y, words_hidden, words_best;
  __host__ __device__ int words() const { return words_x + words_y + words_hidden + words_best; }
};

template <typename T> inline Carve carve(const Params& p, const Plan& plan) {
  Carve c;
  size_t at = 0;
  auto take = [&](size_t bytes) {
    const size_t here = at;
    at = (at + bytes + 15) / 16 * 16;
    return unsigned(here);
  };
  const int widest = p.d_inner > p.d_model ? p.d_inner : p.d_model;
  c.x = take(size_t(widest) * 4 + 64);
  c.xdb = take(size_t(plan.x_rows) * 4);
  c.sums = take(p.family == 1 ? size_t(plan.x_rows) * 16 : 0);
  c.x_columns = take(p.family == 1 ? size_t(plan.x_rows) * plan.x_stride * 4 : 0);
  c.partial = take(size_t(plan.partials) * 8);
  c.squares = take(2 * kWarps * 4);
  c.residual = take(size_t(p.d_model / plan.blocks + 1) * 4);
  c.u = take(size_t(plan.channels_most) * 4);
  c.z = take(size_t(plan.channels_most) * 4);
  c.state = take(size_t(plan.channels_most) * p.d_state * 4);
  c.norm = take(size_t(p.d_model) * sizeof(T));
  c.gated = take(p.family == 2 ? size_t(p.d_inner) * sizeof(T) : 0);
  c.barriers = take(2 * 64 * 8);
  c.ring = unsigned((at + 127) / 128 * 128);
  return c;
}

}  // namespace mamba::decode
