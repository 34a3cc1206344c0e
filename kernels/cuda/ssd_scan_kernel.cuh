// The fused SSD scan on tensor cores (mma.sync), and its state-only form for pieces of a split sequence.
//
// Chunk by chunk, with the state h of every head in registers:
//   scores = (C B^T) * exp(decay from s to t) * dt_s      causal, one C B^T for all heads of the block
//   y      = exp(decay from the start) * (C h) + scores x + D x
//   h      = exp(decay of the chunk) h + (x * dt * exp(decay to the end))^T B
// The scores of chunk i + 1 and the decays of chunk i + 2 are made while chunk i is finished, so that one barrier a
// chunk is enough.
#pragma once

#include "ssd_chunk.cuh"

namespace mamba {
namespace ssd {

// The warps share the causal part of C B^T: warp slot k takes up to kMax 16 x 8 tiles of one row of tiles.
template <typename L>
struct Scores {
  using T = typename L::T;
  static constexpr int kMax = L::kRowTiles == 4 ? 3 : 1;
  static constexpr int kSlots = L::kRowTiles == 4 ? 8 : 6;
  static_assert(L::kRowTiles == 4 || L::kRowTiles == 2, "slots are laid out for chunks of 64 and 32");

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

  __device__ __forceinline__ static void make(uint32_t C_tile, uint32_t B_tile, const Decays<L>& decays, uint32_t out) {
    for (int k = threadIdx.x >> 5; k < kSlots; k += L::kWarps) make_slot(slot(k), C_tile, B_tile, decays, out);
  }

  __device__ __forceinline__ static void make_slot(const Slot s, uint32_t C_tile, uint32_t B_tile, const Decays<L>& decays,
                                                   uint32_t out) {
    const int lane = threadIdx.x & 31;
    float acc[kMax][4] = {};
#pragma unroll
    for (int k = 0; k < L::kState / 16; k++) {
      uint32_t c[4];
      ldmatrix_x4(c, C_tile + Tile<L::kState>::offset(s.row * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
      for (int u = 0; u < kMax; u++) {
        const int tile = s.first + min(u, s.count - 1);  // a missing third tile repeats the last
        uint32_t b[2];
        ldmatrix_x2(b, B_tile + Tile<L::kState>::offset(tile * 8 + (lane & 7), 2 * k + ((lane >> 3) & 1)));
        Traits<T>::mma(acc[u], c, b[0], b[1]);
      }
    }
    const int t = s.row * 16 + (lane >> 2);
#pragma unroll
    for (int head = 0; head < L::kHeads; head++) {
      const float* sum = decays.sum(head);
      const float* dt = decays.dt(head);
      const float sum_lo = sum[t], sum_hi = sum[t + 8];
#pragma unroll
      for (int u = 0; u < kMax; u++) {
        if (u >= s.count) break;
        const int tile = s.first + u, col = tile * 8 + (lane & 3) * 2;
        const float2 sum_s = *reinterpret_cast<const float2*>(sum + col);
        const float2 dt_s = *reinterpret_cast<const float2*>(dt + col);
        float v0 = acc[u][0] * (ex2(sum_lo - sum_s.x) * dt_s.x);
        float v1 = acc[u][1] * (ex2(sum_lo - sum_s.y) * dt_s.y);
        float v2 = acc[u][2] * (ex2(sum_hi - sum_s.x) * dt_s.x);
        float v3 = acc[u][3] * (ex2(sum_hi - sum_s.y) * dt_s.y);
        if (tile >= 2 * s.row) {
          if (col > t) v0 = 0.f;
          if (col + 1 > t) v1 = 0.f;
          if (col > t + 8) v2 = 0.f;
          if (col + 1 > t + 8) v3 = 0.f;
        }
        const int block = s.row * (s.row + 1) / 2 + tile / 2;
        const uint32_t at = out + head * L::kScores + block * 512 + (tile & 1) * 256 + lane * 4;
        store_shared(at, Traits<T>::pack(v0, v1));
        store_shared(at + 128, Traits<T>::pack(v2, v3));
      }
    }
  }
};

// One chunk of one warp: its columns of y, and its state brought to the chunk's end.
template <typename L>
struct ChunkWarp {
  using T = typename L::T;
  static constexpr int kRows = L::kRowTiles, kCols = L::kWarpCols / 8;
  float y[kRows][kCols][4];

  // y = C h, and h decayed to the end of the chunk.
  __device__ __forceinline__ void from_state(WarpState<L>& h, uint32_t C_tile, float decay) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int n = 0; n < kCols; n++) y[i][n][0] = y[i][n][1] = y[i][n][2] = y[i][n][3] = 0.f;
#pragma unroll
    for (int k = 0; k < L::kState / 16; k++) {
      uint32_t b[kCols][2];
#pragma unroll
      for (int n = 0; n < kCols; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float(&f)[4] = h.v[n / 2][2 * k + half];
          b[n][half] = Traits<T>::pack(f[(n & 1) * 2], f[(n & 1) * 2 + 1]);
          f[(n & 1) * 2] *= decay, f[(n & 1) * 2 + 1] *= decay;
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        uint32_t c[4];
        ldmatrix_x4(c, C_tile + Tile<L::kState>::offset(i * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < kCols; n++) Traits<T>::mma(y[i][n], c, b[n][0], b[n][1]);
      }
    }
  }

  __device__ __forceinline__ void scale_rows(const float* from_start) {
    const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const float lo = from_start[i * 16 + g], hi = from_start[i * 16 + g + 8];
#pragma unroll
      for (int n = 0; n < kCols; n++) y[i][n][0] *= lo, y[i][n][1] *= lo, y[i][n][2] *= hi, y[i][n][3] *= hi;
    }
  }

