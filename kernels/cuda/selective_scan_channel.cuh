// selective_scan, tactic "channel": a thread per channel, time in order. For large batch x channels.
//
// A block has 128 neighbouring channels. Tiles of kTile tokens of u, delta and z come in by cp.async, double
// buffered, so that a thread reads them with immediate offsets and no address arithmetic; y leaves through shared
// memory in 16-byte stores. B and C are the same for all threads: converted to float32 once per block and read as
// broadcasts. What is left per (channel, token) is about 120 instructions, 20 of them special-function.
#pragma once

#include "selective_scan.cuh"

namespace mamba::scan {

constexpr int kTile = 16;
constexpr int kWidth = 128;  // channels and threads of a block

template <typename T> struct ChannelShared {
  T u[kTile][kWidth], delta[kTile][kWidth], z[kTile][kWidth], y[kTile][kWidth];
  float bc[kTile][2 * kState];
};

// A thread's share of moving the tiles of one activation: with kVec runs of 16 bytes, else its own channel.
template <typename T, bool kVec> struct Lane {
  static constexpr int kRun = kVec ? 16 / sizeof(T) : 1, kRuns = kWidth / kRun;
  static constexpr int kRows = kWidth / kRuns;  // tokens between this thread's rows of a tile
  T* p;                                         // this thread's first row of the next tile
  int64_t rows, tile;                           // steps of kRows and of kTile tokens, in elements
  int r, c;

  __device__ __forceinline__ Lane(const T* base, const Strides& s, int b, int64_t first, int64_t dir, int c0)
      : rows(dir * kRows * s.token), tile(dir * kTile * s.token), r(threadIdx.x / kRuns), c(threadIdx.x % kRuns * kRun) {
    p = const_cast<T*>(base) + b * s.batch + (first + dir * r) * s.token + c0 + c;
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

// One token: decays, recurrence, output. bc holds this token's 16 values of B and 16 of C.
template <typename T, int kFma>
__device__ __forceinline__ T channel_token(float (&h)[kState], const float (&A)[kState], const float* bc, float u,
                                           float dt, float z, float D, bool has_z) {
  const float du = dt * u;
  float part[4] = {D * u, 0.0f, 0.0f, 0.0f};  // four chains, so that no sum waits for the one before
#pragma unroll
  for (int n = 0; n < kState; n += 4) {
    float B[4], C[4];
    *reinterpret_cast<float4*>(B) = *reinterpret_cast<const float4*>(bc + n);
    *reinterpret_cast<float4*>(C) = *reinterpret_cast<const float4*>(bc + kState + n);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float x = dt * A[n + j];
      const float a = n + j < kFma ? ex2_fma(x) : ex2(x);
      h[n + j] = fmaf(a, h[n + j], du * B[j]);
      part[j] = n == 0 && j > 0 ? C[j] * h[n + j] : fmaf(C[j], h[n + j], part[j]);
    }
  }
  const float y = (part[0] + part[1]) + (part[2] + part[3]);
  return from_float<T>(has_z ? y * silu(z) : y);
}

__device__ __forceinline__ void store_state(float* dst, const float (&h)[kState]) {
#pragma unroll
  for (int n = 0; n < kState; n += 4) {
    *reinterpret_cast<float4*>(dst + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
  }
}

template <typename T, bool kVec, int kFma, bool kStateOnly>
__global__ void __launch_bounds__(kWidth, sizeof(T) == 4 ? 3 : 5) channel_kernel(const __grid_constant__ Args<T> p) {
  extern __shared__ __align__(16) char shared[];
  auto* tiles = reinterpret_cast<ChannelShared<T>*>(shared);  // [2]
  const int b = blockIdx.y;
  const int blocks_per_group = ceil_div(p.group_dim, kWidth);
  const int group = blockIdx.x / blocks_per_group;
  const int c0 = group * p.group_dim + (blockIdx.x % blocks_per_group) * kWidth;
  const int channels = min(kWidth, (group + 1) * p.group_dim - c0);
  const int c = c0 + threadIdx.x;
  const bool active = int(threadIdx.x) < channels;
  const int piece = blockIdx.z, full_row = row_length(p, b), t_begin = min(piece * p.piece_len, full_row);
  const int row = min(p.piece_len, full_row - t_begin);  // tokens of this block
  const int64_t dir = p.reverse ? -1 : 1, first = p.reverse ? full_row - 1 - t_begin : t_begin;
  const bool use_softplus = p.softplus, has_z = !kStateOnly && p.z;

  float A[kState], h[kState];
#pragma unroll
  for (int n = 0; n < kState; n++) {
    A[n] = active ? p.A[int64_t(c) * kState + n] * kLog2e : 0.0f;
    h[n] = active && p.h0 && !kStateOnly ? p.h0[(int64_t(b) * p.dim + c) * kState + n] : 0.0f;
  }
  for (int j = 0; !kStateOnly && active && j < piece; j++) {  // through the pieces before
    const int64_t at = (int64_t(b) * p.pieces + j) * p.dim + c;
    const float dt = p.piece_dt[at];
#pragma unroll
    for (int n = 0; n < kState; n++) h[n] = fmaf(ex2(A[n] * dt), h[n], p.piece_state[at * kState + n]);
  }
  float dt_total = 0.0f;
  const float bias = active && p.bias ? p.bias[c] : 0.0f, D = active && p.D ? p.D[c] : 0.0f;

  // The first 4 * kTile / 2 threads stage one run of eight states each: tile token, B or C, half.
  const int run = threadIdx.x, run_token = run / 4;
  const bool is_b = run % 4 < 2;
  const int64_t bc_token = is_b ? p.B_stride.token : p.C_stride.token;
  const T* pbc = (is_b ? p.B + b * p.B_stride.batch : p.C + b * p.C_stride.batch) + (first + dir * run_token) * bc_token +
                 group * kState + run % 2 * 8;
  Run<T> raw{};  // where there is no token the values of the tile before stay: they meet dt = 0 or are not used
  auto load_bc = [&](int t0) {
    if (run < 4 * kTile && t0 + run_token < row) load_run8<T, kVec>(raw, pbc);
    pbc += dir * kTile * bc_token;
  };
  Lane<T, kVec> u(p.u, p.u_stride, b, first, dir, c0), delta(p.delta, p.delta_stride, b, first, dir, c0);
  Lane<T, kVec> z(has_z ? p.z : p.u, has_z ? p.z_stride : p.u_stride, b, first, dir, c0);
  Lane<T, kVec> y(p.y, p.y_stride, b, first, dir, c0);
  auto stage = [&](ChannelShared<T>& tile, int t0) {
    u.stage(tile.u, row - t0, channels);
    delta.stage(tile.delta, row - t0, channels);
    if (has_z) z.stage(tile.z, row - t0, channels);
    cp_async_commit();
  };

  if (row > 0) stage(tiles[0], 0);
  load_bc(0);
  int buffer = 0;
  for (int t0 = 0; t0 < row; t0 += kTile, buffer ^= 1) {
    ChannelShared<T>& tile = tiles[buffer];
    if (run < 4 * kTile) stage_states(&tile.bc[run_token][run % 4 * 8], raw);
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone is done with the tile before
    if (!kStateOnly && t0 > 0) y.unstage(tiles[buffer ^ 1].y, kTile, channels);
    if (t0 + kTile < row) stage(tiles[buffer ^ 1], t0 + kTile);
    load_bc(t0 + kTile);
    auto token = [&](int i) {
      const float dt = time_step<T>(to_float(tile.delta[i][threadIdx.x]) + bias, use_softplus);
      const T out = channel_token<T, kFma>(h, A, tile.bc[i], to_float(tile.u[i][threadIdx.x]), dt,
                                           to_float(tile.z[i][threadIdx.x]), D, has_z);
      if (kStateOnly) {
        dt_total += dt;
      } else {
        tile.y[i][threadIdx.x] = out;
      }
    };
    const int tokens = min(kTile, row - t0);
    int i = 0;
#pragma unroll 1
    for (; i + 4 <= tokens; i += 4) {
#pragma unroll
      for (int j = 0; j < 4; j++) token(i + j);
    }
#pragma unroll 1
    for (; i < tokens; i++) token(i);
  }
  if constexpr (kStateOnly) {
    const int64_t at = (int64_t(b) * p.pieces + piece) * p.dim + c;
    if (active) p.piece_dt[at] = dt_total;
    if (active) store_state(p.piece_state + at * kState, h);
  } else {
    __syncthreads();
    if (row > 0) y.unstage(tiles[buffer ^ 1].y, (row - 1) % kTile + 1, channels);
    if (piece != p.pieces - 1) return;
    if (active && p.hT) store_state(p.hT + (int64_t(b) * p.dim + c) * kState, h);
    zero_padding(p, b, full_row, c0, c0 + channels);
  }
}

}  // namespace mamba::scan
