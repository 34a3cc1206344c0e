// Matrix-vector products whose rows come through the ring, and the sums around them.
#pragma once

#include <type_traits>

#include "decode_plan.cuh"
#include "decode_ring.cuh"

namespace mamba::decode {

__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

// The value, computed here and not where it is used: ahead of a wait, not behind it.
__device__ __forceinline__ int keep(int v) {
  asm volatile("// keep" : "+r"(v));
  return v;
}

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

// The vector of a product in shared memory: for tensor cores a high and a low part of the 16-bit type, `low` bytes apart; in
// float32 two planes (values 0-3 and 4-7 of every eight).
template <typename T> struct Vector {
  unsigned char* at;
  int low;
  static constexpr bool kTensor = sizeof(T) == 2;
  // float16's range is short: the residual is scaled down on its way into the tensor cores.
  static constexpr float kShrink = std::is_same_v<T, __half> ? 1.0f / 16 : 1.0f;

  Vector() = default;
  __device__ __forceinline__ Vector(unsigned char* memory, int widest) : at(memory), low((kTensor ? 2 : 0) * widest + 64) {}

  // Where values i and i + 1 lie; kHeld: of every four pairs the even ones first, for HeldProduct.
  template <bool kHeld> __device__ __forceinline__ static int offset(int i) {
    return kHeld ? (i & ~7) * 2 + (i & 2) * 4 + (i & 4) : i * 2;
  }
  // Values i and i + 1 of `width`; `where` is their offset.
  __device__ __forceinline__ void place(int i, int where, int width, float a, float b) const {
    if constexpr (kTensor) {
      auto clamped = [](float v) { return std::is_same_v<T, __half> ? fminf(fmaxf(v, -65504.0f), 65504.0f) : v; };
      a = clamped(a * kShrink), b = clamped(b * kShrink);
      const pair_t<T> high = from_float2<T>(a, b);
      const float2 h = to_float2(high);
      unsigned char* to = at + where;
      *reinterpret_cast<pair_t<T>*>(to) = high;
      *reinterpret_cast<pair_t<T>*>(to + low) = from_float2<T>(a - h.x, b - h.y);
    } else {
      float* to = reinterpret_cast<float*>(at) + (i % 8 / 4) * (width / 2) + i / 8 * 4 + i % 4;
      *reinterpret_cast<float2*>(to) = make_float2(a, b);
    }
  }
};

// Eight weights from shared memory times eight values, x being the two planes.
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

// The consumers' side of a matrix-vector product whose rows come through the ring, float32 weights: a warp has a row or
// two. Calls store(row, term, value) from one lane.
struct Product {
  const Ring& ring;
  Cursor& cursor;  // the same in every warp between stages
  const float4* x;
  int warp, lane;

