// Integer weights: how a row is laid out (decode_stack.h), and integers as pairs of the 16-bit type.
//
// An integer becomes a number by standing in the mantissa of a power of two: 128 + q in bfloat16, 1024 + q in float16. What
// is subtracted then is exact. Products are of whole numbers; their sums over 32 values or more take the scale, in float32.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "mamba/decode_stack.h"

namespace mamba::decode {

// A row's bytes, where its scales begin, from a scale to its zero point (in values; 0: none), log2 of a group's values.
struct Packing {
  int row_bytes, scales, zeros, shift;
};

constexpr int kUnit = 64;  // bytes of integers that four lanes have

__host__ __device__ inline Packing packing_of(const mamba_decode_stack_params& p, int width, int bits) {
  Packing f{0, width * bits / 8, 0, 30};
  const int groups = mamba_decode_scales(p.group_size, width);
  for (int k = 5; k < 30; k++) f.shift = p.group_size == 1 << k ? k : f.shift;
  f.zeros = p.zero_points && bits == 4 ? groups : 0;
  // An odd number of units: neighbouring rows lie in other banks of shared memory.
  f.row_bytes = mamba_decode_row_bytes(bits, width, groups + f.zeros);
  return f;
}

// A model of int4 some of whose matrices are int8, where kernels are told by the bits of their integers.
constexpr int kMixed = 12;

// The bits of a matrix whose own field says `own`.
__host__ __device__ inline int bits_of(const mamba_decode_stack_params& p, int own) { return own ? own : p.weight_bits; }

// 0, 8, 4 or kMixed.
inline int model_bits(const mamba_decode_stack_params& p) {
  bool wide = p.head_bits == 8;
  for (int i = 0; i < p.n_layer; i++) wide |= p.layers[i].in_proj_bits == 8 || p.layers[i].out_proj_bits == 8;
  return p.weight_bits == 4 && wide ? kMixed : p.weight_bits;
}

// Whether the parameters describe integer weights that exist.
inline int check_integers(const mamba_decode_stack_params& p) {
  const auto known = [&](int own) { return own == 0 || (own == 8 && p.weight_bits); };
  bool all_known = known(p.head_bits);
  for (int i = 0; i < p.n_layer; i++) all_known &= known(p.layers[i].in_proj_bits) && known(p.layers[i].out_proj_bits);
  if (!all_known) return MAMBA_ERROR_DTYPE;
  if (p.weight_bits == 0) return p.group_size || p.zero_points || p.embedding_packed ? MAMBA_ERROR_DTYPE : MAMBA_OK;
  if ((p.weight_bits != 8 && p.weight_bits != 4) || p.dtype == MAMBA_F32) return MAMBA_ERROR_DTYPE;
  if (p.zero_points && p.weight_bits != 4) return MAMBA_ERROR_DTYPE;
  if (p.group_size && (p.group_size < 32 || p.group_size & (p.group_size - 1))) return MAMBA_ERROR_SHAPE;
  const bool whole = p.d_model % (512 / p.weight_bits) == 0 && p.d_inner % (512 / p.weight_bits) == 0;
  return whole ? MAMBA_OK : MAMBA_ERROR_SHAPE;
}

// (v & mask) ^ magic in one instruction, which the compiler makes two of.
__device__ __forceinline__ uint32_t masked(uint32_t v, uint32_t mask, uint32_t magic) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(v), "r"(mask), "r"(magic));
  return out;
}

