// selective_scan, tactic "channel": a thread per channel, time in order. For large batch x channels.
//
// A block has 128 neighbouring channels. Tiles of kTile tokens of u, delta and z come in by cp.async, double
// buffered, so that a thread reads them with immediate offsets and no address arithmetic; y leaves through shared
// memory in 16-byte stores. B and C are the same for all threads: converted to float32 once per block and read as
// broadcasts. What is left per (channel, token) is about 120 instructions, 19 of them special-function.
//
// A row may be cut into pieces, a block for each:
//   in turn       where whole rows would leave some multiprocessors with a block more than others: as many blocks run
//                 as have a place, and a piece waits for the state of the one before it, which an earlier ticket has
//   side by side  for few long rows: selective_scan_pieces.cuh makes the state at the end of every piece first
#pragma once

#include "selective_scan_pieces.cuh"

namespace mamba::scan {

template <typename T> struct ChannelShared {
  T u[kTile][kWidth], delta[kTile][kWidth], z[kTile][kWidth], y[kTile][kWidth];
  float bc[kTile][2 * kState];
};

// A token's decays, recurrence and sum over the states. bc holds its 16 values of B and 16 of C.
__device__ __forceinline__ float channel_token(float (&h)[kState], const float (&A)[kState], const float* bc, float dt, float du,
                                               float y) {
  float part[4] = {y, 0.0f, 0.0f, 0.0f};  // four chains, so that no sum waits for the one before
#pragma unroll
  for (int n = 0; n < kState; n += 4) {
    const Vec<float, 4> B = load_vec<float, 4>(bc + n), C = load_vec<float, 4>(bc + kState + n);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      h[n + j] = fmaf(ex2(dt * A[n + j]), h[n + j], du * B.v[j]);
      part[j] = n == 0 && j > 0 ? C.v[j] * h[n + j] : fmaf(C.v[j], h[n + j], part[j]);
    }
  }
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// kCount tokens from token i of a tile on: what is elementwise for all of them first.
template <int kCount, typename T>
__device__ __forceinline__ void channel_tokens(ChannelShared<T>& tile, int i, float (&h)[kState], const float (&A)[kState], float bias,
                                               float D, bool use_softplus, bool has_z) {
  float dt[kCount], du[kCount], gate[kCount], y[kCount];
  const int c = threadIdx.x;
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    dt[j] = to_float(tile.delta[i + j][c]), du[j] = to_float(tile.u[i + j][c]), gate[j] = to_float(tile.z[i + j][c]);
  }
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    dt[j] = time_step<T>(dt[j] + bias, use_softplus);
    gate[j] = has_z ? silu(gate[j]) : 1.0f;
    y[j] = D * du[j], du[j] *= dt[j];
  }
  __syncwarp();  // keeps the compiler from mixing the two, which it does until every result is waited for
#pragma unroll
  for (int j = 0; j < kCount; j++) y[j] = channel_token(h, A, tile.bc[i + j], dt[j], du[j], y[j]);
#pragma unroll
  for (int j = 0; j < kCount; j++) tile.y[i + j][c] = from_float<T>(y[j] * gate[j]);
}

// The states of a row of blocks on their way from piece to piece, and how many pieces are done.
struct Turn {
  float4* states;  // [kState / 4][kWidth]
  int* done;

  template <typename T>
  __device__ __forceinline__ Turn(const Args<T>& p, const Place& at)
      : states(reinterpret_cast<float4*>(p.piece_state) + at.row() * (kState / 4 * kWidth) + threadIdx.x),
        done(p.turns + 1 + at.row()) {}
  __device__ __forceinline__ void take(float (&h)[kState], int piece) const {
    if (threadIdx.x == 0) {
      while (load_acquire(done) < piece) __nanosleep(64);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kState; n += 4) {
      const float4 v = __ldcg(states + n / 4 * kWidth);
      h[n] = landed(v.x), h[n + 1] = landed(v.y), h[n + 2] = landed(v.z), h[n + 3] = landed(v.w);
    }
  }
  __device__ __forceinline__ void hand_on(const float (&h)[kState], int piece) const {
#pragma unroll
    for (int n = 0; n < kState; n += 4) __stcg(states + n / 4 * kWidth, make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) store_release(done, piece + 1);
  }
};

template <typename T, bool kVec>
__global__ void __launch_bounds__(kWidth, kVec && sizeof(T) == 2 ? 4 : 3) channel_kernel(const __grid_constant__ Args<T> p) {
  extern __shared__ __align__(16) char memory[];
  auto* tiles = reinterpret_cast<ChannelShared<T>*>(memory);  // [2]
  const Place at = place_of_block(p);
  const Part<T> part(p, at);
  if (part.piece > part.last) return;
  const int channels = part.channels, c = part.c0 + threadIdx.x, row = part.tokens;
  const bool active = int(threadIdx.x) < channels, use_softplus = p.softplus, has_z = p.z;

  Lane<T, kVec> u(p.u, p.u_stride, part), delta(p.delta, p.delta_stride, part), y(p.y, p.y_stride, part);
  Lane<T, kVec> z(has_z ? p.z : p.u, has_z ? p.z_stride : p.u_stride, part);
  StatesLane<T, kVec> states(p, part, threadIdx.x);
  auto stage = [&](ChannelShared<T>& tile, int t0) {
    u.stage(tile.u, row - t0, channels);
    delta.stage(tile.delta, row - t0, channels);
    if (has_z) z.stage(tile.z, row - t0, channels);
    cp_async_commit();
    states.load(row - t0);
  };
  if (row > 0) stage(tiles[0], 0);

  float A[kState], h[kState];
#pragma unroll
  for (int n = 0; n < kState; n++) A[n] = active ? p.A[int64_t(c) * kState + n] * kLog2e : 0.0f, h[n] = 0.0f;
  const float bias = landed(active && p.bias ? p.bias[c] : 0.0f), D = landed(active && p.D ? p.D[c] : 0.0f);
  if (p.turns && part.piece > 0) {
    Turn(p, at).take(h, part.piece);
  } else if (active) {
    state_before(h, A, p, part.b, part.piece, c);
  }

  int buffer = 0;
  for (int t0 = 0; t0 < row; t0 += kTile, buffer ^= 1) {
    ChannelShared<T>& tile = tiles[buffer];
    if (states.token < kTile) stage_states(&tile.bc[states.token][states.part * 8], states.raw);
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone is done with the tile before
    if (t0 > 0) y.unstage(tiles[buffer ^ 1].y, kTile, channels);
    if (t0 + kTile < row) stage(tiles[buffer ^ 1], t0 + kTile);
    const int tokens = min(kTile, row - t0);
    int i = 0;
#pragma unroll 1
    for (; i + kAtOnce <= tokens; i += kAtOnce) channel_tokens<kAtOnce>(tile, i, h, A, bias, D, use_softplus, has_z);
#pragma unroll 1
    for (; i < tokens; i++) channel_tokens<1>(tile, i, h, A, bias, D, use_softplus, has_z);
  }
  if (p.turns && part.piece < part.last) Turn(p, at).hand_on(h, part.piece);
  __syncthreads();
  if (row > 0) y.unstage(tiles[buffer ^ 1].y, (row - 1) % kTile + 1, channels);
  if (part.piece < part.last) return;
  if (active && p.hT) store_state(p.hT + (int64_t(part.b) * p.dim + c) * kState, h);
  zero_padding(p, part.b, part.full, part.c0, part.c0 + channels);
}

}  // namespace mamba::scan
