// The Hopper kernels: compiled for sm_90a only (see CMakeLists.txt), used on devices of compute capability 9.0.
#include "ssd_plan.cuh"
#include "ssd_scan_hopper.cuh"

namespace mamba {
namespace ssd {
namespace {

template <typename T, int kState, int kHeads>
Plan plan_of() {
  using L = HopperLayout<T, kState, kHeads>;
  return Plan{ssd_hopper_kernel<L, kPieces>, ssd_hopper_kernel<L, kStream>, ssd_hopper_kernel<L, kStates>,
              L::kHeads, L::kChunk, L::kThreads, 1, L::kShared, L::kShared};
}

template <typename T>
bool plan_for(int d_state, Plan* plan) {
  if (d_state == 128) *plan = plan_of<T, 128, 2>();
  if (d_state == 64) *plan = plan_of<T, 64, 2>();
  return d_state == 128 || d_state == 64;
}

}  // namespace

bool plan_hopper(int dtype, int headdim, int d_state, int layout, Plan* plan) {
  if (headdim != 64 || layout != 0) return false;  // three heads a block were slower than two
  return dtype == MAMBA_BF16 ? plan_for<__nv_bfloat16>(d_state, plan) : plan_for<__half>(d_state, plan);
}

}  // namespace ssd
}  // namespace mamba
