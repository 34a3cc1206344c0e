// selective_scan, tactic "chain": lanes, slots and records in shared memory, and which layouts there are kernels for.
#pragma once

#include <algorithm>

#include "selective_scan.cuh"

namespace mamba::scan {

constexpr int kChainWarps = 16;  // of a block, at most
constexpr int chain_tiles(int states) { return states <= 32 ? 4 : states == 64 ? 2 : 1; }  // of a slot

// kLanes lanes of a warp share a channel, kN / kLanes of its states each. kN is d_state or, but for 16, the next size there is:
// the states beyond are zeros. kWarps: two blocks of a cluster, each with so many warps a group, take a row's slots in turn.
// kEndFirst: a warp makes what its tile adds to a state before it waits for the one before.
template <typename T, int kLanes, int kN = kState, int kWarps = 0, bool kEndFirst = false> struct Chain {
  static constexpr int kLanesOfChannel = kLanes, kAllStates = kN, kLinked = kWarps, kBlocks = kLinked ? 2 : 1;
  static constexpr bool kEarly = kEndFirst;
  // Whether the compiler is told that the numbers of scanning and of copying warps are uniform, as was measured: addresses are then
  // computed once a warp. With more than two lanes a channel it moves work behind the scanning warps' waits.
  static constexpr bool kUniformScan = kLanes == 2, kUniformCopy = kLanes < 8 || kN == kState || kN == 256;
  // Of a block. With 12 a lane may have 168 registers instead of 128; bounds of 14 give code 1 % faster than of 16.
  static constexpr int kMostWarps = kLinked == 4 ? 14 : kLinked == 8 ? 12 : kChainWarps;
  static constexpr int kWidth = 32 / kLanes, kTokens = 16;                             // channels of a group, tokens of a tile
  static constexpr int kTiles = kLinked ? kLinked : chain_tiles(kN), kSpan = kTiles * kTokens;  // tiles and tokens of a slot
  static constexpr int kRun = kWidth < 8 ? kWidth : 8;                                 // channels copied at once
  static constexpr int kStates = kN / kLanes;                                          // of a lane,
  static constexpr int kTogether = kLanes == 2 ? 1 : 2, kHands = kStates / kTogether;  // which hands kTogether on at once
  // Tokens of a tile whose decays of the next two states are made among the recurrences of two, as was measured. Linked, the other block
  // waits for these; with more states than 16 registers would spill; with a tile's end first nobody waits.
  static constexpr int kAmong = (kLinked && !kEarly) || kN > kState ? 4 : kEarly ? 16 : 8;
  static constexpr bool kOneA = kN > kState;     // a copy of A for a group, not for each of its warps
  static constexpr int kOwn = kTokens / kLanes;  // tokens of a tile that a lane makes dt of and finishes
  // A slot: of every group u, delta, z, [token][kWidth] each (the copy engine moves them if a token is 16 bytes at least; if not,
  // groups are a token apart, so that the copies of a token's groups go to different banks), or, linked, u of all groups, then delta,
  // then z, so that one box has a tensor: the copying warp has less time for a slot there; then B and C as float32,
  // [2 * kN][place / 4 of a tile][tile][4], from a multiple of 16 bytes on. The pad: lanes with different states read different banks.
  static constexpr bool kBoxes = kWidth * sizeof(T) >= 16;
  static constexpr int kActivation = kSpan * kWidth, kMostGroups = kLinked ? 3 : kChainWarps;
  static constexpr int kTensor = kLinked ? kMostGroups * kActivation : kActivation;  // from u to delta, from delta to z
  static constexpr int kGroup = kLinked ? kActivation : 3 * kActivation + (kBoxes ? 0 : kWidth);
  static_assert(!kBoxes || kActivation * sizeof(T) % 128 == 0, "a box lies at a multiple of 128 bytes");
  static constexpr int kPad = 4, kRow = kSpan, kStep = kTiles * 4;
  static constexpr __host__ __device__ int row(int state) { return state * kRow + state / kStates * kPad; }  // C: from kN on
  static constexpr int kToC = row(kN);
  // A lane's own tokens are every kLanes-th, so that the lanes of a channel read neighbours. In a record, and so in B and C, they lie
  // side by side: a token's place there (with two lanes a channel, which exchange by shuffles, its own number). Place 4 q + r has
  // token kQuad q + in_quad(r).
  static constexpr int kQuad = kLanes == 2 ? 4 : kLanes / 4;
  static constexpr __host__ __device__ int place(int token) {
    return kLanes == 2 ? token : token % kLanes * kOwn + token / kLanes;
  }
  static constexpr __host__ __device__ int in_quad(int r) { return kLanes == 2 ? r : kLanes == 4 ? 4 * r : r % 2 * 8 + r / 2; }
  // A scanning warp's record: the states it hands on and its copy of A, both [kHands][32][kTogether] (with kOneA the copies of A
  // lie behind all records); with more than two lanes dt and dt * u of every channel, [kWidth][kSteps], and the lanes'
  // parts of y, [lane of the channel][tokens / kTurn][kWidth][kTurn]. The strides keep every access there free of bank conflicts.
  static constexpr int kTurn = 32 / kWidth, kSteps = kLanes == 4 ? 36 : 40, kBlock = kLanes == 4 ? 36 : 32;
  static constexpr int kSums = kLanes == 4 ? 148 : 68;
  // Linked, what is handed on is in the slots instead, [K][kWarps] behind B and C: a warp does not hear from the other block that
  // what it handed on has been taken, but from whoever fills the slot again.
  static constexpr int kHanded = kStates * 32, kOwnHands = kLinked ? 0 : kHanded, kOwnA = kOneA ? 0 : kHanded;
  static constexpr int kRecord = kOwnHands + kOwnA + (kLanes == 2 ? 0 : kWidth * kSteps + kLanes * kSums);

  // Lanes l and l ^ 1 have the same states, l and l ^ 2 the same channel (with more than two lanes a channel): either is
  // what lets the two halves of a 16-byte load of one address for several lanes go together.
  static constexpr __host__ __device__ int part(int l) {
    return kLanes == 2 ? l / 16 : kLanes == 4 ? (l & 2) | l >> 4 : (l >> 1 & 1) | l >> 3 << 1;
  }
  static constexpr __host__ __device__ int channel(int l) {
    return kLanes == 2 ? l % 16 : kLanes == 4 ? (l & 1) | (l & 4) | (l >> 2 & 2) : (l & 1) | (l >> 1 & 2);
  }
  static constexpr __host__ __device__ int lane(int part, int c) {
    return kLanes == 2   ? part * 16 + c
           : kLanes == 4 ? (c & 1) | (part & 2) | (c & 4) | (c & 2) << 2 | (part & 1) << 4
                         : (c & 1) | (part & 1) << 1 | (c & 2) << 1 | part >> 1 << 3;
  }

  static __device__ __forceinline__ int d_state(const Args<T>& p) { return kN == kState ? kState : p.d_state; }
  static __host__ __device__ int activations(int K) {
    if (kLinked) return 3 * kTensor;
    return kBoxes ? K * kGroup : ceil_div(K * kGroup, 8) * 8;
  }
  static __host__ __device__ int slot_bytes(int K) {
    const unsigned bytes = activations(K) * sizeof(T) + (row(2 * kN) + K * kLinked * kHanded) * sizeof(float);
    return (bytes + 127) & ~127u;  // boxes lie at multiples of 128
  }
  static __host__ __device__ int record_floats(int K, int W) { return K * W * kRecord + (kOneA ? K * kHanded : 0); }
  static __host__ __device__ int fixed_bytes(int K, int W) {  // records [K][W]; barriers: [K][W][kHands] and 2 a slot; inboxes [K]
    const int inboxes = kLinked ? K * int(sizeof(float) * kHanded + sizeof(uint64_t) * kHands) : 0;
    return int(sizeof(float) * record_floats(K, W) + sizeof(uint64_t) * (K * W * kHands + 32)) + inboxes;
  }
  // Whether a launch of so many lots of channels has blocks that take several (selective_scan_chain_lots.cuh).
  static constexpr bool kLots = kN == kState && kLanes <= 4 && !kLinked && !kEarly;
  static bool in_lots(const Tactic& t, int lots, int seqlen, bool ragged) {
    return kLots && lots > sm_count() && !ragged && ceil_div(seqlen, kTokens) >= t.warps && slots(t) >= least_slots(t, true);
  }
  // With fewer a barrier could be a phase behind: a copying warp waits for slots in order, but all that the end of one says of those before
  // is that no warp of a group is at more than its last tile. With several lots a slot may be the end of a row, of a single tile.
  static int least_slots(const Tactic& t, bool several = false) {
    return (several ? ceil_div(t.warps - 1, kTiles) + 1 : ceil_div(t.warps, kTiles)) + t.copiers;
  }
  // Slots that fit beside the rest; negative or 0 if not even that does.
  static int slots(const Tactic& t) {
    return std::min(16, (int(max_shared_bytes()) - fixed_bytes(t.groups, t.warps)) / slot_bytes(t.groups));
  }
};

// The states of the kernel that takes d_state of them, or 0.
constexpr int chain_states(int d_state) {
  for (int n = 8; n <= 256; n *= 2) {
    if (d_state <= n) return d_state % 8 == 0 ? n : 0;
  }
  return 0;
}
constexpr int chain_lanes_of(int kernel) { return kernel == Tactic::kLinked ? 4 : 2 << (kernel - Tactic::kChain); }
// Lanes a channel that there are kernels for.
constexpr bool chain_lanes(int states, int lanes) {
  switch (states) {
    case 8: return lanes == 4;
    case 16: return lanes == 2 || lanes == 4 || lanes == 8;
    case 32:
    case 64: return lanes == 4 || lanes == 8;
    case 128:
    case 256: return lanes == 8;
    default: return false;
  }
}

// Warps a group that there are kernels for where two blocks are linked, of four lanes a channel.
constexpr bool linked_warps(int states, int warps) {
  return states == 8 ? warps == 4 : states == kState && (warps == 4 || warps == 8);
}

// Calls f with the layout of a tactic that there is. With one group to a block a warp waits for the one before, and has time to
// make its tile's end first.
template <typename T, int kN, typename F> auto with_lanes(const Tactic& t, F&& f) {
  if constexpr (kN == kState) {
    const bool alone = t.groups == 1;
    switch (t.kernel) {
      case Tactic::kChain: return f(Chain<T, 2, kN>{});
      case Tactic::kChain4: return alone ? f(Chain<T, 4, kN, 0, true>{}) : f(Chain<T, 4, kN>{});
      case Tactic::kChain8: return alone ? f(Chain<T, 8, kN, 0, true>{}) : f(Chain<T, 8, kN>{});
      default: return t.warps == 4 ? f(Chain<T, 4, kN, 4>{}) : f(Chain<T, 4, kN, 8, true>{});
    }
  } else if constexpr (chain_lanes(kN, 4) && chain_lanes(kN, 8)) {
    return t.kernel == Tactic::kChain4 ? f(Chain<T, 4, kN>{}) : f(Chain<T, 8, kN>{});
  } else if constexpr (linked_warps(kN, 4)) {
    return t.kernel == Tactic::kLinked ? f(Chain<T, 4, kN, 4>{}) : f(Chain<T, 4, kN>{});
  } else {
    return f(Chain<T, chain_lanes(kN, 4) ? 4 : 8, kN>{});
  }
}
template <typename T, typename F> auto with_size(const Tactic& t, int d_state, F&& f) {
  switch (chain_states(d_state)) {
    case 8: return with_lanes<T, 8>(t, f);
    case 32: return with_lanes<T, 32>(t, f);
    case 64: return with_lanes<T, 64>(t, f);
    case 128: return with_lanes<T, 128>(t, f);
    default: return with_lanes<T, 256>(t, f);
  }
}
template <typename T, typename F> auto with_chain(const Tactic& t, int d_state, F&& f) {
  return d_state == kState ? with_lanes<T, kState>(t, f) : with_size<T>(t, d_state, f);
}

}  // namespace mamba::scan
