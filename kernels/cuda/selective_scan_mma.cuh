// selective_scan: the two products of the tensor cores (tf32) that tactic "matrix" uses. g = lane / 4, q = lane % 4.
#pragma once

#include "common.cuh"

namespace mamba::scan {

// d[16][8] = a[16][4] b[4][8]. Lane: a0 = a[g][q], a1 = a[g + 8][q]; b = b[q][g]; d = d[g][2q], d[g][2q + 1], then row g + 8.
__device__ __forceinline__ void product_of_four(float (&d)[4], float a0, float a1, float b) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)), "f"(0.0f));
}

// d[16][8] += a[16][8] b[8][8]. Lane: a0 = a[g][q], a1 = a[g + 8][q], a2 = a[g][q + 4], a3 = a[g + 8][q + 4]; b0 = b[q][g],
// b1 = b[q + 4][g]. The unit takes the upper 19 bits of a float32 and leaves the rest.
__device__ __forceinline__ void product(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// What a tensor core takes of v (truncated), and what it leaves.
__device__ __forceinline__ float upper(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
__device__ __forceinline__ float lower(float v) { return v - upper(v); }

}  // namespace mamba::scan
