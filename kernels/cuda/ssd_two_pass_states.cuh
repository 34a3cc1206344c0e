// First pass: the state before every chunk of 128 tokens.
//
// A block has a row (of a head), a piece of one, or some of them one after the other, and kWgs warpgroups of consumers, each with 64
// rows of d_state: its part of the transposed state, [64 of d_state][headdim], stays in registers as accumulators. Per chunk
// h = decay h + B^T (x weight): another warpgroup weighs x in its place in shared memory, ahead of the consumers, whose chain
// from chunk to chunk is the critical one.
#pragma once

#include <type_traits>

#include "ssd_two_pass_pieces.cuh"

namespace mamba {
namespace ssd {

template <typename T_, int kHeadDim_, int kState_, bool kPadded_, int kWgs_>
struct StatesLayout : TwoPass<T_, kHeadDim_, kState_, kPadded_> {
  using Base = TwoPass<T_, kHeadDim_, kState_, kPadded_>;
  static constexpr int kWgs = kWgs_, kSplit = Base::kStateTiles / kWgs;  // blocks a head
  static constexpr int kProducers = 128, kWeighers = 128, kConsumers = 128 * kWgs;
  static constexpr int kThreads = kProducers + kWeighers + kConsumers;
  // The producers' warps: loads (one thread; all of two warps for float32), then weights.
  static constexpr int kLoaders = Base::kParts == 2 ? 64 : 32, kWeighing = kLoaders / 32;
  static constexpr int kStage = Base::kParts * (kWgs + Base::kHeadTiles) * kTileBytes;  // B, then x; high before low
  static constexpr int kStages = 4 * kStage <= 196608 ? 4 : Base::kHeadTiles > 1 ? 3 : 2;
  static constexpr int kOut = Base::kParts * Base::kWideTiles * 2048;  // bytes of a warp's part of an image's whole tiles
  static constexpr int kOutAt = kStages * kStage, kWeightAt = kOutAt + 4 * kWgs * kOut;
  static constexpr int kDecayAt = kWeightAt + kStages * kTileRows * 4;
  static constexpr int kBarrierAt = kDecayAt + 16;
  static constexpr int kShared = kBarrierAt + (3 * kStages + 1) * 8;
  static_assert(Base::kStateTiles % kWgs == 0 && kShared <= 232448, "whole blocks");
};

template <typename L>
struct StatesShared {
  uint8_t* base;
  __device__ uint32_t B(int s, int wg) const { return smem_address(base) + s * L::kStage + wg * kTileBytes; }
  __device__ uint32_t x(int s) const { return B(s, L::kParts * L::kWgs); }
  __device__ uint32_t out(int warp) const { return smem_address(base) + L::kOutAt + warp * L::kOut; }
  __device__ float* weights(int s) const { return reinterpret_cast<float*>(base + L::kWeightAt) + s * kTileRows; }
  __device__ float& decay(int s) const { return reinterpret_cast<float*>(base + L::kDecayAt)[s]; }
  __device__ uint64_t* full(int s) const { return reinterpret_cast<uint64_t*>(base + L::kBarrierAt) + s; }
  __device__ uint64_t* empty(int s) const { return full(L::kStages + s); }
  __device__ uint64_t* weighted(int s) const { return full(2 * L::kStages + s); }
  __device__ uint64_t* landed() const { return full(3 * L::kStages); }  // of a tile whose padding must be cleared
};

template <typename L, bool kCut>
struct StatesConsumer {
  using T = typename L::T;
  using E = typename L::E;
  using Rows = Tile<64>;
  int wg, warp;  // warp: within the warpgroup
  float h[L::kAccumulators][4];

  // Walks what this thread has of the state: visit(value, its place in the head's [headdim, d_state], or -1 if it is none).
  template <typename Visit>
  __device__ __forceinline__ void each(const ScanArgs& p, int part, Visit visit) {
    const int lane = threadIdx.x & 31, row = (part * L::kWgs + wg) * 64 + warp * 16 + (lane >> 2);
#pragma unroll
    for (int n = 0; n < L::kAccumulators; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int at = (n * 8 + (lane & 3) * 2) * L::states(p) + row + half * 8;
        const bool inside = !L::kPadded || (n * 8 < L::columns(p) && row + half * 8 < L::states(p));
        visit(h[n][2 * half], inside ? at : -1), visit(h[n][2 * half + 1], inside ? at + L::states(p) : -1);
      }
  }

