// selective_scan, tactic "chain": the recurrence is handed from warp to warp, nothing is computed twice.
//
// A block owns K groups of channels for a whole row. Two, four or eight lanes of a warp share a channel, so that a group is
// 16, 8 or 4 channels wide; what follows is said of two (selective_scan_chain_pairs.cuh has the tile of the others). A lane
// has one channel and 8 of its 16 states; a warp takes 16 tokens (a tile) of a group and keeps dt, dt * u, y and the
// decays of one state in registers. For each state it waits for the value at the end of the tile before, which another
// warp has, runs the recurrence and hands the value on; only then it adds to y and computes the decays of the next
// state. The W warps of a group take its tiles in turn.
//
// P more warps only copy: they keep a ring of N slots of four tiles filled and write y, which lies in the place of z.
#pragma once

#include "early_launch.cuh"
#include "selective_scan_chain_pairs.cuh"

namespace mamba::scan {

template <typename T>
__device__ __forceinline__ void chain_tile(T* acts, const float* bc, const float* A, float* carry_in, float* carry_out,
                                           uint64_t* in_ready, uint64_t* out_ready, int parity, int valid, float bias,
                                           float D, bool use_softplus, bool has_z) {
  using L = Chain<T, 2>;
  constexpr int G = L::kWidth, kAct = L::kActivation, kRow = L::kRow, kStep = L::kStep, kToC = L::kToC;
  const bool odd = threadIdx.x & 16;  // this half of the warp finishes the odd tokens, the other the even ones
  float dt[16], du[16], y[16], d[8], x[8];
  T* own = acts + (odd ? G : 0);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    d[i] = to_float(own[kAct + 2 * i * G]) + bias;
    x[i] = to_float(own[2 * i * G]);
  }
  if (use_softplus) {
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = softplus<sizeof(T) == 4>(d[i]);
  }
  if (valid < 16) {  // past the end of the row; what is there may be NaN
    const int left = valid - (odd ? 1 : 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (2 * i >= left) d[i] = x[i] = 0.0f;
    }
  }
  const float D0 = odd ? 0.0f : D, D1 = odd ? D : 0.0f;
  const int even_lane = threadIdx.x & 15, odd_lane = even_lane + 16;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    y[2 * i] = D0 * x[i], y[2 * i + 1] = D1 * x[i];
    x[i] *= d[i];
    dt[2 * i] = __shfl_sync(~0u, d[i], even_lane), dt[2 * i + 1] = __shfl_sync(~0u, d[i], odd_lane);
    du[2 * i] = __shfl_sync(~0u, x[i], even_lane), du[2 * i + 1] = __shfl_sync(~0u, x[i], odd_lane);
  }
  float a[16], b[16];  // decays, then states; what comes in
#pragma unroll
  for (int t = 0; t < 16; t++) a[t] = ex2(dt[t] * A[0]);
  auto inputs = [&](const float* B) {
#pragma unroll
    for (int t = 0; t < 16; t += 4) {
      const Vec<float, 4> v = load_vec<float, 4>(B + t / 4 * kStep);
#pragma unroll
      for (int r = 0; r < 4; r++) b[t + r] = du[t + r] * v.v[r];
    }
  };
  // From the wait to the arrival nothing but the recurrence: every tile of the row waits for it.
  auto recur = [&](int s) {
    mbarrier_wait(in_ready + s, parity);
    float h = carry_in[s * 32];
#pragma unroll
    for (int t = 0; t < 16; t++) a[t] = h = fmaf(a[t], h, b[t]);
    carry_out[s * 32] = h;
    mbarrier_arrive(out_ready + s);
    __syncwarp();  // keeps what follows from being scheduled into the recurrence
  };
  auto outputs = [&](const float* C, auto last, float As) {
#pragma unroll
    for (int t = 0; t < 16; t += 4) {
      const Vec<float, 4> v = load_vec<float, 4>(C + t / 4 * kStep);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        y[t + r] = fmaf(v.v[r], a[t + r], y[t + r]);
        if (!last) a[t + r] = ex2(dt[t + r] * As);
      }
    }
  };
  inputs(bc);
