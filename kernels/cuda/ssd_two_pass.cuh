// The SSD scan for Hopper (sm_90a) in two passes over chunks of 128 tokens, every one a kernel of its own:
//
//   states    walks the chunks of a head and writes a 16-bit copy of the state before each one
//             (or, of a row cut into pieces, what the piece adds to the state at its start)
//   outputs   makes y of all chunks side by side: scores x + D x + exp(decay from the chunk's start) * (C h)
//
// The copies stay in the L2 cache: a long sequence is taken in parts, a launch of each pass for every part. What both
// passes share is here: arguments, per-token decays of a chunk in blocks of 64 tokens, tile loads.
//
// float32 runs on bfloat16 tensor cores as well: every operand as a sum of two values, three products.
#pragma once

#include "early_launch.cuh"
#include "ssd_two_pass_plan.cuh"
#include "ssd_wgmma.cuh"

namespace mamba {
namespace ssd {

constexpr int kTileRows = kTwoPassChunk;
constexpr int kTileBytes = kTileRows * 128;  // 128 tokens x 64 columns of 16 bits

// What the tiles hold for inputs of type T, and in how many parts.
template <typename T>
struct Operand {
  using Element = T;
  static constexpr int kParts = 1;
};
template <>
struct Operand<float> {
  using Element = __nv_bfloat16;
  static constexpr int kParts = 2;
};

// kPadded: heads may have fewer columns than kHeadDim, states fewer rows than kState (multiples of 8); the rest of a tile is zeros.
// An image of a state: for each part, for each 64 columns of headdim, rows of d_state, swizzled as Tile<64>; then rows of the kRest
// columns left, as they are.
template <typename T_, int kHeadDim_, int kState_, bool kPadded_>
struct TwoPass {
  using T = T_;
  using E = typename Operand<T>::Element;
  static constexpr int kParts = Operand<T>::kParts, kHeadDim = kHeadDim_, kState = kState_;
  static constexpr bool kPadded = kPadded_;
  static constexpr int kHeadTiles = (kHeadDim + 63) / 64, kStateTiles = kState / 64;
  static constexpr int kWideTiles = kHeadDim / 64, kRest = kHeadDim % 64;  // the last tile has kRest columns of 64
  static constexpr int kStateTile = kState * 128;                          // bytes of 64 columns of headdim
  static constexpr int kWideImage = kParts * kWideTiles * kStateTile, kImage = kWideImage + kState * kRest * 2;  // bytes
  static_assert(kRest == 0 || (kParts == 1 && kRest == 16), "what is copied by threads");
  static constexpr int kAccumulators = kHeadDim / 8;  // of four registers

  // Where a head or a group begins for the copy engine, see TwoPassArgs.
  struct Place {
    int column, part;
  };
  __device__ __forceinline__ static Place head(const ScanArgs& p, int head) {
    return kPadded ? Place{p.within(head), p.step_head(head)} : Place{p.column(head), 0};
  }
  __device__ __forceinline__ static Place group(int group) { return kPadded ? Place{0, group} : Place{group * kState, 0}; }

  __device__ __forceinline__ static int columns(const ScanArgs& p) { return kPadded ? p.headdim : kHeadDim; }
  __device__ __forceinline__ static int states(const ScanArgs& p) { return kPadded ? p.d_state : kState; }
};

// Valid tokens of a row of the batch.
__device__ __forceinline__ int valid_tokens(const ScanArgs& p, int batch) {
  return p.seq_lens ? max(0, min(p.seqlen, p.seq_lens[batch])) : p.seqlen;
}

// Chunks of this launch that have valid tokens of such a row.
__device__ __forceinline__ int valid_chunks(const TwoPassArgs& args, int limit) {
  return max(0, min(args.chunks, ceil_div(limit - args.chunk0 * kTileRows, kTileRows)));
}

// How a row of heads of this launch is cut.
struct RowCut {
  int first, rest;  // chunks
  __device__ __forceinline__ RowCut(const TwoPassArgs& args, int row) : first(args.first), rest(args.rest) {
    if (args.run > 0) first = min(args.run - row * args.chunks % args.run, args.chunks);  // where the block's run ends
  }
  // Pieces behind the first that have chunks before chunk c; the start of one; the first chunk behind it, c at most.
  __device__ __forceinline__ int later(int c) const { return c > first ? ceil_div(c - first, rest) : 0; }
  __device__ __forceinline__ int start(int piece) const { return first + piece * rest; }
  __device__ __forceinline__ int end(int piece, int c) const { return min(start(piece + 1), c); }
};

// The steps and decays of 128 tokens of one head, by one warp: a lane has four tokens, four lanes a block of 16.
template <typename T>
struct ChunkDecay {
  T raw[4];
  float dt[4], sum[4];  // sum: log2 of the decay from the block's start up to and with t
  float total;          // of the block of 16
  float before, half;   // of the blocks before it in its 64 tokens; of all 64

  __device__ __forceinline__ void fetch(const ScanArgs& p, int batch, int head, int token0, int limit) {
    const int t = token0 + (threadIdx.x & 31) * 4;
    const T* at = static_cast<const T*>(p.dt) + batch * p.dt_batch + p.step_head(head) + t * p.dt_token;
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (t + e < limit) raw[e] = at[e * p.dt_token];
  }

