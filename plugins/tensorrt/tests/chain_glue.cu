// What TensorRT itself compiles between the plugins and the projections of a step: the residual sum with RMSNorm, as one
// kernel for one row of bfloat16.
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

}  // namespace

// residual += add (if any); out = RMSNorm(residual) * weight.
extern "C" int chain_add_norm(float* residual, const void* add, const void* weight, void* out, int width, float eps,
                              void* stream) {
  add_norm_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      residual, static_cast<const __nv_bfloat16*>(add), static_cast<const __nv_bfloat16*>(weight),
      static_cast<__nv_bfloat16*>(out), width, eps);
  return cudaGetLastError() == cudaSuccess ? 0 : -1;
}
