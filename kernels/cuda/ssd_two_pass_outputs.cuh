// Second pass: y of every chunk of 128 tokens, from the copies of the states. Of a row cut into pieces, C h is made of several
// copies, and the final state of the pieces' ends.
//
// A block has one chunk and some heads of a group, which lie apart: its neighbours read and write the lines between them at
// the same time. Its two warpgroups of consumers own 64 tokens each; C B^T is made
// once and stays in registers. A warp owns 16 tokens: what its tokens take from those before the 16 shares a decay from
// their start, so the scores need the decays of their columns only, from a table; the 16 x 16 block on the diagonal, which
// weighs most and carries D, is made elementwise, as a sum of two 16-bit values.
#pragma once

#include "ssd_two_pass_rows.cuh"

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

  // A fragments of 16 columns of scores, for the tokens behind them.
  __device__ __forceinline__ static void weigh(const float (&left)[4], const float (&right)[4], const float* columns,
                                               uint32_t (&scores)[L::kParts][4]) {
    const float2 w0 = *reinterpret_cast<const float2*>(columns), w8 = *reinterpret_cast<const float2*>(columns + 8);
    const float v[8] = {left[0] * w0.x,  left[1] * w0.y,  left[2] * w0.x,  left[3] * w0.y,
                        right[0] * w8.x, right[1] * w8.y, right[2] * w8.x, right[3] * w8.y};
#pragma unroll
    for (int r = 0; r < 4; r++) {
      if constexpr (L::kParts == 2)
        split<E>(v[2 * r], v[2 * r + 1], scores[0][r], scores[1][r]);
      else
        scores[0][r] = Traits<E>::pack(v[2 * r], v[2 * r + 1]);
    }
  }

  // Tokens 64 kHalf and the 63 after it.
  template <int kHalf>
  __device__ __forceinline__ void run(const TwoPassArgs& args, const OutputsItem& at, const OutputsShared<L>& shared) {
    const ScanArgs& p = args.scan;
    constexpr int kHalfRows = 64 * Rows::kRowBytes, kSteps = L::kState / 16, kLow = L::kStateTiles * kTileBytes;
    constexpr int kBlocks = 4 * kHalf + 3;  // of 16 columns left of some diagonal block
    const uint64_t from_C = descriptor(shared.C() + kHalf * kHalfRows), from_B = descriptor(shared.B());
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
    float y[L::kAccumulators][4];
    int item = 0;  // of the ring of states
    const auto end_state = [&] {  // the matrix unit has read it
      wgmma_wait<0>();
      pin(y);
      if constexpr (kCut) {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive_after(shared.state_empty(item % L::kStages), __float_as_uint(y[0][0]));
      }
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
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j <= kHalf; j++) pin(products[j]);
    float diagonal[2][4];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int r = 0; r < 8; r++)
        if (j == 0 || warp == j) diagonal[r / 4][r % 4] = products[kHalf][2 * j + r / 4][r % 4];

    const int lane = threadIdx.x & 31, g = lane >> 2, c = (lane & 3) * 2;
    const int64_t t = at.token0 + 64 * kHalf + warp * 16;
    const int rows = at.end - static_cast<int>(t), valid = min(at.limit, at.end) - static_cast<int>(t);
    T* out = static_cast<T*>(p.y) + at.batch * p.y_batch + t * p.y_token + at.head0 * L::kHeadDim;
    const int next = at.step * L::kHeadDim;
    const bool extras = p.z || p.d_per_channel;
    uint32_t packed[L::kAccumulators][2];
    int i = 0;  // a block has a head at least
#pragma unroll 1
    do {
      from_state();
      const int stage = i % L::kStages, head = at.head0 + i * at.step;
      const uint32_t x_tile = shared.x(stage);
      const uint64_t from_x = descriptor(x_tile, kTileBytes);
      const DecayTable table = shared.table(stage);
      mbarrier_wait(shared.x_full(stage), i / L::kStages & 1);
      uint32_t scores[kBlocks][L::kParts][4];
      const float* columns = table.columns(kHalf, warp) + c;
#pragma unroll
      for (int j = 0; j < kBlocks; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
#pragma unroll
          for (int part = 0; part < L::kParts; part++) scores[j][part][r] = 0;
        }
        if (j < 4 * kHalf + warp) weigh(products[j / 4][j % 4 * 2], products[j / 4][j % 4 * 2 + 1], columns + j * 16, scores[j]);
      }
      const float before = table.before(4 * kHalf + warp);
      end_state();
      scale(before);
