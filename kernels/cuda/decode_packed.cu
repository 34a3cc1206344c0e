// The whole-stack decode kernel for integer weights.
#include "decode_launch.cuh"

namespace mamba::decode {

int launch_packed(const Params& p, const Plan& plan, cudaStream_t stream) {
  if (p.dtype == MAMBA_F16) {
    return p.weight_bits == 8 ? launch_fused<8, __half>(p, plan, stream) : launch_fused<4, __half>(p, plan, stream);
  }
  return p.weight_bits == 8 ? launch_fused<8, __nv_bfloat16>(p, plan, stream) : launch_fused<4, __nv_bfloat16>(p, plan, stream);
}

}  // namespace mamba::decode
