// selective_scan, tactic "chain": slots of shared memory, and the copying warps that fill them and write y.
#pragma once

#include <algorithm>
#include <type_traits>

#include "selective_scan.cuh"

namespace mamba::scan {

constexpr int kChainWarps = 16;  // of a block, at most

struct Chain {
  static constexpr int kWidth = 16, kTokens = 16;           // channels of a group, tokens of a tile
  static constexpr int kTiles = 4, kSpan = kTiles * kTokens;  // tiles and tokens of a slot
  static constexpr int kStates = 8;                         // of a lane
  // A slot: u, delta, z of every group, [tile][token][kWidth] with one token of padding a tile; then B and C as float32,
  // [2 * kState][token / 4 of a tile][tile][4], time innermost. The pad: the halves of a warp read different banks.
  static constexpr int kHalfPad = 4, kRow = kSpan, kStep = kTiles * 4;
  static constexpr int kActivation = kTiles * (kTokens + 1) * kWidth;
  template <typename T> static __host__ __device__ int slot_bytes(int K) {
    return int(3 * K * kActivation * sizeof(T) + (2 * kState * kRow + 4 * kHalfPad) * sizeof(float));
  }
  static __host__ __device__ int fixed_bytes(int K, int W) {
    // carries and A [K][W][kStates][32], barriers: [K][W][kStates] and 2 a slot
    return int(sizeof(float) * 2 * K * W * kStates * 32 + sizeof(uint64_t) * (K * W * kStates + 32));
  }
};

// Slots that fit beside the rest; negative or 0 if not even that does.
template <typename T> int chain_slots(const Tactic& t) {
  const int left = int(max_shared_bytes()) - Chain::fixed_bytes(t.groups, t.warps);
  return std::min(16, left / Chain::slot_bytes<T>(t.groups));
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
template <typename T> struct Copier {
  using L = Chain;
  static constexpr int kRun = 8;
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
      const uint32_t to = dst + (t + t / L::kTokens) * int(L::kWidth * sizeof(T));
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
      store_vec<T, kRun>(to, load_vec<T, kRun>(from + (t + t / L::kTokens) * L::kWidth));
      to += rows * y.token;
    }
  }

  // B and C: share i is four tokens by eight states, transposed; 2 (B, C) x 2 (halves of the states) x 16 quads of
  // tokens. Eight lanes in a row write 128 neighbouring bytes.
  static constexpr int kShares = L::kSpan;
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
    float* dst = bc + eighth * (8 * L::kRow + L::kHalfPad) + quad * 4;
#pragma unroll
    for (int s = 0; s < 8; s++) {
      *reinterpret_cast<float4*>(dst + s * L::kRow) = make_float4(f[0][s], f[1][s], f[2][s], f[3][s]);
    }
  }
  __device__ __forceinline__ void fill_states(float* bc, int t0) const {
    constexpr int kAtOnce = sizeof(T) == 4 ? 1 : 2;  // loads in flight
    for (int i = lane; i < kShares; i += 32 * kAtOnce) {
      Run<T> raw[kAtOnce][4];
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) load_share(raw[j], t0, i + 32 * j);
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) store_share(bc, raw[j], i + 32 * j);
    }
  }
};

}  // namespace mamba::scan