#pragma unroll
      for (int j = 0; j < kBlocks; j++) pin(scores[j]);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kBlocks; j++) {
        Wgmma<E>::regs_columns(y, scores[j][0], advance(from_x, j * 2048));
        if constexpr (L::kParts == 2) {
          Wgmma<E>::regs_columns(y, scores[j][1], advance(from_x, j * 2048));
          Wgmma<E>::regs_columns(y, scores[j][0], advance(from_x, j * 2048 + L::kHeadTiles * kTileBytes));
        }
      }
      wgmma_commit();

      if constexpr (L::kParts == 1) {
        if (i > 0) Base::store(packed, out + (i - 1) * next, p.y_token, rows, shared.out(kHalf * 4 + warp));
      }
      uint32_t high[4], low[4];
      const float* sum = table.sum() + kHalf * 64 + warp * 16;
      Base::decay_diagonal(diagonal, sum, table.source() + kHalf * 64 + warp * 16, table.skip(), high, low);
      const float from_lo = ex2(sum[g]), from_hi = ex2(sum[g + 8]);
      wgmma_wait<0>();
      pin(y);
#pragma unroll
      for (int n = 0; n < L::kAccumulators; n++) y[n][0] *= from_lo, y[n][1] *= from_lo, y[n][2] *= from_hi, y[n][3] *= from_hi;
      uint32_t used = Base::add_diagonal(y, high, low, x_tile + kHalf * kHalfRows + warp * 16 * Rows::kRowBytes + Rows::lane_16x16());
      used |= high[0] | high[1] | high[3] | __float_as_uint(from_lo) | __float_as_uint(from_hi);  // and of the table
      __syncwarp();
      if (lane == 0) mbarrier_arrive_after(shared.empty(stage), used);

      if (__builtin_expect(extras, 0)) {
        const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + t * p.x_token + head * L::kHeadDim;
        const T* z = p.z ? static_cast<const T*>(p.z) + at.batch * p.z_batch + t * p.z_token + head * L::kHeadDim : nullptr;
        Base::finish(p, y, x, z, p.D && p.d_per_channel ? p.D + head * L::kHeadDim : nullptr, valid);
      }
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (half * 8 + g >= valid) {  // padding: its C was read as it lay there
#pragma unroll
          for (int n = 0; n < L::kAccumulators; n++) y[n][2 * half] = y[n][2 * half + 1] = 0.f;
        }
      if constexpr (L::kParts == 2) {
        Base::store_float(y, out + i * next, p.y_token, rows);
      } else {
#pragma unroll
        for (int n = 0; n < L::kAccumulators; n++)
          packed[n][0] = Traits<E>::pack(y[n][0], y[n][1]), packed[n][1] = Traits<E>::pack(y[n][2], y[n][3]);
      }
    } while (++i < at.heads);
    if constexpr (L::kParts == 1)
      Base::store(packed, out + (at.heads - 1) * next, p.y_token, rows, shared.out(kHalf * 4 + warp));
  }
};

template <typename L, bool kCut>
__global__ void __launch_bounds__(L::kThreads, 1) ssd_outputs_kernel(const __grid_constant__ TwoPassArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const OutputsShared<L> shared{memory};
  const OutputsItem at = outputs_item(args);
  const bool padding = at.limit <= at.token0;  // and nothing else
  let_next_start();
  if (padding) {
    wait_for_previous();
    clear_outputs<L>(args.scan, at);
  } else {
    if (threadIdx.x == 0) {
      mbarrier_init(shared.ready(), L::kParts == 2 ? L::kProducers : 1), mbarrier_init(shared.landed(), 1);
      for (int s = 0; s < L::kStages; s++) {
        mbarrier_init(shared.x_full(s), L::kParts == 2 ? L::kLoaders : 2);  // 2: the tile and the decays
        mbarrier_init(shared.state_full(s), 1);
        mbarrier_init(shared.empty(s), L::kConsumers / 32), mbarrier_init(shared.state_empty(s), L::kConsumers / 32);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }
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