  template <typename F> __device__ __forceinline__ void run(const Shape& s, int rows, F&& store) {
    Cursor at = cursor;
    const int slots = ((rows - 1) >> s.shift) + 1, tasks = (rows + s.each - 1) / s.each << s.part_shift;
    int passed = 0;
#pragma unroll 1
    for (int task = warp; task < tasks; task += kWarps) {
      const int row = (task >> s.part_shift) * s.each, part = task & ((1 << s.part_shift) - 1), slot = row >> s.shift;
      for (;; passed++, at.advance(ring.slots)) {  // every slot in turn: a release must not overtake a refill
        ring.wait(at);
        if (passed == slot) break;
        __syncwarp();
        if (lane == 0) ring.release(at.slot);
      }
      const float* data = reinterpret_cast<const float*>(ring.at(at.slot)) + (row - (slot << s.shift)) * s.width;
      const int from = s.turns * part >> s.part_shift, to = s.turns * (part + 1) >> s.part_shift;
      float sum[2] = {0.0f, 0.0f};
      if (s.each == 2) dots<float, 2>(data, x, s.width, from, to, sum);
      else dots<float, 1>(data, x, s.width, from, to, sum);
      warp_sum(sum);
      if (lane == 0) store(row, part, sum[0]);
      // Of an odd number of rows the last has a neighbour too: what the slot held before.
      if (s.each == 2 && lane == 0 && row + 1 < rows) store(row + 1, part, sum[1]);
    }
    for (; passed < slots; passed++, at.advance(ring.slots)) {
      ring.wait(at);
      __syncwarp();
      if (lane == 0) ring.release(at.slot);
    }
    cursor = at;
  }
};

// A tile of 16 rows times 8 columns, 16 values deep.
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The same for 16-bit weights on tensor cores.
//
// A tile of 16 rows is multiplied by 8 columns, of which a vector needs one. The others make up for it: two columns are
// the high and the low part, so that x keeps float32's precision nearly; and there are four such pairs. With one piece a
// row, odd rows take the 64-byte halves of every 128 bytes in the other order than even ones (two pairs), so that
// neighbouring rows never meet in a bank of shared memory. With few rows a row is cut into 2 or 4 pieces, each a row of
// the tile with a pair of its own. The order of the values inside a product is free, so fragments are loaded by 16 bytes.
template <typename T> struct TensorProduct {
  const Shape& s;
  int rows;                // of this block
  const unsigned char* x;  // where this lane's column begins
  int a, below, flip, x_flip, row, pair, piece, lane, warp;
  bool zero;

  // Everything that does not depend on the data: time to spend before the data arrive.
  __device__ __forceinline__ TensorProduct(const Shape& shape, int block_rows, const Vector<T>& v, bool use_low)
      : s(shape), rows(block_rows), lane(threadIdx.x & 31), warp(threadIdx.x >> 5) {
    const int g = lane >> 2, t = lane & 3, seg_shift = s.segment_shift(), length = s.steps * 128;  // log2; bytes of a piece
    const int pairs = s.segments == 4 ? 4 : 2, x_pair = (g >> 1) & (pairs - 1);
    pair = g & (pairs - 1), piece = g & (s.segments - 1), row = g >> seg_shift;
    below = (8 >> seg_shift) * s.width * 2;
    a = row * s.width * 2 + piece * length + t * 16 + (pair & 1) * 64;
    flip = pair & 1 ? -64 : 64, x_flip = x_pair & 1 ? -64 : 64;
    x = v.at + (s.segments == 1 ? 0 : x_pair * length) + t * 16 + (x_pair & 1) * 64 + (g & 1) * v.low;
    zero = (g & 1) && !use_low;
  }

  // Calls store(row, term, value) from one lane each.
  template <typename F> __device__ __forceinline__ void run(const Ring& ring, Cursor& cursor, F&& store) const {
    const int length = s.steps * 128, tile_rows = s.tile_rows(), stride = s.whole ? 128 : kWarps * 128;
    const int begin = s.whole ? 0 : warp * 128;
    const bool chosen = (lane & 3) == pair;
#pragma unroll 1
    for (int first = 0; first < rows; first += 1 << s.shift, cursor.advance(ring.slots)) {
      ring.wait(cursor);
      const int here = min(rows - first, 1 << s.shift);
      const unsigned char* data = ring.at(cursor.slot) + a;
      const bool mine = !s.whole || (first >> s.shift) % kWarps == warp;
#pragma unroll 1
      for (int tile = 0; mine && tile < here; tile += tile_rows, data += tile_rows * s.width * 2) {
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int at = begin; at < length; at += stride) {
          // Rows past the last are read too, whatever is there: their results go nowhere.
          const uint4 top = load(data + at), top2 = load(data + at + flip);
          const uint4 bottom = load(data + at + below), bottom2 = load(data + at + below + flip);
          uint4 v = load(x + at), v2 = load(x + at + x_flip);
          if (zero) v = v2 = make_uint4(0, 0, 0, 0);
          multiply<T>(c, top.x, bottom.x, top.y, bottom.y, v.x, v.y);
          multiply<T>(c, top.z, bottom.z, top.w, bottom.w, v.z, v.w);
          multiply<T>(c, top2.x, bottom2.x, top2.y, bottom2.y, v2.x, v2.y);
          multiply<T>(c, top2.z, bottom2.z, top2.w, bottom2.w, v2.z, v2.w);
        }
        float upper = c[0] + c[1], lower = c[2] + c[3];  // of use in the lane where the columns are the pair's
        const int row_a = tile + row, row_b = row_a + tile_rows / 2;
        if (s.whole) {
          if (!chosen) upper = lower = 0.0f;
#pragma unroll
          for (int o = 1; o < 16; o *= 2) {
            if (o < 4 * s.segments) {
              upper += __shfl_xor_sync(~0u, upper, o);
              lower += __shfl_xor_sync(~0u, lower, o);
            }
          }
          const bool first_lane = (lane & 3) == 0 && piece == 0;
          if (first_lane && row_a < here) store(first + row_a, 0, upper);
          if (first_lane && row_b < here) store(first + row_b, 0, lower);
        } else if (chosen) {
          const int term = warp * s.segments + piece;
          if (row_a < here) store(first + row_a, term, upper);
          if (row_b < here) store(first + row_b, term, lower);
        }
      }
      __syncwarp();
      if (lane == 0) ring.release(cursor.slot);
    }
  }

