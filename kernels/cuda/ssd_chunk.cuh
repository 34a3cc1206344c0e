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
  // Of a head in x, y, z, D by channel and the states: its columns; 1 if two heads of the kernel, its first and its last 64 columns,
  // are one of the caller's. Both make what lies in both, in the same way.
  int32_t width, halves;
  float dt_min, dt_max;
  int32_t blocks_x;  // blocks that share a row of the batch
  // The sequence cut into `splits` pieces of whole chunks, equal to within one chunk.
  int32_t splits;
  float* split_state;  // [batch, nheads, splits, headdim, d_state]: ends of the pieces, then their beginnings
  float* split_decay;  // [batch, nheads, splits]: log2 of a piece's decay
  // Streaming (splits == 0): each block takes an equal run of chunks, across the ends of rows.
  float* handoff;                // a block's state for the block after it
  unsigned long long* handed;    // holds `ticket` once that state is there; 0 after it was taken
  unsigned long long ticket;

  __host__ __device__ bool overlap() const { return halves && width < 128; }
  // The head whose dt, A, dt_bias and D by head a head of the kernel has, and where its columns and its state begin.
  __device__ __forceinline__ int step_head(int head) const { return head >> halves; }
  __device__ __forceinline__ int within(int head) const { return (head & halves) * (width - 64); }  // of the caller's head
  __device__ __forceinline__ int column(int head) const { return step_head(head) * width + within(head); }
  __device__ __forceinline__ int64_t state_at(int batch, int head) const {
    return (static_cast<int64_t>(batch) * (nheads >> halves) * width + column(head)) * d_state;
  }
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
  static constexpr int kRowTiles = kChunk / 16;                        // 16-token tiles of a chunk
  static constexpr int kMaskBlocks = kRowTiles * (kRowTiles + 1) / 2;  // causal 16 x 16 blocks
  static constexpr int kStateTile = kChunk * kState * 2;               // bytes of a chunk of B or C
  static constexpr int kInputTile = kChunk * kHeadDim * 2;             // bytes of a chunk of x, one head
  static constexpr int kScores = (kMaskBlocks + kRowTiles) * 512;      // decayed C B^T of one head, see Scores
  static constexpr int kDecays = 4 * kHeads * kChunk * 4;              // bytes of the Decays arrays
  static constexpr int kHeadConstants = 2 * kHeads * 4;
  // Three chunks of B and C, two of x and of the scores, three of the decays.
  static constexpr int kScanShared =
      3 * (2 * kStateTile + kDecays) + 2 * kHeads * (kInputTile + kScores) + kHeadConstants;
  static constexpr int kStateShared = 3 * (kStateTile + kHeads * kInputTile + kDecays) + kHeadConstants;
  static constexpr int kMinBlocks = kThreads <= 128 ? 2 : 1;
  static_assert(kHeadDim % kWarpCols == 0 && kWarpCols % 16 == 0 && kState % 16 == 0 && kChunk % 32 == 0);
};

// A run of chunks of one row of the batch and one block of heads.
struct Item {
  int batch, head0, heads, group;
  int begin, end, len;  // tokens [begin, end) of a row of valid length len
  __device__ __forceinline__ int limit() const { return min(end, len); }
};

template <typename L>
__device__ __forceinline__ Item item_at(const ScanArgs& p, int batch, int block, int first_chunk, int last_chunk) {
  Item at;
  const int heads_per_group = p.nheads / p.ngroups;
  const int blocks_per_group = (heads_per_group + L::kHeads - 1) / L::kHeads;
  at.group = block / blocks_per_group;
  const int first = (block % blocks_per_group) * L::kHeads;
  at.head0 = at.group * heads_per_group + first;
  at.heads = min(L::kHeads, heads_per_group - first);
  at.batch = batch;
  at.begin = first_chunk * L::kChunk;
  at.end = min(p.seqlen, last_chunk * L::kChunk);
  at.len = p.seq_lens ? max(0, min(p.seqlen, p.seq_lens[batch])) : p.seqlen;
  return at;
}

