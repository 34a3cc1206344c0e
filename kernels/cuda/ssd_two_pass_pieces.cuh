// First pass: which pieces of which rows are a block's, and their chunks.
#pragma once

#include "ssd_two_pass.cuh"

namespace mamba {
namespace ssd {

// What a block works on: a piece of a row.
struct StatesItem {
  int batch, head, part;  // part: of d_state, when several blocks share a head
  int64_t row;            // of heads, of this launch
  int piece;              // of the row
  int begin, chunks;      // of this launch, with valid tokens
  int token0, limit;      // of the piece, of the row
  bool more;              // the row goes on behind the piece
};

// The block's row.
template <typename L>
__device__ __forceinline__ StatesItem whole_row(const TwoPassArgs& args) {
  StatesItem at;
  at.part = blockIdx.x % L::kSplit, at.head = blockIdx.x / L::kSplit, at.batch = args.batch0 + blockIdx.y;
  at.row = static_cast<int64_t>(at.batch - args.batch0) * args.scan.nheads + at.head, at.piece = at.begin = 0, at.more = false;
  at.token0 = args.chunk0 * kTileRows, at.limit = valid_tokens(args.scan, at.batch), at.chunks = valid_chunks(args, at.limit);
  return at;
}

// Of rows that are cut, the block's piece number `index`; false behind its last. Blocks of first pieces come first.
template <typename L>
__device__ __forceinline__ bool piece_of_row(const TwoPassArgs& args, int index, StatesItem& at) {
  const int rows = args.rows * args.scan.nheads, block = blockIdx.x / L::kSplit;
  int row = block, end = args.first;
  at.piece = 0, at.begin = 0;
  if (args.run > 0) {
    row = block * args.run / args.chunks + index;
    const int before = row * args.chunks, behind = (block + 1) * args.run - before;  // chunks, of the rows and of the run
    if (row >= rows || behind <= 0) return false;
    at.begin = max(0, block * args.run - before), at.piece = at.begin > 0 ? 1 : 0, end = min(args.chunks, behind);
  } else if (block >= rows) {
    const int piece = (block - rows) * args.together + index;
    if (index >= args.together || piece >= rows * args.later) return false;
    row = piece / args.later, at.piece = 1 + piece % args.later;
    at.begin = args.first + (at.piece - 1) * args.rest, end = at.begin + args.rest;
  } else if (index > 0) {
    return false;
  }
  at.row = row, at.head = row % args.scan.nheads, at.batch = args.batch0 + row / args.scan.nheads;
  at.part = blockIdx.x % L::kSplit;
  at.token0 = (args.chunk0 + at.begin) * kTileRows, at.limit = valid_tokens(args.scan, at.batch);
  const int valid = valid_chunks(args, at.limit);
  at.chunks = max(0, min(valid, end) - at.begin), at.more = valid > end;
  return true;
}

// The block's pieces from the first on: visit(piece, chunks of the block before it).
template <typename L, bool kCut, typename Visit>
__device__ __forceinline__ void each_piece(const TwoPassArgs& args, StatesItem at, Visit visit) {
  int i = 0, n = 0;
#pragma unroll 1
  do {
    visit(at, n);
    n += at.chunks;
  } while (kCut && piece_of_row<L>(args, ++i, at));
}

// Every kStep-th of their chunks: visit(piece, chunk of the piece, chunk of the block).
template <typename L, bool kCut, int kStep, typename Visit>
__device__ __forceinline__ void each_chunk(const TwoPassArgs& args, const StatesItem& first, int c, Visit visit) {
  each_piece<L, kCut>(args, first, [&](const StatesItem& at, int n) {
#pragma unroll 1
    for (; c < at.chunks; c += kStep) visit(at, c, n + c);
    c -= at.chunks;
  });
}

}  // namespace ssd
}  // namespace mamba
