// selective_scan, tactic "matrix": the tensor cores make dt u B and C h, the rest of a warp's work is exponentials.
//
// A block owns K groups of 16 channels for a whole row. A warp takes 16 tokens (a tile) of a group, and its 16 states in two
// halves. Rows of a product are the channels, columns the states, so that a lane has two states of two channels. First come the
// decays and, by products, dt u B of all tokens: dt u as the sum of what tf32 holds of it and of what that leaves, twice, and
// half of B, which is exact. Then the warp waits for the state at the end of the tile before, which another warp has, runs the
// recurrence, hands the state on, and multiplies all states by C: C of a token stands in the column of that token, all others
// are zero, so that the sum over eight tokens has y of each in its own place. The W warps of a group take its tiles in turn.
//
// F more warps feed: they make dt and dt u and bring B and C, N slots of 32 tokens ahead, and finish y.
#pragma once

#include "selective_scan_matrix_feed.cuh"

namespace mamba::scan {

// Not moved behind the wait, as ex2 would be.
__device__ __forceinline__ float ex2_here(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a lane needs for its states of one group; pointers are its own, those into a slot for the first tile. The second half of
// the states lies kCarry further and has the next barrier.
struct Strand {
  static constexpr int kCarry = 32;
  const float *steps, *inputs, *B, *C;
  float* y;
  float A[2][4];
  float4 *carry_in, *carry_out;
  uint64_t *in_ready, *out_ready;
};

// One tile, `at` floats into the slots.
template <typename T> __device__ __forceinline__ void matrix_tile(const Strand& s, int at, int parity) {
  using M = Matrix;
  constexpr int kTokens = M::kTokens;
  constexpr bool kExact = !std::is_same<T, __nv_bfloat16>::value;  // y from all bits of h
  const int own = threadIdx.x % 32 / 4;                            // the token of eight whose column this lane has
  float sum[2][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float a[kTokens][4], b[kTokens][4];
#pragma unroll
    for (int t = 0; t < kTokens; t += 2) {
      const Vec<float, 4> dt = load_vec<float, 4>(s.steps + at + 2 * t);
#pragma unroll
      for (int i = 0; i < 8; i++) a[t + i / 4][i % 4] = ex2_here(dt.v[i / 4 * 2 + i % 4 / 2] * s.A[half][i % 4]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; t += 4) {
      const Vec<float, 4> v = load_vec<float, 4>(s.B + at + half * 8 * M::kRowB + t / 8 * M::kOctetB + t % 8);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const Vec<float, 4> x = load_vec<float, 4>(s.inputs + at + 2 * (t + i));
        product_of_four(b[t + i], x.v[0], x.v[1], v.v[i]), product_of_four(b[t + i + 1], x.v[2], x.v[3], v.v[i + 1]);
      }
    }
    // From the wait to the arrival nothing but the recurrence: every tile of the row waits for it.
    mbarrier_wait(s.in_ready + half, parity);
    Vec<float, 4> h = load_vec<float, 4>(reinterpret_cast<const float*>(s.carry_in + half * Strand::kCarry));
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[t][i] = h.v[i] = fmaf(a[t][i], h.v[i], b[t][i]);
    }
    store_vec<float, 4>(reinterpret_cast<float*>(s.carry_out + half * Strand::kCarry), h);
    mbarrier_arrive(s.out_ready + half);
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      const Vec<float, 2> c = load_vec<float, 2>(s.C + at + half * 64 + t / 8 * 128);
      const float c0 = own == t % 8 ? c.v[0] : 0.0f, c1 = own == t % 8 ? c.v[1] : 0.0f;
      product(sum[t / 8], a[t][0], a[t][2], a[t][1], a[t][3], c0, c1);
      if (kExact) product(sum[t / 8], lower(a[t][0]), lower(a[t][2]), lower(a[t][1]), lower(a[t][3]), c0, c1);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) s.y[at + (i / 4 * 8 + i % 2) * M::kRowY + i % 4 / 2 * M::kChunkY] = sum[i / 4][i % 4];
}

template <typename T>
__global__ void __launch_bounds__(32 * kMatrixWarps, 1)
    matrix_kernel(const __grid_constant__ Args<T> p, int K, int W, int N) {
  using M = Matrix;
  const int scanners = K * W, feeders = blockDim.x / 32 - scanners;
  const int b = blockIdx.y, width = K * M::kWidth;
  const int blocks_per_group = ceil_div(p.group_dim, width);
  const int group = blockIdx.x / blocks_per_group;
  const int c0 = group * p.group_dim + (blockIdx.x % blocks_per_group) * width;
  const int channels = min(width, (group + 1) * p.group_dim - c0), groups = channels / M::kWidth, chunks = channels / M::kChunk;

  extern __shared__ __align__(16) char shared[];
  float* slots = reinterpret_cast<float*>(shared);
  const int tile_floats = M::tile_floats(K), group_floats = M::group_floats(K);
  float4* carries = reinterpret_cast<float4*>(slots + 2 * N * tile_floats);            // [K][W][2][32]
  float *bias = reinterpret_cast<float*>(carries + scanners * 64), *D = bias + width;  // of the block's channels
  uint64_t* ready = reinterpret_cast<uint64_t*>(D + width);                            // [K][W][2]: handed on
  uint64_t *filled = ready + 2 * scanners, *done = filled + 8;                         // [N] each
  for (int i = threadIdx.x; i < 2 * scanners; i += blockDim.x) mbarrier_init(&ready[i], 32);
  for (int i = threadIdx.x; i < channels; i += blockDim.x) {
    bias[i] = p.bias ? p.bias[c0 + i] : 0.0f, D[i] = p.D ? p.D[c0 + i] / kUntruncate<T> : 0.0f;
  }
  if (threadIdx.x < N) {
    mbarrier_init(&filled[threadIdx.x], 32 * (chunks + 1));
    mbarrier_init(&done[threadIdx.x], 32 * groups * M::kSpan / M::kTokens);
  }
  __syncthreads();
  const int n = row_length(p, b), spans = ceil_div(n, M::kSpan), tiles = spans * (M::kSpan / M::kTokens);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < scanners) {
    const int k = warp % K, w = warp / K, before = w == 0 ? W - 1 : w - 1;
    if (k < groups) {
      const int g = lane / 4, q = lane % 4, c = c0 + k * M::kWidth + g;
      Strand s;
      float* own = slots + M::kB + M::kC + k * group_floats;
      s.steps = own + 3 * g * M::kRow, s.inputs = s.steps + (1 + q % 2) * M::kRow;
      s.B = slots + g * M::kRowB, s.C = slots + M::kB + g * 8 + 2 * q, s.y = own + M::kRows + 2 * q * M::kRowY + g;
      s.carry_in = carries + (k * W + before) * 64 + lane, s.carry_out = carries + (k * W + w) * 64 + lane;
      s.in_ready = ready + 2 * (k * W + before), s.out_ready = ready + 2 * (k * W + w);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t low = int64_t(c) * kState + half * 8 + 2 * q, high = low + 8 * kState;  // this channel, eight further
        const float2 A0 = *reinterpret_cast<const float2*>(p.A + low), A1 = *reinterpret_cast<const float2*>(p.A + high);
        s.A[half][0] = A0.x * kLog2e, s.A[half][1] = A0.y * kLog2e, s.A[half][2] = A1.x * kLog2e, s.A[half][3] = A1.y * kLog2e;
        if (w == W - 1) {  // the last warp hands the state before the first token on to the first
          const float* start = p.h0 ? p.h0 + int64_t(b) * p.dim * kState : nullptr;
          const float2 h0 = start ? *reinterpret_cast<const float2*>(start + low) : make_float2(0.0f, 0.0f);
          const float2 h1 = start ? *reinterpret_cast<const float2*>(start + high) : make_float2(0.0f, 0.0f);
          s.carry_out[half * Strand::kCarry] = make_float4(h0.x, h0.y, h1.x, h1.y);
          mbarrier_arrive(s.out_ready + half);
        }
      }
      int r = w, lap = 0, parity = 0;  // the tile's place among those of all slots
      for (int tile = w; tile < tiles; tile += W, parity ^= 1) {
        mbarrier_wait(&filled[r / 2], lap);
        matrix_tile<T>(s, r * tile_floats, parity);
        mbarrier_arrive(&done[r / 2]);
        r += W;
        if (r >= 2 * N) r -= 2 * N, lap ^= 1;
      }
    }
  } else {
    using F = Feeder<T>;
    const F feeder(p, b, group, c0, chunks, n, bias, D);
    auto next = [&](typename F::Item item) {
      item.part += feeders;
      while (item.part > chunks) {
        item.part -= chunks + 1, item.span++, item.slot++;
        if (item.slot == N) item.slot = 0, item.lap++;
      }
      return item;
    };
    typename F::Item item = next({0, warp - scanners - feeders, 0, 0});
    typename F::Raw raw{};
    const int end = spans == 0 ? 0 : spans + N;  // the last slots are only finished
    if (item.span < end) feeder.fetch(raw, item);
    while (item.span < end) {
      const typename F::Item after = next(item);
      typename F::Raw coming = raw;
      feeder.fetch(coming, after);
      float* slot = slots + 2 * item.slot * tile_floats;
      if (item.lap > 0) mbarrier_wait(&done[item.slot], (item.lap + 1) & 1);
      if (item.part == chunks) {
        if (item.span < spans) feeder.fill_states(slot + lane / M::kTokens * tile_floats, raw), mbarrier_arrive(&filled[item.slot]);
      } else {
        const auto own = feeder.place(item);
        float* at = slot + own.t / M::kTokens * tile_floats + M::kB + M::kC + own.chunk / 2 * group_floats;
        if (item.lap > 0) feeder.finish(at, item.span - N, own);
        if (item.span < spans) feeder.fill(at, raw, item.span, own), mbarrier_arrive(&filled[item.slot]);
      }
      item = after, raw = coming;
    }
  }
  __syncthreads();
  if (p.hT) {
    const int last = (tiles + W - 1) % W;  // the warp of the last tile; the one that holds the start, if there is none
    for (int i = threadIdx.x; i < channels * (kState / 2); i += blockDim.x) {
      const int c = i / (kState / 2), s = i % (kState / 2);  // two states
      const int k = c / M::kWidth, from = c % 8 * 4 + s % 4;
      const float4* carry = carries + ((k * W + last) * 2 + s / 4) * 32 + from;
      reinterpret_cast<float2*>(p.hT)[(int64_t(b) * p.dim + c0 + c) * (kState / 2) + s] = reinterpret_cast<const float2*>(carry)[c % M::kWidth / 8];
    }
  }
  zero_padding(p, b, n, c0, c0 + channels);
}

}  // namespace mamba::scan
