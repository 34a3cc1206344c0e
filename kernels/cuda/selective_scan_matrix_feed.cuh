// selective_scan, tactic "matrix": slots of shared memory, and the feeding warps that fill them and finish y.
#pragma once

#include <algorithm>
#include <type_traits>

#include "selective_scan.cuh"
#include "selective_scan_mma.cuh"

namespace mamba::scan {

constexpr int kMatrixWarps = 12;  // of a block, at most

struct Matrix {
  static constexpr int kWidth = 16, kTokens = 16;  // channels of a group, tokens of a tile
  static constexpr int kChunk = 8;                 // channels a feeding lane has
  static constexpr int kSpan = 32;                 // tokens of a slot, two tiles
  // A tile in floats. Half of B: [octet of tokens][state][token]; C: [octet][half of the states][token][state]. Rows are padded
  // so that no banks collide.
  static constexpr int kRowB = 8 + 4, kOctetB = kState * kRowB + 8, kB = 2 * kOctetB, kC = kTokens * kState;
  // Then for each group. dt, the upper and the lower part of dt u: [channel % 8][3][token][channel / 8]; C h: [channel / 8][token]
  // [channel % 8]; u and z as they came: [token][channel / 8].
  static constexpr int kRow = 2 * kTokens + 4, kRows = 8 * 3 * kRow;
  static constexpr int kRowY = 8 + 4, kChunkY = kTokens * kRowY + 16, kY = 2 * kChunkY, kRaw = kTokens * 8;
  static __host__ __device__ int group_floats(int K) { return kRows + kY + 2 * kRaw + (32 / K + 3) / 4 * 4; }
  static __host__ __device__ int tile_floats(int K) {  // 16 more than whole rows of banks
    const int floats = kB + kC + K * group_floats(K);
    return floats + (48 - floats % 32) % 32;
  }
  static __host__ __device__ int slot_floats(int K) { return kSpan / kTokens * tile_floats(K); }
  // Carries [K][W][2][32] of four floats, bias and D of every channel, barriers: [K][W][2] and 2 a slot.
  static __host__ __device__ int fixed_bytes(int K, int W) {
    return int(2 * sizeof(float4) * K * W * 32 + 2 * sizeof(float) * K * kWidth + sizeof(uint64_t) * (2 * K * W + 16));
  }
};

// Slots that fit beside the rest; negative or 0 if not even that does.
inline int matrix_slots(const Tactic& t) {
  const int left = int(max_shared_bytes()) - Matrix::fixed_bytes(t.groups, t.warps);
  return std::min(8, left / int(sizeof(float) * Matrix::slot_floats(t.groups)));
}

// The unit truncates h, by this much on average (mantissas spread evenly in their logarithm: 2^-11 / (2 ln 2)).
template <typename T> constexpr float kUntruncate = 1.0f;
template <> constexpr float kUntruncate<__nv_bfloat16> = 1.0f + 3.5222e-4f;

// The compiler may not reckon these anew, in 64-bit steps, wherever they are used.
__device__ __forceinline__ void keep(char*& p, int& step) { asm volatile("" : "+l"(p), "+r"(step)); }
__device__ __forceinline__ uint4 load_global(const char* p) {
  uint4 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ void store_global(char* p, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// One lane of a feeding warp. An item of work is a K-th of the activations of one span, or its B and C: a slot is finished (y
// of the span it held) and filled. A lane has one token of one group; lanes go along the row of a token.
template <typename T> struct Feeder {
  using M = Matrix;
  using Two = pair_t<T>;
  static_assert(sizeof(T) == 2, "16-bit activations");

  // A tensor at token 0 and the block's first channel, in time order; bytes from token to token.
  struct Column {
    char* p;
    int token;
    __device__ __forceinline__ char* at(int t) const { return p + int64_t(t) * token; }
  };
  // What an item reads, fetched while the item before is worked on: u, delta and z of eight channels, or B and C.
  struct Raw {
    uint4 u, delta, z, more;
  };
  struct Item {
    int span, part, slot, lap;  // part = the number of chunks: B and C; slot and lap: span % slots, span / slots
  };
  struct Place {
    int t, chunk;  // token of the span, eight channels of the block
  };

  int n, lane, chunks, reciprocal;
  bool softplus, gated;
  Column u, delta, z, y, B, C;
  const float *bias, *D;  // of the block's channels, in shared memory

  __device__ __forceinline__ Feeder(const Args<T>& p, int b, int group, int c0, int chunks, int n, const float* bias, const float* D)
      : n(n), lane(threadIdx.x % 32), chunks(chunks), reciprocal(ceil_div(1 << 16, chunks)), softplus(p.softplus), gated(p.z), bias(bias),
        D(D) {
    auto column_of = [&](const T* base, const Strides& s, int c) {
      int token = int(p.reverse ? -s.token : s.token) * int(sizeof(T));
      char* first = reinterpret_cast<char*>(const_cast<T*>(base) + b * s.batch + (p.reverse ? n - 1 : 0) * s.token + c);
      keep(first, token);
      return Column{first, token};
    };
    u = column_of(p.u, p.u_stride, c0), delta = column_of(p.delta, p.delta_stride, c0);
    y = column_of(p.y, p.y_stride, c0), z = p.z ? column_of(p.z, p.z_stride, c0) : u;
    B = column_of(p.B, p.B_stride, group * kState), C = column_of(p.C, p.C_stride, group * kState);
  }

  __device__ __forceinline__ Place place(const Item& item) const {
    const int i = item.part * 32 + lane, t = i * reciprocal >> 16;
    return {t, i - t * chunks};
  }

  // Past the end of the row: its last token again, whose dt becomes 0.
  __device__ __forceinline__ void fetch(Raw& raw, const Item& item) const {
    const int first = item.span * M::kSpan;
    if (item.part == chunks) {
      const int t = min(first + lane, n - 1);
      const char *b = B.at(t), *c = C.at(t);
      raw = {load_global(b), load_global(b + 16), load_global(c), load_global(c + 16)};
    } else {
      const Place own = place(item);
      const int t = min(first + own.t, n - 1), at = own.chunk * 16;
      raw.u = load_global(u.at(t) + at), raw.delta = load_global(delta.at(t) + at);
      if (gated) raw.z = load_global(z.at(t) + at);
    }
  }

  __device__ __forceinline__ static float2 two(uint32_t bits) { return to_float2(*reinterpret_cast<const Two*>(&bits)); }
  __device__ __forceinline__ static void eight(float (&f)[8], const uint4& raw) {
    const float2 v[4] = {two(raw.x), two(raw.y), two(raw.z), two(raw.w)};
#pragma unroll
    for (int i = 0; i < 4; i++) f[2 * i] = v[i].x, f[2 * i + 1] = v[i].y;
  }
  __device__ __forceinline__ static void eight(float (&f)[8], const float* from) {
    const Vec<float, 4> a = load_vec<float, 4>(from), b = load_vec<float, 4>(from + 4);
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = a.v[i], f[4 + i] = b.v[i];
  }

  // y of a span; `from`: the group's part of this lane's tile.
  __device__ __forceinline__ void finish(const float* from, int span, const Place& own) const {
    const int t = span * M::kSpan + own.t, row = own.t % M::kTokens, odd = own.chunk % 2;
    const float *h = from + M::kRows + odd * M::kChunkY + row * M::kRowY, *raw = from + M::kRows + M::kY + row * 8 + odd * 4;
    constexpr float kScale = kUntruncate<T>, kInverse = 1.0f / kScale;
    float v[8], skip[8], x[8], g[8];
    eight(v, h), eight(skip, D + own.chunk * M::kChunk), eight(x, *reinterpret_cast<const uint4*>(raw));
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = fmaf(skip[i], x[i], v[i]);
    if (gated) {  // silu with the scale in its denominator
      eight(g, *reinterpret_cast<const uint4*>(raw + M::kRaw));
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] *= g[i] * rcp(fmaf(ex2(-kLog2e * g[i]), kInverse, kInverse));
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] *= kScale;
    }
    Two out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = from_float2<T>(v[2 * i], v[2 * i + 1]);
    if (t < n) store_global(y.at(t) + own.chunk * 16, *reinterpret_cast<const uint4*>(out));
  }

  __device__ __forceinline__ void fill(float* to, const Raw& raw, int span, const Place& own) const {
    float dt[8], w[8], shift[8];
    eight(dt, raw.delta), eight(w, raw.u), eight(shift, bias + own.chunk * M::kChunk);
#pragma unroll
    for (int i = 0; i < 8; i++) dt[i] += shift[i];
    if (softplus) {
#pragma unroll
      for (int i = 0; i < 8; i++) dt[i] = mamba::softplus<false>(dt[i]);
    }
    if ((span + 1) * M::kSpan > n) {
#pragma unroll
      for (int i = 0; i < 8; i++) dt[i] = span * M::kSpan + own.t < n ? dt[i] : 0.0f;
    }
    const int token = own.t % M::kTokens, odd = own.chunk % 2;
    float* row = to + 2 * token + odd;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      w[i] *= dt[i];
      row[3 * i * M::kRow] = dt[i], row[(3 * i + 1) * M::kRow] = w[i], row[(3 * i + 2) * M::kRow] = lower(w[i]);
    }
    uint4* kept = reinterpret_cast<uint4*>(to + M::kRows + M::kY + token * 8 + odd * 4);
    kept[0] = raw.u;
    if (gated) kept[M::kRaw / 4] = raw.z;
  }

  // `tile`: that of the token `lane`.
  __device__ __forceinline__ void fill_states(float* tile, const Raw& raw) const {
    const int token = lane % M::kTokens;
    float* b = tile + token / 8 * M::kOctetB + token % 8;
    float* c = tile + M::kB + token / 8 * 128 + token % 8 * 8;
    auto half = [&](float* b, float* c, const uint4& raw_b, const uint4& raw_c) {
      float f[8], v[8];
      eight(f, raw_b), eight(v, raw_c);
#pragma unroll
      for (int i = 0; i < 8; i++) b[M::kRowB * i] = 0.5f * f[i];
      store_vec<float, 4>(c, {v[0], v[1], v[2], v[3]});
      store_vec<float, 4>(c + 4, {v[4], v[5], v[6], v[7]});
    };
    half(b, c, raw.u, raw.z), half(b + 8 * M::kRowB, c + 64, raw.delta, raw.more);
  }
};

}  // namespace mamba::scan
