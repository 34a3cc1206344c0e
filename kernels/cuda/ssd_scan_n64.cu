#include "ssd_plan_impl.cuh"

namespace mamba {
namespace ssd {

bool plan_n64(int dtype, int headdim, int layout, Plan* plan) {
  switch (headdim * 16 + layout) {
    case 32 * 16 + 0: return plan_for<32, 64, 32, 4, 32>(dtype, plan);
    case 64 * 16 + 0: return plan_for<64, 64, 32, 4, 64>(dtype, plan);
    case 64 * 16 + 1: return plan_for<64, 64, 32, 2, 32>(dtype, plan);
    case 80 * 16 + 0: return plan_for<80, 64, 16, 1, 32>(dtype, plan);
    case 128 * 16 + 0: return plan_for<128, 64, 32, 1, 32>(dtype, plan);
    case 128 * 16 + 1: return plan_for<128, 64, 32, 2, 64>(dtype, plan);
    default: return false;
  }
}

}  // namespace ssd
}  // namespace mamba