// The first chunk of piece `split`.
template <typename L>
__device__ __forceinline__ int piece_start(const ScanArgs& p, int split) {
  const int chunks = (p.seqlen + L::kChunk - 1) / L::kChunk;
  return static_cast<int>(static_cast<int64_t>(chunks) * split / p.splits);
}

// Per-token factors of one chunk, [kHeads][kChunk] each.
template <typename L>
struct Decays {
  float* base;
  static constexpr int kArray = L::kHeads * L::kChunk;
  __device__ float* sum(int head) const { return base + head * L::kChunk; }  // log2 of the decay up to t
  __device__ float* source(int head) const { return base + kArray + head * L::kChunk; }  // the same less log2 dt
  __device__ float* to_end(int head) const { return base + 2 * kArray + head * L::kChunk; }  // dt * decay to the end
  __device__ float* from_start(int head) const { return base + 3 * kArray + head * L::kChunk; }
};

__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A and the bias of dt of the block's heads, fetched once an item.
template <typename L>
struct HeadConstants {
  float* base;
  __device__ float& a(int head) const { return base[head]; }
  __device__ float& bias(int head) const { return base[L::kHeads + head]; }
  __device__ __forceinline__ void load(const ScanArgs& p, const Item& at) const {
    if (threadIdx.x < L::kHeads) {
      const bool active = threadIdx.x < at.heads;
      a(threadIdx.x) = active ? p.A[p.step_head(at.head0 + threadIdx.x)] * kLog2e : 0.f;
      bias(threadIdx.x) = active && p.dt_bias ? p.dt_bias[p.step_head(at.head0 + threadIdx.x)] : 0.f;
    }
  }
};

// The warps that turn dt into decays: each takes one head (and more if there are more heads than warps), a lane
// kChunk / 32 neighbouring tokens. `fetch` well before `store`, which needs the values.
template <typename L>
struct DecayWarp {
  using T = typename L::T;
  static constexpr int kPerLane = L::kChunk / 32;
  static constexpr int kPerWarp = (L::kHeads + L::kWarps - 1) / L::kWarps;
  T raw[kPerWarp][kPerLane];
  float total[kPerWarp];

  __device__ __forceinline__ static int head_of(int i) { return (L::kWarps - 1 - (threadIdx.x >> 5)) + i * L::kWarps; }

  __device__ __forceinline__ void fetch(const ScanArgs& p, const Item& at, int token0) {
#pragma unroll
    for (int i = 0; i < kPerWarp; i++) {
      const int head = head_of(i);
      if (head >= at.heads) continue;
      const int t0 = token0 + (threadIdx.x & 31) * kPerLane;
      const T* dt = static_cast<const T*>(p.dt) + at.batch * p.dt_batch + p.step_head(at.head0 + head) + t0 * p.dt_token;
#pragma unroll
      for (int e = 0; e < kPerLane; e++)
        if (t0 + e < at.limit()) raw[i][e] = dt[e * p.dt_token];
    }
  }

  __device__ __forceinline__ void store(const ScanArgs& p, const Item& at, int token0, const HeadConstants<L>& constants,
                                        const Decays<L>& out) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kPerWarp; i++) {
      const int head = head_of(i);
      if (head >= L::kHeads) continue;
      const float a = constants.a(head), bias = constants.bias(head);
      float dt[kPerLane], sum[kPerLane];
#pragma unroll
      for (int e = 0; e < kPerLane; e++) {
        float v = 0.f;
        if (head < at.heads && token0 + lane * kPerLane + e < at.limit()) {
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
        out.source(head)[t] = s - lg2(dt[e]);
        out.to_end(head)[t] = dt[e] * ex2(total[i] - s);
        out.from_start(head)[t] = ex2(s);
      }
    }
  }
};

