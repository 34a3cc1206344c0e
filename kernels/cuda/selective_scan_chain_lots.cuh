// selective_scan, tactic "chain", where a device has no place for all blocks at once: a block takes several lots of channels one after
// the other, and its copying warps are ahead across their ends, so that only the first lot waits for its start.
//
// The warps of a group take turns as in selective_scan_chain.cuh. Between two lots lies a turn that reads the states at the end of the
// one and hands on those before the other.
#pragma once

#include "selective_scan_chain.cuh"

namespace mamba::scan {

// Of rows that are whole and have a tile for every warp of a group at least: with fewer a barrier could be a phase behind.
// Chain::in_lots says when.
template <typename T, int kLanes>
__global__ void __launch_bounds__(32 * Chain<T, kLanes>::kMostWarps, 1)
    chain_lots_kernel(const __grid_constant__ Args<T> p, const __grid_constant__ Boxes boxes, int K, int W, int N, int lots) {
  using L = Chain<T, kLanes>;
  constexpr int G = L::kWidth, kStates = L::kStates, kHands = L::kHands, kTogether = L::kTogether;
  const int warps = K * W, copiers = blockDim.x / 32 - warps, width = K * G;

  extern __shared__ __align__(128) char shared[];
  const int slot_bytes = L::slot_bytes(K);
  auto slot_acts = [&](int slot) { return reinterpret_cast<T*>(shared + slot * slot_bytes); };
  auto slot_bc = [&](int slot) { return reinterpret_cast<float*>(slot_acts(slot) + L::activations(K)); };
  float* records = reinterpret_cast<float*>(shared + N * slot_bytes);               // [K][W][kRecord]
  uint64_t* ready = reinterpret_cast<uint64_t*>(records + L::record_floats(K, W));  // [K][W][kHands]: handed on
  uint64_t *filled = ready + K * W * kHands, *done = filled + 16;                   // [16] each
  const int warp = L::kUniformScan ? __shfl_sync(~0u, threadIdx.x / 32, 0) : threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  set_up_barriers<T, L>(ready, filled, done, nullptr, boxes, K, W, N);
  __syncthreads();
  let_next_start();
  const int n = p.seqlen, spans = ceil_div(n, L::kSpan), tiles = ceil_div(n, L::kTokens);
  const Lot first_lot(p, blockIdx.x, width);

  const int asks = warps - 1 - warp;
  if (asks >= 0 && asks < min(copiers, spans)) {
    ask_for_first<T, L>(p, boxes, first_lot, n, slot_acts(asks), asks * L::kSpan, &filled[asks]);
  }

  if (warp < warps) {
    const int k = warp % K, w = warp / K, part = L::part(lane), channel = L::channel(lane);
    const bool use_softplus = p.softplus, has_z = p.z;
    float* record = records + (k * W + w) * L::kRecord;
    const int before = w == 0 ? W - 1 : w - 1;
    float *carry_in = records + (k * W + before) * L::kRecord + lane * kTogether, *carry_out = record + lane * kTogether;
    float* own_A = carry_out + L::kOwnHands;
    uint64_t *in_ready = ready + (k * W + before) * kHands, *out_ready = ready + (k * W + w) * kHands;
    [[maybe_unused]] PairLane<L> own;
    float bias = 0, D = 0;
    if constexpr (kLanes > 2) {
      own.use_softplus = use_softplus, own.has_z = has_z, own.use_record(record);
      own.carry_in = reinterpret_cast<float2*>(carry_in), own.carry_out = reinterpret_cast<float2*>(carry_out);
      own.in_ready = in_ready, own.out_ready = out_ready;
    }
    const int first = kLanes == 2 ? 0 : part;  // of this lane's own tokens of a tile
    const uint32_t ring = N * L::kTiles;
    uint32_t place = 0, lap = 0, parity = w == 0;  // the first turn waits for none
    int turn = w;                                  // of the lot, whose first is its start
    int at = 0, base = 0;                          // tiles of the block: up to `place`, before the lot
    int64_t last_state = -1;                       // where the state of the lot before begins; with two lanes found again, as was measured
    wait_for_previous();
    for (int index = blockIdx.x;; index += gridDim.x, base += spans * L::kTiles) {
      const bool goes_on = index < lots;
      const Lot lot(p, index, width);
      const int c = lot.c0 + k * G + channel;
      const bool in = goes_on && c < lot.c0 + lot.channels;
      const int64_t state = in ? (int64_t(lot.b) * p.dim + c) * kState + part * kStates : -1;
      bias = in && p.bias ? p.bias[c] : 0.0f, D = in && p.D ? p.D[c] : 0.0f;
#pragma unroll
      for (int s = 0; s < kStates; s++) {
        own_A[s / kTogether * 32 * kTogether + s % kTogether] = in ? p.A[int64_t(c) * kState + part * kStates + s] * kLog2e : 0.0f;
      }
      if (turn == 0) {
#pragma unroll
        for (int s = 0; s < kStates; s++) {
          const int of_state = s / kTogether * 32 * kTogether + s % kTogether;
          if (base > 0) {
            if (s % kTogether == 0) mbarrier_wait(in_ready + s / kTogether, parity);
            if constexpr (kLanes == 2) {
              const Lot before(p, index - gridDim.x, width);
              const int of_before = before.c0 + k * G + channel;
              const bool there = of_before < before.c0 + before.channels;
              last_state = there ? (int64_t(before.b) * p.dim + of_before) * kState + part * kStates : -1;
            }
            if (p.hT && last_state >= 0) p.hT[last_state + s] = carry_in[of_state];
          }
          carry_out[of_state] = in && p.h0 ? p.h0[state + s] : 0.0f;
          if (s % kTogether == kTogether - 1) mbarrier_arrive(out_ready + s / kTogether);
        }
        turn = W, parity ^= 1;
      }
      if (!goes_on) break;
      if constexpr (kLanes > 2) last_state = state;
      if constexpr (kLanes > 2) own.bias = bias, own.D = D;
      for (; turn <= tiles; turn += W, parity ^= 1) {
        place += base + turn - 1 - at, at = base + turn - 1;
        while (place >= ring) place -= ring, lap ^= 1;
        const uint32_t slot = place / L::kTiles, tile = place % L::kTiles;
        const int left = n - (turn - 1) * L::kTokens;
        uint64_t* full = filled + slot;
        mbarrier_wait(full, lap);
        T* acts = slot_acts(slot) + k * L::kGroup + (tile * L::kTokens + first) * G + channel;
        const float* bc = slot_bc(slot) + L::row(kStates) * part + tile * 4;
        if constexpr (kLanes == 2) {
          chain_tile<T, L>(acts, bc, own_A, carry_in, carry_out, in_ready, out_ready, parity, left, bias, D, use_softplus, has_z);
        } else {
          // Nobody waits for a state here: all of the next pair's decays are made among the recurrences.
          chain_tile_pairs<T, L, L::kTokens>(own, acts, bc, left - first, parity);
        }
        mbarrier_arrive(full + 16);  // done[slot]
        for (int i = turn == tiles ? spans * L::kTiles : tiles; i > tiles; i--) mbarrier_arrive(full + 16);  // for tiles behind the end
      }
      turn -= tiles + 1;
    }
  } else {
    int slot = __shfl_sync(~0u, warp - warps, 0), lap = 0, fill = slot, span = slot;
    int out_index = blockIdx.x, out_span = (slot + (N - slot + copiers - 1) / copiers * copiers) - N;  // whose y leaves next
    Copier<T, L> copier(p, boxes, first_lot.b, first_lot.group, first_lot.c0, first_lot.channels, n), out = copier;
    wait_for_previous();
    auto turn_to = [&](Copier<T, L>& of, int index) {
      const Lot lot(p, index, width);
      of.turn_to(lot.b, lot.group, lot.c0, lot.channels);
    };
    // Whoever fills a slot again writes y out of it.
    auto take_out = [&] {
      if (out_span >= spans) {
        do out_span -= spans, out_index += gridDim.x;
        while (out_span >= spans);
        turn_to(out, out_index);
      }
      mbarrier_wait(&done[slot], lap ^ 1);
      out.write_y(slot_acts(slot), out_span * L::kSpan);
      if ((out_span + 1) * L::kSpan > n) fence_async_proxy();  // this warp has read the slot, which the engine fills
      __syncwarp();
      out_span += copiers;
    };
    auto next = [&] {
      fill += copiers, slot += copiers;
      if (slot >= N) slot -= N, lap ^= 1;
    };
    int end = 0;  // fills of the block
    for (int index = blockIdx.x; index < lots; index += gridDim.x, span -= spans, end += spans) {
      turn_to(copier, index);
      for (; span < spans; span += copiers) {
        const int start = span * L::kSpan;
        const bool again = fill >= N, asked = fill < min(min(copiers, warps), spans);
        const auto states = copier.load_states(start);  // on its way while the slot is waited for
        if (again) take_out();
        copier.fill_activations(slot_acts(slot), start, &filled[slot], again, asked);
        copier.store_states(slot_bc(slot), states, start);
        if (again) copier.fill_gates(slot_acts(slot), start, &filled[slot]);
        mbarrier_arrive(&filled[slot]);
        next();
      }
    }
    for (; fill < end + N; next()) {
      if (fill >= N) take_out();
    }
    copier.finish();
  }
}

}  // namespace mamba::scan
