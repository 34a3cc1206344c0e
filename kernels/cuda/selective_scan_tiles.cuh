// selective_scan, tactic "channel": what of a row a block has, and the tiles it moves.
#pragma once

#include <type_traits>

#include "selective_scan.cuh"

namespace mamba::scan {

constexpr int kWidth = kChannelWidth;
constexpr int kTile = 16;   // tokens
constexpr int kAtOnce = 8;  // tokens whose elementwise work a thread does together, so that it waits for no result
// log2 of a decay behind which a state does not count: the bits of the type, and 40 more for what lies before being larger.
template <typename T> constexpr int kNegligible = -40 - (sizeof(T) == 4 ? 24 : std::is_same_v<T, __half> ? 11 : 8);

template <typename T> __device__ __forceinline__ bool still_counts(float A, float dt) {  // A in log2 units
  return !(A * dt < float(kNegligible<T>));
}

// Where the first pass leaves a copy of the initial state, which the last piece of the second may overwrite while others
// still start: in the place of the last piece's end, which nobody needs.
template <typename T> __device__ __forceinline__ float* start_of_row(const Args<T>& p, int d_state, int b, int c) {
  return p.piece_state + ((int64_t(b) * p.pieces + p.pieces - 1) * p.dim + c) * d_state;
}

// What channel c has of the states before a piece, the nearest piece first, until the slowest decay leaves nothing of what lies
// before: visit(state at the end of a piece or the initial one, dt between it and the piece).
template <typename T, typename Visit>
__device__ __forceinline__ void walk_back(const Args<T>& p, int d_state, int b, int piece, int c, float slowest, Visit visit) {
  float behind = 0.0f;
  int j = piece - 1;
  for (; j >= 0 && (!p.softplus || still_counts<T>(slowest, behind)); j--) {
    const int64_t from = (int64_t(b) * p.pieces + j) * p.dim + c;
    visit(p.piece_state + from * d_state, behind);
    behind += p.piece_dt[from];
  }
  const bool whole = p.pieces == 1 || p.turns;
  if (j < 0 && p.h0) visit(whole ? p.h0 + (int64_t(b) * p.dim + c) * d_state : start_of_row(p, d_state, b, c), behind);
}

// A loaded value, waited for here. Left to the loop that uses it, it would share its scoreboard with a load of the loop, and
// every round would wait for that one. blockDim.y is 1, which the compiler does not know.
__device__ __forceinline__ float landed(float v) { return v * float(blockDim.y); }

__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Which block this is. Pieces in turn draw tickets, so that a piece waits for none that does not run yet.
struct Place {
  int b, column, piece;
  __device__ __forceinline__ int64_t row() const { return int64_t(b) * gridDim.x + column; }
};
template <typename T> __device__ __forceinline__ Place place_of_block(const Args<T>& p) {
  if (!p.turns) return {int(blockIdx.y), int(blockIdx.x), int(blockIdx.z)};
  __shared__ int drawn;
  if (threadIdx.x == 0) drawn = atomicAdd(p.turns, 1);
  __syncthreads();
  const int ticket = drawn, rows = gridDim.x * gridDim.y, row = ticket % rows;
  return {row / int(gridDim.x), row % int(gridDim.x), ticket / rows};
}

// The block's channels and tokens.
template <typename T> struct Part {
  int b, piece, group, c0, channels;
  int full, tokens, last;  // tokens of the row and of this piece; the row's last piece with tokens
  int64_t first, dir;      // index of the piece's first token in time order, step to the next

  __device__ __forceinline__ Part(const Args<T>& p, const Place& at) : b(at.b), piece(at.piece) {
    const int blocks_per_group = ceil_div(p.group_dim, kWidth);
    group = at.column / blocks_per_group;
    c0 = group * p.group_dim + at.column % blocks_per_group * kWidth;
    channels = min(kWidth, (group + 1) * p.group_dim - c0);
    full = row_length(p, b), last = max(ceil_div(full, p.piece_len), 1) - 1;
    const int begin = min(piece * p.piece_len, full);
    tokens = min(p.piece_len, full - begin);
    dir = p.reverse ? -1 : 1, first = p.reverse ? full - 1 - begin : begin;
  }
  __device__ __forceinline__ void turn_back() { first += dir * (tokens - 1), dir = -dir; }
};

// A thread's share of moving the tiles of one activation: with kVec runs of 16 bytes, else its own channel.
template <typename T, bool kVec> struct Lane {
  static constexpr int kRun = kVec ? 16 / sizeof(T) : 1, kRuns = kWidth / kRun;
  static constexpr int kRows = kWidth / kRuns;  // tokens between this thread's rows of a tile
  T* p;                                         // this thread's first row of the next tile
  int64_t rows, tile;                           // steps of kRows and of kTile tokens, in elements
  int r, c;

  __device__ __forceinline__ Lane(const T* base, const Strides& s, const Part<T>& at)
      : rows(at.dir * kRows * s.token), tile(at.dir * kTile * s.token), r(threadIdx.x / kRuns), c(threadIdx.x % kRuns * kRun) {
    p = const_cast<T*>(base) + at.b * s.batch + (at.first + at.dir * r) * s.token + at.c0 + c;
  }
  __device__ __forceinline__ void stage(T (*dst)[kWidth], int tokens, int channels) {
#pragma unroll
    for (int i = 0; i < kTile / kRows; i++) {
      const bool valid = r + i * kRows < tokens && c < channels;
      T* to = &dst[r + i * kRows][c];
      if constexpr (kVec) {
        if (valid) cp_async<16>(to, p + i * rows);
      } else {
        if (valid) *to = p[i * rows];
      }
    }
    p += tile;
  }
  __device__ __forceinline__ void unstage(const T (*src)[kWidth], int tokens, int channels) {
#pragma unroll
    for (int i = 0; i < kTile / kRows; i++) {
      if (r + i * kRows < tokens && c < channels) {
        const T* from = &src[r + i * kRows][c];
        if constexpr (kVec) {
          *reinterpret_cast<uint4*>(p + i * rows) = *reinterpret_cast<const uint4*>(from);
        } else {
          p[i * rows] = *from;
        }
      }
    }
    p += tile;
  }
};

// Moves B and C of a tile: thread `run` has eight states of a token: run = 4 * token + 2 * (0: B, 1: C) + half.
template <typename T, bool kVec> struct StatesLane {
  const T* p;
  int64_t tile;
  int token, part;
  Run<T> raw{};  // where there is no token the values of the tile before stay: they meet dt = 0 or are not used

  __device__ __forceinline__ StatesLane(const Args<T>& a, const Part<T>& at, int run) : token(run / 4), part(run % 4) {
    const bool is_b = part < 2;
    const Strides& s = is_b ? a.B_stride : a.C_stride;
    p = (is_b ? a.B : a.C) + at.b * s.batch + (at.first + at.dir * token) * s.token + at.group * kState + part % 2 * 8;
    tile = at.dir * kTile * s.token;
  }
  __device__ __forceinline__ void load(int tokens) {
    if (token < min(kTile, tokens)) load_run8<T, kVec>(raw, p);
    p += tile;
  }
  // Into shared memory instead, zeros where there is no token.
  __device__ __forceinline__ void copy(T* to, int tokens) {
    const bool valid = token < tokens;
    if constexpr (kVec) {
#pragma unroll
      for (int i = 0; i < Run<T>::kWords; i++) cp_async<16>(to + i * int(16 / sizeof(T)), p + i * int(16 / sizeof(T)), valid);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) to[i] = valid ? p[i] : from_float<T>(0.0f);
    }
    p += tile;
  }
};

__device__ __forceinline__ void store_state(float* dst, const float (&h)[kState]) {
#pragma unroll
  for (int n = 0; n < kState; n += 4) {
    *reinterpret_cast<float4*>(dst + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
  }
}

}  // namespace mamba::scan