  __device__ __forceinline__ void finish(const ScanArgs& p, int head, int token0, int limit) {
    const float a = p.A[p.step_head(head)] * kLog2e, bias = p.dt_bias ? p.dt_bias[p.step_head(head)] : 0.f;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float v = 0.f;
      if (token0 + lane * 4 + e < limit) {
        v = to_float(raw[e]) + bias;
        if (p.dt_softplus) v = softplus<true>(v);
        v = fminf(fmaxf(v, p.dt_min), p.dt_max);
      }
      dt[e] = v;
      sum[e] = fmaxf(v * a, kMinLog2Decay) + (e ? sum[e - 1] : 0.f);
    }
    float scan = sum[3];
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, scan, d, 4);
      if ((lane & 3) >= d) scan += other;
    }
    const float skip = scan - sum[3];
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] += skip;
    total = __shfl_sync(0xffffffffu, scan, 3, 4);
    float blocks = total;
#pragma unroll
    for (int d = 4; d < 16; d *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, blocks, d, 16);
      if ((lane & 15) >= d) blocks += other;
    }
    half = __shfl_sync(0xffffffffu, blocks, 15, 16);
    before = __shfl_up_sync(0xffffffffu, blocks, 4, 16);
    if ((lane & 15) < 4) before = 0.f;
  }
  // dt times the decay from t up to the end of a span `after` (in log2) behind the block.
  __device__ __forceinline__ float4 weights(float after) const {
    return make_float4(dt[0] * ex2(total - sum[0] + after), dt[1] * ex2(total - sum[1] + after),
                       dt[2] * ex2(total - sum[2] + after), dt[3] * ex2(total - sum[3] + after));
  }
};

// Two neighbouring floats as bfloat16 pairs whose sum has 16 bits of mantissa.
template <typename E>
__device__ __forceinline__ void split(float a, float b, uint32_t& high, uint32_t& low) {
  high = Traits<E>::pack(a, b);
  const float2 back = Traits<E>::unpack(high);
  low = Traits<E>::pack(a - back.x, b - back.y);
}

__device__ __forceinline__ void store_shared_16(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ void load_shared_16(uint32_t address, uint32_t (&v)[4]) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address));
}

// 128 rows of 64 float32 columns into a tile at `dst` (the low parts `low_at` bytes behind), by kThreads threads of which
// this is number `thread`. Rows from `rows` on, and columns from `cols` on if any are padding, become zeros: padding, poisoned
// or not, never reaches a product.
template <int kThreads, int kBatch, bool kPadded>
__device__ __forceinline__ void split_tile(uint32_t dst, int low_at, const float* src, int64_t token_stride, int rows, int cols,
                                           int thread) {
  constexpr int kStep = kThreads / 8, kPasses = kTileRows / kStep;
  static_assert(kStep % 8 == 0, "rows of a thread share a swizzle");
  const int row = thread / 8, col = thread % 8;
  if (kPadded && col * 8 >= cols) rows = 0;
  const uint32_t to = dst + Tile<64>::offset(row, col);
  const float* from = src + row * token_stride + col * 8;
#pragma unroll 1
  for (int i0 = 0; i0 < kPasses; i0 += kBatch) {
    float4 v[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; i++, from += kStep * token_stride) {
      v[i][0] = v[i][1] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (row + (i0 + i) * kStep < rows)
        v[i][0] = *reinterpret_cast<const float4*>(from), v[i][1] = *reinterpret_cast<const float4*>(from + 4);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      using E = __nv_bfloat16;
      const uint32_t at = to + (i0 + i) * kStep * 128;
      uint32_t high[4], low[4];
      split<E>(v[i][0].x, v[i][0].y, high[0], low[0]), split<E>(v[i][0].z, v[i][0].w, high[1], low[1]);
      split<E>(v[i][1].x, v[i][1].y, high[2], low[2]), split<E>(v[i][1].z, v[i][1].w, high[3], low[3]);
      store_shared_16(at, high), store_shared_16(at + low_at, low);
    }
  }
}

// A tile of 128 tokens x 64 columns by the copy engine; tokens past the end of the row become zeros, and so do columns past that
// of the part (a head or a group) if any are padding.
template <bool kPadded>
__device__ __forceinline__ void tensor_load(uint32_t dst, const CUtensorMap& map, int col, int part, int token, int batch, uint64_t* bar) {
  if constexpr (kPadded)
    load_box_of_part(dst, map, col, token, part, batch, bar);
  else
    load_box(dst, map, col, token, batch, bar);
}

// A tile out of shared memory, in a bulk group; what lies past the end of the row, or is padding, is not written.
template <bool kPadded>
__device__ __forceinline__ void tensor_store(const CUtensorMap& map, uint32_t src, int col, int part, int token, int batch) {
  if constexpr (kPadded)
    store_box_of_part(map, src, col, token, part, batch);
  else
    store_box(map, src, col, token, batch);
}

// Zeros in rows from `rows` on of `tiles` tiles, by one warp: padding may hold anything.
__device__ __forceinline__ void clear_rows(uint32_t tile, int tiles, int rows) {
  const uint32_t zeros[4] = {0, 0, 0, 0};
  const int pieces = (kTileRows - rows) * 8;
  for (int idx = threadIdx.x & 31; idx < tiles * pieces; idx += 32)
    store_shared_16(tile + idx / pieces * kTileBytes + rows * 128 + idx % pieces * 16, zeros);
}

// Bulk copies of whole images: from global memory, counted by an mbarrier, and to it.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, int bytes, uint64_t* bar) {
  mbarrier_expect(bar, bytes);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(smem_address(bar))
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* dst, uint32_t src, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace ssd
}  // namespace mamba
