#include "mamba/selective_state_update.h"

#include "ops/operands.h"
#include "ops/specs.h"

namespace mamba_plugin {
namespace {

class SelectiveStateUpdate final
    : public KernelOf<SelectiveStateUpdate, mamba_selective_state_update_params, mamba_selective_state_update,
                      mamba_selective_state_update_workspace, mamba_selective_state_update_tactics> {
 public:
  using KernelOf::KernelOf;

  int fill(const Sizes& s, const std::vector<Tensor>& inputs) {
    p.dtype = dtype_code(inputs[0].type);
    p.state_dtype = dtype_code(inputs[7].type);
    p.batch = s.at('B'), p.dim = s.at('D'), p.ngroups = s.at('G'), p.d_state = s.at('N');
    p.delta_softplus = attributes_.flag("delta_softplus");
    p.u_batch_stride = p.delta_batch_stride = p.z_batch_stride = p.y_batch_stride = s['D'];
    p.B_batch_stride = p.C_batch_stride = s['G'] * s['N'];
    return MAMBA_OK;
  }

  void bind(const void* const* in, void* const* out) {
    bind_step(p, attributes_, in, out);
    p.u = in[0], p.delta = in[1];
    p.delta_bias = static_cast<const float*>(in[6]);
  }
};

}  // namespace

const OpSpec& selective_state_update_op() {
  static const OpSpec spec = {
      "MambaSelectiveStateUpdate",
      {{"u", "B1D", Kind::kActivation},
       {"delta", "B1D", Kind::kActivation},
       {"A", "DN", Kind::kFloat32},
       {"B", "B1GN", Kind::kActivation},
       {"C", "B1GN", Kind::kActivation},
       {"D", "D", Kind::kFloat32},
       {"delta_bias", "D", Kind::kFloat32},
       {"state", "BDN", Kind::kState}},
      "B1D",
      {flag("delta_softplus", 1), flag("has_z", 0)},
      7,
      true,
      make_kernel<SelectiveStateUpdate>,
      nullptr,
      nullptr,
  };
  return spec;
}

}  // namespace mamba_plugin
