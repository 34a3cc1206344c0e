// The next token: the best logit of a thread, a block, all blocks.
#pragma once

#include "decode_block.cuh"

namespace mamba::decode {

// The larger logit and of equal ones the smaller row: everywhere the same, in any order.
struct Best {
  static constexpr int kNone = 0x7fffffff;
  float value = -INFINITY;
  int row = kNone;

  // A thread's rows come in order. The first is taken whatever it is: there must be a row even where no logit is larger.
  __device__ __forceinline__ void next(float v, int r) {
    if (v > value || row == kNone) value = v, row = r;
  }
  __device__ __forceinline__ void merge(float v, int r) {
    if (v > value || (v == value && r < row)) value = v, row = r;
  }
  __device__ __forceinline__ void over_warp() {
#pragma unroll
    for (int o = 16; o; o /= 2) {
      const float v = __shfl_xor_sync(~0u, value, o);
      const int r = __shfl_xor_sync(~0u, row, o);
      merge(v, r);
    }
  }
  // By all threads, through 2 * kWarps floats of shared memory.
  __device__ __forceinline__ void over_block(float* shared, int warp, int lane) {
    over_warp();
    if (lane == 0) shared[warp] = value, shared[kWarps + warp] = __int_as_float(row);
    block_sync();
    value = shared[lane % kWarps], row = __float_as_int(shared[kWarps + lane % kWarps]);
    over_warp();
    block_sync();
  }
};

template <typename T, int kFamily>
__device__ __forceinline__ int next_token(const Worker<T, kFamily>& w, Best& best, int step) {
  best.over_block(w.partials, w.warp, w.lane);
  const uint32_t mine = w.tid ? uint32_t(best.row) : __float_as_uint(best.value);
  if (w.tid < 2) send(w.sent_best + 2 * blockIdx.x + w.tid, mine, step + 1);
  best = Best{};
  receive<kThreads>(w.sent_best, 2 * w.plan.blocks, step + 1, w.tid, [&](int, uint32_t value, uint32_t row) {
    best.merge(__uint_as_float(value), int(row));
  });
  best.over_block(w.partials, w.warp, w.lane);
  if (blockIdx.x == 0 && w.tid == 0) w.p.output_ids[step - w.p.n_forced + 1] = best.row;
  return best.row;
}

}  // namespace mamba::decode
