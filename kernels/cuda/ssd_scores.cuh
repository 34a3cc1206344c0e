// The decayed scores of a chunk, C B^T * exp(decay from s to t) * dt_s for s <= t, made once for all heads of a block.
#pragma once

#include "ssd_chunk.cuh"

namespace mamba {
namespace ssd {

// In shared memory, a head's scores are the causal 16 x 16 blocks in row order, each as four 8 x 8 matrices in the
// order of an A fragment. The blocks on the diagonal weigh most and also carry the skip D, so they are kept as a sum
// of two 16-bit values: the low parts follow, one block a row of blocks.
template <typename L>
struct Scores {
  using T = typename L::T;
  static constexpr int kMax = L::kRowTiles == 4 ? 3 : 1;
  static constexpr int kSlots = L::kRowTiles == 4 ? 8 : 6;
  static_assert(L::kRowTiles == 4 || L::kRowTiles == 2, "slots are laid out for chunks of 64 and 32");

  // The warps share the causal part of C B^T: slot k takes up to kMax 16 x 8 tiles of one row of tiles.
  struct Slot {
    int row, first, count;
  };

  __device__ __forceinline__ static Slot slot(int k) {
    if constexpr (L::kRowTiles == 4) {  // rows of 2, 4, 6 and 8 tiles as 2 | 2 2 | 3 3 | 3 3 2; long ones first
      if (k < 3) return {3, 3 * k, k == 2 ? 2 : 3};
      if (k < 5) return {2, 3 * (k - 3), 3};
      if (k < 7) return {1, 2 * (k - 5), 2};
      return {0, 0, 2};
    } else {
      if (k < 4) return {1, k, 1};
      return {0, k - 4, 1};
    }
  }

  // skip: D of the block's first head, or NULL.
  __device__ __forceinline__ static void make(uint32_t C_tile, uint32_t B_tile, const Decays<L>& decays,
                                              const float* skip, int heads, uint32_t out) {
    for (int k = threadIdx.x >> 5; k < kSlots; k += L::kWarps) make_slot(slot(k), C_tile, B_tile, decays, skip, heads, out);
  }

  __device__ __forceinline__ static void products(float (&acc)[kMax][4], const Slot s, uint32_t C_tile, uint32_t B_tile) {
    using Rows = Tile<L::kState>;
    const uint32_t C_rows = C_tile + s.row * 16 * Rows::kRowBytes + Rows::lane_16x16();
    if constexpr (L::kState % 32 == 0) {
      uint32_t B_rows[kMax];
#pragma unroll
      for (int u = 0; u < kMax; u++)  // a missing third tile repeats the last
        B_rows[u] = B_tile + (s.first + min(u, s.count - 1)) * 8 * Rows::kRowBytes + Rows::lane_8x32();
#pragma unroll
      for (int k = 0; k < L::kState / 32; k++) {
        uint32_t c0[4], c1[4];
        ldmatrix_x4(c0, Rows::along(C_rows, 4 * k));
        ldmatrix_x4(c1, Rows::along(C_rows, 4 * k + 2));
#pragma unroll
        for (int u = 0; u < kMax; u++) {
          uint32_t b[4];
          ldmatrix_x4(b, Rows::along(B_rows[u], 4 * k));
          Traits<T>::mma(acc[u], c0, b[0], b[1]);
          Traits<T>::mma(acc[u], c1, b[2], b[3]);
        }
      }
    } else {
      const int lane = threadIdx.x & 31;
#pragma unroll
      for (int k = 0; k < L::kState / 16; k++) {
        uint32_t c[4];
        ldmatrix_x4(c, Rows::along(C_rows, 2 * k));
#pragma unroll
        for (int u = 0; u < kMax; u++) {
          const int row = (s.first + min(u, s.count - 1)) * 8 + (lane & 7);
          uint32_t b[2];
          ldmatrix_x2(b, B_tile + Rows::offset(row, 2 * k + ((lane >> 3) & 1)));
          Traits<T>::mma(acc[u], c, b[0], b[1]);
        }
      }
    }
  }

  __device__ __forceinline__ static void make_slot(const Slot s, uint32_t C_tile, uint32_t B_tile, const Decays<L>& decays,
                                                   const float* skip, int heads, uint32_t out) {
    const int lane = threadIdx.x & 31;
    float acc[kMax][4] = {};
    products(acc, s, C_tile, B_tile);
    const int t = s.row * 16 + (lane >> 2), col0 = s.first * 8 + (lane & 3) * 2;
    const uint32_t block = out + s.row * (s.row + 1) / 2 * 512 + s.first * 256 + lane * 4;
    const uint32_t low = out + L::kMaskBlocks * 512 + s.first * 256 + lane * 4;
#pragma unroll
    for (int head = 0; head < L::kHeads; head++) {
      const float* sum = decays.sum(head) + t;
      const float* source = decays.source(head) + col0;
      const float sum_lo = sum[0], sum_hi = sum[8];
      const float D = skip && head < heads ? skip[head] : 0.f;
#pragma unroll
      for (int u = 0; u < kMax; u++) {
        if (u >= s.count) break;
        const float2 from = *reinterpret_cast<const float2*>(source + u * 8);
        float v0 = acc[u][0] * ex2(sum_lo - from.x), v1 = acc[u][1] * ex2(sum_lo - from.y);
        float v2 = acc[u][2] * ex2(sum_hi - from.x), v3 = acc[u][3] * ex2(sum_hi - from.y);
        const int past = col0 + u * 8 - t;  // column less row, for v0
        const bool diagonal = s.first + u >= 2 * s.row;
        if (diagonal) {
          v0 = past > 0 ? 0.f : past == 0 ? v0 + D : v0;
          v1 = past > -1 ? 0.f : past == -1 ? v1 + D : v1;
          v2 = past > 8 ? 0.f : past == 8 ? v2 + D : v2;
          v3 = past > 7 ? 0.f : past == 7 ? v3 + D : v3;
        }
        const uint32_t at = head * L::kScores + u * 256, p01 = Traits<T>::pack(v0, v1), p23 = Traits<T>::pack(v2, v3);
        store_shared(block + at, p01);
        store_shared(block + at + 128, p23);
        if (diagonal) {
          const float2 h01 = Traits<T>::unpack(p01), h23 = Traits<T>::unpack(p23);
          store_shared(low + at, Traits<T>::pack(v0 - h01.x, v1 - h01.y));
          store_shared(low + at + 128, Traits<T>::pack(v2 - h23.x, v3 - h23.y));
        }
      }
    }
  }
};

}  // namespace ssd
}  // namespace mamba
