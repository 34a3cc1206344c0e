// The two-pass kernels: compiled for sm_90a only (see CMakeLists.txt), used on devices of compute capability 9.0.
#include "ssd_two_pass_outputs.cuh"
#include "ssd_two_pass_states.cuh"

namespace mamba {
namespace ssd {
namespace {

template <typename L>
TwoPassPlan::States states_of() {
  return {{ssd_states_kernel<L, false>, ssd_states_kernel<L, true>}, L::kSplit, L::kWgs, L::kThreads, L::kShared};
}

// kFew, kMany: warpgroups a block of the first pass, for fewest blocks and for most.
template <typename T, int kHeadDim, int kState, bool kPadded, int kFew, int kMany>
TwoPassPlan plan_of() {
  using L = OutputsLayout<T, kHeadDim, kState, kPadded>;
  return {{states_of<StatesLayout<T, kHeadDim, kState, kPadded, kFew>>(), states_of<StatesLayout<T, kHeadDim, kState, kPadded, kMany>>()},
          {ssd_outputs_kernel<L, false>, ssd_outputs_kernel<L, true>}, L::kThreads, L::kShared, L::kImage, L::kParts == 2, kPadded};
}

template <typename T, bool kPadded>
TwoPassPlan plan_for(int d_state) {
  if (d_state <= 64) return plan_of<T, 64, 64, kPadded, 1, 1>();
  if constexpr (sizeof(T) == 2) {
    if (d_state > 128) return plan_of<T, 64, 256, kPadded, 2, 1>();
  }
  return plan_of<T, 64, 128, kPadded, sizeof(T) == 2 ? 2 : 1, 1>();
}

template <typename T>
bool plan_for(int headdim, int d_state, TwoPassPlan* plan) {
  constexpr int kMost = sizeof(T) == 2 ? 256 : 128;  // float32 would need 256 KB for C and B
  if (headdim % 8 != 0 || d_state > kMost || d_state % 8 != 0) return false;
  if constexpr (sizeof(T) == 2) {
    if (headdim > 64 && headdim <= 80 && d_state > 64 && d_state <= 128) return *plan = plan_of<T, 80, 128, true, 2, 1>(), true;
  }
  if (headdim > 64) return false;
  const bool padded = headdim < 64 || (d_state != 64 && d_state != 128 && d_state != 256);
  *plan = padded ? plan_for<T, true>(d_state) : plan_for<T, false>(d_state);
  return true;
}

}  // namespace

bool plan_two_pass(int dtype, int headdim, int d_state, TwoPassPlan* plan) {
  if (dtype == MAMBA_F32) return plan_for<float>(headdim, d_state, plan);
  return dtype == MAMBA_BF16 ? plan_for<__nv_bfloat16>(headdim, d_state, plan) : plan_for<__half>(headdim, d_state, plan);
}

}  // namespace ssd
}  // namespace mamba
