#include "common.cuh"
#include "early_launch.cuh"

extern "C" const char* mamba_status_string(int status) {
  switch (status) {
    case MAMBA_OK: return "ok";
    case MAMBA_ERROR_NULL_POINTER: return "a required buffer is NULL";
    case MAMBA_ERROR_SHAPE: return "a dimension is out of range or two do not agree";
    case MAMBA_ERROR_DTYPE: return "dtype not supported by this op";
    case MAMBA_ERROR_WORKSPACE: return "workspace missing or too small";
    case MAMBA_ERROR_TACTIC: return "no such tactic, or it does not cover this shape";
    case MAMBA_ERROR_CUDA: return "a CUDA launch failed";
    default: return "unknown status";
  }
}

namespace mamba {

// An attribute of the current device, read once; a race writes the same value twice.
static int attribute(cudaDeviceAttr which, int (&cached)[64]) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return 1;
  if (cached[device] == 0) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 1;
    cached[device] = value;
  }
  return cached[device];
}

int sm_count() {
  static int cached[64] = {};
  return attribute(cudaDevAttrMultiProcessorCount, cached);
}

int compute_major() {
  static int cached[64] = {};
  return attribute(cudaDevAttrComputeCapabilityMajor, cached);
}

size_t max_shared_bytes() {
  static int cached[64] = {};
  return size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, cached));
}

}  // namespace mamba