// Pairs of the 16-bit type as they lie in a register.
template <typename T> struct Pairs {
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr uint32_t kMagic = kHalf ? 0x64006400u : 0x43004300u;  // 1024 or 128, twice

  __device__ __forceinline__ static uint32_t minus(uint32_t a, uint32_t b) {
    const pair_t<T> v = __hsub2(*reinterpret_cast<const pair_t<T>*>(&a), *reinterpret_cast<const pair_t<T>*>(&b));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  // Bytes 0 and 2, which are signed. In bfloat16 seven bits have room: the sign's weight makes the number subtracted larger.
  __device__ __forceinline__ static uint32_t bytes(uint32_t v) {
    if constexpr (kHalf) return minus(masked(v, 0x00ff00ffu, 0x64806480u), 0x64806480u);
    else return minus(masked(v, 0x007f007fu, kMagic), masked(v, 0x00800080u, kMagic));
  }
  // Nibbles 0 and 4, less `zero`, which has the power of two in it.
  __device__ __forceinline__ static uint32_t nibbles(uint32_t v, uint32_t zero) {
    return minus(masked(v, 0x000f000fu, kMagic), zero);
  }
  static constexpr uint32_t kEight = kMagic + 0x00080008u;  // the zero of 4 bits
  __device__ __forceinline__ static uint32_t zero_of(const T* at) {
    const uint32_t twice = *reinterpret_cast<const uint16_t*>(at) * 0x10001u;
    return minus(kMagic, twice ^ 0x80008000u);
  }
};

// Of a lane's 16 bytes the integers that belong to the sub-th 32 values, as four pairs: values 0 and 1, 2 and 3, ...
template <typename T, int kBits> struct Integers {
  static constexpr int kSubs = 16 / kBits, kValues = 32 * kSubs;  // in 64 bytes of a row

  __device__ __forceinline__ static uint4 eight(uint32_t low, uint32_t high) {
    using P = Pairs<T>;
    return make_uint4(P::bytes(low), P::bytes(low >> 8), P::bytes(high), P::bytes(high >> 8));
  }
  __device__ __forceinline__ static uint4 nibbles(uint32_t v, uint32_t zero) {
    using P = Pairs<T>;
    return make_uint4(P::nibbles(v, zero), P::nibbles(v >> 4, zero), P::nibbles(v >> 8, zero), P::nibbles(v >> 12, zero));
  }
  __device__ __forceinline__ static uint4 values(const uint4& raw, int sub, uint32_t zero) {
    if constexpr (kBits == 8) return sub ? eight(raw.z, raw.w) : eight(raw.x, raw.y);
    else return nibbles(sub == 0 ? raw.x : sub == 1 ? raw.y : sub == 2 ? raw.z : raw.w, zero);
  }
};

// Scales and zeros of 64 bytes of integers of a row.
template <typename T, int kBits> struct Scales {
  using I = Integers<T, kBits>;
  float scale[I::kSubs];
  uint32_t zero[I::kSubs];

  // Of 32 values, `value` being the first.
  __device__ __forceinline__ static const T* place(const unsigned char* row, const Packing& f, int value) {
    return reinterpret_cast<const T*>(row + f.scales) + (value >> f.shift);
  }
  __device__ __forceinline__ static uint32_t zero_at(const T* scale, const Packing& f) {
    return kBits == 4 && f.zeros ? Pairs<T>::zero_of(scale + f.zeros) : Pairs<T>::kEight;
  }
  // kFine: they may have several groups.
  __device__ __forceinline__ static bool fine(const Packing& f) { return (1 << f.shift) < I::kValues; }
  template <bool kFine> __device__ __forceinline__ void load(const unsigned char* row, const Packing& f, int value) {
#pragma unroll
    for (int i = 0; i < I::kSubs; i++) {
      if (i > 0) scale[i] = scale[0], zero[i] = zero[0];
      if (i > 0 && !kFine) continue;
      const T* at = place(row, f, value + 32 * i);
      scale[i] = to_float(*at), zero[i] = zero_at(at, f);
    }
  }
};

// A token's row of the embedding, value by value. kBits: 16 where it can't be integers.
template <typename T, int kBits> struct EmbeddingRow {
  const unsigned char* row;
  Packing f;
  int bits;  // 0: the row is of T

  __device__ __forceinline__ EmbeddingRow(const mamba_decode_stack_params& p, int64_t token) : f(), bits(0) {
    int64_t bytes = int64_t(p.d_model) * sizeof(T);
    if (kBits < 16 && p.embedding_packed) bits = bits_of(p, p.head_bits), f = packing_of(p, p.d_model, bits), bytes = f.row_bytes;
    row = static_cast<const unsigned char*>(p.embedding) + token * bytes;
  }
  __device__ __forceinline__ float operator[](int i) const {
    if (kBits == 16 || bits == 0) return to_float(reinterpret_cast<const T*>(row)[i]);
    const T* scale = reinterpret_cast<const T*>(row + f.scales) + (i >> f.shift);
    const int lane = (i >> 3 & 3) * 16, j = i & 7;
    float q;
    if (bits == 8) {
      const int place = (j & 4) | (j & 1) << 1 | (j >> 1 & 1);
      q = static_cast<signed char>(row[(i >> 6) * kUnit + lane + (i >> 5 & 1) * 8 + place]);
    } else {
      const int place = (j & 1) * 4 + (j >> 1);
      q = row[(i >> 7) * kUnit + lane + (i >> 5 & 3) * 4 + (place >> 1)] >> 4 * (place & 1) & 15;
      q -= f.zeros ? to_float(scale[f.zeros]) : 8.0f;
    }
    return to_float(from_float<T>(q * to_float(*scale)));
  }
};

}  // namespace mamba::decode
