// Included by the ssd_scan_n*.cu files only.
#pragma once

#include "ssd_plan.cuh"
#include "ssd_scan_kernel.cuh"
#include "ssd_state_kernel.cuh"

namespace mamba {
namespace ssd {

template <typename L>
Plan plan_of() {
  return Plan{ssd_scan_kernel<L>, ssd_stream_kernel<L>, ssd_state_kernel<L>, L::kHeads,      L::kChunk,
              L::kThreads,        L::kMinBlocks,        L::kScanShared,      L::kStateShared};
}

template <int kHeadDim, int kState, int kWarpCols, int kHeads, int kChunk>
bool plan_for(int dtype, Plan* plan) {
  if (dtype == MAMBA_BF16)
    *plan = plan_of<Layout<__nv_bfloat16, kHeadDim, kState, kWarpCols, kHeads, kChunk>>();
  else
    *plan = plan_of<Layout<__half, kHeadDim, kState, kWarpCols, kHeads, kChunk>>();
  return true;
}

}  // namespace ssd
}  // namespace mamba
