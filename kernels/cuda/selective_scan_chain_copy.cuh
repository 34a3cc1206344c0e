// selective_scan, tactic "chain": the copying warps, which fill slots and write y.
//
// From Hopper on the copy engine moves the activations, in boxes of a slot's tokens: rows of 16 bytes, moved by a warp's own loads and
// stores, hold up the scanning warps' in the one queue of the multiprocessor. What a copying warp does for a slot counts: with few
// channels to a block the scanning ones wait for it.
#pragma once

#include "selective_scan_chain_layout.cuh"
#include "tensor_copy.cuh"

namespace mamba::scan {

// The activations as boxes of kSpan tokens x kWidth channels; linked, of the groups of a block: [group][token][kWidth].
struct Boxes {
  CUtensorMap u, delta, z, y;
  int groups;  // of a box; 0: a copying warp moves them itself
};

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

// a / b of numbers up to 64, which a division would take three times as long for.
__device__ __forceinline__ int small_quotient(int a, int b) { return int((a + 0.5f) * rcp(float(b))); }

// One lane of a copying warp; a warp moves a whole slot. Activations move in runs of kRun channels: a lane has
// one column of them and every `rows`-th token.
template <typename T, typename L> struct Copier {
  static constexpr int kRun = L::kRun;
  static constexpr int kRunBytes = kRun * sizeof(T), kBytes = kRunBytes < 16 ? kRunBytes : 16;  // of one access

  // A tensor: its element at token 0 and this thread's column; elements from token to token (time order).
  struct Column {
    T* p;
    int64_t token;
    __device__ __forceinline__ T* at(int t) const { return p + t * token; }
  };

  const Args<T>& args;
  const Boxes& boxes;
  int lane, b, c0, channels, n, token0, rows, place;
  Column u, delta, z, y, B, C;

  __device__ __forceinline__ Copier(const Args<T>& p, const Boxes& boxes, int b, int group, int c0, int channels, int n)
      : args(p), boxes(boxes), lane(threadIdx.x % 32), n(n) {
    turn_to(b, group, c0, channels);
  }
  // Some channels of a row.
  __device__ __forceinline__ void turn_to(int row, int group, int first_channel, int count) {
    const Args<T>& p = args;
    b = row, c0 = first_channel, channels = count;
    const int columns = channels / kRun, column = lane - small_quotient(lane, columns) * columns;
    rows = small_quotient(32, columns);
    token0 = lane < rows * columns ? small_quotient(lane, columns) : 1 << 30;  // the last few lanes have no column
    place = column * kRun / L::kWidth * L::kGroup + column * kRun % L::kWidth;
    auto column_of = [&](const T* base, const Strides& s, int c) {
      return Column{const_cast<T*>(base) + b * s.batch + (p.reverse ? n - 1 : 0) * s.token + c, p.reverse ? -s.token : s.token};
    };
    const int c = c0 + column * kRun;
    u = column_of(p.u, p.u_stride, c), delta = column_of(p.delta, p.delta_stride, c), y = column_of(p.y, p.y_stride, c);
    z = p.z ? column_of(p.z, p.z_stride, c) : u;
    const int states = L::d_state(p);
    B = column_of(p.B, p.B_stride, group * states), C = column_of(p.C, p.C_stride, group * states);
  }

  __device__ __forceinline__ void copy_activations(T* slot, int t0) const {
    const uint32_t dst = smem_address(slot + place);
    const unsigned count = min(L::kSpan, n - t0);
    const T *pu = u.at(t0 + token0), *pd = delta.at(t0 + token0), *pz = z.at(t0 + token0);
    const bool has_z = args.z;
    for (unsigned t = token0; t < count; t += rows) {
      const uint32_t to = dst + t * unsigned(L::kWidth * sizeof(T));
#pragma unroll
      for (int i = 0; i < kRunBytes / kBytes; i++) {
        constexpr int kElements = kBytes / sizeof(T);
        cp_async_at<kBytes>(to + i * kBytes, pu + i * kElements);
        cp_async_at<kBytes>(to + L::kTensor * sizeof(T) + i * kBytes, pd + i * kElements);
        if (has_z) cp_async_at<kBytes>(to + 2 * L::kTensor * sizeof(T) + i * kBytes, pz + i * kElements);
      }
      pu += rows * u.token, pd += rows * delta.token, pz += rows * z.token;
    }
  }
  __device__ __forceinline__ void copy_y(const T* slot, int t0) const {
    const T* from = slot + place + 2 * L::kTensor;
    const unsigned count = min(L::kSpan, n - t0);
    T* to = y.at(t0 + token0);
    for (unsigned t = token0; t < count; t += rows) {
      store_vec<T, kRun>(to, load_vec<T, kRun>(from + t * L::kWidth));
      to += rows * y.token;
    }
  }

  static __device__ __forceinline__ bool engine(const Boxes& boxes) { return L::kBoxes && boxes.groups > 0; }
  // At the barrier of a filled slot: of every lane for B and C; of every lane for activations, or that of the lane which expects them.
  static __device__ __forceinline__ int arrivals(const Boxes& boxes) { return 32 + (engine(boxes) ? 1 : 32); }

  static __device__ __forceinline__ void prefetch(const Boxes& boxes) {
    if (engine(boxes)) prefetch_map(boxes.u), prefetch_map(boxes.delta), prefetch_map(boxes.z), prefetch_map(boxes.y);
  }

  // A tensor's boxes; `of`: 0 u, 1 delta, 2 z or y.
  template <typename F> __device__ __forceinline__ void each_box(T* slot, int of, F&& f) const {
    for (int c = 0; c < channels; c += L::kWidth) f(smem_address(slot + c / L::kWidth * L::kGroup + of * L::kTensor), c0 + c);
  }
  __device__ __forceinline__ void load_boxes(const CUtensorMap& map, T* slot, int of, int t0, uint64_t* full) const {
    if constexpr (L::kLinked) {
      load_box_of_part(smem_address(slot + of * L::kTensor), map, 0, t0, c0 / L::kWidth, b, full);
    } else {
      each_box(slot, of, [&](uint32_t to, int c) { load_box(to, map, c, t0, b, full); });
    }
  }
  __device__ __forceinline__ void store_boxes(T* slot, int t0) const {
    if constexpr (L::kLinked) {
      store_box_of_part(boxes.y, smem_address(slot + 2 * L::kTensor), 0, t0, c0 / L::kWidth, b);
    } else {
      each_box(slot, 2, [&](uint32_t from, int c) { store_box(boxes.y, from, c, t0, b); });
    }
  }
  // All but z if the slot is filled `again`: y may be on its way out of z's place.
  __device__ __forceinline__ void ask_for_activations(T* slot, int t0, uint64_t* full, bool again = false) const {
    if (!engine(boxes) || !elected()) return;
    const int tensors = args.z ? 3 : 2, groups = L::kLinked ? tensors * boxes.groups : tensors * channels / L::kWidth;
    mbarrier_expect(full, groups * L::kActivation * int(sizeof(T)));
    load_boxes(boxes.delta, slot, 1, t0, full);
    load_boxes(boxes.u, slot, 0, t0, full);
    if (args.z && !again) load_boxes(boxes.z, slot, 2, t0, full);
  }
  // `asked`: for, by another warp.
  __device__ __forceinline__ void fill_activations(T* slot, int t0, uint64_t* full, bool again, bool asked) const {
    if (!engine(boxes)) {
      copy_activations(slot, t0);
      mbarrier_arrive_copies(full);
    } else if (!asked) {
      ask_for_activations(slot, t0, full, again);
    }
  }
  __device__ __forceinline__ void fill_gates(T* slot, int t0, uint64_t* full) const {
    if (!engine(boxes) || !elected()) return;
    bulk_wait_read();
    if (args.z) load_boxes(boxes.z, slot, 2, t0, full);
  }
  __device__ __forceinline__ void write_y(T* slot, int t0) const {
    if (!engine(boxes) || t0 + L::kSpan > n) {
      copy_y(slot, t0);
    } else if (elected()) {
      fence_async_proxy();
      store_boxes(slot, t0);
      bulk_commit();
    }
  }
  __device__ __forceinline__ void finish() const {
    if (engine(boxes)) bulk_wait_read();
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
    const int t = t0 + share.quad % L::kTiles * L::kTokens + share.quad / L::kTiles * L::kQuad;
    const int64_t step = share.is_c ? C.token : B.token;
    const T* p = (share.is_c ? C.p : B.p) + t * step + share.eighth * 8;
    const bool there = (L::kAllStates == kState || share.eighth * 8 < args.d_state) && (kShares % 32 == 0 || i < kShares);
    if (there && t0 + L::kSpan <= n) {
#pragma unroll
      for (int r = 0; r < 4; r++) load_run8<T, true>(raw[r], p + L::in_quad(r) * step);
    } else {  // zeros past the end of the row, and for states that there are not
#pragma unroll
      for (int r = 0; r < 4; r++) {
        raw[r] = Run<T>{};
        if (there && t + L::in_quad(r) < n) load_run8<T, true>(raw[r], p + L::in_quad(r) * step);
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
