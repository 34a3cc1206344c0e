// selective_scan, tactic "generic": any d_state from 1 to 256, any alignment.
//
// A channel's states are spread over kLanes lanes of a warp, eight each; time runs in order. dt, dt * u and the
// float32 B and C of a tile of tokens are prepared once in shared memory, the next tile on its way meanwhile; y is summed by
// shuffles, and gated after the tile, again once per element.
//
// A row may be cut into pieces, a block each: a first pass makes the state at the end of every piece from zero, and the
// second starts each piece from what those before it left.
#pragma once

#include "selective_scan_tiles.cuh"

namespace mamba::scan {

constexpr int kGenericTile = 16;  // tokens

// kEnds: the first pass.
template <typename T, int kLanes, bool kEnds>
__global__ void __launch_bounds__(kGenericThreads, generic_blocks(kLanes)) generic_kernel(const __grid_constant__ Args<T> p) {
  constexpr int kChannels = kGenericThreads / kLanes, kHalf = kLanes * 4;  // states come in two runs of four a lane
  extern __shared__ __align__(16) float shared[];
  float* s_bc = shared;                                     // [tile][B 2 * kHalf | C 2 * kHalf]
  float* s_dt = s_bc + kGenericTile * 4 * kHalf;            // [tile][kChannels]
  float* s_du = s_dt + kGenericTile * kChannels;
  float* s_y = s_du + kGenericTile * kChannels;  // D u before a tile's scan, y behind it
  float* s_z = s_y + kGenericTile * kChannels;
  const int b = blockIdx.y, N = p.d_state, piece = blockIdx.z, last = p.pieces - 1;
  const int blocks_per_group = ceil_div(p.group_dim, kChannels);
  const int group = blockIdx.x / blocks_per_group;
  const int c0 = group * p.group_dim + (blockIdx.x % blocks_per_group) * kChannels;
  const int channels = min(kChannels, (group + 1) * p.group_dim - c0);
  const int channel = threadIdx.x / kLanes, q = threadIdx.x % kLanes, c = c0 + channel;
  const bool active = channel < channels;
  const int row = row_length(p, b), begin = piece * p.piece_len, end = piece == last ? row : min(row, begin + p.piece_len);
  const int64_t dir = p.reverse ? -1 : 1, first = p.reverse ? row - 1 : 0;
  auto at = [&](auto* base, const Strides& s, int t) { return base + b * s.batch + (first + dir * t) * s.token; };
  auto state_of = [&](int i) { return (i < 4 ? 0 : kHalf) + q * 4 + i % 4; };
  auto in = [&](int i) { return active && state_of(i) < N; };
  auto piece_at = [&](int i) { return (int64_t(b) * p.pieces + i) * p.dim + c; };
  const int64_t whole = (int64_t(b) * p.dim + c) * N;

  float A[kPerLaneStates], h[kPerLaneStates], behind = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLaneStates; i++) {
    A[i] = in(i) ? p.A[int64_t(c) * N + state_of(i)] * kLog2e : 0.0f;
    h[i] = 0.0f;
  }
  if (kEnds && piece == last) {
#pragma unroll
    for (int i = 0; i < kPerLaneStates; i++) {
      if (in(i) && p.h0) start_of_row(p, N, b, c)[state_of(i)] = p.h0[whole + state_of(i)];
    }
    return;
  }
  if (!kEnds && active) {
    float slowest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLaneStates; i++) slowest = in(i) ? fmaxf(slowest, A[i]) : slowest;
    walk_back(p, N, b, piece, c, slowest, [&](const float* state, float behind) {
#pragma unroll
      for (int i = 0; i < kPerLaneStates; i++) {
        if (in(i)) h[i] = fmaf(ex2(A[i] * behind), state[state_of(i)], h[i]);
      }
    });
  }
  // What this thread loads of a tile, and finishes: one channel, every kLanes-th token; and of B, and C of the second pass, a share.
  // It is asked for a tile ahead, unless that takes too many registers (16 lanes: 440 us with 80, 576 with 128).
  constexpr bool kAhead = kLanes < 16;
  constexpr int kEach = kGenericTile / kLanes > 0 ? kGenericTile / kLanes : 1;
  constexpr int kRow = (kEnds ? 2 : 4) * kHalf, kAll = kGenericTile * kRow, kShare = ceil_div(kAll, kGenericThreads);
  constexpr int kAtOnce = kAhead ? kShare : 4;
  const int own = threadIdx.x % kChannels, own_t = threadIdx.x / kChannels;
  const bool owns = own < channels;
  const float bias = owns && p.bias ? p.bias[c0 + own] : 0.0f, D = owns && p.D ? p.D[c0 + own] : 0.0f;
  struct {
    T u[kEach], delta[kEach], z[kEach], states[kAtOnce];
  } raw;
  auto fetch_states = [&](int t0, int first) {
#pragma unroll
    for (int e = 0; e < kAtOnce; e++) {
      const int i = threadIdx.x + (first + e) * kGenericThreads, t = i / kRow, n = i % (2 * kHalf);
      const bool is_b = i % kRow < 2 * kHalf;
      raw.states[e] = from_float<T>(0.0f);
      if (i < kAll && t0 + t < end && n < N)
        raw.states[e] = (at(is_b ? p.B : p.C, is_b ? p.B_stride : p.C_stride, t0 + t) + group * N)[n];
    }
  };
  auto stage_states = [&](int first) {
#pragma unroll
    for (int e = 0; e < kAtOnce; e++) {
      const int i = threadIdx.x + (first + e) * kGenericThreads;
      if (i < kAll) s_bc[i / kRow * 4 * kHalf + i % kRow] = to_float(raw.states[e]);
    }
  };
  auto fetch = [&](int t0) {
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const int t = own_t + e * kLanes;
      raw.u[e] = raw.delta[e] = raw.z[e] = from_float<T>(0.0f);
      if (!owns || t >= kGenericTile || t0 + t >= end) continue;
      raw.u[e] = at(p.u, p.u_stride, t0 + t)[c0 + own], raw.delta[e] = at(p.delta, p.delta_stride, t0 + t)[c0 + own];
      if (!kEnds && p.z) raw.z[e] = at(p.z, p.z_stride, t0 + t)[c0 + own];
    }
    if (kAhead) fetch_states(t0, 0);
  };
  auto stage = [&](int t0) {
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const int i = (own_t + e * kLanes) * kChannels + own;
      if (own_t + e * kLanes >= kGenericTile) continue;
      const float dt = owns ? time_step<T>(to_float(raw.delta[e]) + bias, p.softplus) : 0.0f, u = to_float(raw.u[e]);
      s_dt[i] = dt, s_du[i] = dt * u;
      if constexpr (!kEnds) s_y[i] = D * u, s_z[i] = p.z ? silu(to_float(raw.z[e])) : 1.0f;
    }
