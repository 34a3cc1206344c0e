// The launch of the whole-stack decode kernel, for weights of the model's type (decode_stack.cu) and integers
// (decode_packed.cu, decode_mixed.cu).
#pragma once

#include "decode_kernel.cuh"

namespace mamba::decode {

template <int kBits, int kFamily, typename T> auto kernel_of(const Plan& plan) {
  if constexpr (sizeof(T) == 2) {
    if (plan.held) return stack_kernel<T, kFamily, true, kBits>;
  }
  return stack_kernel<T, kFamily, false, kBits>;
}

template <int kBits, typename T> int launch_fused(const Params& p, const Plan& plan, cudaStream_t stream) {
  Layers layers;
  for (int i = 0; i < p.n_layer; i++) layers.layer[i] = p.layers[i];
  const auto kernel = p.family == 1 ? kernel_of<kBits, 1, T>(plan) : kernel_of<kBits, 2, T>(plan);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes)) != cudaSuccess ||
      cudaMemsetAsync(p.workspace, 0, plan.words() * sizeof(Word), stream) != cudaSuccess) {
    return MAMBA_ERROR_CUDA;
  }
  void* arguments[] = {const_cast<Params*>(&p), &layers, const_cast<Plan*>(&plan)};
  const auto status = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(plan.blocks),
                                                  dim3(kThreads + 32), arguments, plan.shared_bytes, stream);
  return status == cudaSuccess ? launch_status() : MAMBA_ERROR_CUDA;
}

int launch_packed(const Params& p, const Plan& plan, cudaStream_t stream);  // integer weights
int launch_mixed(const Params& p, const Plan& plan, cudaStream_t stream);   // int4, and int8 among it

}  // namespace mamba::decode
