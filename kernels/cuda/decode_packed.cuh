// Products of integer weights that come through the ring: TensorProduct and HeldProduct again, whose fragments are integers
// made into pairs, and whose sums of 32 values take the scale.
#pragma once

#include "decode_integers.cuh"
#include "decode_product.cuh"

namespace mamba::decode {

// A tile's first product: multiply() with nothing to add to.
template <typename T>
__device__ __forceinline__ void multiply_first(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%10,%10,%10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%10,%10,%10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
  }
}

// A lane has the same rows, pieces and columns as in TensorProduct, but a step is 64 bytes of a row, and rows lie so that
// neighbours share no bank: pieces of the same row are those of lanes further apart.
template <typename T, int kBits> struct PackedProduct {
  using I = Integers<T, kBits>;
  static constexpr int kSubs = I::kSubs;
  const Shape& s;
  int rows;                // of this block
  const unsigned char* x;  // where this lane's column begins
  int a, first_value, below, row, piece, lane, warp;
  bool zero;

  __device__ __forceinline__ PackedProduct(const Shape& shape, int block_rows, const Vector<T>& v, bool use_low)
      : s(shape), rows(block_rows), lane(threadIdx.x & 31), warp(threadIdx.x >> 5) {
    const int g = lane >> 2, t = lane & 3, rows_shift = 3 - s.segment_shift(), length = s.steps * kUnit;
    row = g & ((1 << rows_shift) - 1), piece = g >> rows_shift;
    below = s.packed.row_bytes << rows_shift;
    a = piece * length + t * 16, first_value = piece * s.steps * I::kValues;
    x = v.at + ((g >> 1) & (s.segments - 1)) * length * kSubs + t * 16 + (g & 1) * v.low;
    zero = (g & 1) && !use_low;
  }

  // Calls store(row, term, value) from one lane each.
  template <typename F> __device__ __forceinline__ void run(const Ring& ring, Cursor& cursor, F&& store) const {
    const int tile_rows = s.tile_rows(), stride = s.whole ? 1 : kWarps, begin = s.whole ? 0 : warp;
#pragma unroll 1
    for (int first = 0; first < rows; first += 1 << s.shift, cursor.advance(ring.slots)) {
      ring.wait(cursor);
      const int here = min(rows - first, 1 << s.shift);
      const unsigned char* data = ring.at(cursor.slot) + row * s.packed.row_bytes;
      const bool mine = !s.whole || (first >> s.shift) % kWarps == warp;
#pragma unroll 1
      for (int tile = 0; mine && tile < here; tile += tile_rows, data += tile_rows * s.packed.row_bytes) {
        float upper = 0.0f, lower = 0.0f;
#pragma unroll 1
        for (int at = begin; at < s.steps; at += stride) {
          if (Scales<T, kBits>::fine(s.packed)) step<true>(data, at, upper, lower);
          else step<false>(data, at, upper, lower);
        }
        give(upper, lower, first, tile, here, store);
      }
      __syncwarp();
      if (lane == 0) ring.release(cursor.slot);
    }
  }

 private:
  __device__ __forceinline__ static uint4 load(const unsigned char* p) { return *reinterpret_cast<const uint4*>(p); }

  // The sums of a tile's upper and lower half; of use are those in the lane where the columns are the piece's.
  template <typename F>
  __device__ __forceinline__ void give(float upper, float lower, int first, int tile, int here, F&& store) const {
    bool speaks = (lane & 3) == piece;
    const int row_a = tile + row, row_b = row_a + s.tile_rows() / 2;
    if (s.whole) {
      if (!speaks) upper = lower = 0.0f;
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        if (o >= 4 && o < 32 >> s.segment_shift()) continue;  // lanes of other rows
        upper += __shfl_xor_sync(~0u, upper, o);
        lower += __shfl_xor_sync(~0u, lower, o);
      }
      speaks = (lane & 3) == 0 && piece == 0;
    }
    const int term = s.whole ? 0 : warp * s.segments + piece;
    if (speaks && row_a < here) store(first + row_a, term, upper);
    if (speaks && row_b < here) store(first + row_b, term, lower);
  }

  // Rows past the last are read too, whatever is there: their results go nowhere.
  template <bool kFine>
  __device__ __forceinline__ void step(const unsigned char* data, int at, float& upper, float& lower) const {
    const uint4 top = load(data + a + at * kUnit), bottom = load(data + a + at * kUnit + below);
    Scales<T, kBits> of_top, of_bottom;
    of_top.template load<kFine>(data, s.packed, first_value + at * I::kValues);
    of_bottom.template load<kFine>(data + below, s.packed, first_value + at * I::kValues);
    const unsigned char* column = x + at * kUnit * kSubs;
    float c[kSubs][4];
#pragma unroll
    for (int i = 0; i < kSubs; i++) {
      uint4 v = load(column + i * 64);
      if (zero) v = make_uint4(0, 0, 0, 0);
      const uint4 p = I::values(top, i, of_top.zero[i]), q = I::values(bottom, i, of_bottom.zero[i]);
      multiply_first<T>(c[i], p.x, q.x, p.y, q.y, v.x, v.y);
      multiply<T>(c[i], p.z, q.z, p.w, q.w, v.z, v.w);
    }
#pragma unroll
    for (int i = 0; i < kSubs; i++) {
      upper = fmaf(of_top.scale[i], c[i][0] + c[i][1], upper);
      lower = fmaf(of_bottom.scale[i], c[i][2] + c[i][3], lower);
    }
  }
};