 private:
  __device__ __forceinline__ static uint4 load(const unsigned char* p) { return *reinterpret_cast<const uint4*>(p); }
};

// 16-bit, few rows and a short vector: every warp has kChunks chunks of 64 values, of all rows, and takes its weights into
// registers before the vector is there. What remains then is a load and a few independent products.
//
// The two halves of a tile are the even and the odd words of the same 8 rows, so that 16 bytes from shared memory are a
// fragment as they lie there. Of a chunk's two halves of 64 bytes odd rows take the second first: no bank conflicts. The
// columns are, high and low part each, half 0 even, half 0 odd, half 1 even, half 1 odd; each lane finds in its columns one
// of the four sums that make up a row's result: they go to shared memory as four terms.
template <typename T, int kChunks> struct HeldProduct {
  static constexpr int kGroups = kHeldUnits / kChunks;
  uint4 held[kGroups][kChunks][2];
  int width, rows, lane, warp;
  int x_at, terms_at;
  bool low, other, odd;

  __device__ __forceinline__ HeldProduct(const Vector<T>& v, int vector, int block_rows, int own_lane, int own_warp)
      : width(vector), rows(block_rows), lane(own_lane), warp(own_warp) {
    const int g = lane >> 2, t = lane & 3;
    x_at = keep(warp * kChunks * 128 + (g >> 2) * 64 + t * 16 + (g >> 1 & 1) * 8 + (g & 1) * v.low);
    terms_at = keep(g * kHeldTerms + warp * 4 + t);
    low = g & 1, other = (t >> 1) != (g & 1), odd = t & 1;
  }

  __device__ __forceinline__ bool has(int chunk) const { return (warp * kChunks + chunk) * 64 < width; }

  __device__ __forceinline__ void hold(const Ring& ring, Cursor cursor, int shift) {
    const int g = lane >> 2, at = (lane & 3) * 16 + (g & 1) * 64, flip = g & 1 ? -64 : 64;
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
#pragma unroll
      for (int k = 0; k < kChunks; k++) held[i][k][0] = held[i][k][1] = make_uint4(0, 0, 0, 0);  // else it is live always
    }
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      const int in_slot = (8 * i) & ((1 << shift) - 1);
      if (8 * i >= rows) break;
      if (i > 0 && in_slot == 0) cursor.advance(ring.slots);
      if (in_slot == 0) ring.wait(cursor);
      // Rows past the last are read too, whatever is there: their results go nowhere.
      const unsigned char* data = ring.at(cursor.slot) + ((in_slot + g) * width + warp * kChunks * 64) * 2 + at;
#pragma unroll
      for (int k = 0; k < kChunks; k++) {
        if (!has(k)) break;
        held[i][k][0] = *reinterpret_cast<const uint4*>(data + k * 128);
        held[i][k][1] = *reinterpret_cast<const uint4*>(data + k * 128 + flip);
      }
    }
  }

  // The results of row r go to terms + r * kHeldTerms, those of rows that the block does not have too.
  __device__ __forceinline__ void run(const Vector<T>& v, bool use_low, float* terms) const {
    float c[kGroups][2][4] = {};
#pragma unroll
    for (int k = 0; k < kChunks; k++) {
      uint2 b = *reinterpret_cast<const uint2*>(v.at + x_at + k * 128);
      if (!has(k) || (!use_low && low)) b = make_uint2(0, 0);
#pragma unroll
      for (int i = 0; i < kGroups; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4& a = held[i][k][h];
          multiply<T>(c[i][h], a.x, a.y, a.z, a.w, b.x, b.y);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      const float even_sum = other ? c[i][1][0] + c[i][1][1] : c[i][0][0] + c[i][0][1];
      const float odd_sum = other ? c[i][1][2] + c[i][1][3] : c[i][0][2] + c[i][0][3];
      terms[terms_at + 8 * i * kHeldTerms] = odd ? odd_sum : even_sum;
    }
  }

  // When the weights are used up.
  __device__ __forceinline__ void release(const Ring& ring, Cursor& cursor, int shift) const {
#pragma unroll 1
    for (int i = 0; i < rows; i += 1 << shift, cursor.advance(ring.slots)) {
      if (lane == 0) ring.release(cursor.slot);
    }
  }
};

template <typename T> __device__ __forceinline__ float rounded(float v) {
  if constexpr (sizeof(T) == 2) return to_float2(from_float2<T>(v, v)).x;  // pairs convert faster than one value
  else return v;
}

}  // namespace mamba::decode