#pragma unroll 1
    for (int first = 0; first < kShare; first += kAtOnce) {
      if (!kAhead) fetch_states(t0, first);
      stage_states(first);
    }
  };
  if (kAhead) fetch(begin);
  for (int t0 = begin; t0 < end; t0 += kGenericTile) {
    const int tokens = min(kGenericTile, end - t0);
    if (!kAhead) fetch(t0);
    stage(t0);
    __syncthreads();
    if (kAhead) fetch(t0 + kGenericTile);
#pragma unroll 4
    for (int t = 0; t < tokens; t++) {
      const int place = t * kChannels + channel;
      const float dt = s_dt[place], du = s_du[place];
      const float* bc = s_bc + t * 4 * kHalf + q * 4;
      float y = !kEnds && q == 0 ? s_y[place] : 0.0f;
      behind += dt;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float B[4], C[4];
        *reinterpret_cast<float4*>(B) = *reinterpret_cast<const float4*>(bc + half * kHalf);
        if (!kEnds) *reinterpret_cast<float4*>(C) = *reinterpret_cast<const float4*>(bc + 2 * kHalf + half * kHalf);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float& state = h[half * 4 + j];
          state = fmaf(ex2(dt * A[half * 4 + j]), state, du * B[j]);
          if (!kEnds) y = fmaf(C[j], state, y);
        }
      }
      if constexpr (!kEnds) {
#pragma unroll
        for (int o = 1; o < kLanes; o *= 2) y += __shfl_xor_sync(~0u, y, o);
        if (q == 0) s_y[place] = y;
      }
    }
    __syncthreads();
    if constexpr (!kEnds) {
#pragma unroll
      for (int e = 0; e < kEach; e++) {
        const int t = own_t + e * kLanes, i = t * kChannels + own;
        if (owns && t < tokens) at(p.y, p.y_stride, t0 + t)[c0 + own] = from_float<T>(s_y[i] * s_z[i]);
      }
    }
  }
  if (kEnds && active && q == 0) p.piece_dt[piece_at(piece)] = behind;
  float* to = kEnds ? p.piece_state + piece_at(piece) * N : piece == last && p.hT ? p.hT + whole : nullptr;
#pragma unroll
  for (int i = 0; i < kPerLaneStates; i++) {
    if (to && in(i)) to[state_of(i)] = h[i];
  }
  if (!kEnds && piece == last) zero_padding(p, b, row, c0, c0 + channels);
}

}  // namespace mamba::scan
