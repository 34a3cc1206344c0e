// Vectors of float and the functions the kernels need, in the compiler's own vector extensions (GCC and Clang).
//
// MAMBA_ISA names the namespace and the instruction set, which decides the width: this header is compiled once for
// each. Everything is static and nothing of the standard library is used, because a template of std:: that two
// instruction sets both instantiate would be merged by the linker into the wider one.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define MAMBA_LANES 16
#define MAMBA_TILE 16  // states a tile keeps in registers: 32 registers
#elif defined(__AVX2__)
#define MAMBA_LANES 8
#define MAMBA_TILE 8  // 16 registers
#elif defined(__aarch64__)
#define MAMBA_LANES 4
#define MAMBA_TILE 16
#else
#define MAMBA_LANES 4
#define MAMBA_TILE 8
#endif

namespace mamba::MAMBA_ISA {
namespace {

constexpr int kLanes = MAMBA_LANES;
constexpr int kTile = MAMBA_TILE;

typedef float V __attribute__((vector_size(MAMBA_LANES * 4)));
typedef int32_t I __attribute__((vector_size(MAMBA_LANES * 4)));
typedef uint32_t U __attribute__((vector_size(MAMBA_LANES * 4)));
typedef uint16_t H __attribute__((vector_size(MAMBA_LANES * 2)));

#define MAMBA_INLINE static inline __attribute__((always_inline))

MAMBA_INLINE V splat(float x) { return V{} + x; }

template <class To, class From>
MAMBA_INLINE To bits(From x) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "");
  memcpy(&to, &x, sizeof to);
  return to;
}

// A type as it lies in memory: float, or the bits of a 16-bit float.
struct Half {
  uint16_t value;
};
struct Brain {
  uint16_t value;
};

MAMBA_INLINE V widen(Half, H h) {
  const U u = __builtin_convertvector(h, U);
  const U magnitude = (u & 0x7fffu) << 13;
  // A product by 2^112 moves the exponent's bias and makes denormals normal.
  const V scaled = bits<V>(magnitude) * splat(0x1p112f);
  const U special = bits<U>((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits<V>(bits<U>(scaled) | special | ((u & 0x8000u) << 16));
}

MAMBA_INLINE H narrow(Half, V x) {
  const U u = bits<U>(x);
  const U sign = u & 0x80000000u, a = u ^ sign;
  const U nan = bits<U>(a > 0x7f800000u), huge = bits<U>(a >= 0x477ff000u), tiny = bits<U>(a < 0x38800000u);
  const U normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const U denormal = bits<U>(bits<V>(a) + splat(0.5f)) - 0x3f000000u;  // the adder rounds
  U h = (tiny & denormal) | (~tiny & normal);
  h = (huge & 0x7c00u) | (~huge & h);
  h = (nan & 0x7e00u) | (~nan & h);
  return __builtin_convertvector(h | (sign >> 16), H);
}

MAMBA_INLINE V widen(Brain, H h) { return bits<V>(__builtin_convertvector(h, U) << 16); }

MAMBA_INLINE H narrow(Brain, V x) {
  const U u = bits<U>(x);
  const U nan = bits<U>((u & 0x7fffffffu) > 0x7f800000u);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), H);
}

// `count` elements at `p`; the lanes past them are 0.
MAMBA_INLINE V load(const float* p, int count) {
  V v = {};
  if (count == kLanes) {
    memcpy(&v, p, sizeof v);
  } else {
    memcpy(&v, p, sizeof(float) * static_cast<size_t>(count));
  }
  return v;
}

MAMBA_INLINE void store(float* p, V v, int count) {
  if (count == kLanes) {
    memcpy(p, &v, sizeof v);
  } else {
    memcpy(p, &v, sizeof(float) * static_cast<size_t>(count));
  }
}

template <class T>
MAMBA_INLINE V load(const T* p, int count) {
  H h = {};
  if (count == kLanes) {
    memcpy(&h, p, sizeof h);
  } else {
    memcpy(&h, p, 2 * static_cast<size_t>(count));
  }
  return widen(T{}, h);
}

template <class T>
MAMBA_INLINE void store(T* p, V v, int count) {
  const H h = narrow(T{}, v);
  if (count == kLanes) {
    memcpy(p, &h, sizeof h);
  } else {
    memcpy(p, &h, 2 * static_cast<size_t>(count));
  }
}

MAMBA_INLINE float scalar(const float* p) { return *p; }

template <class T>
MAMBA_INLINE float scalar(const T* p) {
  return load(p, 1)[0];
}

// The comparisons are false for NaN, which so passes through.
MAMBA_INLINE V at_least(V x, V low) { return x < low ? low : x; }
MAMBA_INLINE V at_most(V x, V high) { return x > high ? high : x; }

// Rounding to an integer n: adding kMagic leaves n + 127, a float's exponent, in the lowest bits.
constexpr float kMagic = 0x1.8p23f + 127.0f;

MAMBA_INLINE V power_of_two(V shifted) { return bits<V>(bits<U>(shifted) << 23); }

// 2^x within 1.5 ulp; 0 below 2^-126, infinity above the largest float.
MAMBA_INLINE V exp2(V x) {
  x = at_most(at_least(x, splat(-127.0f)), splat(128.0f));
  const V shifted = x + splat(kMagic);
  const V f = x - (shifted - splat(kMagic));
  V p = f * 0.00015353362f + 0.0013398874f;
  p = p * f + 0.009618437f;
  p = p * f + 0.055503324f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  return p * power_of_two(shifted);
}

// e^x within 1.5 ulp: x is reduced by multiples of ln 2 in two parts, so that large arguments keep their digits.
MAMBA_INLINE V exp(V x) {
  x = at_most(at_least(x, splat(-88.0f)), splat(89.0f));
  const V shifted = x * 1.44269504f + kMagic;
  const V n = shifted - kMagic;
  const V f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  V p = f * 0.0013843651f + 0.008374156f;
  p = p * f + 0.041668f;
  p = p * f + 0.16666432f;
  p = p * f + 0.49999994f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * power_of_two(shifted);
}

// log(1 + e^x), without overflow and with all digits where it is tiny: log(1 + e) = 2 atanh(e / (2 + e)).
MAMBA_INLINE V softplus(V x) {
  const V magnitude = x < 0.0f ? x : -x;
  const V e = exp(magnitude);
  const V s = e / (e + 2.0f), q = s * s;
  V p = q * 0.24289557f + 0.21430741f;
  p = p * q + 0.28616595f;
  p = p * q + 0.3999889f;
  p = p * q + 0.66666675f;
  const V log1p = (p * q) * s + (s + s);
  return at_least(x, V{}) + log1p;
}

MAMBA_INLINE V silu(V x) { return x / (exp(-x) + 1.0f); }

// Lane i becomes p[i * stride]; the lanes past `count` are 0. Elements are collected in memory, not lane by lane.
template <class T>
MAMBA_INLINE V gather(const T* p, ptrdiff_t stride, int count) {
  T lanes[kLanes] = {};
  if (count == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) lanes[i] = p[i * stride];
  } else {
    for (int i = 0; i < count; ++i) lanes[i] = p[i * stride];
  }
  return load(lanes, kLanes);
}

MAMBA_INLINE float sum(V v) {
#if defined(__clang__)
  float lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#else
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
    I other = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ width;
    v = v + __builtin_shuffle(v, other);
  }
  return v[0];
#endif
}

}  // namespace
}  // namespace mamba::MAMBA_ISA
