// selective_scan, tactic "chain": slots of shared memory, and the copying warps that fill them and write y.
#pragma once

#include <algorithm>
#include <type_traits>

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
  // Of a block. With 12 a lane may have 168 registers instead of 128; bounds of 14 give code 1 % faster than of 16.
  static constexpr int kMostWarps = kLinked == 4 ? 14 : kLinked == 8 ? 12 : kChainWarps;
  static constexpr int kWidth = 32 / kLanes, kTokens = 16;                             // channels of a group, tokens of a tile
  static constexpr int kTiles = kLinked ? kLinked : chain_tiles(kN), kSpan = kTiles * kTokens;  // tiles and tokens of a slot
  static constexpr int kRun = kWidth < 8 ? kWidth : 8;                                 // channels copied at once
  static constexpr int kStates = kN / kLanes;                                          // of a lane,
  static constexpr int kTogether = kLanes == 2 ? 1 : 2, kHands = kStates / kTogether;  // which hands kTogether on at once
  static constexpr bool kOneA = kN > kState;     // a copy of A for a group, not for each of its warps
  static constexpr int kOwn = kTokens / kLanes;  // tokens of a tile that a lane makes dt of and finishes
  // A slot: u, delta, z of every group, [tile][token][kWidth] with a token of padding behind every kPadded (so that the
  // lanes of a warp, with kOwn tokens in a row each, read different banks); then B and C as float32,
  // [2 * kN][token / 4 of a tile][tile][4], time innermost, from a multiple of 16 bytes on. The pad: lanes with different states
  // read different banks.
  static constexpr int kPadded = kLanes == 2 ? kTokens : 128 / (kWidth * int(sizeof(T)));
  static constexpr int kTileRows = kTokens + kTokens / kPadded, kActivation = (kTiles * kTileRows * kWidth + 7) / 8 * 8;
  static constexpr int kPad = 4, kRow = kSpan, kStep = kTiles * 4;
  static constexpr __host__ __device__ int row(int state) { return state * kRow + state / kStates * kPad; }  // C: from kN on
  static constexpr int kToC = row(kN);
  // A scanning warp's record: the states it hands on and its copy of A, both [kHands][32][kTogether] (with kOneA the copies of A
  // lie behind all records); with more than two lanes dt, dt * u and D * u of every channel, [kWidth][kSteps], and the lanes'
  // parts of y, [lane of the channel][tokens / kTurn][kWidth][kTurn]. The strides keep every access there free of bank conflicts.
  static constexpr int kTurn = 32 / kWidth, kSteps = kLanes == 4 ? 68 : 56, kBlock = kLanes == 4 ? 36 : 32;
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
  static __host__ __device__ int slot_bytes(int K) {
    return int(3 * K * kActivation * sizeof(T) + (row(2 * kN) + K * kLinked * kHanded) * sizeof(float));
  }
  static __host__ __device__ int record_floats(int K, int W) { return K * W * kRecord + (kOneA ? K * kHanded : 0); }
  static __host__ __device__ int fixed_bytes(int K, int W) {  // records [K][W]; barriers: [K][W][kHands] and 2 a slot; inboxes [K]
    const int inboxes = kLinked ? K * int(sizeof(float) * kHanded + sizeof(uint64_t) * kHands) : 0;
    return int(sizeof(float) * record_floats(K, W) + sizeof(uint64_t) * (K * W * kHands + 32)) + inboxes;
  }
  // With fewer a barrier could be a phase behind.
  static int least_slots(const Tactic& t) { return ceil_div(t.warps, kTiles) + t.copiers; }
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
  return states == 8 ? warps == 4 : states == kState && (warps == 3 || warps == 4 || warps == 8);
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
      default: return t.warps == 3 ? f(Chain<T, 4, kN, 3>{}) : t.warps == 4 ? f(Chain<T, 4, kN, 4>{}) : f(Chain<T, 4, kN, 8, true>{});
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

template <int kBytes> __device__ __forceinline__ void cp_async_at(uint32_t dst, const void* src) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(dst), "l"(src), "n"(kBytes) : "memory");
  }
}
// Arrives once all earlier cp.async of this thread have landed.
__device__ __forceinline__ void mbarrier_arrive_copies(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(smem_address(bar)) : "memory");
}

