// selective_scan, tactic "chain" with four or eight lanes a channel: a tile of 16 tokens, two states at a time.
//
// A lane makes dt, dt * u and silu(z) of 16 / kLanes tokens; dt and dt * u go to all lanes of the channel, and the lanes'
// parts of y to the one that finishes a token, through the warp's record in shared memory. Nothing of a tile is in a
// loop, and y is no sum in registers before the first pair of states: so two states' decays and inputs have room.
#pragma once

#include "selective_scan_chain_linked.cuh"

namespace mamba::scan {

// What a lane has for the whole row, and what moves with its tiles.
template <typename L> struct PairLane {
  Link<L> link;  // of linked blocks
  float bias, D;
  bool use_softplus, has_z;
  const float2* carry_in;
  float2* carry_out;
  const float2* own_A;  // in log2 units, unless it is behind what is handed on
  uint64_t *in_ready, *out_ready;
  float *steps_out, *sums_out;  // in the warp's record, written by this lane
  const float *steps, *sums;    // read by it

  __device__ __forceinline__ float2 decay_rates(int s) const {
    return L::kOneA || L::kLinked ? own_A[s / 2 * 32] : carry_out[(L::kHands + s / 2) * 32];
  }
  __device__ __forceinline__ void use_record(float* record) {
    constexpr int kTurn = L::kTurn;
    const int part = L::part(threadIdx.x % 32), channel = L::channel(threadIdx.x % 32), first = part * L::kOwn;
    float* own = record + L::kOwnHands + L::kOwnA;
    float* all = own + L::kWidth * L::kSteps;
    steps = own + channel * L::kSteps, steps_out = const_cast<float*>(steps) + first;
    sums_out = all + part * L::kSums + channel * kTurn;
    sums = all + first / kTurn * L::kBlock + channel * kTurn + first % kTurn;
  }
};

// dt and dt * u of this lane's own tokens, into the warp's record.
template <typename T, typename L>
__device__ __forceinline__ void make_steps(const PairLane<L>& lane, const T* own, int left) {
  constexpr int kLanes = L::kLanesOfChannel, kStep = kLanes * L::kWidth, kOwn = L::kOwn;
  float d[kOwn], x[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i++) {
    d[i] = to_float(own[L::kTensor + i * kStep]) + lane.bias;
    x[i] = to_float(own[i * kStep]);
  }
  if (lane.use_softplus) {
#pragma unroll
    for (int i = 0; i < kOwn; i++) d[i] = softplus<sizeof(T) == 4>(d[i]);
  }
  if (left <= (kOwn - 1) * kLanes) {  // past the end of the row; what is there may be NaN
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      if (i * kLanes >= left) d[i] = x[i] = 0.0f;
    }
  }
  Vec<float, kOwn> step, in;
#pragma unroll
  for (int i = 0; i < kOwn; i++) step.v[i] = d[i], in.v[i] = d[i] * x[i];
  store_vec<float, kOwn>(lane.steps_out, step);
  store_vec<float, kOwn>(lane.steps_out + L::kTokens, in);
}

// y of this lane's own tokens from the parts of all lanes of the channel, into the place of z. u is read again: keeping it, or D * u in
// the record, costs more.
template <typename T, typename L>
__device__ __forceinline__ void finish_tokens(const PairLane<L>& lane, T* own, const float (&y)[L::kTokens]) {
  constexpr int kStep = L::kLanesOfChannel * L::kWidth, kOwn = L::kOwn, kTurn = L::kTurn;
#pragma unroll
  for (int t = 0; t < L::kTokens; t += 4) {
    float* to = lane.sums_out + t / kTurn * L::kBlock + t % kTurn;
    *reinterpret_cast<float4*>(to) = make_float4(y[t], y[t + 1], y[t + 2], y[t + 3]);
  }
  T* out = own + 2 * L::kTensor;
  float sum[kOwn], gate[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i++) sum[i] = lane.D * to_float(own[i * kStep]), gate[i] = 1.0f;
  if (lane.has_z) {
#pragma unroll
    for (int i = 0; i < kOwn; i++) gate[i] = silu(to_float(out[i * kStep]));
  }
  __syncwarp();
#pragma unroll
  for (int q = 0; q < L::kLanesOfChannel; q++) {
    const auto part = load_vec<float, kOwn>(lane.sums + q * L::kSums);
#pragma unroll
    for (int i = 0; i < kOwn; i++) sum[i] += part.v[i];
  }
#pragma unroll
  for (int i = 0; i < kOwn; i++) out[i * kStep] = from_float<T>(sum[i] * gate[i]);
}

// Decays of two states over some tokens of a tile; dt is read again for every pair, else registers spill.
template <typename L>
__device__ __forceinline__ void pair_decays(const PairLane<L>& lane, int s, float (&a0)[L::kTokens], float (&a1)[L::kTokens], int from = 0,
                                            int to = L::kTokens) {
  const float2 A = lane.decay_rates(s);
#pragma unroll
  for (int t = from; t < to; t += 4) {
    const auto dt = load_vec<float, 4>(lane.steps + t);
#pragma unroll
    for (int r = 0; r < 4; r++) a0[t + r] = ex2(dt.v[r] * A.x), a1[t + r] = ex2(dt.v[r] * A.y);
  }
}

