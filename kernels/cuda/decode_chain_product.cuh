// Matrix-vector products of the chain. Every block has an equal part of the rows and every warp an equal part of the
// block's bytes, which pass through the warp's own ring in shared memory: each lane copies 16 bytes at a time and reads
// what it copied itself, so that no barrier stands in the stream. The first loads precede the vector.
#pragma once

#include "decode_chain_packed.cuh"

namespace mamba::decode::chain {

// Steps of a warp, 1 KB each; eight warps have 80 and 96 KB of them in a multiprocessor.
constexpr int kInDepth = 10, kOutDepth = 12;  // in its ring
constexpr int kSmallDepth = 4;                // where shared memory is smaller
constexpr int kPackedDepth = 6;               // of integers
constexpr int kFlight = 5;  // under way at a time while the kernels before run, whose loads queue behind these
constexpr int kBeyond = 4;  // behind the ring, into the L2 cache

// `count` units of two rows of `width` values. A step is 512 bytes of both rows of a unit; `rows(unit, r)` is where a row
// begins. kBits: 8 or 4 for integers.
template <typename T, int kDepth, int kBits = 8 * sizeof(T)> struct Product {
  static constexpr bool kPacked = kBits < 16;
  using Weight = std::conditional_t<kPacked, unsigned char, T>;
  static constexpr int kChunk = 128 / kBits, kStep = 32 * kChunk, kTeam = kProductThreads / 32;
  static constexpr int kHop = 16 / sizeof(Weight);  // from a lane's chunk to the next lane's
  static constexpr int kSlot = 64, kRing = kDepth * kSlot;  // in 16 bytes
  static constexpr int kFirst = kFlight < kDepth ? kFlight : kDepth;

  int width, steps, each, first, last;  // steps of a unit, and of a warp: [first, last)
  uint4* ring;  // where this lane's chunks begin
  float4* x;    // for 16-bit weights two planes: values 0-3 and 4-7 of every eight
  float *squares, *sums;
  int2 own;  // of the sums that make up the row of this thread
  Packing packed;

  static size_t bytes(int width, int units) {
    return kTeam * kRing * 16 + (ceil_div(width, kStep) * kStep + kTeam + 2 * (units + kTeam)) * sizeof(float);
  }

  __device__ __forceinline__ Product(unsigned char* memory, int width, int count, const Packing& f) : width(width), packed(f) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    steps = ceil_div(width, kStep), each = ceil_div(count * steps, kTeam);
    first = warp * each, last = min(first + each, count * steps);
    ring = reinterpret_cast<uint4*>(memory) + warp * kRing + lane;
    x = reinterpret_cast<float4*>(memory) + kTeam * kRing;
    squares = reinterpret_cast<float*>(x) + steps * kStep, sums = squares + kTeam;
    own = pieces(threadIdx.x / 2);
  }

  __device__ __forceinline__ int plane() const { return sizeof(T) == 4 ? 0 : steps * kStep / 8; }
  // Where the vector's values 4 i to 4 i + 3 are.
  __device__ __forceinline__ float4& quad(int i) const { return x[sizeof(T) == 4 ? i : (i & 1) * plane() + (i >> 1)]; }
  __device__ __forceinline__ int2 pieces(int unit) const { return {unit * steps / each, ((unit + 1) * steps - 1) / each}; }