// kChunk rows of kPieces 16-byte pieces into tiles of kCols columns that lie side by side in a row. Rows from
// `rows` and pieces from `pieces` on become zeros, so that padding, poisoned or not, never reaches an mma.
template <typename L, int kPieces, int kCols>
__device__ __forceinline__ void load_tile(uint32_t dst, const typename L::T* src, int64_t token_stride, int rows,
                                          int pieces) {
  constexpr int kTilePieces = kCols / 8, kTileBytes = L::kChunk * kCols * 2, kStep = L::kThreads / kPieces;
  const auto address = [&](int row, int col) {
    return dst + (col / kTilePieces) * kTileBytes + Tile<kCols>::offset(row, col % kTilePieces);
  };
  if constexpr (L::kThreads % kPieces == 0 && kStep % 8 == 0 && L::kChunk % kStep == 0) {
    // A thread stays in its column of pieces, and its rows share a swizzle: one address, constant steps.
    const int row = threadIdx.x / kPieces, col = threadIdx.x % kPieces;
    const uint32_t to = address(row, col);
    const typename L::T* from = src + row * token_stride + col * 8;
    if (rows >= L::kChunk && pieces == kPieces) {
#pragma unroll
      for (int i = 0; i < L::kChunk / kStep; i++) {
        copy_async_16(to + i * kStep * Tile<kCols>::kRowBytes, from);
        from += kStep * token_stride;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < L::kChunk / kStep; i++) {
        const bool valid = row + i * kStep < rows && col < pieces;
        copy_async_16(to + i * kStep * Tile<kCols>::kRowBytes, valid ? from : src, valid);
        from += kStep * token_stride;
      }
    }
  } else {
#pragma unroll 2
    for (int idx = threadIdx.x; idx < L::kChunk * kPieces; idx += L::kThreads) {
      const int row = idx / kPieces, col = idx % kPieces;
      const bool valid = row < rows && col < pieces;
      copy_async_16(address(row, col), valid ? src + row * token_stride + col * 8 : src, valid);
    }
  }
}

// The state of one warp: v[m][n] is the accumulator of headdim rows 16m.. and d_state columns 8n...
template <typename L>
struct WarpState {
  using T = typename L::T;
  static constexpr int kM = L::kWarpCols / 16, kN = L::kState / 8;
  float v[kM][kN][4];

  __device__ __forceinline__ void scale(float by) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int n = 0; n < kN; n++) v[m][n][0] *= by, v[m][n][1] *= by, v[m][n][2] *= by, v[m][n][3] *= by;
  }

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

  // To and from scratch that only the same warp of another block reads: any order will do, so a dense one.
  __device__ __forceinline__ void hand_over(float* block_scratch) const {
    float4* at = reinterpret_cast<float4*>(block_scratch) + (threadIdx.x >> 5) * kM * kN * 32 + (threadIdx.x & 31);
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int n = 0; n < kN; n++) at[(m * kN + n) * 32] = make_float4(v[m][n][0], v[m][n][1], v[m][n][2], v[m][n][3]);
  }
  __device__ __forceinline__ void take_over(const float* block_scratch) {
    const float4* at =
        reinterpret_cast<const float4*>(block_scratch) + (threadIdx.x >> 5) * kM * kN * 32 + (threadIdx.x & 31);
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const float4 f = __ldcg(at + (m * kN + n) * 32);
        v[m][n][0] = f.x, v[m][n][1] = f.y, v[m][n][2] = f.z, v[m][n][3] = f.w;
      }
  }

  // v += (x weight)^T B over 16 tokens: the fragments of x of this warp's columns, the weights of tokens 2 (lane % 4)
  // and the next, and of those 8 later; B_rows is the lane's ldmatrix address of these tokens' rows of B.
  __device__ __forceinline__ void add_outer(const uint32_t (&x)[kM][4], float2 weight0, float2 weight8, uint32_t B_rows) {
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
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Tile<L::kState>::along(B_rows, n));
#pragma unroll
      for (int m = 0; m < kM; m++) {
        Traits<T>::mma(v[m][n], a[m], b[0], b[1]);
        Traits<T>::mma(v[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  // x_rows: the lane's ldmatrix address of 16 tokens at this warp's first column.
  __device__ __forceinline__ static void load_input(uint32_t (&x)[kM][4], uint32_t x_rows) {
#pragma unroll
    for (int m = 0; m < kM; m++) ldmatrix_x4_trans(x[m], Tile<L::kHeadDim>::along(x_rows, 2 * m));
  }
};

}  // namespace ssd
}  // namespace mamba