#pragma unroll 1
  for (int s = 0; s < L::kStates - 1; s++) {
    recur(0);
    A += 32, carry_in += 32, carry_out += 32, in_ready++, out_ready++;
    outputs(bc + kToC, std::false_type{}, A[0]);
    bc += kRow;
    inputs(bc);
  }
  recur(0);
  outputs(bc + kToC, std::true_type{}, 0.0f);
  T* out = own + 2 * kAct;
  float v[8], gate[8];
  if (has_z) {  // all eight at once, not each between two stores
#pragma unroll
    for (int i = 0; i < 8; i++) gate[i] = silu(to_float(out[2 * i * G]));
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float mine = odd ? y[2 * i + 1] : y[2 * i], theirs = odd ? y[2 * i] : y[2 * i + 1];
    v[i] = mine + __shfl_xor_sync(~0u, theirs, 16);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) out[2 * i * G] = from_float<T>(has_z ? v[i] * gate[i] : v[i]);
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(32 * kChainWarps, 1)
    chain_kernel(const __grid_constant__ Args<T> p, int K, int W, int N) {
  using L = Chain<T, kLanes>;
  constexpr int G = L::kWidth, kStates = L::kStates, kHands = L::kHands, kTogether = L::kTogether, kAct = L::kActivation;
  const int warps = K * W, copiers = blockDim.x / 32 - warps;
  const int b = blockIdx.y, width = K * G;
  const int blocks_per_group = ceil_div(p.group_dim, width);
  const int group = blockIdx.x / blocks_per_group;
  const int c0 = group * p.group_dim + (blockIdx.x % blocks_per_group) * width;
  const int channels = min(width, (group + 1) * p.group_dim - c0);

  extern __shared__ __align__(16) char shared[];
  const int slot_bytes = L::slot_bytes(K);
  auto slot_acts = [&](int slot) { return reinterpret_cast<T*>(shared + slot * slot_bytes); };
  auto slot_bc = [&](int slot) { return reinterpret_cast<float*>(slot_acts(slot) + 3 * K * kAct); };
  float* records = reinterpret_cast<float*>(shared + N * slot_bytes);            // [K][W][kRecord]
  uint64_t* ready = reinterpret_cast<uint64_t*>(records + K * W * L::kRecord);  // [K][W][kHands]: handed on
  uint64_t *filled = ready + K * W * kHands, *done = filled + 16;                // [16] each

  for (int i = threadIdx.x; i < K * W * kHands; i += blockDim.x) mbarrier_init(&ready[i], 32);
  if (threadIdx.x < N) {
    mbarrier_init(&filled[threadIdx.x], 2 * 32);
    mbarrier_init(&done[threadIdx.x], L::kTiles * 32 * K);
  }
  __syncthreads();
  let_next_start();
  wait_for_previous();
  const int n = row_length(p, b), tiles = ceil_div(n, L::kTokens), spans = ceil_div(n, L::kSpan);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < warps) {
    const int k = warp % K, w = warp / K, part = L::part(lane), channel = L::channel(lane), c = c0 + k * G + channel;
    const bool in = c < c0 + channels, use_softplus = p.softplus, has_z = p.z;
    const float bias = in && p.bias ? p.bias[c] : 0.0f, D = in && p.D ? p.D[c] : 0.0f;
    const int before = w == 0 ? W - 1 : w - 1;
    float* record = records + (k * W + w) * L::kRecord;
    float *carry_in = records + (k * W + before) * L::kRecord + lane * kTogether, *carry_out = record + lane * kTogether;
    uint64_t *in_ready = ready + (k * W + before) * kHands, *out_ready = ready + (k * W + w) * kHands;
    [[maybe_unused]] PairLane<L> own;
    // The last warp hands the state before the first token on to warp 0.
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      const int state = part * kStates + s;
      const int at = s / kTogether * 32 * kTogether + s % kTogether;
      carry_out[kStates * 32 + at] = in ? p.A[int64_t(c) * kState + state] * kLog2e : 0.0f;
      if (w == W - 1) {
        carry_out[at] = in && p.h0 ? p.h0[(int64_t(b) * p.dim + c) * kState + state] : 0.0f;
        if (s % kTogether == kTogether - 1) mbarrier_arrive(out_ready + s / kTogether);
      }
    }
    if constexpr (kLanes > 2) {
      own.bias = bias, own.D = D, own.use_softplus = use_softplus, own.has_z = has_z, own.use_record(record);
      own.carry_in = reinterpret_cast<float2*>(carry_in), own.carry_out = reinterpret_cast<float2*>(carry_out);
      own.in_ready = in_ready, own.out_ready = out_ready;
    }
    const int first = kLanes == 2 ? 0 : part * L::kOwn;  // this lane's own tokens; with two lanes a channel it has every other
    uint32_t place = w, lap = 0, parity = 0;  // in the ring of N slots, which holds more than W tiles
    const int end = n - spans * L::kSpan;
    for (int left = n - w * L::kTokens; left > end; left -= L::kTokens * W, parity ^= 1) {
      const uint32_t slot = place / L::kTiles, at = place % L::kTiles;
      uint64_t* full = filled + slot;
      mbarrier_wait(full, lap);
      if (left > 0) {
        T* acts = slot_acts(slot) + k * 3 * kAct + at * L::kTileRows * G + (first + first / L::kPadded) * G + channel;
        const float* bc = slot_bc(slot) + L::row(kStates) * part + at * 4;
        if constexpr (kLanes == 2) {
          chain_tile<T>(acts, bc, carry_out + kStates * 32, carry_in, carry_out, in_ready, out_ready, parity, left, bias, D,
                        use_softplus, has_z);
        } else {
          chain_tile_pairs<T, L>(own, acts, bc, left - first, parity);
        }
      }
      mbarrier_arrive(full + 16);  // done[slot], by a register less
      place += W;
      if (place >= uint32_t(N) * L::kTiles) place -= N * L::kTiles, lap ^= 1;
    }
  } else {
    const Copier<T, L> copier(p, b, group, c0, channels, n);
    const int first = warp - warps;
    for (int span = first; span < spans; span += copiers) {
      const int slot = span % N;
      const auto states = copier.load_states(span * L::kSpan);  // on its way while the slot is waited for
      if (span >= N) {
        mbarrier_wait(&done[slot], span / N + 1 & 1);
        copier.write_y(slot_acts(slot), (span - N) * L::kSpan);
      }
      copier.fill_activations(slot_acts(slot), span * L::kSpan);  // each lane overwrites only what it has read itself
      mbarrier_arrive_copies(&filled[slot]);
      copier.store_states(slot_bc(slot), states);
      mbarrier_arrive(&filled[slot]);
    }
    for (int span = first; span < spans; span += copiers) {
      if (span < spans - N) continue;  // written above
      mbarrier_wait(&done[span % N], span / N & 1);
      copier.write_y(slot_acts(span % N), span * L::kSpan);
    }
  }
  __syncthreads();
  if (p.hT) {
    const int last = (tiles + W - 1) % W;  // the warp of the last tile; W - 1, which holds the start, if there is none
    for (int i = threadIdx.x; i < channels * kState; i += blockDim.x) {
      const int c = i / kState, s = i % kState, lane_of = L::lane(s / kStates, c % G), hand = s % kStates / kTogether;
      p.hT[(int64_t(b) * p.dim + c0 + c) * kState + s] =
          records[(c / G * W + last) * L::kRecord + (hand * 32 + lane_of) * kTogether + s % kTogether];
    }
  }
  zero_padding(p, b, n, c0, c0 + channels);
}

}  // namespace mamba::scan
