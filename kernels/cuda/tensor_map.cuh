// Describes tensors to the copy engine (tensor_copy.cuh), on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace mamba {

// A tensor of `rank` sizes, at most four, in boxes; `stride`: bytes from one to the next, of all sizes but the first. False if the
// engine cannot take it so, or there is none. The driver's function is asked for, so that the library need not be linked against it.
inline bool describe_tensor(CUtensorMap* map, CUtensorMapDataType type, const void* at, int rank, const cuuint64_t* size,
                            const cuuint64_t* stride, const cuuint32_t* box, CUtensorMapSwizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  const cuuint32_t step[] = {1, 1, 1, 1};
  return encode && encode(map, type, rank, const_cast<void*>(at), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace mamba
