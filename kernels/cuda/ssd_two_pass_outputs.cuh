// Second pass: y of every chunk of 128 tokens, from the copies of the states. Of a row cut into pieces, C h is made of several
// copies, and the final state of the pieces' ends.
//
// A block has one chunk and some heads of a group, which lie apart: its neighbours read and write the lines between them at
// the same time. Its two warpgroups of consumers own 64 tokens each; C B^T is made once and stays in registers, for 16-bit inputs
// in pairs of 16 bits. A warp owns 16 tokens: what its tokens take from those before the 16 shares a decay from their start, so the
// scores need the decays of their columns only, from a table; the 16 x 16 block on the diagonal, which weighs most and carries D,
// is made elementwise, as a sum of two 16-bit values. A consumer's time is its own instructions, one behind the other: what does
// not need the product with the state is done while that runs.
#pragma once

#include "ssd_two_pass_rows.cuh"

#include <type_traits>

namespace mamba {
namespace ssd {

template <typename L, bool kCut>
struct OutputsConsumer : OutputRows<L> {
  using Base = OutputRows<L>;
  using typename Base::E;
  using typename Base::Rows;
  using typename Base::T;
  static constexpr int kProducts = L::kParts == 2 ? 3 : 1;  // of a high and a low part each: high high, low high, high low
  int warp;                                                 // within the warpgroup

  // C B^T of 64 columns, as a lane has it: 8 tiles of 8 columns, a pair of columns of two rows each.
  struct Columns {
    using Value = std::conditional_t<L::kParts == 2, float[8][4], uint32_t[8][2]>;
    Value at;
    __device__ __forceinline__ void keep(const float (&products)[8][4]) {
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
          if constexpr (L::kParts == 2)
            at[n][r] = products[n][r];
          else if (r % 2 == 0)
            at[n][r / 2] = Traits<E>::pack(products[n][r] * ScoreScale<T>::kScores, products[n][r + 1] * ScoreScale<T>::kScores);
    }
  };

  // A fragments of `kBlocks` times 16 of these columns, for the tokens behind them: `blocks` are before the warp's own.
  template <int kBlocks>
  __device__ __forceinline__ static void weigh(const Columns& scores, const DecayTable<T>& table, int half, int warp, int group, int blocks,
                                               uint32_t (&out)[kBlocks][L::kParts][4]) {
    const int lane = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < kBlocks; j++) {
      if constexpr (L::kParts == 2) {
        const float* columns = table.columns(half, warp) + group * 64 + j * 16 + lane * 2;
        const float2 w[2] = {*reinterpret_cast<const float2*>(columns), *reinterpret_cast<const float2*>(columns + 8)};
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float* v = scores.at[2 * j + r / 2] + r % 2 * 2;
          split<E>(v[0] * w[r / 2].x, v[1] * w[r / 2].y, out[j][0][r], out[j][1][r]);
        }
      } else if (j % 2 == 0) {
        uint32_t w[4];
        load_shared_16(smem_address(table.pairs(half, warp) + group * 8 + j / 2 * 4 + lane), w);
#pragma unroll
        for (int k = 0; k < 2 && j + k < kBlocks; k++)
#pragma unroll
          for (int r = 0; r < 4; r++) out[j + k][0][r] = Traits<E>::multiply(scores.at[2 * (j + k) + r / 2][r % 2], w[2 * k + r / 2]);
      }
    }
#pragma unroll
    for (int j = 0; j < kBlocks; j++)
#pragma unroll
      for (int part = 0; part < L::kParts; part++)
#pragma unroll
        for (int r = 0; r < 4; r++) out[j][part][r] = j < blocks ? out[j][part][r] : 0;
  }

