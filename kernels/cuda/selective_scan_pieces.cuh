// selective_scan, tactic "channel", pieces of a row side by side: the pass that makes the state at the end of every piece.
//
// It starts from zero and walks back from the piece's end:
//   h_n = sum over t of 2^(A_n R_t) dt_t u_t B_tn,  R_t = sum of the dt behind t
// so that it can leave a state as soon as what lies before decays by more than 2^kNegligible<T> up to the end. How far that
// is depends on the data; of a long piece most states are left early, and then the few others go on alone, a thread for
// each. A piece all of whose states were left hides every piece before it. Without softplus dt may be negative, and
// nothing is left early.
#pragma once

#include "selective_scan_tiles.cuh"

namespace mamba::scan {

constexpr int kLook = 4 * kTile;  // tokens between looks at which states still count

// A state on its own. `at`: channel of the block * kState + state; `behind`: dt up to the piece's end.
struct alignas(16) Single {
  float A, h, behind;
  int at;
};

template <typename T> struct PieceShared {
  static constexpr int kAhead = sizeof(T) == 2 ? 2 : 1;  // tiles on their way
  static constexpr int kPad = 4;                         // tokens: rows of neighbouring states lie in other banks
  struct Tile {
    T u[kTile][kWidth], delta[kTile][kWidth], B[kTile][kState];
  } tile[kAhead + 1];
  float B[2][kState][kTile + kPad];
  Single single[kWidth];
  float behind[kWidth];
  int wanted[kWidth];  // of channels that are moved together: the last look at which one of their states still counted
  int count[kWidth / 32];  // states that still count, of a warp

  __device__ __forceinline__ int2 counted(int warp) const {  // in the warps before this one; in all
    int before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWidth / 32; w++) before += w < warp ? count[w] : 0, all += count[w];
    return {before, all};
  }
};

template <typename T, bool kVec>
__global__ void __launch_bounds__(kWidth, 3) piece_states_kernel(const __grid_constant__ Args<T> p) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<PieceShared<T>*>(memory);
  Part<T> part(p, place_of_block(p));
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, channels = part.channels, row = part.tokens;
  const bool active = thread < channels, use_softplus = p.softplus;
  if (part.piece == 0 && p.h0 && active) {
    const float* from = p.h0 + (int64_t(part.b) * p.dim + part.c0 + thread) * kState;
    float* to = start_of_row(p, kState, part.b, part.c0 + thread);
#pragma unroll
    for (int n = 0; n < kState; n++) to[n] = from[n];
  }
  if (part.piece >= part.last) return;  // nothing comes behind the last one
  part.turn_back();
  const int64_t out = (int64_t(part.b) * p.pieces + part.piece) * p.dim + part.c0;

  // B is a tile ahead of the rest, so that it is float32, with time innermost, when its tile's turn comes. No load of it goes
  // through registers: whatever else waits on that scoreboard would wait for global memory.
  constexpr int kAhead = PieceShared<T>::kAhead;
  Lane<T, kVec> u(p.u, p.u_stride, part), delta(p.delta, p.delta_stride, part);
  StatesLane<T, kVec> states(p, part, thread % 2 + thread / 2 * 4);  // of B
  int wanted = channels;  // 0: nobody needs the channels that this thread moves
  auto tile_at = [&](int t0) -> auto& { return shared.tile[t0 / kTile % (kAhead + 1)]; };
  auto B_at = [&](int t0) -> auto& { return shared.B[t0 / kTile % 2]; };
  auto stage_states = [&](int t0) {
    if (t0 < row && states.token < kTile) states.copy(&tile_at(t0).B[states.token][states.part * 8], row - t0);
  };
  auto convert_states = [&](int t0) {
    if (t0 >= row || states.token >= kTile) return;
    float f[8];
    to_floats(f, *reinterpret_cast<const Run<T>*>(&tile_at(t0).B[states.token][states.part * 8]));
#pragma unroll
    for (int j = 0; j < 8; j++) B_at(t0)[states.part * 8 + j][states.token] = f[j];
  };
  auto stage = [&](int t0) {
    if (t0 < row) u.stage(tile_at(t0).u, row - t0, wanted), delta.stage(tile_at(t0).delta, row - t0, wanted);
    stage_states(t0 + kTile);
    cp_async_commit();
  };
  auto arrive = [&](int t0, bool few = false) {  // the tile is here, and everyone is done with the tile before
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    if (few) wanted = shared.wanted[u.c / u.kRun] == t0 ? channels : 0;
    convert_states(t0 + kTile);
    stage(t0 + kAhead * kTile);
  };
  // dt u and R of kAtOnce tokens of a channel; none past the end of the row, where NaN may be.
  auto inputs = [&](const auto& tile, int i, int tokens, int c, float bias, float& behind, float (&du)[kAtOnce], float (&R)[kAtOnce]) {
    float dt[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      dt[j] = time_step<T>(to_float(tile.delta[i + j][c]) + bias, use_softplus);
      du[j] = dt[j] * to_float(tile.u[i + j][c]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      if (j >= tokens - i) dt[j] = du[j] = 0.0f;
      R[j] = behind, behind += dt[j];
    }
  };
  auto add = [&](float& h, float A, const float* B, const float (&du)[kAtOnce], const float (&R)[kAtOnce]) {
    float sum[2] = {h, 0.0f};
#pragma unroll
    for (int j = 0; j < kAtOnce; j += 4) {
      const Vec<float, 4> b = load_vec<float, 4>(B + j);
#pragma unroll
      for (int r = 0; r < 4; r++) sum[r % 2] = fmaf(ex2(A * R[j + r]) * du[j + r], b.v[r], sum[r % 2]);
    }
    h = sum[0] + sum[1];
  };

  stage_states(0);
  for (int i = 0; i < kAhead; i++) stage(i * kTile);
  cp_async_wait<kAhead - 1>();
  convert_states(0);  // what this thread has copied itself
  float A[kState], h[kState];
#pragma unroll
  for (int n = 0; n < kState; n++) {
    A[n] = active ? p.A[(part.c0 + thread) * int64_t(kState) + n] * kLog2e : -1e30f, h[n] = 0.0f;
  }
  const float bias = landed(active && p.bias ? p.bias[part.c0 + thread] : 0.0f);
  float behind = active ? 0.0f : 1.0f;  // where there is no channel no state counts
  uint32_t mine = 0, left = 0xffff;     // states that still count: of this thread; of any of the warp's
  int t0 = 0, total = kWidth * kState;
  for (; t0 < row; t0 += kTile) {
    const bool look = use_softplus && t0 % kLook == 0;
    if (look) {
      mine = 0;
#pragma unroll
      for (int n = 0; n < kState; n++) mine |= still_counts<T>(A[n], behind) ? 1u << n : 0;
      left = __reduce_or_sync(~0u, mine);
      const int count = __reduce_add_sync(~0u, __popc(mine));
      if (lane == 0) shared.count[warp] = count;
    }
    arrive(t0);
    if (look) total = shared.counted(warp).y;
    if (total <= kWidth) break;
    const auto& tile = tile_at(t0);
    const auto& B = B_at(t0);
#pragma unroll 1
    for (int i = 0; i < kTile; i += kAtOnce) {
      float du[kAtOnce], R[kAtOnce];
      inputs(tile, i, active ? row - t0 : 0, thread, bias, behind, du, R);
      if (left == 0xffff) {
#pragma unroll
        for (int n = 0; n < kState; n++) add(h[n], A[n], &B[n][i], du, R);
      } else {
#pragma unroll
        for (int n = 0; n < kState; n++) {
          if (left >> n & 1) add(h[n], A[n], &B[n][i], du, R);
        }
      }
    }
  }
  if (active) store_state(p.piece_state + (out + thread) * kState, h);
  if (t0 >= row || total == 0) {
    if (active) p.piece_dt[out + thread] = behind;
    return;
  }

  // The few states left, a thread each, closed up whenever that makes a warp idle.
  int place = __popc(mine);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, place, d);
    place += lane >= d ? other : 0;
  }
  place += shared.counted(warp).x - __popc(mine);
