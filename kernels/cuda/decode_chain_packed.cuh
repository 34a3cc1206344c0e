// Integer weights of the chain: where a row is, and a lane's 16 bytes of it times as many values of the vector.
#pragma once

#include "decode_chain_row.cuh"
#include "decode_integers.cuh"

namespace mamba::decode::chain {

// kBits below 16: the layout of a row of integers.
template <int kBits> __device__ __forceinline__ Packing packing(const Params& p, int width) {
  return kBits < 16 ? packing_of(p, width, kBits) : Packing{};
}
template <typename T, int kBits>
__device__ __forceinline__ auto row_of(const void* matrix, int row, int width, const Packing& f) {
  if constexpr (kBits < 16) return static_cast<const unsigned char*>(matrix) + int64_t(row) * f.row_bytes;
  else return static_cast<const T*>(matrix) + int64_t(row) * width;
}

template <typename T, int kBits> struct PackedDot {
  using I = Integers<T, kBits>;
  static constexpr int kValues = I::kValues;
  Scales<T, kBits> now = {}, ahead = {};  // of the 64 bytes of which this lane has 16

  __device__ __forceinline__ void load(const unsigned char* row, const Packing& f, int value) {
    if (ahead.fine(f)) ahead.template load<true>(row, f, value);
    else ahead.template load<false>(row, f, value);
  }
  __device__ __forceinline__ void next() { now = ahead; }
  // `x`: the first of the lane's values, in two planes.
  __device__ __forceinline__ float dot(const uint4& raw, const float4* x, int plane, float sum) const {
#pragma unroll
    for (int i = 0; i < I::kSubs; i++) {
      sum = fmaf(now.scale[i], dot16<T>(I::values(raw, i, now.zero[i]), x[i * 4], x[i * 4 + plane], 0.0f), sum);
    }
    return sum;
  }
};

}  // namespace mamba::decode::chain
