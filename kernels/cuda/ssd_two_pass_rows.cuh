// Second pass: what a warp of consumers does with its 16 tokens of a head, besides the products of a warpgroup.
#pragma once

#include "ssd_two_pass_stages.cuh"

namespace mamba {
namespace ssd {

template <typename L>
struct OutputRows {
  using T = typename L::T;
  using E = typename L::E;
  using Rows = Tile<64>;

  // A fragments of the block on the diagonal: 16 x 16, of which the quarter above the diagonal is zero.
  __device__ __forceinline__ static void decay_diagonal(const float (&products)[2][4], const float* sum, const float* source,
                                                        float D, uint32_t (&high)[4], uint32_t (&low)[4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = (lane & 3) * 2;
    const float sum_lo = sum[g], sum_hi = sum[g + 8];
    const float2 from0 = *reinterpret_cast<const float2*>(source + c), from8 = *reinterpret_cast<const float2*>(source + c + 8);
    const float D0 = c == g ? D : 0.f, D1 = c + 1 == g ? D : 0.f;
    const auto masked = [&](float v, float decay, int col, float skip) { return col > g ? 0.f : fmaf(v, decay, skip); };
    split<E>(masked(products[0][0], ex2(sum_lo - from0.x), c, D0), masked(products[0][1], ex2(sum_lo - from0.y), c + 1, D1), high[0],
             low[0]);
    split<E>(products[0][2] * ex2(sum_hi - from0.x), products[0][3] * ex2(sum_hi - from0.y), high[1], low[1]);
    high[2] = low[2] = 0;
    split<E>(masked(products[1][2], ex2(sum_hi - from8.x), c, D0), masked(products[1][3], ex2(sum_hi - from8.y), c + 1, D1), high[3],
             low[3]);
  }

  // y += the diagonal block times x: one block a warp, so not worth warpgroup products. Returns what depends on all it read of x.
  __device__ __forceinline__ static uint32_t add_diagonal(float (&y)[L::kAccumulators][4], const uint32_t (&high)[4],
                                                          const uint32_t (&low)[4], uint32_t x_rows) {
    uint32_t used = 0;
#pragma unroll
    for (int n = 0; n < L::kAccumulators; n += 2) {
      const uint32_t at = Rows::along(x_rows, n % 8) + n / 8 * kTileBytes;
      uint32_t x[4];
      ldmatrix_x4_trans(x, at);
      used |= x[0];
      Traits<E>::mma(y[n], low, x[0], x[1]), Traits<E>::mma(y[n + 1], low, x[2], x[3]);
      Traits<E>::mma(y[n], high, x[0], x[1]), Traits<E>::mma(y[n + 1], high, x[2], x[3]);
      if constexpr (L::kParts == 2) {
        ldmatrix_x4_trans(x, at + L::kHeadTiles * kTileBytes);
        used |= x[0];
        Traits<E>::mma(y[n], high, x[0], x[1]), Traits<E>::mma(y[n + 1], high, x[2], x[3]);
      }
    }
    return used;
  }

  // D of every channel, and the gate: both from global memory, in the accumulators' layout. Most calls want neither, so this is a
  // small loop that turns y round by 16 columns, and not one long piece of code in the middle of another.
  __device__ __forceinline__ static void finish(const ScanArgs& p, float (&y)[L::kAccumulators][4], const T* x, const T* z,
                                                const float* D, int rows) {
    const int lane = threadIdx.x & 31, row = lane >> 2;
#pragma unroll 1
    for (int col = (lane & 3) * 2; col < L::kHeadDim; col += 16) {
      float2 skip[2] = {}, in[4] = {}, gate[4] = {};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int t = row + e % 2 * 8;
        int at = col + e / 2 * 8;
        if (L::kPadded) at = min(at, L::columns(p) - 2);  // of padding nothing is kept
        if (D && e % 2 == 0) skip[e / 2] = make_float2(D[at], D[at + 1]);
        if (D && t < rows) in[e] = to_float2(*reinterpret_cast<const pair_t<T>*>(x + t * p.x_token + at));
        if (z && t < rows) gate[e] = to_float2(*reinterpret_cast<const pair_t<T>*>(z + t * p.z_token + at));
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float &a = y[e / 2][e % 2 * 2], &b = y[e / 2][e % 2 * 2 + 1];
        a = fmaf(skip[e / 2].x, in[e].x, a), b = fmaf(skip[e / 2].y, in[e].y, b);
        if (z) a *= silu(gate[e].x), b *= silu(gate[e].y);
      }
      float first[2][4];
#pragma unroll
      for (int n = 0; n < L::kAccumulators; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          if (n < 2) first[n][r] = y[n][r];
          y[n][r] = n + 2 < L::kAccumulators ? y[n + 2][r] : first[n + 2 - L::kAccumulators][r];
        }
    }
  }