#pragma unroll
  for (int n = 0; n < kState; n++) {
    if (mine >> n & 1) shared.single[place++] = {A[n], h[n], behind, thread * kState + n};
  }
  shared.behind[thread] = behind, shared.wanted[thread] = 0;
  __syncthreads();
  Single own = shared.single[thread];
  int used = total;
  bool alive = thread < total;
  float own_bias = landed(alive && p.bias ? p.bias[part.c0 + own.at / kState] : 0.0f);
  auto retire = [&] {
    p.piece_state[out * kState + own.at] = own.h;
    atomicMax(reinterpret_cast<int*>(&shared.behind[own.at / kState]), __float_as_int(own.behind));
  };
  while (true) {
    const auto& tile = tile_at(t0);
    const auto& B = B_at(t0);
    if (__any_sync(~0u, alive)) {
#pragma unroll 1
      for (int i = 0; i < kTile; i += kAtOnce) {
        float du[kAtOnce], R[kAtOnce];
        inputs(tile, i, row - t0, alive ? own.at / kState : 0, own_bias, own.behind, du, R);
        add(own.h, own.A, &B[alive ? own.at % kState : 0][i], du, R);
      }
    }
    t0 += kTile;
    if (t0 >= row) break;
    const bool look = t0 % kLook == 0;
    uint32_t counting = 0;
    if (look) {
      const bool counts = alive && still_counts<T>(own.A, own.behind);
      if (alive && !counts) retire();
      alive = counts, counting = __ballot_sync(~0u, counts);
      if (alive) atomicMax(&shared.wanted[own.at / kState / u.kRun], t0);
      if (lane == 0) shared.count[warp] = __popc(counting);
    }
    arrive(t0, look);
    if (!look) continue;
    const int2 counted = shared.counted(warp);
    if (counted.y == 0) break;
    if (ceil_div(counted.y, 32) == ceil_div(used, 32)) continue;
    if (alive) shared.single[counted.x + __popc(counting & ((1u << lane) - 1))] = own;
    __syncthreads();
    used = counted.y, alive = thread < used;
    own = shared.single[thread];
    own_bias = landed(alive && p.bias ? p.bias[part.c0 + own.at / kState] : 0.0f);
  }
  if (alive) retire();
  __syncthreads();
  if (active) p.piece_dt[out + thread] = shared.behind[thread];
}

// The state of channel c before a piece: of the pieces before it, the nearest first, and of the initial state.
template <typename T>
__device__ __forceinline__ void state_before(float (&h)[kState], const float (&A)[kState], const Args<T>& p, int b, int piece, int c) {
  float slowest = A[0];
#pragma unroll
  for (int n = 1; n < kState; n++) slowest = fmaxf(slowest, A[n]);
  walk_back(p, kState, b, piece, c, slowest, [&](const float* state, float behind) {
#pragma unroll
    for (int n = 0; n < kState; n++) h[n] = fmaf(ex2(A[n] * behind), state[n], h[n]);
  });
}

}  // namespace mamba::scan