  // y += scores x and h += (weighted x)^T B, 16 tokens at a time.
  __device__ __forceinline__ void from_input(WarpState<L>& h, uint32_t x_tile, uint32_t B_tile, uint32_t scores,
                                             const float* to_end, int col0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      uint32_t x[WarpState<L>::kM][4];
      WarpState<L>::load_input(x, x_tile, col0, j);
#pragma unroll
      for (int i = j; i < kRows; i++) {
        uint32_t s[4];
        ldmatrix_x4(s, scores + (i * (i + 1) / 2 + j) * 512 + lane * 16);
#pragma unroll
        for (int n = 0; n < kCols; n++) Traits<T>::mma(y[i][n], s, x[n / 2][(n & 1) * 2], x[n / 2][(n & 1) * 2 + 1]);
      }
      const float2 w0 = *reinterpret_cast<const float2*>(to_end + j * 16 + (lane & 3) * 2);
      const float2 w8 = *reinterpret_cast<const float2*>(to_end + j * 16 + (lane & 3) * 2 + 8);
      h.add_outer(x, w0, w8, B_tile, j);
    }
  }

  // y += D x, from the x tile in shared memory.
  __device__ __forceinline__ void add_skip(const float* D, bool per_channel, uint32_t x_tile, int col0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < kCols / 2; m++) {
      float2 d[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int col = col0 + m * 16 + half * 8 + (lane & 3) * 2;
        d[half] = per_channel ? make_float2(D[col], D[col + 1]) : make_float2(D[0], D[0]);
      }
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        uint32_t x[4];
        ldmatrix_x4(x, x_tile + Tile<L::kHeadDim>::offset(i * 16 + (lane & 15), col0 / 8 + 2 * m + (lane >> 4)));
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float2 f = Traits<T>::unpack(x[r]);
          float(&acc)[4] = y[i][2 * m + (r >> 1)];
          acc[(r & 1) * 2] = fmaf(f.x, d[r >> 1].x, acc[(r & 1) * 2]);
          acc[(r & 1) * 2 + 1] = fmaf(f.y, d[r >> 1].y, acc[(r & 1) * 2 + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void gate(const T* z, int64_t z_token, int rows, int col0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = i * 16 + half * 8 + (lane >> 2);
        if (t >= rows) continue;
        const T* at = z + t * z_token + col0 + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < kCols; n++) {
          const float2 f = Traits<T>::unpack(*reinterpret_cast<const uint32_t*>(at + n * 8));
          y[i][n][half * 2] *= silu(f.x), y[i][n][half * 2 + 1] *= silu(f.y);
        }
      }
  }

  // Writes rows [0, rows) of y: through this warp's own columns of the x tile, which nobody reads any more, so that
  // the global stores are 16 bytes a lane.
  __device__ __forceinline__ void store(T* out, int64_t y_token, uint32_t x_tile, int rows, int col0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int n = 0; n < kCols; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          store_shared(x_tile + Tile<L::kHeadDim>::offset(i * 16 + half * 8 + (lane >> 2), col0 / 8 + n) + (lane & 3) * 4,
                       Traits<T>::pack(y[i][n][half * 2], y[i][n][half * 2 + 1]));
    __syncwarp();
    constexpr int kPieces = L::kWarpCols / 8, kTotal = L::kChunk * kPieces;
#pragma unroll
    for (int i = 0; i < kTotal / 32; i++) {
      const int idx = lane + i * 32, piece = col0 / 8 + idx % kPieces;
      // Rows q and q + 4 share a quarter of the warp: their swizzles differ where rows q and q + 1 would collide.
      const int seq = idx / kPieces, row = (seq & ~7) | ((seq & 1) << 2) | ((seq >> 1) & 3);
      uint4 v;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(x_tile + Tile<L::kHeadDim>::offset(row, piece)));
      if (row < rows) *reinterpret_cast<uint4*>(out + row * y_token + piece * 8) = v;
    }
  }
};

template <typename L>
__global__ void __launch_bounds__(L::kThreads, 256 / L::kThreads > 0 ? 256 / L::kThreads : 1)
    ssd_scan_kernel(const __grid_constant__ ScanArgs p) {
  using T = typename L::T;
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kTwoTiles = 2 * L::kStateTile;
  const uint32_t base = smem_address(shared);
  const auto C_tile = [&](int i) { return base + (i % 3) * kTwoTiles; };
  const auto B_tile = [&](int i) { return base + (i % 3) * kTwoTiles + L::kStateTile; };
  const auto x_tile = [&](int i) { return base + 3 * kTwoTiles + (i & 1) * L::kHeads * L::kInputTile; };
  const auto scores = [&](int i) {
    return base + 3 * kTwoTiles + 2 * L::kHeads * L::kInputTile + (i & 1) * L::kHeads * L::kScores;
  };
  const auto decays = [&](int i) {
    uint8_t* at = shared + 3 * kTwoTiles + 2 * L::kHeads * (L::kInputTile + L::kScores) + (i % 3) * L::kDecays;
    return Decays<L>{reinterpret_cast<float*>(at)};
  };

  const Place at = place_of_block<L>(p);
  const int limit = min(at.len, at.end);
  const int chunks = limit > at.begin ? (limit - at.begin + L::kChunk - 1) / L::kChunk : 0;
  const T* B = static_cast<const T*>(p.B) + at.batch * p.B_batch + at.group * L::kState;
  const T* C = static_cast<const T*>(p.C) + at.batch * p.C_batch + at.group * L::kState;
  const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + at.head0 * L::kHeadDim;
  const auto token0 = [&](int i) { return at.begin + i * L::kChunk; };
  const auto load_BC = [&](int i) {
    if (i >= chunks) return;
    load_state_tile<L>(C_tile(i), C, p.C_token, token0(i), limit);
    load_state_tile<L>(B_tile(i), B, p.B_token, token0(i), limit);
  };
  const auto load_x = [&](int i) {
    if (i < chunks) load_input_tile<L>(x_tile(i), x, p.x_token, token0(i), limit, at.heads);
  };

  const int warp = threadIdx.x >> 5, local_head = warp / L::kWarpsPerHead, head = at.head0 + local_head;
  const int col0 = (warp % L::kWarpsPerHead) * L::kWarpCols;
  const bool active = local_head < at.heads;
  const int64_t state_at = (static_cast<int64_t>(at.batch) * p.nheads + head) * L::kHeadDim * L::kState;

  DecayWarp<L> decay_warp;
  float total[DecayWarp<L>::kPerWarp];
  load_BC(0), load_x(0), load_BC(1);
  cp_async_commit();
  WarpState<L> h;
  h.zero();
  if (active) {
    if (p.splits > 1) {
      const int64_t skip = static_cast<int64_t>(at.split) * L::kHeadDim * L::kState;
      h.template move<true>(static_cast<const float*>(p.split_state) + state_at * p.splits + skip, col0);
    } else if (p.initial_state) {
      h.template move<true>(p.initial_state + state_at, col0);
    }
  }
  for (int i = 0; i < 2; i++) {
    decay_warp.fetch(p, at, token0(i));
    decay_warp.store(p, at, token0(i), decays(i), total);
  }
  decay_warp.fetch(p, at, token0(2));
  cp_async_wait<0>();
  __syncthreads();
  if (chunks > 0) Scores<L>::make(C_tile(0), B_tile(0), decays(0), scores(0));

  for (int i = 0; i < chunks; i++) {
    cp_async_wait<0>();
    __syncthreads();
    load_BC(i + 2), load_x(i + 1);
    cp_async_commit();
    decay_warp.store(p, at, token0(i + 2), decays(i + 2), total);
    decay_warp.fetch(p, at, token0(i + 3));
    if (i + 1 < chunks) Scores<L>::make(C_tile(i + 1), B_tile(i + 1), decays(i + 1), scores(i + 1));
    if (!active) continue;

    const Decays<L> d = decays(i);
    const uint32_t x_head = x_tile(i) + local_head * L::kInputTile;
    ChunkWarp<L> chunk;
    chunk.from_state(h, C_tile(i), d.from_start(local_head)[L::kChunk - 1]);
    chunk.scale_rows(d.from_start(local_head));
    chunk.from_input(h, x_head, B_tile(i), scores(i) + local_head * L::kScores, d.to_end(local_head), col0);
    if (p.D) chunk.add_skip(p.D + (p.d_per_channel ? head * L::kHeadDim : head), p.d_per_channel, x_head, col0);
    const int rows = limit - token0(i);
    if (p.z) {
      const T* z = static_cast<const T*>(p.z) + at.batch * p.z_batch + token0(i) * p.z_token + head * L::kHeadDim;
      chunk.gate(z, p.z_token, rows, col0);
    }
    __syncwarp();
    T* y = static_cast<T*>(p.y) + at.batch * p.y_batch + token0(i) * p.y_token + head * L::kHeadDim;
    chunk.store(y, p.y_token, x_head, rows, col0);
  }

  if (active && p.final_state && at.split == p.splits - 1) h.template move<false>(p.final_state + state_at, col0);
  // Padding gets zeros.
  T* y = static_cast<T*>(p.y) + at.batch * p.y_batch + at.head0 * L::kHeadDim;
  const int pieces = at.heads * L::kHeadDim / 8, first = max(at.begin, at.len);
  for (int idx = threadIdx.x; idx < (at.end - first) * pieces; idx += L::kThreads)
    *reinterpret_cast<uint4*>(y + (first + idx / pieces) * p.y_token + (idx % pieces) * 8) = make_uint4(0, 0, 0, 0);
}

// The state at the end of every piece but the last, from zero, and the piece's decay.
template <typename L>
__global__ void __launch_bounds__(L::kThreads, 256 / L::kThreads > 0 ? 256 / L::kThreads : 1)
    ssd_state_kernel(const __grid_constant__ ScanArgs p) {
  using T = typename L::T;
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kStage = L::kStateTile + L::kHeads * L::kInputTile;
  const uint32_t base = smem_address(shared);
  const auto B_tile = [&](int i) { return base + (i % 3) * kStage; };
  const auto x_tile = [&](int i) { return base + (i % 3) * kStage + L::kStateTile; };
  const auto decays = [&](int i) {
    return Decays<L>{reinterpret_cast<float*>(shared + 3 * kStage + (i % 3) * L::kDecays)};
  };

  const Place at = place_of_block<L>(p);
  const int limit = min(at.len, at.end);
  const int chunks = limit > at.begin ? (limit - at.begin + L::kChunk - 1) / L::kChunk : 0;
  const T* B = static_cast<const T*>(p.B) + at.batch * p.B_batch + at.group * L::kState;
  const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + at.head0 * L::kHeadDim;
  const auto token0 = [&](int i) { return at.begin + i * L::kChunk; };
  const auto load = [&](int i) {
    if (i < chunks) {
      load_state_tile<L>(B_tile(i), B, p.B_token, token0(i), limit);
      load_input_tile<L>(x_tile(i), x, p.x_token, token0(i), limit, at.heads);
    }
    cp_async_commit();
  };

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, local_head = warp / L::kWarpsPerHead;
  const int col0 = (warp % L::kWarpsPerHead) * L::kWarpCols;
  const bool active = local_head < at.heads;

  DecayWarp<L> decay_warp;
  float total[DecayWarp<L>::kPerWarp], sum[DecayWarp<L>::kPerWarp] = {};
  load(0), load(1);
  WarpState<L> h;
  h.zero();
  decay_warp.fetch(p, at, token0(0));
  decay_warp.store(p, at, token0(0), decays(0), total);
  decay_warp.fetch(p, at, token0(1));
  for (int i = 0; i < chunks; i++) {
#pragma unroll
    for (int k = 0; k < DecayWarp<L>::kPerWarp; k++) sum[k] += total[k];
    cp_async_wait<1>();
    __syncthreads();
    load(i + 2);
    decay_warp.store(p, at, token0(i + 1), decays(i + 1), total);
    decay_warp.fetch(p, at, token0(i + 2));
    if (!active) continue;
    const Decays<L> d = decays(i);
    const float decay = d.from_start(local_head)[L::kChunk - 1];
#pragma unroll
    for (int m = 0; m < WarpState<L>::kM; m++)
#pragma unroll
      for (int n = 0; n < WarpState<L>::kN; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) h.v[m][n][r] *= decay;
#pragma unroll
    for (int j = 0; j < L::kRowTiles; j++) {
      uint32_t frag[WarpState<L>::kM][4];
      WarpState<L>::load_input(frag, x_tile(i) + local_head * L::kInputTile, col0, j);
      const float* to_end = d.to_end(local_head) + j * 16 + (lane & 3) * 2;
      h.add_outer(frag, *reinterpret_cast<const float2*>(to_end), *reinterpret_cast<const float2*>(to_end + 8), B_tile(i), j);
    }
  }

  const int64_t row = (static_cast<int64_t>(at.batch) * p.nheads + at.head0) * p.splits + at.split;
  if (active)
    h.template move<false>(p.split_state + (row + static_cast<int64_t>(local_head) * p.splits) * L::kHeadDim * L::kState, col0);
#pragma unroll
  for (int k = 0; k < DecayWarp<L>::kPerWarp; k++) {
    const int owner = DecayWarp<L>::head_of(k);
    if (lane == 0 && owner < at.heads) p.split_decay[row + static_cast<int64_t>(owner) * p.splits] = sum[k];
  }
}

}  // namespace ssd
}  // namespace mamba
