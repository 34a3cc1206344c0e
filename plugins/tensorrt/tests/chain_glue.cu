// What TensorRT itself compiles around the plugins of a step, for one row of bfloat16: the residual sum with RMSNorm as
// one kernel, and a matrix-vector product, a warp to a row.
#include <cuda_bf16.h>

namespace {

constexpr int kThreads = 256;

__global__ void add_norm_kernel(float* residual, const __nv_bfloat16* add, const __nv_bfloat16* weight,
                                __nv_bfloat16* out, int width, float eps) {
  __shared__ float partial[kThreads / 32];
  float sum = 0.0F;
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const float value = residual[i] + (add ? __bfloat162float(add[i]) : 0.0F);
    residual[i] = value;
    sum += value * value;
  }
  for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(~0U, sum, lane);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0F;
  for (int i = 0; i < kThreads / 32; i++) total += partial[i];
  const float scale = rsqrtf(total / width + eps);
  for (int i = threadIdx.x; i < width; i += kThreads)
    out[i] = __float2bfloat16_rn(residual[i] * scale * __bfloat162float(weight[i]));
}

struct alignas(16) Eight {
  __nv_bfloat162 v[4];
};

__global__ void gemv_kernel(const __nv_bfloat16* matrix, const __nv_bfloat16* x, __nv_bfloat16* y, int rows, int columns) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32, vectors = columns / 8;
  if (row >= rows) return;
  const Eight* a = reinterpret_cast<const Eight*>(matrix + static_cast<long>(row) * columns);
  const Eight* b = reinterpret_cast<const Eight*>(x);
  float sum = 0.0F;
#pragma unroll 4
  for (int i = lane; i < vectors; i += 32) {
    const Eight m = a[i], v = b[i];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float2 p = __bfloat1622float2(m.v[k]), q = __bfloat1622float2(v.v[k]);
      sum = fmaf(p.x, q.x, fmaf(p.y, q.y, sum));
    }
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0U, sum, step);
  if (lane == 0) y[row] = __float2bfloat16_rn(sum);
}

}  // namespace

// y [rows] = matrix [rows, columns] x; columns a multiple of 8, all aligned to 16 bytes.
extern "C" __attribute__((visibility("default"))) int chain_gemv(const void* matrix, const void* x, void* y, int rows,
                                                                 int columns, void* stream) {
  gemv_kernel<<<(rows + 3) / 4, 128, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(matrix), static_cast<const __nv_bfloat16*>(x), static_cast<__nv_bfloat16*>(y),
      rows, columns);
  return cudaGetLastError() == cudaSuccess ? 0 : -1;
}

// residual += add (if any); out = RMSNorm(residual) * weight.
extern "C" __attribute__((visibility("default"))) int chain_add_norm(float* residual, const void* add, const void* weight, void* out, int width, float eps,
                              void* stream) {
  add_norm_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      residual, static_cast<const __nv_bfloat16*>(add), static_cast<const __nv_bfloat16*>(weight),
      static_cast<__nv_bfloat16*>(out), width, eps);
  return cudaGetLastError() == cudaSuccess ? 0 : -1;
}
