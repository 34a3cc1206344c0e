// The kernels of the SSD scan for Hopper (sm_90a): which items a block takes, and its two roles.
#pragma once

#include "ssd_hopper.cuh"

namespace mamba {
namespace ssd {

enum HopperMode { kPieces, kStream, kStates };  // as ssd_scan_kernel, ssd_stream_kernel and ssd_state_kernel

// Calls visit(item, first chunk, last chunk, chunks of a row) for the items of this block, in order.
template <typename L, HopperMode kMode, typename Visit>
__device__ __forceinline__ void for_each_item(const ScanArgs& p, Visit visit) {
  const int row_chunks = (p.seqlen + L::kChunk - 1) / L::kChunk;
  if constexpr (kMode == kStream) {
    const int64_t all = static_cast<int64_t>(p.blocks_x) * p.batch * row_chunks;
    const int64_t begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
#pragma unroll 1
    for (int row = static_cast<int>((end - 1) / row_chunks); row >= begin / row_chunks; row--) {
      const int64_t row_begin = static_cast<int64_t>(row) * row_chunks;
      const int first = static_cast<int>(max(begin - row_begin, static_cast<int64_t>(0)));
      const int last = static_cast<int>(min(end - row_begin, static_cast<int64_t>(row_chunks)));
      visit(item_at<L>(p, row / p.blocks_x, row % p.blocks_x, first, last), first, last, row_chunks);
    }
  } else {
    const int first = piece_start<L>(p, blockIdx.y), last = piece_start<L>(p, blockIdx.y + 1);
    visit(item_at<L>(p, blockIdx.z, blockIdx.x, first, last), first, last, row_chunks);
  }
}

template <typename L>
__device__ __forceinline__ void consumers_barrier() {
  asm volatile("bar.sync 5, %0;" ::"n"(L::kConsumers) : "memory");
}

template <typename L, HopperMode kMode>
__device__ __forceinline__ void hopper_consume(const ScanArgs& p, const HopperShared<L>& shared) {
  constexpr int kSize = 64 * L::kState;
  const int thread = threadIdx.x - L::kProducers;
  HopperConsumer<L> me;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // tells the compiler that it is uniform
  me.head = warp / 4, me.warp = warp % 4;
  Ring<L::kStages> ring;
  for_each_item<L, kMode>(p, [&](const Item& at, int first, int last, int row_chunks) {
    const bool active = me.head < at.heads;
    const int64_t head = static_cast<int64_t>(at.batch) * p.nheads + at.head0 + me.head;
    me.D = active && p.D && !p.d_per_channel ? p.D[p.step_head(at.head0 + me.head)] : 0.f;
    // hand_over counts warps from the block's first.
    const auto scratch = [&](int block) { return p.handoff + (static_cast<int64_t>(block) * L::kHeads - 1) * kSize; };
    if (kMode == kStream && first > 0) {
      if (thread == 0) {
        volatile unsigned long long* flag = p.handed + blockIdx.x - 1;
        while (*flag != p.ticket) {
        }
        *flag = 0;  // ready for the next launch with this ticket, a graph's replay
        __threadfence();
      }
      consumers_barrier<L>();
      me.h.take_over(scratch(blockIdx.x - 1));
    } else if (kMode == kPieces && p.splits > 1 && active) {
      me.h.template move<true>(static_cast<const float*>(p.split_state) + (head * p.splits + blockIdx.y) * kSize, me.warp * 16);
    } else if (kMode != kStates && p.initial_state && active) {
      me.h.template move<true>(p.initial_state + p.state_at(at.batch, at.head0 + me.head), me.warp * 16);
    } else {
      me.h.zero();
    }
    if (kMode != kStates) me.publish_state(shared.state(me.head));

    const int chunks = chunks_of(at, L::kChunk);
#pragma unroll 1
    for (int i = 0; i < chunks; i++) {
      mbarrier_wait(shared.full(ring.stage), ring.parity);
      if (active) {
        if constexpr (kMode == kStates)
          me.state_chunk(shared, ring.stage);
        else
          me.chunk(p, at, shared, ring.stage, at.begin + i * L::kChunk);
      }
      mbarrier_arrive(shared.empty(ring.stage));
      ring.next();
    }

    if (kMode == kStates) {
      if (active) me.h.template move<false>(p.split_state + (head * p.splits + blockIdx.y) * kSize, me.warp * 16);
      return;
    }
    if (kMode == kStream && last < row_chunks) {
      me.h.hand_over(scratch(blockIdx.x));
      __threadfence();
      consumers_barrier<L>();
      if (thread == 0) *static_cast<volatile unsigned long long*>(p.handed + blockIdx.x) = p.ticket;
    } else if (active && p.final_state && last == row_chunks) {
      me.h.template move<false>(p.final_state + p.state_at(at.batch, at.head0 + me.head), me.warp * 16);
    }
    // Padding gets zeros.
    using T = typename L::T;
    T* y = static_cast<T*>(p.y) + at.batch * p.y_batch;
    const int pieces = at.heads * 8, from = max(at.begin, at.len);
    for (int idx = thread; idx < (at.end - from) * pieces; idx += L::kConsumers)
      *reinterpret_cast<uint4*>(y + (from + idx / pieces) * p.y_token + p.column(at.head0 + idx % pieces / 8) + idx % 8 * 8) =
          make_uint4(0, 0, 0, 0);
  });
}

template <typename L, HopperMode kMode>
__global__ void __launch_bounds__(L::kThreads, 1) ssd_hopper_kernel(const __grid_constant__ ScanArgs p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const HopperShared<L> shared{memory};
  if (threadIdx.x == 0) {
    for (int s = 0; s < L::kStages; s++) {
      mbarrier_init(shared.full(s), L::kProducers);
      mbarrier_init(shared.empty(s), L::kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < L::kProducers) {
    set_registers<L::kProducerRegisters, false>();
    Ring<L::kStages> ring;
    for_each_item<L, kMode>(p, [&](const Item& at, int, int, int) {
      float sum;
      HopperProducer<L, kMode == kStates>::run(p, at, shared, ring, sum);
      const int owner = 3 - threadIdx.x / 32;  // the head whose decays this warp made
      if (kMode == kStates && threadIdx.x % 32 == 0 && owner < at.heads)
        p.split_decay[(static_cast<int64_t>(at.batch) * p.nheads + at.head0 + owner) * p.splits + blockIdx.y] = sum;
    });
  } else {
    set_registers<L::kConsumerRegisters, true>();
    hopper_consume<L, kMode>(p, shared);
  }
}

}  // namespace ssd
}  // namespace mamba