  struct Cursor {
    int unit, step;
    const Weight *a, *b;  // this lane's chunks of both rows
  };
  template <typename F> __device__ __forceinline__ Cursor cursor(F&& rows) const {
    Cursor at{first / steps, first % steps, nullptr, nullptr};
    const int i = at.step * 32 * kHop + threadIdx.x % 32 * kHop;
    at.a = rows(at.unit, 0) + i, at.b = rows(at.unit, 1) + i;
    return at;
  }
  template <typename F> __device__ __forceinline__ void advance(Cursor& at, F&& rows) const {
    at.step++, at.a += 32 * kHop, at.b += 32 * kHop;
    if (at.step < steps) return;
    const int i = threadIdx.x % 32 * kHop;
    at.step = 0, at.unit++, at.a = rows(at.unit, 0) + i, at.b = rows(at.unit, 1) + i;
  }
  __device__ __forceinline__ bool inside(int step) const { return step * kStep + int(threadIdx.x % 32) * kChunk < width; }
  template <typename F> __device__ __forceinline__ void fetch(Cursor& at, uint4* slot, F&& rows) const {
    const bool some = inside(at.step);
    cp_async<16>(slot, at.a, some), cp_async<16>(slot + 32, at.b, some);
    advance(at, rows);
  }

  // What needs no predecessor: the first weights into the ring and into the L2 cache, and `factor` (null: ones) to where
  // the vector will be, zeros behind it.
  template <typename F> __device__ __forceinline__ Cursor begin(const T* factor, bool vector, F&& rows) const {
    Cursor ahead = cursor(rows);
    if (vector) {
#pragma unroll 1
      for (int s = 0; s < kFirst; s++) {
        if (first + s < last) fetch(ahead, ring + s * kSlot, rows);
        cp_async_commit();
      }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < steps * kStep / 4; i += kProductThreads) {
      float f[4];
#pragma unroll
      for (int j = 0; j < 4; j++) f[j] = 4 * i + j >= width ? 0.0f : factor ? to_float(factor[4 * i + j]) : 1.0f;
      quad(i) = make_float4(f[0], f[1], f[2], f[3]);
    }
    if (!vector) return ahead;
#pragma unroll 1
    for (int s = kFirst; s < kDepth; s++) {
      if (first + s < last) fetch(ahead, ring + s * kSlot, rows);
      cp_async_commit();
      cp_async_wait<kFirst>();
    }
    Cursor beyond = ahead;
#pragma unroll 1
    for (int s = kDepth; s < kDepth + kBeyond && first + s < last; s++) {
      if (threadIdx.x % 8 == 0 && inside(beyond.step)) prefetch_line(beyond.a), prefetch_line(beyond.b);
      advance(beyond, rows);
    }
    return ahead;
  }

