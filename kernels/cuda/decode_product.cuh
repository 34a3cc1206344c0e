// Matrix-vector products whose rows come through the ring, and the sums around them.
#pragma once

#include "decode_plan.cuh"
#include "decode_ring.cuh"

namespace mamba::decode {

__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
template <int N> __device__ __forceinline__ void warp_sum(float (&v)[N]) {
#pragma unroll
  for (int o = 16; o; o /= 2) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += __shfl_xor_sync(~0u, v[i], o);
  }
}

// Eight weights from shared memory times eight values, x being kept in two planes (values 0-3 and 4-7 of every eight).
template <typename T> __device__ __forceinline__ float dot8(const T* w, float4 a, float4 b, float sum) {
  if constexpr (sizeof(T) == 4) {
    const float4 p = reinterpret_cast<const float4*>(w)[0], q = reinterpret_cast<const float4*>(w)[1];
    sum = fmaf(p.x, a.x, fmaf(p.y, a.y, fmaf(p.z, a.z, fmaf(p.w, a.w, sum))));
    return fmaf(q.x, b.x, fmaf(q.y, b.y, fmaf(q.z, b.z, fmaf(q.w, b.w, sum))));
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(w);
    const pair_t<T>* v = reinterpret_cast<const pair_t<T>*>(&raw);
    const float2 p = to_float2(v[0]), q = to_float2(v[1]), r = to_float2(v[2]), s = to_float2(v[3]);
    sum = fmaf(p.x, a.x, fmaf(p.y, a.y, fmaf(q.x, a.z, fmaf(q.y, a.w, sum))));
    return fmaf(r.x, b.x, fmaf(r.y, b.y, fmaf(s.x, b.z, fmaf(s.y, b.w, sum))));
  }
}

// kRows rows times x, over the turns [from, to) of 32 chunks of eight.
template <typename T, int kRows>
__device__ __forceinline__ void dots(const T* rows, const float4* x, int width, int from, int to, float* sum) {
  constexpr int kTurns = 3;
  const int chunks = width / 8, lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < kRows; r++) sum[r] = 0.0f;
#pragma unroll 1
  for (int turn = from; turn < to; turn += kTurns) {
#pragma unroll
    for (int t = 0; t < kTurns; t++) {
      const int c = (turn + t) * 32 + lane;
      if (turn + t < to && c < chunks) {
        const float4 a = x[c], b = x[chunks + c];
#pragma unroll
        for (int r = 0; r < kRows; r++) sum[r] = dot8(rows + r * width + c * 8, a, b, sum[r]);
      }
    }
  }
}

// The consumers' side of a matrix-vector product whose rows come through the ring.
template <typename T> struct Product {
  const Ring& ring;
  Cursor& cursor;  // the same in every warp between stages
  const float4* x;
  int warp, lane;

  // Calls store(row, part, value) from one lane for every row and part; before its first, finish(sum of `extra` over the
  // warp), which costs little when summed along.
  template <typename G, typename F>
  __device__ __forceinline__ void run(const Shape& s, float extra, G&& finish, F&& store) {
    const bool brief = s.slots <= ring.slots;
    Cursor at = cursor;
    int passed = 0;
#pragma unroll 1
    for (int task = warp; task < s.tasks; task += kWarps) {
      const int row = (task >> s.part_shift) * s.each, part = task & ((1 << s.part_shift) - 1), slot = row >> s.shift;
      Cursor here = at;
      if (brief) {
        here.advance(ring.slots, slot);
        ring.wait(here);
      } else {
        for (;; passed++, at.advance(ring.slots)) {  // every slot in turn: a release must not overtake a refill
          ring.wait(at);
          if (passed == slot) break;
          __syncwarp();
          if (lane == 0) ring.release(at.slot);
        }
        here = at;
      }
      const T* data = reinterpret_cast<const T*>(ring.at(here.slot)) + (row - (slot << s.shift)) * s.width;
      const int from = s.turns * part >> s.part_shift, to = s.turns * (part + 1) >> s.part_shift;
      float sum[3] = {0.0f, 0.0f, extra};
      if (s.each == 2) dots<T, 2>(data, x, s.width, from, to, sum);
      else dots<T, 1>(data, x, s.width, from, to, sum);
      warp_sum(sum);
      if (task == warp) finish(sum[2]);
      if (lane == 0) store(row, part, sum[0]);
      // Of an odd number of rows the last has a neighbour too: what the slot held before.
      if (s.each == 2 && lane == 0 && row + 1 < s.rows) store(row + 1, part, sum[1]);
    }
    if (brief) {
      __syncwarp();
      if (lane < s.slots) {
        Cursor c = cursor;
        c.advance(ring.slots, lane);
        ring.release(c.slot);
      }
      if (lane + 32 < s.slots) {
        Cursor c = cursor;
        c.advance(ring.slots, lane + 32);
        ring.release(c.slot);
      }
      cursor.advance(ring.slots, s.slots);
    } else {
      for (; passed < s.slots; passed++, at.advance(ring.slots)) {
        ring.wait(at);
        __syncwarp();
        if (lane == 0) ring.release(at.slot);
      }
      cursor = at;
    }
  }
};

// The larger logit of a warp's, and of equal ones the smaller row: everywhere the same.
__device__ __forceinline__ void best_of(float& value, int& row) {
#pragma unroll
  for (int o = 16; o; o /= 2) {
    const float v = __shfl_xor_sync(~0u, value, o);
    const int r = __shfl_xor_sync(~0u, row, o);
    if (v > value || (v == value && r < row)) value = v, row = r;
  }
}

template <typename T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

}  // namespace mamba::decode
