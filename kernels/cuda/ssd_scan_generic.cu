#include "ssd_generic_plan.cuh"
#include "ssd_scan_generic.cuh"

namespace mamba {
namespace ssd {

namespace {

template <typename T, int kChunk, int kCols>
bool fits(int d_state, int shared_limit, GenericPlan* plan) {
  using G = Generic<T, kChunk, kCols>;
  if (G::shared_bytes(d_state) > shared_limit) return false;
  *plan = {ssd_generic_kernel<G, false>, ssd_generic_kernel<G, true>, kChunk, kCols, G::kThreads, G::shared_bytes(d_state)};
  return true;
}

template <typename T>
bool largest(int d_state, int shared_limit, GenericPlan* plan) {
  return fits<T, 32, 32>(d_state, shared_limit, plan) || fits<T, 16, 16>(d_state, shared_limit, plan) ||
         fits<T, 8, 8>(d_state, shared_limit, plan);
}

}  // namespace

bool generic_plan(int dtype, int d_state, int shared_limit, GenericPlan* plan) {
  if (dtype == MAMBA_F32) return largest<float>(d_state, shared_limit, plan);
  if (dtype == MAMBA_F16) return largest<__half>(d_state, shared_limit, plan);
  return largest<__nv_bfloat16>(d_state, shared_limit, plan);
}

}  // namespace ssd
}  // namespace mamba
