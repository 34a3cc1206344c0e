// What the SSD passes share: the arguments, the shape of one block's work, the per-token decays, the tile loads.
#pragma once

#include "ssd_mma.cuh"

namespace mamba {
namespace ssd {

struct ScanArgs {
  const void *x, *dt, *B, *C, *z;
  void* y;
  const float *A, *D, *dt_bias, *initial_state;
  float* final_state;
  const int32_t* seq_lens;
  int64_t x_batch, x_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, z_batch, z_token, y_batch, y_token;
  int32_t batch, seqlen, nheads, headdim, ngroups, d_state;
  int32_t dt_softplus, d_per_channel;
  float dt_min, dt_max;
  // The sequence cut into `splits` pieces of `split_len` tokens (a multiple of the chunk).
  int32_t splits, split_len;
  float* split_state;  // [batch, nheads, splits, headdim, d_state]: ends of the pieces, then their beginnings
  float* split_decay;  // [batch, nheads, splits]: log2 of a piece's decay
};

// One block handles kHeads heads of one group; a warp owns kWarpCols columns (of headdim) of one head's state for
// all of d_state, kept in registers as the accumulators of mma.sync.
template <typename T_, int kHeadDim_, int kState_, int kWarpCols_, int kHeads_, int kChunk_>
struct Layout {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kState = kState_, kWarpCols = kWarpCols_, kHeads = kHeads_;
  static constexpr int kChunk = kChunk_;
  static constexpr int kWarpsPerHead = kHeadDim / kWarpCols;
  static constexpr int kWarps = kWarpsPerHead * kHeads;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kChunk / 16;                          // 16-token tiles of a chunk
  static constexpr int kMaskBlocks = kRowTiles * (kRowTiles + 1) / 2;    // causal 16 x 16 blocks
  static constexpr int kStateTile = kChunk * kState * 2;                 // bytes of a chunk of B or C
  static constexpr int kInputTile = kChunk * kHeadDim * 2;               // bytes of a chunk of x, one head
  static constexpr int kScores = kMaskBlocks * 512;                      // bytes of the decayed C B^T, one head
  static constexpr int kDecays = 4 * kHeads * kChunk * 4;                // bytes of the Decays arrays
  // Three chunks of B and C, two of x and of the scores, three of the decays.
  static constexpr int kScanShared = 3 * (2 * kStateTile + kDecays) + 2 * kHeads * (kInputTile + kScores);
  static constexpr int kStateShared = 3 * (kStateTile + kHeads * kInputTile + kDecays);
  static_assert(kHeadDim % kWarpCols == 0 && kWarpCols % 16 == 0 && kState % 16 == 0 && kChunk % 32 == 0);
};

// Per-token factors of one chunk, [kHeads][kChunk] each.
template <typename L>
struct Decays {
  float* base;
  static constexpr int kArray = L::kHeads * L::kChunk;
  __device__ float* sum(int head) const { return base + head * L::kChunk; }             // cumulative log2 decay
  __device__ float* dt(int head) const { return base + kArray + head * L::kChunk; }
  __device__ float* to_end(int head) const { return base + 2 * kArray + head * L::kChunk; }  // dt * decay to the end
  __device__ float* from_start(int head) const { return base + 3 * kArray + head * L::kChunk; }
};

// Where this block works.
struct Place {
  int batch, head0, heads, group, split, begin, end, len;  // tokens [begin, end), the row's valid length
};

template <typename L>
__device__ __forceinline__ Place place_of_block(const ScanArgs& p) {
  Place at;
  const int heads_per_group = p.nheads / p.ngroups;
  const int blocks_per_group = (heads_per_group + L::kHeads - 1) / L::kHeads;
  at.group = blockIdx.x / blocks_per_group;
  const int first = (blockIdx.x % blocks_per_group) * L::kHeads;
  at.head0 = at.group * heads_per_group + first;
  at.heads = min(L::kHeads, heads_per_group - first);
  at.split = blockIdx.y;
  at.batch = blockIdx.z;
  at.begin = at.split * p.split_len;
  at.end = min(p.seqlen, at.begin + p.split_len);
  at.len = p.seq_lens ? max(0, min(p.seqlen, p.seq_lens[at.batch])) : p.seqlen;
  return at;
}

// The warps that turn dt into decays: each takes one head (and more if there are more heads than warps), a lane
// kChunk / 32 neighbouring tokens. The raw values are fetched one chunk ahead.
template <typename L>
struct DecayWarp {
  using T = typename L::T;
  static constexpr int kPerLane = L::kChunk / 32;
  static constexpr int kPerWarp = (L::kHeads + L::kWarps - 1) / L::kWarps;
  T raw[kPerWarp][kPerLane];

