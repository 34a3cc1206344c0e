// The fused SSD scan on tensor cores (mma.sync).
//
// Chunk by chunk, with the state h of every head in registers:
//   scores = (C B^T) * exp(decay from s to t) * dt_s      causal, one C B^T for all heads of the block
//   y      = exp(decay from the start) * (C h) + scores x + D x
//   h      = exp(decay of the chunk) h + (x * dt * exp(decay to the end))^T B
// The scores of chunk i + 1 and the decays of chunk i + 2 are made while chunk i is finished, so that one barrier a
// chunk is enough.
#pragma once

#include "ssd_scores.cuh"

namespace mamba {
namespace ssd {

// One chunk of one warp: its columns of y, and its state brought to the chunk's end.
template <typename L>
struct ChunkWarp {
  using T = typename L::T;
  using Input = Tile<L::kHeadDim>;
  using State = Tile<L::kState>;
  static constexpr int kRows = L::kRowTiles, kCols = L::kWarpCols / 8;
  float y[kRows][kCols][4];

  // y = C h, and h decayed to the end of the chunk.
  __device__ __forceinline__ void from_state(WarpState<L>& h, uint32_t C_tile, float decay) {
    const uint32_t C_rows = C_tile + State::lane_16x16();
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
      const uint32_t C_k = State::along(C_rows, 2 * k);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        uint32_t c[4];
        ldmatrix_x4(c, C_k + i * 16 * State::kRowBytes);
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
    const uint32_t x_rows = Input::along(x_tile + Input::lane_16x16(), col0 / 8), B_rows = B_tile + State::lane_16x16();
    scores += lane * 16;
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      uint32_t x[WarpState<L>::kM][4];
      WarpState<L>::load_input(x, x_rows + j * 16 * Input::kRowBytes);
      const auto add_scores = [&](int i, uint32_t block) {
        uint32_t s[4];
        ldmatrix_x4(s, block);
#pragma unroll
        for (int n = 0; n < kCols; n++) Traits<T>::mma(y[i][n], s, x[n / 2][(n & 1) * 2], x[n / 2][(n & 1) * 2 + 1]);
      };
      add_scores(j, scores + (L::kMaskBlocks + j) * 512);
#pragma unroll
      for (int i = kRows - 1; i >= j; i--) add_scores(i, scores + (i * (i + 1) / 2 + j) * 512);
      const float* weights = to_end + j * 16 + (lane & 3) * 2;
      h.add_outer(x, *reinterpret_cast<const float2*>(weights), *reinterpret_cast<const float2*>(weights + 8),
                  B_rows + j * 16 * State::kRowBytes);
    }
  }

  // y += D x with a D of its own for every channel (otherwise the scores carry it).
  __device__ __forceinline__ void add_skip(const float* D, uint32_t x_tile, int col0) {
    const int lane = threadIdx.x & 31;
    const uint32_t x_rows = Input::along(x_tile + Input::lane_16x16(), col0 / 8);
#pragma unroll
    for (int m = 0; m < kCols / 2; m++) {
      float2 d[2];
#pragma unroll
      for (int half = 0; half < 2; half++)
        d[half] = *reinterpret_cast<const float2*>(D + col0 + m * 16 + half * 8 + (lane & 3) * 2);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        uint32_t x[4];
        ldmatrix_x4(x, Input::along(x_rows, 2 * m) + i * 16 * Input::kRowBytes);
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
    const uint32_t x_rows = Input::along(x_tile + Input::lane_16x16(), col0 / 8);
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int n = 0; n < kCols; n += 2)
        store_matrix_x4(Input::along(x_rows, n) + i * 16 * Input::kRowBytes, Traits<T>::pack(y[i][n][0], y[i][n][1]),
                        Traits<T>::pack(y[i][n][2], y[i][n][3]), Traits<T>::pack(y[i][n + 1][0], y[i][n + 1][1]),
                        Traits<T>::pack(y[i][n + 1][2], y[i][n + 1][3]));
    __syncwarp();
    constexpr int kPieces = L::kWarpCols / 8, kPass = 32 / kPieces;  // rows a pass: 8 or 16
    // Rows q and q + 4 share a quarter of the warp: their swizzles differ where rows q and q + 1 would collide.
    const int seq = lane / kPieces, row0 = (seq & ~7) | ((seq & 1) << 2) | ((seq >> 1) & 3);
    const uint32_t from = x_tile + Input::offset(row0, col0 / 8 + lane % kPieces);
    T* to = out + row0 * y_token + col0 + lane % kPieces * 8;
#pragma unroll
    for (int i = 0; i < L::kChunk / kPass; i++) {
      uint4 v;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(from + i * kPass * Input::kRowBytes));
      if (row0 + i * kPass < rows) store_global_16(to, v);
      to += kPass * y_token;
    }
  }
};