  // This warp's 16 rows of y, packed, by the copy engine from the warp's own place in shared memory, which a lane waits for first.
  // Rows past the end of the sequence are not written.
  __device__ __forceinline__ static void store(const uint32_t (&y)[L::kAccumulators][2], const CUtensorMap& map, typename L::Place at,
                                               int token, int batch, uint32_t place) {
    const bool leader = (threadIdx.x & 31) == 0;
#pragma unroll
    for (int tile = 0; tile < L::kHeadTiles; tile++) {
      if (leader) bulk_wait_read();
      __syncwarp();
#pragma unroll
      for (int n = tile * 8; n < tile * 8 + 8 && n < L::kAccumulators; n += 2)
        store_matrix_x4(Rows::along(place + Rows::lane_16x16(), n % 8), y[n][0], y[n][1], y[n + 1][0], y[n + 1][1]);
      fence_async_proxy();
      __syncwarp();
      if (leader) {
        tensor_store<L::kPadded>(map, place, at.column + tile * 64, at.part, token, batch);
        bulk_commit();
      }
    }
  }

  __device__ __forceinline__ static void store_float(const float (&y)[L::kAccumulators][4], float* out, int64_t y_token, int rows,
                                                     int cols) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = half * 8 + (lane >> 2);
      if (t >= rows) continue;
#pragma unroll
      for (int n = 0; n < L::kAccumulators; n++)
        if (n * 8 < cols)
          *reinterpret_cast<float2*>(out + t * y_token + n * 8 + (lane & 3) * 2) = make_float2(y[n][half * 2], y[n][half * 2 + 1]);
    }
  }
};

// The block's chunk and heads. The first chunks of all rows come first, or the last.
__device__ __forceinline__ OutputsItem outputs_item(const TwoPassArgs& args) {
  const ScanArgs& p = args.scan;
  OutputsItem at;
  const int heads_per_group = p.nheads / p.ngroups, blocks = args.group_blocks;
  const int block = blockIdx.x % (blocks * p.ngroups), row = blockIdx.x / (blocks * p.ngroups) % args.rows;
  const int first = block % blocks;
  at.group = block / blocks, at.head0 = at.group * heads_per_group + first, at.step = blocks;
  at.heads = (heads_per_group - first + blocks - 1) / blocks;
  at.chunk = blockIdx.x / (blocks * p.ngroups * args.rows);
  if (args.late_first) at.chunk = args.chunks - 1 - at.chunk;
  at.batch = args.batch0 + row, at.token0 = (args.chunk0 + at.chunk) * kTileRows;
  at.end = min(p.seqlen, at.token0 + kTileRows), at.limit = valid_tokens(p, at.batch);
  at.row = row * p.nheads + at.head0;
  return at;
}

// Zeros in a chunk that is nothing but padding.
template <typename L>
__device__ __forceinline__ void clear_outputs(const ScanArgs& p, const OutputsItem& at) {
  using T = typename L::T;
  T* y = static_cast<T*>(p.y) + at.batch * p.y_batch;
  constexpr int kWide = 16 / sizeof(T);
  const int of_head = L::columns(p) / kWide, pieces = at.heads * of_head;
  for (int idx = threadIdx.x; idx < (at.end - at.token0) * pieces; idx += L::kThreads) {
    const int col = p.column(at.head0 + idx % pieces / of_head * at.step) + idx % of_head * kWide;
    *reinterpret_cast<uint4*>(y + (at.token0 + idx / pieces) * p.y_token + col) = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace ssd
}  // namespace mamba