// One lane of a copying warp; a warp moves a whole slot. Activations move in runs of kRun channels: a lane has
// one column of them and every `rows`-th token.
template <typename T, typename L> struct Copier {
  static constexpr int kRun = L::kRun;
  static constexpr int kAct = L::kActivation;
  static constexpr int kRunBytes = kRun * sizeof(T), kBytes = kRunBytes < 16 ? kRunBytes : 16;  // of one access

  // A tensor: its element at token 0 and this thread's column; elements from token to token (time order).
  struct Column {
    T* p;
    int64_t token;
    __device__ __forceinline__ T* at(int t) const { return p + t * token; }
  };

  const Args<T>& args;
  int lane, n, token0, rows, place;
  Column u, delta, z, y, B, C;

  __device__ __forceinline__ Copier(const Args<T>& p, int b, int group, int c0, int channels, int n)
      : args(p), lane(threadIdx.x % 32), n(n) {
    const int columns = channels / kRun, column = lane % columns;
    rows = 32 / columns;
    token0 = lane < rows * columns ? lane / columns : 1 << 30;  // the last few lanes have no column
    place = column * kRun / L::kWidth * 3 * kAct + column * kRun % L::kWidth;
    auto column_of = [&](const T* base, const Strides& s, int c) {
      return Column{const_cast<T*>(base) + b * s.batch + (p.reverse ? n - 1 : 0) * s.token + c, p.reverse ? -s.token : s.token};
    };
    const int c = c0 + column * kRun;
    u = column_of(p.u, p.u_stride, c), delta = column_of(p.delta, p.delta_stride, c), y = column_of(p.y, p.y_stride, c);
    z = p.z ? column_of(p.z, p.z_stride, c) : u;
    const int states = L::d_state(p);
    B = column_of(p.B, p.B_stride, group * states), C = column_of(p.C, p.C_stride, group * states);
  }

  __device__ __forceinline__ void fill_activations(T* slot, int t0) const {
    const uint32_t dst = smem_address(slot + place);
    const unsigned count = min(L::kSpan, n - t0);
    const T *pu = u.at(t0 + token0), *pd = delta.at(t0 + token0), *pz = z.at(t0 + token0);
    const bool has_z = args.z;
    for (unsigned t = token0; t < count; t += rows) {
      const uint32_t to = dst + (t + t / L::kPadded) * unsigned(L::kWidth * sizeof(T));
#pragma unroll
      for (int i = 0; i < kRunBytes / kBytes; i++) {
        constexpr int kElements = kBytes / sizeof(T);
        cp_async_at<kBytes>(to + i * kBytes, pu + i * kElements);
        cp_async_at<kBytes>(to + kAct * sizeof(T) + i * kBytes, pd + i * kElements);
        if (has_z) cp_async_at<kBytes>(to + 2 * kAct * sizeof(T) + i * kBytes, pz + i * kElements);
      }
      pu += rows * u.token, pd += rows * delta.token, pz += rows * z.token;
    }
  }
  __device__ __forceinline__ void write_y(const T* slot, int t0) const {
    const T* from = slot + place + 2 * kAct;
    const unsigned count = min(L::kSpan, n - t0);
    T* to = y.at(t0 + token0);
    for (unsigned t = token0; t < count; t += rows) {
      store_vec<T, kRun>(to, load_vec<T, kRun>(from + (t + t / L::kPadded) * L::kWidth));
      to += rows * y.token;
    }
  }

  // B and C: a share is four tokens by eight states, transposed. Eight lanes in a row write 128 neighbouring bytes: from the
  // innermost on, shares are eight quads of tokens (or all there are), the eighths of the states, further quads, B and C.
  static constexpr int kQuads = L::kSpan / 4, kNear = kQuads % 8 ? kQuads : 8, kEighths = L::kAllStates / 8;
  static constexpr int kShares = 2 * kQuads * kEighths, kEach = ceil_div(kShares, 32), kAtOnce = kEach < 2 ? kEach : 2;
  struct Share {
    int quad, eighth;
    bool is_c;
    __device__ __forceinline__ explicit Share(int i)
        : quad(i % kNear + i / (kNear * kEighths) % (kQuads / kNear) * kNear), eighth(i / kNear % kEighths), is_c(i >= kShares / 2) {}
  };
  struct States {  // of a span, as loaded by this lane; kAtOnce shares of them
    Run<T> raw[kAtOnce][4];
  };
  __device__ __forceinline__ void load_share(Run<T> (&raw)[4], int t0, int i) const {
    const Share share(i);
    const int t = t0 + share.quad % L::kTiles * L::kTokens + share.quad / L::kTiles * 4;
    const int64_t step = share.is_c ? C.token : B.token;
    const T* p = (share.is_c ? C.p : B.p) + t * step + share.eighth * 8;
    const bool there = (L::kAllStates == kState || share.eighth * 8 < args.d_state) && (kShares % 32 == 0 || i < kShares);
    if (there && t0 + L::kSpan <= n) {
#pragma unroll
      for (int r = 0; r < 4; r++) load_run8<T, true>(raw[r], p + r * step);
    } else {  // zeros past the end of the row, and for states that there are not
#pragma unroll
      for (int r = 0; r < 4; r++) {
        raw[r] = Run<T>{};
        if (there && t + r < n) load_run8<T, true>(raw[r], p + r * step);
      }
    }
  }
  __device__ __forceinline__ void store_share(float* bc, const Run<T> (&raw)[4], int i) const {
    if (kShares % 32 != 0 && i >= kShares) return;
    const Share share(i);
    float f[4][8];
#pragma unroll
    for (int r = 0; r < 4; r++) to_floats(f[r], raw[r]);
    float* dst = bc + L::row((share.is_c ? L::kAllStates : 0) + share.eighth * 8) + share.quad * 4;
#pragma unroll
    for (int s = 0; s < 8; s++) {
      *reinterpret_cast<float4*>(dst + L::row(s)) = make_float4(f[0][s], f[1][s], f[2][s], f[3][s]);
    }
  }
  __device__ __forceinline__ States load_states(int t0, int first = 0) const {
    States states;
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) load_share(states.raw[j], t0, lane + 32 * (first + j));
    return states;
  }
  // `states`: the first of them, loaded before.
  __device__ __forceinline__ void store_states(float* bc, States states, int t0) const {
#pragma unroll 1
    for (int first = 0; first < kEach; first += kAtOnce) {
      if (first > 0) states = load_states(t0, first);
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) store_share(bc, states.raw[j], lane + 32 * (first + j));
    }
  }
};

}  // namespace mamba::scan
