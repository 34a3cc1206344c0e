// selective_scan, tactic "chain": the recurrence is handed from warp to warp, nothing is computed twice.
//
// A block owns K groups of channels for a whole row. Two, four or eight lanes of a warp share a channel, so that a group is
// 16, 8 or 4 channels wide; what follows is said of two and of 16 states (selective_scan_chain_two.cuh;
// selective_scan_chain_pairs.cuh has the tile of the others). A lane has one channel and 8 of its states; a warp takes 16
// tokens (a tile) of a group and keeps dt, dt * u, y and the decays of one state in registers. For each state it waits for the
// value at the end of the tile before, which another warp has, runs the recurrence and hands the value on; only then it
// adds to y and computes the decays of the next state. The W warps of a group take its tiles in turn.
//
// P more warps only copy, or have the copy engine do so: they keep a ring of N slots of some tiles filled and write y, which lies in
// the place of z.
//
// Linked (selective_scan_chain_linked.cuh), two blocks own the groups together and take slots in turn. Where there are more blocks than
// multiprocessors, a block takes several lots of channels one after the other (selective_scan_chain_lots.cuh).
#pragma once

#include "early_launch.cuh"
#include "selective_scan_chain_copy.cuh"
#include "selective_scan_chain_pairs.cuh"
#include "selective_scan_chain_two.cuh"

namespace mamba::scan {

// The copies of A that the warps of a group share, [K][kHands][32][kTogether].
template <typename L, typename T>
__device__ __forceinline__ void copy_A(float* to, const Args<T>& p, int K, int c0, int channels, int d_state) {
  constexpr int kTogether = L::kTogether;
  for (int i = threadIdx.x; i < K * L::kHanded; i += blockDim.x) {
    const int l = i / kTogether % 32, s = i % L::kHanded / (32 * kTogether) * kTogether + i % kTogether;
    const int state = L::part(l) * L::kStates + s, c = i / L::kHanded * L::kWidth + L::channel(l);
    to[i] = c < channels && state < d_state ? p.A[int64_t(c0 + c) * d_state + state] * kLog2e : 0.0f;
  }
}

// Sets up what barriers of a block this warp has a share in, in one of its lanes: the lanes of one warp would do it one after the other,
// 0.4 us more.
template <typename T, typename L>
__device__ __forceinline__ void set_up_barriers(uint64_t* ready, uint64_t* filled, uint64_t* done, uint64_t* arrived, const Boxes& boxes,
                                                int K, int W, int N) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), all_warps = blockDim.x / 32;
  if (!elected()) return;
  if (warp == K * W) Copier<T, L>::prefetch(boxes);
  for (int i = warp; i < K * W * L::kHands; i += all_warps) mbarrier_init(&ready[i], 32);
  for (int i = warp; i < N; i += all_warps) {
    mbarrier_init(&filled[i], Copier<T, L>::arrivals(boxes));
    mbarrier_init(&done[i], L::kTiles * 32 * K);
  }
  if constexpr (L::kLinked > 0) {
    for (int i = warp; i < K * L::kHands; i += all_warps) {
      mbarrier_init(&arrived[i], 1);
      mbarrier_expect(&arrived[i], kSentBytes);
    }
  }
}

// Neighbouring channels of a row, `width` or as many as there are: number `column` of the group, or number `index` of all rows.
struct Lot {
  int b, group, c0, channels;

  template <typename T> __device__ __forceinline__ Lot(const Args<T>& p, int row, int group, int column, int width) : b(row), group(group) {
    find(p, column, width);
  }
  template <typename T> __device__ __forceinline__ Lot(const Args<T>& p, int index, int width) {
    const int of_group = ceil_div(p.group_dim, width), column = index % (of_group * p.ngroups);
    b = index / (of_group * p.ngroups), group = column / of_group;
    find(p, column % of_group, width);
  }
  template <typename T> __device__ __forceinline__ void find(const Args<T>& p, int column, int width) {
    c0 = group * p.group_dim + column * width, channels = min(width, (group + 1) * p.group_dim - c0);
  }
};

// Asks for the activations of a slot, as a scanning warp at the start: a copying warp begins with B and C.
template <typename T, typename L>
__device__ __forceinline__ void ask_for_first(const Args<T>& p, const Boxes& boxes, const Lot& lot, int n, T* acts, int t0, uint64_t* full) {
  const Copier<T, L> copier(p, boxes, lot.b, lot.group, lot.c0, lot.channels, n);
  wait_for_previous();
  copier.ask_for_activations(acts, t0, full);
}

