#include "mamba/ssd_state_update.h"

#include "ops/operands.h"
#include "ops/specs.h"

namespace mamba_plugin {
namespace {

class SsdStateUpdate final
    : public KernelOf<SsdStateUpdate, mamba_ssd_state_update_params, mamba_ssd_state_update,
                      mamba_ssd_state_update_workspace, mamba_ssd_state_update_tactics> {
 public:
  using KernelOf::KernelOf;

  int fill(const Sizes& s, const std::vector<Tensor>& inputs) {
    p.dtype = dtype_code(inputs[0].type);
    p.state_dtype = dtype_code(inputs[7].type);
    p.batch = s.at('B'), p.nheads = s.at('H'), p.headdim = s.at('P'), p.ngroups = s.at('G'), p.d_state = s.at('N');
    p.dt_softplus = attributes_.flag("dt_softplus");
    p.d_per_channel = inputs[5].shape.size() == 2;
    p.dt_min = static_cast<float>(attributes_.get("dt_min"));
    p.dt_max = static_cast<float>(attributes_.get("dt_max"));
    p.x_batch_stride = p.z_batch_stride = p.y_batch_stride = s['H'] * s['P'];
    p.dt_batch_stride = s['H'];
    p.B_batch_stride = p.C_batch_stride = s['G'] * s['N'];
    return MAMBA_OK;
  }

  void bind(const void* const* in, void* const* out) {
    bind_step(p, attributes_, in, out);
    p.x = in[0], p.dt = in[1];
    p.dt_bias = static_cast<const float*>(in[6]);
  }
};

}  // namespace

const OpSpec& ssd_state_update_op() {
  static const OpSpec spec = {
      "MambaSsdStateUpdate",
      {{"x", "B1HP", Kind::kActivation},
       {"dt", "B1H", Kind::kActivation},
       {"A", "H", Kind::kFloat32},
       {"B", "B1GN", Kind::kActivation},
       {"C", "B1GN", Kind::kActivation},
       {"D", "H|HP", Kind::kFloat32},
       {"dt_bias", "H", Kind::kFloat32},
       {"state", "BHPN", Kind::kState}},
      "B1HP",
      {flag("dt_softplus", 1), real("dt_min", 0.0), real("dt_max", kNoLimit), flag("has_z", 0)},
      7,
      true,
      make_kernel<SsdStateUpdate>,
      nullptr,
      nullptr,
  };
  return spec;
}

}  // namespace mamba_plugin