  __device__ __forceinline__ void load(const TwoPassArgs& args, const StatesItem& at) {
    const ScanArgs& p = args.scan;
    const float* from = args.chunk0 > 0 ? args.carry : p.initial_state;
    if (from && at.piece == 0) {
      from += args.chunk0 > 0 ? at.row * L::columns(p) * L::states(p) : p.state_at(at.batch, at.head);
      each(p, at.part, [&](float& v, int index) { v = index < 0 ? 0.f : __ldcg(from + index); });
    } else {
      each(p, at.part, [&](float& v, int) { v = 0.f; });
    }
  }

  // The end of a first piece goes where the final state belongs: the initial state may lie there, which no other block reads.
  __device__ __forceinline__ void store(const TwoPassArgs& args, const StatesItem& at) {
    const ScanArgs& p = args.scan;
    const bool last = (args.chunk0 + args.chunks) * kTileRows >= p.seqlen;
    float* to = last ? p.final_state : args.carry;
    if (!to || (at.piece > 0 && at.chunks == 0)) return;
    const int64_t size = L::columns(p) * L::states(p);
    if (at.piece > 0)
      to = args.ends + (at.row * args.later + at.piece - 1) * size;
    else
      to += last ? p.state_at(at.batch, at.head) : at.row * size;
    each(p, at.part, [&](float& v, int index) {
      if (index >= 0) to[index] = v;
    });
  }

  // The 16-bit copy of this warp's rows, by way of shared memory; `image`: their place in it, rows16: which 16 of d_state they are.
  __device__ __forceinline__ void publish(const StatesShared<L>& shared, uint8_t* image, int rows16) {
    const bool leader = (threadIdx.x & 31) == 0;
    if (leader) bulk_wait_read();
    __syncwarp();
    const uint32_t out = shared.out(wg * 4 + warp), rows = out + Rows::lane_16x16();
#pragma unroll
    for (int n = 0; n < 8 * L::kWideTiles; n += 2) {
      uint32_t high[4], low[4];
      split<E>(h[n][0], h[n][1], high[0], low[0]), split<E>(h[n][2], h[n][3], high[1], low[1]);
      split<E>(h[n + 1][0], h[n + 1][1], high[2], low[2]), split<E>(h[n + 1][2], h[n + 1][3], high[3], low[3]);
      const uint32_t to = Rows::along(rows, n % 8) + n / 8 * 2048;
      store_matrix_x4(to, high[0], high[1], high[2], high[3]);
      if (L::kParts == 2) store_matrix_x4(to + L::kWideTiles * 2048, low[0], low[1], low[2], low[3]);
    }
    fence_async_proxy();
    __syncwarp();
    if (leader) {
#pragma unroll
      for (int i = 0; i < L::kParts * L::kWideTiles; i++) bulk_store(image + i * L::kStateTile, out + i * 2048, 2048);
      bulk_commit();
    }
    if constexpr (L::kRest > 0) {
      const int lane = threadIdx.x & 31;
      constexpr int kRow = L::kRest / 2;  // in pairs of values
      uint32_t* rest = reinterpret_cast<uint32_t*>(image + L::kWideImage - rows16 * 2048) + (rows16 * 16 + lane / 4) * kRow + lane % 4;
#pragma unroll
      for (int n = 0; n < L::kRest / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float(&v)[4] = h[8 * L::kWideTiles + n];
          rest[half * 8 * kRow + n * 4] = Traits<E>::pack(v[2 * half], v[2 * half + 1]);
        }
    }
  }

