// selective_scan, tactic "chain": slots of shared memory, and the copying warps that fill them and write y.
#pragma once

#include <algorithm>
#include <type_traits>

#include "selective_scan.cuh"

namespace mamba::scan {

constexpr int kChainWarps = 16;  // of a block, at most
constexpr int kChainTiles = 4;   // of a slot

// kLanes lanes of a warp share a channel, 16 / kLanes of its states each.
template <typename T, int kLanes> struct Chain {
  static constexpr int kLanesOfChannel = kLanes;
  static constexpr int kWidth = 32 / kLanes, kTokens = 16;              // channels of a group, tokens of a tile
  static constexpr int kTiles = kChainTiles, kSpan = kTiles * kTokens;  // tiles and tokens of a slot
  static constexpr int kRun = kWidth < 8 ? kWidth : 8;                  // channels copied at once
  static constexpr int kStates = kState / kLanes;                       // of a lane,
  static constexpr int kTogether = kLanes == 2 ? 1 : 2, kHands = kStates / kTogether;  // which hands kTogether on at once
  static constexpr int kOwn = kTokens / kLanes;                         // tokens of a tile that a lane makes dt of and finishes
  // A slot: u, delta, z of every group, [tile][token][kWidth] with a token of padding behind every kPadded (so that the
  // lanes of a warp, with kOwn tokens in a row each, read different banks); then B and C as float32,
  // [2 * kState][token / 4 of a tile][tile][4], time innermost. The pad: lanes with different states read different banks.
  static constexpr int kPadded = kLanes == 2 ? kTokens : 128 / (kWidth * int(sizeof(T)));
  static constexpr int kTileRows = kTokens + kTokens / kPadded, kActivation = kTiles * kTileRows * kWidth;
  static constexpr int kPad = 4, kRow = kSpan, kStep = kTiles * 4;
  static constexpr __host__ __device__ int row(int state) { return state * kRow + state / kStates * kPad; }  // C: from kState on
  static constexpr int kToC = row(kState);
  // A scanning warp's record: the states it hands on and its copy of A, both [kHands][32][kTogether]; with more than two
  // lanes dt, dt * u and D * u of every channel, [kWidth][kSteps], and the lanes' parts of y,
  // [lane of the channel][tokens / kTurn][kWidth][kTurn]. The strides keep every access there free of bank conflicts.
  static constexpr int kTurn = 32 / kWidth, kSteps = kLanes == 4 ? 68 : 56, kBlock = kLanes == 4 ? 36 : 32;
  static constexpr int kSums = kLanes == 4 ? 148 : 68;
  static constexpr int kRecord = 2 * kStates * 32 + (kLanes == 2 ? 0 : kWidth * kSteps + kLanes * kSums);

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

  static __host__ __device__ int slot_bytes(int K) {
    return int(3 * K * kActivation * sizeof(T) + row(2 * kState) * sizeof(float));
  }
  static __host__ __device__ int fixed_bytes(int K, int W) {  // records [K][W]; barriers: [K][W][kHands] and 2 a slot
    return int(sizeof(float) * K * W * kRecord + sizeof(uint64_t) * (K * W * kHands + 32));
  }
  // Slots that fit beside the rest; negative or 0 if not even that does.
  static int slots(const Tactic& t) {
    return std::min(16, (int(max_shared_bytes()) - fixed_bytes(t.groups, t.warps)) / slot_bytes(t.groups));
  }
};

// Calls f with the layout of a tactic.
template <typename T, typename F> auto with_chain(const Tactic& t, F&& f) {
  switch (t.kernel) {
    case Tactic::kChain4: return f(Chain<T, 4>{});
    case Tactic::kChain8: return f(Chain<T, 8>{});
    default: return f(Chain<T, 2>{});
  }
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
    B = column_of(p.B, p.B_stride, group * kState), C = column_of(p.C, p.C_stride, group * kState);
  }

  __device__ __forceinline__ void fill_activations(T* slot, int t0) const {
    const uint32_t dst = smem_address(slot + place);
    const int count = min(L::kSpan, n - t0);
    const T *pu = u.at(t0 + token0), *pd = delta.at(t0 + token0), *pz = z.at(t0 + token0);
    const bool has_z = args.z;
    for (int t = token0; t < count; t += rows) {
      const uint32_t to = dst + (t + t / L::kPadded) * int(L::kWidth * sizeof(T));
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
    const int count = min(L::kSpan, n - t0);
    T* to = y.at(t0 + token0);
    for (int t = token0; t < count; t += rows) {
      store_vec<T, kRun>(to, load_vec<T, kRun>(from + (t + t / L::kPadded) * L::kWidth));
      to += rows * y.token;
    }
  }

  // B and C: share i is four tokens by eight states, transposed; 2 (B, C) x 2 (halves of the states) x 16 quads of
  // tokens. Eight lanes in a row write 128 neighbouring bytes.
  static constexpr int kShares = L::kSpan;
  struct States {  // of a span, as loaded by this lane
    Run<T> raw[kShares / 32][4];
  };
  __device__ __forceinline__ void load_share(Run<T> (&raw)[4], int t0, int i) const {
    const int half = i / 8 % 2, quad = i % 8 + i / 16 % 2 * 8, t = t0 + quad % L::kTiles * L::kTokens + quad / L::kTiles * 4;
    const bool is_c = i >= kShares / 2;
    const int64_t step = is_c ? C.token : B.token;
    const T* p = (is_c ? C.p : B.p) + t * step + half * 8;
    if (t0 + L::kSpan <= n) {
#pragma unroll
      for (int r = 0; r < 4; r++) load_run8<T, true>(raw[r], p + r * step);
    } else {  // zeros past the end of the row
#pragma unroll
      for (int r = 0; r < 4; r++) {
        raw[r] = Run<T>{};
        if (t + r < n) load_run8<T, true>(raw[r], p + r * step);
      }
    }
  }
  __device__ __forceinline__ void store_share(float* bc, const Run<T> (&raw)[4], int i) const {
    const int half = i / 8 % 2, quad = i % 8 + i / 16 % 2 * 8, eighth = i / (kShares / 2) * 2 + half;
    float f[4][8];
#pragma unroll
    for (int r = 0; r < 4; r++) to_floats(f[r], raw[r]);
    float* dst = bc + eighth * L::row(8) + quad * 4;
#pragma unroll
    for (int s = 0; s < 8; s++) {
      *reinterpret_cast<float4*>(dst + L::row(s)) = make_float4(f[0][s], f[1][s], f[2][s], f[3][s]);
    }
  }
  __device__ __forceinline__ States load_states(int t0) const {
    States states;
#pragma unroll
    for (int j = 0; j < kShares / 32; j++) load_share(states.raw[j], t0, lane + 32 * j);
    return states;
  }
  __device__ __forceinline__ void store_states(float* bc, const States& states) const {
#pragma unroll
    for (int j = 0; j < kShares / 32; j++) store_share(bc, states.raw[j], lane + 32 * j);
  }
};

}  // namespace mamba::scan