  // Tokens 64 kHalf and the 63 after it.
  template <int kHalf>
  __device__ __forceinline__ void run(const TwoPassArgs& args, const OutputsItem& at, const OutputsShared<L>& shared) {
    const ScanArgs& p = args.scan;
    constexpr int kHalfRows = 64 * Rows::kRowBytes, kSteps = L::kState / 16, kLow = L::kStateTiles * kTileBytes;
    const uint64_t from_C = descriptor(shared.C() + kHalf * kHalfRows), from_B = descriptor(shared.B());
    float y[L::kAccumulators][4];
    Columns scores[kHalf + 1];
    float diagonal[2][4];
    {
      float products[kHalf + 1][8][4];
      mbarrier_wait(shared.ready(), 0);
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < kProducts; part++)
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
          const uint32_t skip = k / 4 * kTileBytes + k % 4 * 32;
#pragma unroll
          for (int j = 0; j <= kHalf; j++)
            Wgmma<E>::rows_rows(products[j], advance(from_C, skip + (part == 1 ? kLow : 0)),
                                advance(from_B, j * kHalfRows + skip + (part == 2 ? kLow : 0)), part + k > 0);
        }
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int j = 0; j <= kHalf; j++) pin(products[j]), scores[j].keep(products[j]);
      if constexpr (L::kLate > 0) {  // there is room for the last stage now
        const uint32_t used = __float_as_uint(products[0][0][0]);
        mbarrier_arrive_after(shared.empty(L::kStages - 1), used);
        if constexpr (kCut) mbarrier_arrive_after(shared.state_empty(L::kStages - 1), used);
      }
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int r = 0; r < 8; r++)
          if (j == 0 || warp == j) diagonal[r / 4][r % 4] = products[kHalf][2 * j + r / 4][r % 4];
    }
    const uint32_t zero = args.rows >> 31;
    int item = 0;  // of the ring of states
    const auto end_state = [&] {  // the matrix unit has read it
      wgmma_wait<0>();
      pin(y);
      if constexpr (kCut) mbarrier_arrive_after(shared.state_empty(item % L::kStages), __float_as_uint(y[0][0]));
      item++;
    };
    const auto scale = [&](float by) {
#pragma unroll
      for (int n = 0; n < L::kAccumulators; n++) y[n][0] *= by, y[n][1] *= by, y[n][2] *= by, y[n][3] *= by;
      pin(y);
    };
    const auto from_state = [&] {  // starts y = C h, a sum of several where the row is cut
      bool add = false;
#pragma unroll 1
      do {
        const int slot = item % L::kStages;
        const uint64_t state = descriptor(shared.state(slot), L::kStateTile);
        mbarrier_wait(shared.state_full(slot), item / L::kStages & 1);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < kProducts; part++)
#pragma unroll
          for (int k = 0; k < kSteps; k++)
            Wgmma<E>::rows_columns(y, advance(from_C, k / 4 * kTileBytes + k % 4 * 32 + (part == 1 ? kLow : 0)),
                                   advance(state, k * 2048 + (part == 2 ? L::kHeadTiles * L::kStateTile : 0)), add || part + k > 0);
        wgmma_commit();
        if constexpr (kCut) {
          const float carried = shared.carried(slot);
          add = __shfl_sync(0xffffffffu, carried != 0.f, 0);
          if (add) end_state(), scale(carried);
        }
      } while (kCut && add);
    };

    const int lane = threadIdx.x & 31, g = lane >> 2;
    const int token = at.token0 + 64 * kHalf + warp * 16;  // the warp's first
    const int rows = at.end - token, valid = min(at.limit, at.end) - token;
    const bool extras = p.z || p.d_per_channel;
    uint32_t packed[L::kAccumulators][2];
    int i = 0;  // a block has a head at least