template <typename T, int kLanes, int kN, int kLinked, bool kEarly>
__global__ void __launch_bounds__(32 * Chain<T, kLanes, kN, kLinked>::kMostWarps, 1)
    chain_kernel(const __grid_constant__ Args<T> p, const __grid_constant__ Boxes boxes, int K, int warps_of_group, int N) {
  using L = Chain<T, kLanes, kN, kLinked, kEarly>;
  constexpr int kBlocks = L::kBlocks;
  const int W = kLinked ? kLinked : warps_of_group;
  constexpr int G = L::kWidth, kStates = L::kStates, kHands = L::kHands, kTogether = L::kTogether;
  const int warps = K * W, copiers = blockDim.x / 32 - warps;
  const int column = blockIdx.x / kBlocks, turn = blockIdx.x % kBlocks;  // which block of its cluster this is

  extern __shared__ __align__(128) char shared[];
  const int slot_bytes = L::slot_bytes(K);
  auto slot_acts = [&](int slot) { return reinterpret_cast<T*>(shared + slot * slot_bytes); };
  auto slot_bc = [&](int slot) { return reinterpret_cast<float*>(slot_acts(slot) + L::activations(K)); };
  [[maybe_unused]] auto slot_hands = [&](int slot, int k, int w) { return slot_bc(slot) + L::row(2 * kN) + (k * W + w) * L::kHanded; };
  float* records = reinterpret_cast<float*>(shared + N * slot_bytes);            // [K][W][kRecord]
  uint64_t* ready = reinterpret_cast<uint64_t*>(records + L::record_floats(K, W));  // [K][W][kHands]: handed on
  uint64_t *filled = ready + K * W * kHands, *done = filled + 16;                // [16] each
  uint64_t* arrived = done + 16;                                                // [K][kHands], the inboxes behind
  [[maybe_unused]] float2* inboxes = reinterpret_cast<float2*>(arrived + K * kHands);

  const int warp = L::kUniformScan ? __shfl_sync(~0u, threadIdx.x / 32, 0) : threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  set_up_barriers<T, L>(ready, filled, done, arrived, boxes, K, W, N);
  if constexpr (kLinked > 0) {
    cluster_arrive();
  } else {
    __syncthreads();
  }
  const Lot lot(p, blockIdx.y, blockIdx.z, column, K * G);
  const auto [b, group, c0, channels] = lot;
  const int d_state = L::d_state(p);
  let_next_start();
  if (L::kOneA || p.seq_lens) wait_for_previous();  // else each warp has something to find out before it waits
  [[maybe_unused]] float* all_A = records + K * W * L::kRecord;  // with kOneA, [K][kHands][32][kTogether]
  if constexpr (L::kOneA) {
    copy_A<L>(all_A, p, K, c0, channels, d_state);
    __syncthreads();
  }
  const int n = row_length(p, b), all_spans = ceil_div(n, L::kSpan);
  const int spans = kLinked ? (all_spans + 1 - turn) / 2 : all_spans;  // of this block
  auto start_of = [&](int span) { return (span * kBlocks + turn) * L::kSpan; };
  if constexpr (kLinked > 0) cluster_wait();

  const int asks = warps - 1 - warp;
  if (asks >= 0 && asks < min(copiers, spans)) {
    ask_for_first<T, L>(p, boxes, lot, n, slot_acts(asks), start_of(asks), &filled[asks]);
  }
  if (warp < warps) {
    const int k = warp % K, w = warp / K, part = L::part(lane), channel = L::channel(lane), c = c0 + k * G + channel;
    const bool in = c < c0 + channels, use_softplus = p.softplus, has_z = p.z;
    wait_for_previous();
    const float bias = in && p.bias ? p.bias[c] : 0.0f, D = in && p.D ? p.D[c] : 0.0f;
    [[maybe_unused]] float rates[kStates];  // all asked for before one is waited for
    if constexpr (!L::kOneA) {
#pragma unroll
      for (int s = 0; s < kStates; s++) {
        const int state = part * kStates + s;
        rates[s] = in && (kN == kState || state < d_state) ? p.A[int64_t(c) * d_state + state] : 0.0f;
      }
    }
    const int before = w == 0 ? W - 1 : w - 1;
    float* record = records + (k * W + w) * L::kRecord;
    float *carry_in = records + (k * W + before) * L::kRecord + lane * kTogether, *carry_out = record + lane * kTogether;
    float* own_A = L::kOneA ? all_A + k * L::kHanded + lane * kTogether : carry_out + L::kOwnHands;
    if constexpr (kLinked > 0) carry_out = slot_hands(0, k, w) + lane * kTogether;
    uint64_t *in_ready = ready + (k * W + before) * kHands, *out_ready = ready + (k * W + w) * kHands;
    [[maybe_unused]] PairLane<L> own;
    // The last warp hands the state before the first token on to warp 0 (linked: that of the row's first block).
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      const int state = part * kStates + s;
      const int at = s / kTogether * 32 * kTogether + s % kTogether;
      const bool there = in && (kN == kState || state < d_state);
      if (!L::kOneA) own_A[at] = rates[s] * kLog2e;
      if (w == W - 1) {
        carry_out[at] = there && p.h0 && turn == 0 ? p.h0[(int64_t(b) * p.dim + c) * d_state + state] : 0.0f;
        if (s % kTogether == kTogether - 1) mbarrier_arrive(out_ready + s / kTogether);
      }
    }
    if constexpr (kLanes > 2) {
      if constexpr (L::kOneA || kLinked > 0) own.own_A = reinterpret_cast<const float2*>(own_A);
      own.bias = bias, own.D = D, own.use_softplus = use_softplus, own.has_z = has_z, own.use_record(record);
      own.carry_in = reinterpret_cast<float2*>(carry_in), own.carry_out = reinterpret_cast<float2*>(carry_out);
      own.in_ready = in_ready, own.out_ready = out_ready;
      if constexpr (kLinked > 0) {
        float2* inbox = inboxes + k * kHands * 32 + lane;
        uint64_t* inbox_arrived = arrived + k * kHands;
        if (w == 0) own.carry_in = inbox, own.in_ready = inbox_arrived;
        own.link.receives = w == 0 && lane == 0, own.link.sends = w == W - 1 && turn == 0 && n > 0;
        own.link.send_to(inbox, inbox_arrived, turn);
#pragma unroll
        for (int s = 0; s < kHands; s++) own.link.send(s, own.carry_out[s * 32]);
        own.link.send_to(inbox, inbox_arrived, turn ^ 1);
      }
    }
    const int first = kLanes == 2 ? 0 : part;  // of this lane's own tokens of a tile
    uint32_t place = kLinked ? 0 : w, lap = 0, parity = 0;  // in the ring of N slots, which holds more than W tiles
    int left = n - start_of(0) - w * L::kTokens;  // tokens of the row from a tile on
    const int end = (kLinked ? left : n) - spans * kBlocks * L::kSpan;
    for (; left > end; left -= kBlocks * L::kTokens * W, parity ^= 1) {
      const uint32_t slot = kLinked ? place : place / L::kTiles, at = kLinked ? w : place % L::kTiles;
      uint64_t* full = filled + slot;
      mbarrier_wait(full, lap);
      if constexpr (kLinked > 0) {
        own.carry_out = reinterpret_cast<float2*>(slot_hands(slot, k, w)) + lane;
        if (w > 0) own.carry_in = own.carry_out - L::kHanded / 2;
        own.link.sends = w == W - 1 && left > L::kTokens;
      }
      if (left > 0) {
        T* acts = slot_acts(slot) + k * L::kGroup + (at * L::kTokens + first) * G + channel;
        const float* bc = slot_bc(slot) + L::row(kStates) * part + at * 4;
        if constexpr (kLanes == 2) {
          chain_tile<T, L>(acts, bc, own_A, carry_in, carry_out, in_ready, out_ready, parity, left, bias, D, use_softplus, has_z);
        } else {
          chain_tile_pairs<T, L>(own, acts, bc, left - first, parity);
        }
      }
      mbarrier_arrive(full + 16);  // done[slot], by a register less
      place += kLinked ? 1 : W;
      const uint32_t ring = kLinked ? N : N * L::kTiles;
      if (place >= ring) place -= ring, lap ^= 1;
    }
    // The row's end is with the warp of its last tile, or with W - 1, which holds the start, if there is none.
    if (p.hT && turn == max(all_spans - 1, 0) % kBlocks) {
      const int tiles = ceil_div(n, L::kTokens) - (all_spans - spans) * L::kTiles;  // of this block
      const int thread = thread_again(), of_warp = thread / 32, l = thread % 32, first_state = L::part(l) * kStates;
      const int c = of_warp % K * G + L::channel(l), w = of_warp / K;
      const float* hands = records + (of_warp % K * W + w) * L::kRecord + l * kTogether;
      if constexpr (kLinked > 0) hands = reinterpret_cast<const float*>(own.carry_out);
      float* to = p.hT + (int64_t(b) * p.dim + c0 + c) * d_state + first_state;
      if (c < channels && w == (tiles + W - 1) % W) {
#pragma unroll
        for (int s = 0; s < kStates; s++) {
          if (kN == kState || first_state + s < d_state) to[s] = hands[s / kTogether * 32 * kTogether + s % kTogether];
        }
      }
    }
  } else {
    const Copier<T, L> copier(p, boxes, b, group, c0, channels, n);
    int slot = L::kUniformCopy ? __shfl_sync(~0u, warp - warps, 0) : warp - warps, lap = 0;
    wait_for_previous();
    // Whoever fills a slot again writes y out of it.
    for (int span = slot; span < spans + N; span += copiers) {
      const bool fills = span < spans, again = span >= N, asked = span < min(copiers, warps);
      typename Copier<T, L>::States states;
      if (fills) states = copier.load_states(start_of(span));  // on its way while the slot is waited for
      if (again) {
        mbarrier_wait(&done[slot], lap ^ 1);
        copier.write_y(slot_acts(slot), start_of(span - N));
      }
      if (fills) {
        copier.fill_activations(slot_acts(slot), start_of(span), &filled[slot], again, asked);
        copier.store_states(slot_bc(slot), states, start_of(span));
        if (again) copier.fill_gates(slot_acts(slot), start_of(span), &filled[slot]);
        mbarrier_arrive(&filled[slot]);
      }
      slot += copiers;
      if (slot >= N) slot -= N, lap ^= 1;
    }
    copier.finish();
  }
  if (turn == max(all_spans - 1, 0) % kBlocks) zero_padding(p, b, n, c0, c0 + channels);
}

}  // namespace mamba::scan