// What comes into two states: dt u B.
template <typename L>
__device__ __forceinline__ void pair_inputs(const PairLane<L>& lane, const float* bc, int s, float (&b0)[L::kTokens],
                                            float (&b1)[L::kTokens]) {
#pragma unroll
  for (int t = 0; t < L::kTokens; t += 4) {
    const auto du = load_vec<float, 4>(lane.steps + L::kTokens + t);
    const auto v0 = load_vec<float, 4>(bc + L::row(s) + t / 4 * L::kStep);
    const auto v1 = load_vec<float, 4>(bc + L::row(s + 1) + t / 4 * L::kStep);
#pragma unroll
    for (int r = 0; r < 4; r++) b0[t + r] = du.v[r] * v0.v[r], b1[t + r] = du.v[r] * v1.v[r];
  }
}

// Two states at the end of a tile, for the warp of the next.
template <typename L> __device__ __forceinline__ void hand_on(const PairLane<L>& lane, int s, float2 h) {
  if constexpr (L::kLinked > 0) lane.link.send(s / 2, h);
  lane.carry_out[s / 2 * 32] = h;
  mbarrier_arrive(lane.out_ready + s / 2);
  if constexpr (L::kLinked > 0) {
    if (lane.link.receives) mbarrier_expect(lane.in_ready + s / 2, kSentBytes);  // those of the next tile
  }
}

// Two states at the end of a tile that starts from zero, and the tile's decays of them: with these a warp hands the end on as soon
// as it has the start, for 36 instructions more a pair.
struct TileEnd {
  float2 states, decays;

  template <typename L>
  __device__ __forceinline__ void make(const float (&a0)[L::kTokens], const float (&a1)[L::kTokens], const float (&b0)[L::kTokens],
                                       const float (&b1)[L::kTokens], float2 A, float dt) {
    states = make_float2(b0[0], b1[0]), decays = make_float2(ex2(dt * A.x), ex2(dt * A.y));
#pragma unroll
    for (int t = 1; t < L::kTokens; t++) {
      const int i = L::place(t);
      states.x = fmaf(a0[i], states.x, b0[i]), states.y = fmaf(a1[i], states.y, b1[i]);
    }
  }
  __device__ __forceinline__ float2 from(float2 h) const {
    return make_float2(fmaf(decays.x, h.x, states.x), fmaf(decays.y, h.y, states.y));
  }
};

// `own`: u of this lane's first token; `left`: how many tokens of the row there are from it on. The next pair's decays of the first
// kAmong tokens are made among the dependent steps of the recurrences: that hands the states on later, but with three or more warps to a
// group nobody waits for them, and the special-function unit does not idle meanwhile.
template <typename T, typename L, int kAmong = L::kAmong>
__device__ __forceinline__ void chain_tile_pairs(const PairLane<L>& lane, T* own, const float* bc, int left, int parity) {
  constexpr int kTokens = L::kTokens;
  float y[kTokens], a0[kTokens], a1[kTokens];  // decays, then states
  make_steps(lane, own, left);
  __syncwarp();
  pair_decays(lane, 0, a0, a1);
  [[maybe_unused]] float all_dt = 0;
  if constexpr (L::kEarly) {
#pragma unroll
    for (int t = 0; t < kTokens; t += 4) {
      const auto dt = load_vec<float, 4>(lane.steps + t);
      all_dt += (dt.v[0] + dt.v[1]) + (dt.v[2] + dt.v[3]);
    }
  }
#pragma unroll
  for (int s = 0; s < L::kStates; s += 2) {
    float b0[kTokens], b1[kTokens], next0[kTokens], next1[kTokens];
    pair_inputs(lane, bc, s, b0, b1);
    [[maybe_unused]] TileEnd end;
    if constexpr (L::kEarly) end.template make<L>(a0, a1, b0, b1, lane.decay_rates(s), all_dt);
    __syncwarp();  // the compiler moves nothing of the above behind the wait
    mbarrier_wait(lane.in_ready + s / 2, parity);
    float2 h = lane.carry_in[s / 2 * 32];
    if constexpr (L::kEarly) hand_on(lane, s, end.from(h));
    if (s + 2 < L::kStates) pair_decays(lane, s + 2, next0, next1, 0, kAmong);
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      const int i = L::place(t);
      a0[i] = h.x = fmaf(a0[i], h.x, b0[i]);
      a1[i] = h.y = fmaf(a1[i], h.y, b1[i]);
    }
    if constexpr (!L::kEarly) hand_on(lane, s, h);
    if (s + 2 < L::kStates) pair_decays(lane, s + 2, next0, next1, kAmong);
#pragma unroll
    for (int t = 0; t < kTokens; t += 4) {
      const Vec<float, 4> v0 = load_vec<float, 4>(bc + L::kToC + L::row(s) + t / 4 * L::kStep);
      const Vec<float, 4> v1 = load_vec<float, 4>(bc + L::kToC + L::row(s + 1) + t / 4 * L::kStep);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        y[t + r] = s == 0 ? v0.v[r] * a0[t + r] : fmaf(v0.v[r], a0[t + r], y[t + r]);
        y[t + r] = fmaf(v1.v[r], a1[t + r], y[t + r]);
      }
    }
    if (s + 2 < L::kStates) {
#pragma unroll
      for (int t = 0; t < kTokens; t++) a0[t] = next0[t], a1[t] = next1[t];
    }
  }
  finish_tokens(lane, own, y);
}

}  // namespace mamba::scan
