// The whole-stack decode kernel for models of int4 some of whose matrices are int8.
#include "decode_launch.cuh"

namespace mamba::decode {

int launch_mixed(const Params& p, const Plan& plan, cudaStream_t stream) {
  return p.dtype == MAMBA_F16 ? launch_fused<kMixed, __half>(p, plan, stream)
                              : launch_fused<kMixed, __nv_bfloat16>(p, plan, stream);
}

}  // namespace mamba::decode
