// The state-only pass over the pieces of a split sequence, on mma.sync.
#pragma once

#include "ssd_chunk.cuh"

namespace mamba {
namespace ssd {

// The state at the end of every piece but the last, from zero, and the piece's decay.
template <typename L>
__global__ void __launch_bounds__(L::kThreads, L::kMinBlocks) ssd_state_kernel(const __grid_constant__ ScanArgs p) {
  using T = typename L::T;
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr int kStage = L::kStateTile + L::kHeads * L::kInputTile;
  const auto B_tile = [&](int i) { return smem_address(memory) + (i % 3) * kStage; };
  const auto x_tile = [&](int i) { return B_tile(i) + L::kStateTile; };
  const auto decays = [&](int i) {
    return Decays<L>{reinterpret_cast<float*>(memory + 3 * kStage + (i % 3) * L::kDecays)};
  };
  const HeadConstants<L> constants{reinterpret_cast<float*>(memory + 3 * kStage + 3 * L::kDecays)};

  const int split = blockIdx.y;
  const Item at = item_at<L>(p, blockIdx.z, blockIdx.x, piece_start<L>(p, split), piece_start<L>(p, split + 1));
  const int limit = at.limit();
  const int chunks = limit > at.begin ? (limit - at.begin + L::kChunk - 1) / L::kChunk : 0;
  const auto token0 = [&](int i) { return at.begin + i * L::kChunk; };
  const auto load = [&](int i) {
    if (i < chunks) {
      constexpr int kB = L::kState / 8, kX = L::kHeadDim / 8;
      const T* B = static_cast<const T*>(p.B) + at.batch * p.B_batch + token0(i) * p.B_token + at.group * L::kState;
      const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + token0(i) * p.x_token + at.head0 * L::kHeadDim;
      load_tile<L, kB, L::kState>(B_tile(i), B, p.B_token, limit - token0(i), kB);
      load_tile<L, kX * L::kHeads, L::kHeadDim>(x_tile(i), x, p.x_token, limit - token0(i), kX * at.heads);
    }
    cp_async_commit();
  };

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, local_head = warp / L::kWarpsPerHead;
  const int col0 = (warp % L::kWarpsPerHead) * L::kWarpCols;
  const bool active = local_head < at.heads;

  load(0), load(1);
  constants.load(p, at);
  DecayWarp<L> decay_warp;
  float sum[DecayWarp<L>::kPerWarp] = {};
  decay_warp.fetch(p, at, token0(0));
  __syncthreads();
  decay_warp.store(p, at, token0(0), constants, decays(0));
  decay_warp.fetch(p, at, token0(1));
  WarpState<L> h;
  h.zero();
#pragma unroll 1
  for (int i = 0; i < chunks; i++) {
#pragma unroll
    for (int k = 0; k < DecayWarp<L>::kPerWarp; k++) sum[k] += decay_warp.total[k];
    cp_async_wait<1>();
    __syncthreads();
    load(i + 2);
    decay_warp.store(p, at, token0(i + 1), constants, decays(i + 1));
    decay_warp.fetch(p, at, token0(i + 2));
    if (!active) continue;
    const Decays<L> d = decays(i);
    h.scale(d.from_start(local_head)[L::kChunk - 1]);
    using Input = Tile<L::kHeadDim>;
    using State = Tile<L::kState>;
    const uint32_t x_rows = Input::along(x_tile(i) + local_head * L::kInputTile + Input::lane_16x16(), col0 / 8);
    const uint32_t B_rows = B_tile(i) + State::lane_16x16();
#pragma unroll
    for (int j = 0; j < L::kRowTiles; j++) {
      uint32_t x[WarpState<L>::kM][4];
      WarpState<L>::load_input(x, x_rows + j * 16 * Input::kRowBytes);
      const float* weights = d.to_end(local_head) + j * 16 + (lane & 3) * 2;
      h.add_outer(x, *reinterpret_cast<const float2*>(weights), *reinterpret_cast<const float2*>(weights + 8),
                  B_rows + j * 16 * State::kRowBytes);
    }
  }

  const int64_t row = (static_cast<int64_t>(at.batch) * p.nheads + at.head0) * p.splits + split;
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
