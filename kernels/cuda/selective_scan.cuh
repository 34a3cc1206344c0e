// What the selective_scan kernels share: arguments, loads of activations, the tactic code.
#pragma once

#include <atomic>

#include "common.cuh"
#include "mamba/selective_scan.h"

namespace mamba::scan {

constexpr int kState = 16;          // d_state of the fast kernels
constexpr int kChannelWidth = 128;  // channels and threads of a block of the tactic channel
constexpr int kGenericThreads = 256, kPerLaneStates = 8;  // of a block and of a lane of the tactic generic

// Lanes of a channel in the tactic generic, and blocks of it that fit a multiprocessor.
inline int generic_lanes(int d_state) {
  int lanes = 1;
  while (lanes * kPerLaneStates < d_state) lanes *= 2;
  return lanes;
}
constexpr int generic_blocks(int lanes) { return lanes == 1 ? 2 : 3; }

struct Strides {
  int64_t batch, token;
};

// Kernel arguments, typed; pieces > 1 cuts the sequence into that many pieces of piece_len tokens (time split).
template <typename T> struct Args {
  const T *u, *delta, *z, *B, *C;
  T* y;
  const float *A, *D, *bias, *h0;
  float* hT;
  const int32_t* seq_lens;
  Strides u_stride, delta_stride, z_stride, B_stride, C_stride, y_stride;
  int seqlen, dim, group_dim, ngroups, d_state;
  int softplus, reverse;
  int vec;  // every row of u, delta, z, y, B and C starts at a 16-byte boundary
  int pieces, piece_len;
  float* piece_state;  // [batch, pieces, dim, d_state]: state at the end of a piece that started from zero
  float* piece_dt;     // [batch, pieces, dim]: sum of dt over the piece, or of so many tokens at its end that no state is left
  int* turns;          // pieces in turn: tickets drawn, then for every row of blocks the pieces done; piece_state: see Turn
};

// Which kernel, and: chain (two, four or eight lanes a channel; linked: four, and two blocks): groups of channels in a block,
// scanning warps of a group, copying warps; channel: pieces of a row, side by side or in turn by so many blocks of a
// multiprocessor (in copiers); generic: pieces.
struct Tactic {
  enum Kernel { kGeneric = 0, kChannel = 1, kChain = 2, kChain4 = 3, kChain8 = 4, kLinked = 5 };
  int kernel, groups, warps, copiers, pieces;
  int code() const { return kernel | groups << 4 | warps << 12 | copiers << 17 | pieces << 20; }
  int in_turn() const { return kernel == kChannel && pieces > 1 ? copiers : 0; }
  static Tactic from(int c) { return {c & 15, c >> 4 & 255, c >> 12 & 31, c >> 17 & 7, c >> 20 & 1023}; }
};

// Lets a kernel have that much dynamic shared memory; the driver is asked once per kernel, device and larger size.
template <auto kKernel> bool allow_shared(int bytes) {
  static std::atomic<int> allowed[64];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return false;
  if (allowed[device].load(std::memory_order_relaxed) >= bytes) return true;
  // The carveout too: the driver's own choice leaves room for one block fewer than fits.
  if (cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess ||
      cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  allowed[device].store(bytes, std::memory_order_relaxed);
  return true;
}

template <typename T> __device__ __forceinline__ int row_length(const Args<T>& p, int b) {
  return p.seq_lens ? max(0, min(p.seq_lens[b], p.seqlen)) : p.seqlen;
}

// Eight neighbouring states of one token of B or C, as loaded.
template <typename T> struct Run {
  static constexpr int kWords = 8 * sizeof(T) / 16;
  uint4 word[kWords];
};
template <typename T, bool kVec> __device__ __forceinline__ void load_run8(Run<T>& r, const T* p) {
  if constexpr (kVec) {
#pragma unroll
    for (int i = 0; i < Run<T>::kWords; i++) r.word[i] = reinterpret_cast<const uint4*>(p)[i];
  } else {
    T* v = reinterpret_cast<T*>(r.word);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = p[i];
  }
}
template <typename T> __device__ __forceinline__ void to_floats(float (&f)[8], const Run<T>& r) {
  const pair_t<T>* pairs = reinterpret_cast<const pair_t<T>*>(r.word);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 v = to_float2(pairs[i]);
    f[2 * i] = v.x, f[2 * i + 1] = v.y;
  }
}
template <typename T> __device__ __forceinline__ void stage_states(float* dst, const Run<T>& r) {
  float f[8];
  to_floats(f, r);
  *reinterpret_cast<float4*>(dst) = make_float4(f[0], f[1], f[2], f[3]);
  *reinterpret_cast<float4*>(dst + 4) = make_float4(f[4], f[5], f[6], f[7]);
}

// A select, not a branch: both flags are uniform and the softplus is cheap.
template <typename T> __device__ __forceinline__ float time_step(float v, bool use_softplus) {
  float sp = softplus<sizeof(T) == 4>(v);
  return use_softplus ? sp : v;
}

// Outputs at padded positions are 0.
template <typename T>
__device__ void zero_padding(const Args<T>& p, int b, int len, int c0, int c1) {
  int width = c1 - c0;
  T* y = p.y + b * p.y_stride.batch;
  int64_t total = int64_t(p.seqlen - len) * width;
  for (int64_t i = threadIdx.x; i < total; i += blockDim.x) {
    y[(len + i / width) * p.y_stride.token + c0 + i % width] = from_float<T>(0.0f);
  }
}

template <typename T> int launch_chain(const Args<T>& args, const Tactic& tactic, int batch, cudaStream_t stream);
template <typename T> int launch_channel(const Args<T>& args, const Tactic& tactic, int batch, cudaStream_t stream);
template <typename T> int launch_generic(const Args<T>& args, const Tactic& tactic, int batch, cudaStream_t stream);

}  // namespace mamba::scan