// The shared memory of ssd_scan_kernel.
template <typename L>
struct ScanShared {
  uint8_t* base;
  static constexpr int kStage = 2 * L::kStateTile;
  static constexpr int kInput = 3 * kStage, kScore = kInput + 2 * L::kHeads * L::kInputTile;
  static constexpr int kDecay = kScore + 2 * L::kHeads * L::kScores, kConstant = kDecay + 3 * L::kDecays;
  __device__ uint32_t C(int i) const { return smem_address(base) + (i % 3) * kStage; }
  __device__ uint32_t B(int i) const { return C(i) + L::kStateTile; }
  __device__ uint32_t x(int i) const { return smem_address(base) + kInput + (i & 1) * L::kHeads * L::kInputTile; }
  __device__ uint32_t scores(int i) const { return smem_address(base) + kScore + (i & 1) * L::kHeads * L::kScores; }
  __device__ Decays<L> decays(int i) const {
    return {reinterpret_cast<float*>(base + kDecay + (i % 3) * L::kDecays)};
  }
  __device__ HeadConstants<L> constants() const { return {reinterpret_cast<float*>(base + kConstant)}; }
};

// Where an item's state comes from and goes to.
struct StateRoute {
  const float* load;       // [headdim, d_state] of the block's first head, NULL for zeros
  int64_t load_head;       // from one head to the next
  float* store;            // likewise
  const float* take_over;  // instead of load: what the block before left in its scratch
  float* hand_over;
};

template <typename L>
__device__ __forceinline__ void scan_item(const ScanArgs& p, const Item& at, const StateRoute& route,
                                          const ScanShared<L>& shared) {
  using T = typename L::T;
  const int limit = at.limit();
  const int chunks = limit > at.begin ? (limit - at.begin + L::kChunk - 1) / L::kChunk : 0;
  const auto token0 = [&](int i) { return at.begin + i * L::kChunk; };
  const auto load_BC = [&](int i) {
    if (i >= chunks) return;
    constexpr int kPieces = L::kState / 8;
    const int64_t t = token0(i), group = at.group * L::kState;
    const T* C = static_cast<const T*>(p.C) + at.batch * p.C_batch + t * p.C_token + group;
    const T* B = static_cast<const T*>(p.B) + at.batch * p.B_batch + t * p.B_token + group;
    load_tile<L, kPieces, L::kState>(shared.C(i), C, p.C_token, limit - token0(i), kPieces);
    load_tile<L, kPieces, L::kState>(shared.B(i), B, p.B_token, limit - token0(i), kPieces);
  };
  const auto load_x = [&](int i) {
    if (i >= chunks) return;
    constexpr int kPieces = L::kHeadDim / 8;
    const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + token0(i) * p.x_token + at.head0 * L::kHeadDim;
    load_tile<L, kPieces * L::kHeads, L::kHeadDim>(shared.x(i), x, p.x_token, limit - token0(i), kPieces * at.heads);
  };

  const int warp = threadIdx.x >> 5, local_head = warp / L::kWarpsPerHead;
  const int col0 = (warp % L::kWarpsPerHead) * L::kWarpCols;
  const bool active = local_head < at.heads;
  const float* skip = p.D && !p.d_per_channel ? p.D + at.head0 : nullptr;

  load_BC(0), load_x(0), load_BC(1);
  cp_async_commit();
  shared.constants().load(p, at);
  DecayWarp<L> decay_warp;
  decay_warp.fetch(p, at, token0(0));
  __syncthreads();
  decay_warp.store(p, at, token0(0), shared.constants(), shared.decays(0));
  decay_warp.fetch(p, at, token0(1));
  WarpState<L> h;
  if (route.take_over) {
    h.take_over(route.take_over);
  } else if (route.load && active) {
    h.template move<true>(route.load + local_head * route.load_head, col0);
  } else {
    h.zero();
  }
  decay_warp.store(p, at, token0(1), shared.constants(), shared.decays(1));
  cp_async_wait<0>();
  __syncthreads();
  if (chunks > 0) Scores<L>::make(shared.C(0), shared.B(0), shared.decays(0), skip, at.heads, shared.scores(0));

#pragma unroll 1
  for (int i = 0; i < chunks; i++) {
    cp_async_wait<0>();
    __syncthreads();
    decay_warp.fetch(p, at, token0(i + 2));
    load_BC(i + 2), load_x(i + 1);
    cp_async_commit();
    if (i + 1 < chunks)
      Scores<L>::make(shared.C(i + 1), shared.B(i + 1), shared.decays(i + 1), skip, at.heads, shared.scores(i + 1));
    if (i + 2 < chunks) decay_warp.store(p, at, token0(i + 2), shared.constants(), shared.decays(i + 2));
    if (!active) continue;

    const Decays<L> d = shared.decays(i);
    const uint32_t x_head = shared.x(i) + local_head * L::kInputTile;
    const int head = at.head0 + local_head;
    ChunkWarp<L> chunk;
    chunk.from_state(h, shared.C(i), d.from_start(local_head)[L::kChunk - 1]);
    chunk.scale_rows(d.from_start(local_head));
    chunk.from_input(h, x_head, shared.B(i), shared.scores(i) + local_head * L::kScores, d.to_end(local_head), col0);
    if (p.D && p.d_per_channel) chunk.add_skip(p.D + head * L::kHeadDim, x_head, col0);
    const int rows = limit - token0(i);
    if (p.z) {
      const T* z = static_cast<const T*>(p.z) + at.batch * p.z_batch + token0(i) * p.z_token + head * L::kHeadDim;
      chunk.gate(z, p.z_token, rows, col0);
    }
    __syncwarp();
    T* y = static_cast<T*>(p.y) + at.batch * p.y_batch + token0(i) * p.y_token + head * L::kHeadDim;
    chunk.store(y, p.y_token, x_head, rows, col0);
  }

  if (route.hand_over) {
    h.hand_over(route.hand_over);
  } else if (active && route.store) {
    h.template move<false>(route.store + static_cast<int64_t>(local_head) * L::kHeadDim * L::kState, col0);
  }
  // Padding gets zeros.
  T* y = static_cast<T*>(p.y) + at.batch * p.y_batch + at.head0 * L::kHeadDim;
  const int pieces = at.heads * L::kHeadDim / 8, first = max(at.begin, at.len);
  for (int idx = threadIdx.x; idx < (at.end - first) * pieces; idx += L::kThreads)
    *reinterpret_cast<uint4*>(y + (first + idx / pieces) * p.y_token + (idx % pieces) * 8) = make_uint4(0, 0, 0, 0);
}

