#pragma once
#include "cuda_runtime.h"
struct __half { _Float16 x; };
struct alignas(4) __half2 { __half x, y; };
inline float __half2float(__half v) { return float(v.x); }
inline float2 __half22float2(__half2 v) { return {float(v.x.x), float(v.y.x)}; }
inline __half __float2half_rn(float f) { return {_Float16(f)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