  // The vector comes: factor times v.
  __device__ __forceinline__ void place(const float* v) const {
    constexpr int kBatch = 5;
    const int quads = width / 4;
    float square = 0.0f;
    if (width % 4 == 0) {
#pragma unroll 1
      for (int begin = threadIdx.x; begin < quads; begin += kBatch * kProductThreads) {
        float4 f[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
          const int i = begin + k * kProductThreads;
          if (i < quads) f[k] = __ldcg(reinterpret_cast<const float4*>(v) + i);
        }
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
          const int i = begin + k * kProductThreads;
          if (i >= quads) continue;
          square = fmaf(f[k].x, f[k].x, fmaf(f[k].y, f[k].y, fmaf(f[k].z, f[k].z, fmaf(f[k].w, f[k].w, square))));
          const float4 w = quad(i);
          quad(i) = make_float4(w.x * f[k].x, w.y * f[k].y, w.z * f[k].z, w.w * f[k].w);
        }
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i <= quads; i += kProductThreads) {
        float4 w = quad(i);
        float* each[4] = {&w.x, &w.y, &w.z, &w.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float f = 4 * i + j < width ? __ldcg(v + 4 * i + j) : 0.0f;
          square = fmaf(f, f, square), *each[j] *= f;
        }
        quad(i) = w;
      }
    }
    square = warp_total(square);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
  }

  // The norm's factor for all values: 1 / the root of the vector's mean square.
  __device__ __forceinline__ float scale(float eps) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kTeam; i++) total += squares[i];
    return rsqrtf(total / width + eps);
  }

  template <typename F> __device__ __forceinline__ void run(Cursor ahead, bool vector, F&& rows) const {
    const int lane = threadIdx.x % 32;
    int q = first, step = first % steps, place = first / steps + threadIdx.x / 32;
    float a = 0.0f, b = 0.0f;
    auto finish = [&] {  // the halves of the warp end up with one row each
      float sum = lane < 16 ? a : b;
      sum += __shfl_xor_sync(~0u, lane < 16 ? b : a, 16);
#pragma unroll
      for (int o = 8; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane % 16 == 0) sums[place * 2 + lane / 16] = sum;  // unit + warp only rises: a place for each pair of them
      a = b = 0.0f, step = 0, place++;
    };
    if constexpr (kPacked) {
      run_packed(ahead, rows, step, a, b, finish);
    } else if (vector) {
      uint4* slot = ring;
      const float4* at = x + step * 32 + lane;
#pragma unroll 1
      for (; q < last; q++) {
        cp_async_wait<kDepth - 1>();
        const uint4 w = slot[0], v = slot[32];
        const float4 low = at[0], high = at[plane()];
        if (q + kDepth < last) fetch(ahead, slot, rows);
        cp_async_commit();
        slot += kSlot, at += 32;
        if (slot == ring + kRing) slot = ring;
        a = dot16<T>(w, low, high, a), b = dot16<T>(v, low, high, b);
        if (++step == steps) finish(), at = x + lane;
      }
    } else {
      Cursor at = cursor(rows);
#pragma unroll 1
      for (; q < last; q++) {
#pragma unroll 1
        for (int j = 0; j < kChunk; j++) {
          const int i = at.step * kStep + lane * kChunk + j;
          if (i >= width) break;
          const float v = reinterpret_cast<const float*>(&quad(i / 4))[i % 4];
          a = fmaf(to_float(at.a[j]), v, a), b = fmaf(to_float(at.b[j]), v, b);
        }
        advance(at, rows);
        if (++step == steps) finish();
      }
    }
    if (step && first < last) finish();  // a warp without a part has no place among the sums
    __syncthreads();
  }

  // Integers: what run() does between its first and its last step.
  template <typename F, typename G>
  __device__ __forceinline__ void run_packed(Cursor ahead, F&& rows, int& step, float& a, float& b, G&& finish) const {
    using Dot = PackedDot<T, kBits>;
    const int lane = threadIdx.x % 32;
    uint4* slot = ring;
    int unit = first / steps;
    Dot of_a, of_b;
    auto scales = [&](int at) {  // of the step to come, a step ahead
      const int value = at * kStep + lane / 4 * Dot::kValues;
      if (value < width) of_a.load(rows(unit, 0), packed, value), of_b.load(rows(unit, 1), packed, value);
    };
    if (first < last) scales(step);
#pragma unroll 1
    for (int q = first; q < last; q++) {
      cp_async_wait<kDepth - 1>();
      const uint4 w = slot[0], v = slot[32];
      const float4* at = x + step * (kStep / 8) + lane / 4 * (Dot::kValues / 8) + lane % 4;
      of_a.next(), of_b.next();
      const bool ends = step + 1 == steps;
      unit += ends;
      if (q + 1 < last) scales(ends ? 0 : step + 1);
      if (q + kDepth < last) fetch(ahead, slot, rows);
      cp_async_commit();
      slot += kSlot;
      if (slot == ring + kRing) slot = ring;
      a = of_a.dot(w, at, plane(), a), b = of_b.dot(v, at, plane(), b);
      if (++step == steps) finish();
    }
  }

  // The product of row `i` of the units' rows.
  __device__ __forceinline__ float total(int i) const {
    const int2 range = i == int(threadIdx.x) ? own : pieces(i / 2);
    float sum = 0.0f;
#pragma unroll 1
    for (int w = range.x; w <= range.y; w++) sum += sums[(i / 2 + w) * 2 + i % 2];
    return sum;
  }
};

}  // namespace mamba::decode::chain