  // Starts what chunk c adds: B^T (x weight).
  __device__ __forceinline__ void begin(const StatesShared<L>& shared, int c, float (&added)[L::kAccumulators][4]) {
    const int stage = c % L::kStages;
    const uint64_t from_B = descriptor(shared.B(stage, wg)), from_x = descriptor(shared.x(stage), kTileBytes);
    mbarrier_wait(shared.weighted(stage), c / L::kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < (L::kParts == 2 ? 3 : 1); part++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        Wgmma<E>::columns_columns(added, advance(from_B, j * 2048 + (part == 1 ? L::kWgs * kTileBytes : 0)),
                                  advance(from_x, j * 2048 + (part == 2 ? L::kHeadTiles * kTileBytes : 0)), part + j > 0);
    wgmma_commit();
  }

  // Ends chunk c and returns its decay.
  __device__ __forceinline__ float end(const StatesShared<L>& shared, int c, float (&added)[L::kAccumulators][4]) {
    const int stage = c % L::kStages;
    const float decay = shared.decay(stage);
    wgmma_wait<0>();
    pin(added);
#pragma unroll
    for (int n = 0; n < L::kAccumulators; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) h[n][r] = fmaf(decay, h[n][r], added[n][r]);
    mbarrier_arrive_after(shared.empty(stage), __float_as_uint(decay));
    return decay;
  }

  // `n` chunks of the block come before this piece.
  __device__ __forceinline__ void walk(const TwoPassArgs& args, const StatesItem& at, const StatesShared<L>& shared, int n) {
    const int rows16 = (at.part * L::kWgs + wg) * 4 + warp;
    uint8_t* image = static_cast<uint8_t*>(args.states) + (at.row * args.chunks + at.begin) * L::kImage + rows16 * 2048;
    // One thread of a head tells how much of the state at the start of a later piece is left behind each chunk.
    const bool tells = at.piece > 0 && at.part == 0 && wg == 0 && warp == 0 && (threadIdx.x & 31) == 0;
    float* left = args.decays + at.row * (args.chunks + 1) + at.begin;
    float decay = 1.f;
    // The copy goes out while the matrix unit is at the next chunk. That of a later piece's start is the piece's before it.
    float added[L::kAccumulators][4];
    begin(shared, n, added);
    if (at.piece == 0) publish(shared, image, rows16);
#pragma unroll 1
    for (int c = 1; c < at.chunks; c++) {
      decay *= end(shared, n + c - 1, added);
      if (tells) left[c] = decay;
      begin(shared, n + c, added);
      publish(shared, image + static_cast<int64_t>(c) * L::kImage, rows16);
    }
    decay *= end(shared, n + at.chunks - 1, added);
    if (tells) left[at.chunks] = decay;
    if (at.more) publish(shared, image + static_cast<int64_t>(at.chunks) * L::kImage, rows16);
  }

  __device__ __forceinline__ void run(const TwoPassArgs& args, const StatesItem& first, const StatesShared<L>& shared) {
    wait_for_previous();
    each_piece<L, kCut>(args, first, [&](const StatesItem& at, int n) {
      load(args, at);
      if (at.chunks > 0) walk(args, at, shared, n);
      store(args, at);
    });
    if ((threadIdx.x & 31) == 0) bulk_wait<0>();
  }
};

// Weights of bfloat16 tokens are rounded to it, so that a pair takes one instruction; float16 has too few exponents for them.
template <typename L>
constexpr bool kPairedWeights = std::is_same_v<typename L::T, __nv_bfloat16>;

// A tile of x times the weights of its tokens, in place: kPieces times 8 columns of it.
template <typename L, int kPieces>
__device__ __forceinline__ void weigh_tile(uint32_t tile, const float* weights) {
  using E = typename L::E;
  constexpr int kLow = L::kHeadTiles * kTileBytes, kRows = L::kWeighers / kPieces;  // at once; they share a swizzle
  const int thread = threadIdx.x % L::kWeighers, row = thread / kPieces;
  const uint32_t first = tile + Tile<64>::offset(row, thread % kPieces);
  weights += row;
  uint32_t x[L::kParts][kPieces][4];
#pragma unroll
  for (int part = 0; part < L::kParts; part++)
#pragma unroll
    for (int i = 0; i < kPieces; i++) load_shared_16(first + part * kLow + i * kRows * 128, x[part][i]);
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const float w = weights[i * kRows];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      if constexpr (kPairedWeights<L>) {
        x[0][i][r] = Traits<E>::multiply(x[0][i][r], __float_as_uint(w));
        continue;
      }
      float2 f = Traits<E>::unpack(x[0][i][r]);
      if constexpr (L::kParts == 2) {
        const float2 low = Traits<E>::unpack(x[1][i][r]);
        f.x += low.x, f.y += low.y;
        split<E>(f.x * w, f.y * w, x[0][i][r], x[1][i][r]);
      } else {
        x[0][i][r] = Traits<E>::pack(f.x * w, f.y * w);
      }
    }
#pragma unroll
    for (int part = 0; part < L::kParts; part++) store_shared_16(first + part * kLow + i * kRows * 128, x[part][i]);
  }
}

template <typename L, bool kCut>
__device__ __forceinline__ void states_weigh(const TwoPassArgs& args, const StatesItem& item, const StatesShared<L>& shared) {
  each_chunk<L, kCut, 1>(args, item, 0, [&](const StatesItem&, int, int n) {
    const int stage = n % L::kStages;
    mbarrier_wait(shared.full(stage), n / L::kStages & 1);
#pragma unroll
    for (int tile = 0; tile < L::kWideTiles; tile++) weigh_tile<L, 8>(shared.x(stage) + tile * kTileBytes, shared.weights(stage));
    if constexpr (L::kRest > 0) weigh_tile<L, L::kRest / 8>(shared.x(stage) + L::kWideTiles * kTileBytes, shared.weights(stage));
    fence_async_proxy();
    mbarrier_arrive(shared.weighted(stage));
  });
}

// The weights of a chunk's tokens and its decay, by one warp.
template <typename L>
__device__ __forceinline__ void make_weights(const ScanArgs& p, const StatesItem& at, const StatesShared<L>& shared, int stage,
                                             int token0, ChunkDecay<typename L::T>& decay) {
  const int lane = threadIdx.x & 31;
  decay.finish(p, at.head, token0, at.limit);
  const float second = __shfl_sync(0xffffffffu, decay.half, 31), first = __shfl_sync(0xffffffffu, decay.half, 0);
  // Behind the block: the rest of its 64 tokens, and for the first 64 the others.
  const float after = decay.half - (decay.before + decay.total) + (lane < 16 ? second : 0.f);
  float4 w = decay.weights(after);
  if constexpr (kPairedWeights<L>) {
    const auto pair = [](float v) { return __uint_as_float(Traits<typename L::E>::pack(v, v)); };
    w = make_float4(pair(w.x), pair(w.y), pair(w.z), pair(w.w));
  }
  *reinterpret_cast<float4*>(shared.weights(stage) + lane * 4) = w;
  if (lane == 0) shared.decay(stage) = ex2(first + second);
}

template <typename L, bool kCut>
__device__ __forceinline__ void states_produce(const TwoPassArgs& args, const StatesItem& item, const StatesShared<L>& shared) {
  using T = typename L::T;
  const ScanArgs& p = args.scan;
  const int warp = threadIdx.x / 32, heads_per_group = p.nheads / p.ngroups;
  const auto free = [&](int n) { mbarrier_wait(shared.empty(n % L::kStages), (n / L::kStages & 1) ^ 1); };
  if (warp >= L::kWeighing) {
    each_chunk<L, kCut, 4 - L::kWeighing>(args, item, warp - L::kWeighing, [&](const StatesItem& at, int c, int n) {
      const int token0 = at.token0 + c * kTileRows;
      ChunkDecay<T> decay;
      decay.fetch(p, at.batch, at.head, token0, at.limit);
      free(n);
      make_weights<L>(p, at, shared, n % L::kStages, token0, decay);
      mbarrier_arrive(shared.full(n % L::kStages));
    });
  } else if constexpr (L::kParts == 2) {
    each_chunk<L, kCut, 1>(args, item, 0, [&](const StatesItem& at, int c, int n) {
      const int64_t t = at.token0 + c * kTileRows;
      const int rows = at.limit - static_cast<int>(t), stage = n % L::kStages, group = at.head / heads_per_group;
      const T* B = static_cast<const T*>(p.B) + at.batch * p.B_batch + group * L::states(p) + at.part * L::kWgs * 64;
      const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + p.column(at.head);
      free(n);
#pragma unroll
      for (int wg = 0; wg < L::kWgs; wg++)
        split_tile<L::kLoaders, 8, L::kPadded>(shared.B(stage, wg), L::kWgs * kTileBytes, B + t * p.B_token + wg * 64, p.B_token, rows,
                                               L::states(p) - (at.part * L::kWgs + wg) * 64, threadIdx.x);
#pragma unroll
      for (int i = 0; i < L::kHeadTiles; i++)
        split_tile<L::kLoaders, 8, L::kPadded>(shared.x(stage) + i * kTileBytes, L::kHeadTiles * kTileBytes, x + t * p.x_token + i * 64,
                                               p.x_token, rows, L::columns(p), threadIdx.x);
      fence_async_proxy();
      mbarrier_arrive(shared.full(stage));
    });
  } else {
    int cleared = 0;
    each_chunk<L, kCut, 1>(args, item, 0, [&](const StatesItem& at, int c, int n) {
      const int token0 = at.token0 + c * kTileRows, stage = n % L::kStages, rows = at.limit - token0;
      const int group = at.head / heads_per_group;
      const bool clear = rows < kTileRows && at.limit < p.seqlen;
      uint64_t* bar = clear ? shared.landed() : shared.full(stage);
      free(n);
      if (threadIdx.x == 0) {
        const auto of_B = L::group(group), of_x = L::head(p, at.head);
        mbarrier_expect(bar, L::kStage);
#pragma unroll
        for (int wg = 0; wg < L::kWgs; wg++)
          tensor_load<L::kPadded>(shared.B(stage, wg), args.B, of_B.column + (at.part * L::kWgs + wg) * 64, of_B.part, token0, at.batch,
                                  bar);
#pragma unroll
        for (int i = 0; i < L::kHeadTiles; i++)
          tensor_load<L::kPadded>(shared.x(stage) + i * kTileBytes, args.x, of_x.column + i * 64, of_x.part, token0, at.batch, bar);
      }
      if (clear) {  // the last chunk of a row
        mbarrier_wait(bar, cleared++ & 1);
        clear_rows(shared.B(stage, 0), L::kWgs + L::kHeadTiles, rows);
        fence_async_proxy();
      }
      if (clear || threadIdx.x > 0) mbarrier_arrive(shared.full(stage));  // if not, lane 0 has, with the bytes
      __syncwarp();  // nobody waits for `landed` any more when its next phase begins
    });
  }
}

// kCut: rows are cut, and blocks stand in one row; if not, in one of [parts and heads, rows of the batch].
template <typename L, bool kCut>
__global__ void __launch_bounds__(L::kThreads, 1) ssd_states_kernel(const __grid_constant__ TwoPassArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const StatesShared<L> shared{memory};
  if (threadIdx.x == 0) {
    for (int s = 0; s < L::kStages; s++) {
      mbarrier_init(shared.full(s), L::kLoaders + 32);  // tiles and weights
      mbarrier_init(shared.weighted(s), L::kWeighers), mbarrier_init(shared.empty(s), L::kConsumers);
    }
    mbarrier_init(shared.landed(), 1);
    fence_mbarrier_init();
  }
  if (L::kParts == 1 && threadIdx.x == 32) prefetch_map(args.B), prefetch_map(args.x);
  // The first launch of a call waits for its inputs here: the second pass, which starts behind this, reads some without waiting.
  const bool waits = args.batch0 == 0 && args.chunk0 == 0;
  if (waits && args.scan.seq_lens) wait_for_previous();
  StatesItem at;  // the first
  if constexpr (kCut)
    piece_of_row<L>(args, 0, at);
  else
    at = whole_row<L>(args);
  __syncthreads();
  if (waits) wait_for_previous();
  let_next_start();
  if (threadIdx.x < L::kProducers) {
    states_produce<L, kCut>(args, at, shared);
  } else if (threadIdx.x < L::kProducers + L::kWeighers) {
    states_weigh<L, kCut>(args, at, shared);
  } else {
    StatesConsumer<L, kCut> me;
    const int warp = __shfl_sync(0xffffffffu, (threadIdx.x - L::kProducers - L::kWeighers) / 32, 0);  // tells that it is uniform
    me.wg = warp / 4, me.warp = warp % 4;
    me.run(args, at, shared);
  }
}

}  // namespace ssd
}  // namespace mamba