  __device__ __forceinline__ static int head_of(int i) { return (L::kWarps - 1 - (threadIdx.x >> 5)) + i * L::kWarps; }

  __device__ __forceinline__ void fetch(const ScanArgs& p, const Place& at, int token0) {
    const T* dt = static_cast<const T*>(p.dt) + at.batch * p.dt_batch + at.head0;
#pragma unroll
    for (int i = 0; i < kPerWarp; i++) {
      const int head = head_of(i);
#pragma unroll
      for (int e = 0; e < kPerLane; e++) {
        const int t = token0 + (threadIdx.x & 31) * kPerLane + e;
        if (head < at.heads && t < at.len && t < at.end) raw[i][e] = dt[t * p.dt_token + head];
      }
    }
  }

  // Returns nothing; lane 31 of the warp of a head holds the chunk's total in `total[i]`.
  __device__ __forceinline__ void store(const ScanArgs& p, const Place& at, int token0, const Decays<L>& out,
                                        float (&total)[kPerWarp]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kPerWarp; i++) {
      const int head = head_of(i);
      total[i] = 0.f;
      if (head >= L::kHeads) continue;
      const bool active = head < at.heads;
      const float a = active ? p.A[at.head0 + head] * kLog2e : 0.f;
      const float bias = active && p.dt_bias ? p.dt_bias[at.head0 + head] : 0.f;
      float dt[kPerLane], sum[kPerLane];
#pragma unroll
      for (int e = 0; e < kPerLane; e++) {
        const int t = token0 + lane * kPerLane + e;
        float v = 0.f;
        if (active && t < at.len && t < at.end) {
          v = to_float(raw[i][e]) + bias;
          if (p.dt_softplus) v = softplus<true>(v);
          v = fminf(fmaxf(v, p.dt_min), p.dt_max);
        }
        dt[e] = v;
        sum[e] = fmaxf(v * a, kMinLog2Decay) + (e ? sum[e - 1] : 0.f);
      }
      float scan = sum[kPerLane - 1];
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, scan, d);
        if (lane >= d) scan += other;
      }
      total[i] = __shfl_sync(0xffffffffu, scan, 31);
      const float before = scan - sum[kPerLane - 1];
#pragma unroll
      for (int e = 0; e < kPerLane; e++) {
        const int t = lane * kPerLane + e;
        const float s = before + sum[e];
        out.sum(head)[t] = s;
        out.dt(head)[t] = dt[e];
        out.to_end(head)[t] = dt[e] * ex2(total[i] - s);
        out.from_start(head)[t] = ex2(s);
      }
    }
  }
};

// A chunk of B or C: rows past `limit` become zeros, so that padding, poisoned or not, never reaches an mma.
template <typename L>
__device__ __forceinline__ void load_state_tile(uint32_t dst, const typename L::T* src, int64_t token_stride, int token0,
                                                int limit) {
  constexpr int kPieces = L::kState / 8, kTotal = L::kChunk * kPieces;
#pragma unroll
  for (int i = 0; i < (kTotal + L::kThreads - 1) / L::kThreads; i++) {
    const int idx = threadIdx.x + i * L::kThreads;
    if (kTotal % L::kThreads != 0 && idx >= kTotal) break;
    const int row = idx / kPieces, piece = idx % kPieces;
    const bool valid = token0 + row < limit;
    copy_async_16(dst + Tile<L::kState>::offset(row, piece), valid ? src + (token0 + row) * token_stride + piece * 8 : src,
                  valid);
  }
}