// One piece of one row a block.
template <typename L>
__global__ void __launch_bounds__(L::kThreads, L::kMinBlocks) ssd_scan_kernel(const __grid_constant__ ScanArgs p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const int split = blockIdx.y;
  const Item at = item_at<L>(p, blockIdx.z, blockIdx.x, piece_start<L>(p, split), piece_start<L>(p, split + 1));
  constexpr int kSize = L::kHeadDim * L::kState;
  const int64_t head = static_cast<int64_t>(at.batch) * p.nheads + at.head0;
  StateRoute route = {};
  if (p.splits > 1)
    route.load = p.split_state + (head * p.splits + split) * kSize, route.load_head = p.splits * kSize;
  else if (p.initial_state)
    route.load = p.initial_state + head * kSize, route.load_head = kSize;
  if (p.final_state && split == p.splits - 1) route.store = p.final_state + head * kSize;
  scan_item<L>(p, at, route, ScanShared<L>{memory});
}

// Equal runs of chunks a block, over the ends of rows. A run is at least a row long, so a row lies in two runs at
// most; every block takes the beginning of its last row first and the end of its first row last, so that the state
// it needs for that has long been handed over.
template <typename L>
__global__ void __launch_bounds__(L::kThreads, L::kMinBlocks) ssd_stream_kernel(const __grid_constant__ ScanArgs p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr int kSize = L::kHeadDim * L::kState;
  const int row_chunks = (p.seqlen + L::kChunk - 1) / L::kChunk, block = blockIdx.x;
  const int64_t all = static_cast<int64_t>(p.blocks_x) * p.batch * row_chunks;
  const int64_t begin = all * block / gridDim.x, end = all * (block + 1) / gridDim.x;
#pragma unroll 1
  for (int row = static_cast<int>((end - 1) / row_chunks); row >= begin / row_chunks; row--) {
    const int64_t row_begin = static_cast<int64_t>(row) * row_chunks;
    const int first = static_cast<int>(max(begin - row_begin, static_cast<int64_t>(0)));
    const int last = static_cast<int>(min(end - row_begin, static_cast<int64_t>(row_chunks)));
    const Item at = item_at<L>(p, row / p.blocks_x, row % p.blocks_x, first, last);
    const int64_t head = static_cast<int64_t>(at.batch) * p.nheads + at.head0;
    StateRoute route = {};
    __syncthreads();  // the item before is done with shared memory
    if (first > 0) {
      if (threadIdx.x == 0) {
        volatile unsigned long long* flag = p.handed + block - 1;
        while (*flag != p.ticket) {
        }
        *flag = 0;  // ready for the next launch with this ticket, a graph's replay
        __threadfence();
      }
      __syncthreads();
      route.take_over = p.handoff + static_cast<int64_t>(block - 1) * L::kHeads * kSize;
    } else if (p.initial_state) {
      route.load = p.initial_state + head * kSize, route.load_head = kSize;
    }
    if (last < row_chunks)
      route.hand_over = p.handoff + static_cast<int64_t>(block) * L::kHeads * kSize;
    else if (p.final_state)
      route.store = p.final_state + head * kSize;
    scan_item<L>(p, at, route, ScanShared<L>{memory});
    if (last < row_chunks) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) *static_cast<volatile unsigned long long*>(p.handed + block) = p.ticket;
    }
  }
}

}  // namespace ssd
}  // namespace mamba