#pragma unroll 1
    do {
      from_state();
      const int stage = i % L::kStages, head = at.head0 + i * at.step;
      const uint32_t x_tile = shared.x(stage);
      const uint64_t from_x = descriptor(x_tile, kTileBytes);
      const DecayTable<T> table = shared.table(stage);
      mbarrier_wait(shared.x_full(stage), i / L::kStages & 1);
      // What needs no product with the state comes while the matrix unit is at it.
      uint32_t before_64[4][L::kParts][4], within_64[3][L::kParts][4];
      if constexpr (kHalf > 0) weigh<4>(scores[0], table, kHalf, warp, 0, 4, before_64);
      weigh<3>(scores[kHalf], table, kHalf, warp, kHalf, warp, within_64);
      const float before = table.before(4 * kHalf + warp);
      uint32_t high[4], low[4];
      const float* sum = table.sum() + kHalf * 64 + warp * 16;
      Base::decay_diagonal(diagonal, sum, table.source() + kHalf * 64 + warp * 16, table.skip(), high, low);
      const float from_lo = ex2(sum[g]), from_hi = ex2(sum[g + 8]);
      const uint32_t x_rows = x_tile + kHalf * kHalfRows + warp * 16 * Rows::kRowBytes + Rows::lane_16x16();
      float near[L::kAccumulators][4];  // the diagonal block times x; float32 has no registers for it
      uint32_t used = high[0] | high[1] | high[3] | __float_as_uint(from_lo) | __float_as_uint(from_hi);
      if constexpr (L::kParts == 1) {
#pragma unroll
        for (int n = 0; n < L::kAccumulators; n++) near[n][0] = near[n][1] = near[n][2] = near[n][3] = 0.f;
        used |= Base::add_diagonal(near, high, low, x_rows);
        pin(near);
      }
      end_state();
      // ptxas would put much of the above among the products below: what they start from depends on it, by a 0 it does not know.
      uint32_t late = 0;
      if constexpr (L::kParts == 1) {
#pragma unroll
        for (int n = 0; n < L::kAccumulators; n++) late |= __float_as_uint(near[n][0]);
      }
      scale(__uint_as_float(__float_as_uint(before) | (late & zero)));
#pragma unroll
      for (int j = 0; j < 4 * kHalf; j++) pin(before_64[j]);
#pragma unroll
      for (int j = 0; j < 3; j++) pin(within_64[j]);
      wgmma_fence();
      const auto add_scores = [&](uint32_t(&fragments)[L::kParts][4], int block) {
        Wgmma<E>::regs_columns(y, fragments[0], advance(from_x, block * 2048));
        if constexpr (L::kParts == 2) {
          Wgmma<E>::regs_columns(y, fragments[1], advance(from_x, block * 2048));
          Wgmma<E>::regs_columns(y, fragments[0], advance(from_x, block * 2048 + L::kHeadTiles * kTileBytes));
        }
      };
#pragma unroll
      for (int j = 0; j < 4 * kHalf; j++) add_scores(before_64[j], j);
#pragma unroll
      for (int j = 0; j < 3; j++) add_scores(within_64[j], 4 * kHalf + j);
      wgmma_commit();

      if constexpr (L::kParts == 1) {
        if (i > 0) Base::store(packed, args.y, L::head(p, head - at.step), token, at.batch, shared.out(kHalf * 4 + warp));
      }
      wgmma_wait<0>();
      pin(y);
#pragma unroll
      for (int n = 0; n < L::kAccumulators; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float from = r < 2 ? from_lo : from_hi;
          y[n][r] = L::kParts == 1 ? fmaf(y[n][r], from, near[n][r]) : y[n][r] * from;
        }
      if constexpr (L::kParts == 2) used |= Base::add_diagonal(y, high, low, x_rows);
      mbarrier_arrive_after(shared.empty(stage), used);

      if (__builtin_expect(extras, 0)) {
        const int column = p.column(head);
        const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + token * p.x_token + column;
        const T* z = p.z ? static_cast<const T*>(p.z) + at.batch * p.z_batch + token * p.z_token + column : nullptr;
        Base::finish(p, y, x, z, p.D && p.d_per_channel ? p.D + column : nullptr, valid);
      }
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (half * 8 + g >= valid) {  // padding: its C was read as it lay there
#pragma unroll
          for (int n = 0; n < L::kAccumulators; n++) y[n][2 * half] = y[n][2 * half + 1] = 0.f;
        }
      if constexpr (L::kParts == 2) {
        T* out = static_cast<T*>(p.y) + at.batch * p.y_batch + token * p.y_token + p.column(head);
        Base::store_float(y, out, p.y_token, rows, L::columns(p));
      } else {
#pragma unroll
        for (int n = 0; n < L::kAccumulators; n++)
          packed[n][0] = Traits<E>::pack(y[n][0], y[n][1]), packed[n][1] = Traits<E>::pack(y[n][2], y[n][3]);
      }
    } while (++i < at.heads);
    if constexpr (L::kParts == 1) {
      const int last = at.head0 + (at.heads - 1) * at.step;
      Base::store(packed, args.y, L::head(p, last), token, at.batch, shared.out(kHalf * 4 + warp));
      if (lane == 0) bulk_wait_read();
    }
  }
};

template <typename L, bool kCut>
__global__ void __launch_bounds__(L::kThreads, 1) ssd_outputs_kernel(const __grid_constant__ TwoPassArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const OutputsShared<L> shared{memory};
  let_next_start();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.ready(), L::kParts == 2 ? L::kProducers : 1), mbarrier_init(shared.landed(), 1);
    for (int s = 0; s < L::kStages; s++) {
      mbarrier_init(shared.x_full(s), L::kParts == 2 ? L::kProducers : 2 * 32);  // the tile and the decays
      mbarrier_init(shared.state_full(s), 1);
      mbarrier_init(shared.empty(s), L::kConsumers), mbarrier_init(shared.state_empty(s), L::kConsumers);
    }
    fence_mbarrier_init();
  }
  if (L::kParts == 1 && threadIdx.x == 32) prefetch_map(args.C), prefetch_map(args.B), prefetch_map(args.x), prefetch_map(args.y);
  const OutputsItem at = outputs_item(args);
  const bool padding = at.limit <= at.token0;  // and nothing else
  if (padding) {
    wait_for_previous();
    clear_outputs<L>(args.scan, at);
  }
  __syncthreads();
  if (threadIdx.x < L::kProducers) {
    set_registers<L::kProducerRegisters, false>();
    if (!padding) outputs_produce<L, kCut>(args, at, shared);
    // The consumers have the last heads before them.
    if constexpr (kCut) finish_state<L>(args, at);
  } else if (!padding) {
    set_registers<L::kConsumerRegisters, true>();
    OutputsConsumer<L, kCut> me;
    const int warp = __shfl_sync(0xffffffffu, (threadIdx.x - L::kProducers) / 32, 0);  // tells that it is uniform
    me.warp = warp % 4;
    if (warp < 4)
      me.template run<0>(args, at, shared);
    else
      me.template run<1>(args, at, shared);
  }
}

}  // namespace ssd
}  // namespace mamba
