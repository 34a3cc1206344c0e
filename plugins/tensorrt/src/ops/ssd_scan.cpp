#include "mamba/ssd_scan.h"

#include "ops/operands.h"
#include "ops/specs.h"
#include "scan_or_step.h"

namespace mamba_plugin {
namespace {

class SsdScan final : public KernelOf<SsdScan, mamba_ssd_scan_params, mamba_ssd_scan, mamba_ssd_scan_workspace,
                                      mamba_ssd_scan_tactics> {
 public:
  using KernelOf::KernelOf;

  int fill(const Sizes& s, const std::vector<Tensor>& inputs) {
    p.dtype = dtype_code(inputs[0].type);
    p.batch = s.at('B'), p.seqlen = s.at('L'), p.nheads = s.at('H'), p.headdim = s.at('P');
    p.ngroups = s.at('G'), p.d_state = s.at('N');
    p.dt_softplus = attributes_.flag("dt_softplus");
    p.d_per_channel = inputs[5].shape.size() == 2;
    p.dt_min = static_cast<float>(attributes_.get("dt_min"));
    p.dt_max = static_cast<float>(attributes_.get("dt_max"));
    p.x_token_stride = p.z_token_stride = p.y_token_stride = s['H'] * s['P'];
    p.dt_token_stride = s['H'];
    p.B_token_stride = p.C_token_stride = s['G'] * s['N'];
    p.x_batch_stride = p.z_batch_stride = p.y_batch_stride = s['L'] * p.x_token_stride;
    p.dt_batch_stride = s['L'] * p.dt_token_stride;
    p.B_batch_stride = p.C_batch_stride = s['L'] * p.B_token_stride;
    return MAMBA_OK;
  }

  void bind(const void* const* in, void* const* out) {
    bind_scan(p, attributes_, in, out);
    p.x = in[0], p.dt = in[1];
    p.dt_bias = static_cast<const float*>(in[6]);
  }
};

}  // namespace

const OpSpec& ssd_scan_op() {
  static const OpSpec spec = {
      "MambaSsdScan",
      {{"x", "BLHP", Kind::kActivation},
       {"dt", "BLH", Kind::kActivation},
       {"A", "H", Kind::kFloat32},
       {"B", "BLGN", Kind::kActivation},
       {"C", "BLGN", Kind::kActivation},
       {"D", "H|HP", Kind::kFloat32},
       {"dt_bias", "H", Kind::kFloat32},
       {"state", "BHPN", Kind::kState}},
      "BLHP",
      {flag("dt_softplus", 1), real("dt_min", 0.0), real("dt_max", kNoLimit), flag("has_z", 0), unset_flag("reverse"),
       flag("ragged", 0)},
      7,
      false,
      make_scan_or_step<SsdScan, ssd_state_update_op>,
      nullptr,
      nullptr,
  };
  return spec;
}

}  // namespace mamba_plugin