// A chunk of x for all heads of the block: [kHeads][kChunk][kHeadDim].
template <typename L>
__device__ __forceinline__ void load_input_tile(uint32_t dst, const typename L::T* src, int64_t token_stride, int token0,
                                                int limit, int heads) {
  constexpr int kPieces = L::kHeadDim / 8, kRow = kPieces * L::kHeads, kTotal = L::kChunk * kRow;
#pragma unroll
  for (int i = 0; i < (kTotal + L::kThreads - 1) / L::kThreads; i++) {
    const int idx = threadIdx.x + i * L::kThreads;
    if (kTotal % L::kThreads != 0 && idx >= kTotal) break;
    const int row = idx / kRow, col = idx % kRow, head = col / kPieces, piece = col % kPieces;
    const bool valid = token0 + row < limit && head < heads;
    copy_async_16(dst + head * L::kInputTile + Tile<L::kHeadDim>::offset(row, piece),
                  valid ? src + (token0 + row) * token_stride + col * 8 : src, valid);
  }
}

// The state of one warp: state[m][n] is the accumulator of headdim rows 16m.. and d_state columns 8n...
template <typename L>
struct WarpState {
  using T = typename L::T;
  static constexpr int kM = L::kWarpCols / 16, kN = L::kState / 8;
  float v[kM][kN][4];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int n = 0; n < kN; n++) v[m][n][0] = v[m][n][1] = v[m][n][2] = v[m][n][3] = 0.f;
  }

  // `head` points at the [headdim, d_state] state of this warp's head.
  template <bool kLoad, typename Pointer>
  __device__ __forceinline__ void move(Pointer head, int col0) {
    const int lane = threadIdx.x & 31;
    Pointer base = head + (col0 + (lane >> 2)) * L::kState + (lane & 3) * 2;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int n = 0; n < kN; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          auto* at = base + (m * 16 + half * 8) * L::kState + n * 8;
          if constexpr (kLoad) {
            const float2 pair = *reinterpret_cast<const float2*>(at);
            v[m][n][2 * half] = pair.x, v[m][n][2 * half + 1] = pair.y;
          } else {
            *reinterpret_cast<float2*>(at) = make_float2(v[m][n][2 * half], v[m][n][2 * half + 1]);
          }
        }
  }

  // v += (x weight)^T B over the 16 tokens whose x fragments (of this warp's columns) are given.
  __device__ __forceinline__ void add_outer(const uint32_t (&x)[kM][4], float2 weight0, float2 weight8, uint32_t B_tile,
                                            int row_tile) {
    const int lane = threadIdx.x & 31;
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float2 w = (r & 1) ? weight8 : weight0;
        const float2 f = Traits<T>::unpack(x[m][r]);
        // The fragment of x as a B operand and, transposed, as an A operand differ only in the order of registers.
        a[m][(r & 1) * 2 + (r >> 1)] = Traits<T>::pack(f.x * w.x, f.y * w.y);
      }
    }
    const int row = row_tile * 16 + (lane & 15);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, B_tile + Tile<L::kState>::offset(row, n + (lane >> 4)));
#pragma unroll
      for (int m = 0; m < kM; m++) {
        Traits<T>::mma(v[m][n], a[m], b[0], b[1]);
        Traits<T>::mma(v[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ static void load_input(uint32_t (&x)[kM][4], uint32_t x_tile, int col0, int row_tile) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < kM; m++)
      ldmatrix_x4_trans(x[m], x_tile + Tile<L::kHeadDim>::offset(row_tile * 16 + (lane & 15), col0 / 8 + 2 * m + (lane >> 4)));
  }
};

}  // namespace ssd
}  // namespace mamba