// The integers become pairs before the vector is there; behind it a sum takes its scale, and nothing else is different.
template <typename T, int kChunks, int kBits> struct PackedHeld : HeldProduct<T, kChunks> {
  using Base = HeldProduct<T, kChunks>;
  using I = Integers<T, kBits>;
  using Base::held, Base::rows, Base::warp, Base::lane, Base::has;
  static constexpr int kGroups = Base::kGroups;
  float scales[kGroups][kChunks];  // of the half of a chunk that this lane's sums are of

  using Base::Base;

  __device__ __forceinline__ void hold(const Ring& ring, Cursor cursor, const Shape& s) {
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
#pragma unroll
      for (int k = 0; k < kChunks; k++) held[i][k][0] = held[i][k][1] = make_uint4(0, 0, 0, 0), scales[i][k] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      const int in_slot = (8 * i) & ((1 << s.shift) - 1);
      if (8 * i >= rows) break;
      if (i > 0 && in_slot == 0) cursor.advance(ring.slots);
      if (in_slot == 0) ring.wait(cursor);
      const unsigned char* row = ring.at(cursor.slot) + (in_slot + (lane >> 2)) * s.packed.row_bytes;
#pragma unroll
      for (int k = 0; k < kChunks; k++) {
        if (has(k)) hold(row, s.packed, warp * kChunks + k, held[i][k], scales[i][k]);
      }
    }
  }

  __device__ __forceinline__ void run(const Vector<T>& v, bool use_low, float* terms) const {
    float c[kGroups][kChunks][2][4] = {};
#pragma unroll
    for (int k = 0; k < kChunks; k++) {
      uint2 b = *reinterpret_cast<const uint2*>(v.at + this->x_at + k * 128);
      if (!has(k) || (!use_low && this->low)) b = make_uint2(0, 0);
#pragma unroll
      for (int i = 0; i < kGroups; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4& a = held[i][k][h];
          multiply<T>(c[i][k][h], a.x, a.y, a.z, a.w, b.x, b.y);
        }
      }
    }
    const bool other = lane & 2;
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kChunks; k++) {
        const float even = other ? c[i][k][1][0] + c[i][k][1][1] : c[i][k][0][0] + c[i][k][0][1];
        const float odd = other ? c[i][k][1][2] + c[i][k][1][3] : c[i][k][0][2] + c[i][k][0][3];
        sum = fmaf(scales[i][k], this->odd ? odd : even, sum);
      }
      terms[this->terms_at + 8 * i * kHeldTerms] = sum;
    }
  }

 private:
  // A chunk: 64 values of a row.
  __device__ __forceinline__ void hold(const unsigned char* row, const Packing& f, int chunk, uint4 (&to)[2],
                                       float& scale) const {
    const int t = lane & 3, value = chunk * 64;
    uint32_t zero[2];
#pragma unroll
    for (int h = 0; h < 2; h++) zero[h] = Scales<T, kBits>::zero_at(Scales<T, kBits>::place(row, f, value + 32 * h), f);
    scale = to_float(*Scales<T, kBits>::place(row, f, value + 32 * (t >> 1)));
    if constexpr (kBits == 8) {
      const uint4 raw = *reinterpret_cast<const uint4*>(row + chunk * kUnit + t * 16);
      to[0] = I::values(raw, 0, zero[0]), to[1] = I::values(raw, 1, zero[1]);
    } else {
      const uint2 raw = *reinterpret_cast<const uint2*>(row + chunk / 2 * kUnit + t * 16 + chunk % 2 * 8);
      to[0] = I::nibbles(raw.x, zero[0]), to[1] = I::nibbles(raw.y, zero[1]);
    }
  }
};

}  // namespace mamba::decode
