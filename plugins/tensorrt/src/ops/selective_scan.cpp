#include "mamba/selective_scan.h"

#include "ops/operands.h"
#include "ops/specs.h"
#include "scan_or_step.h"

namespace mamba_plugin {
namespace {

class SelectiveScan final
    : public KernelOf<SelectiveScan, mamba_selective_scan_params, mamba_selective_scan,
                      mamba_selective_scan_workspace, mamba_selective_scan_tactics> {
 public:
  using KernelOf::KernelOf;

  int fill(const Sizes& s, const std::vector<Tensor>& inputs) {
    p.dtype = dtype_code(inputs[0].type);
    p.batch = s.at('B'), p.seqlen = s.at('L'), p.dim = s.at('D'), p.ngroups = s.at('G'), p.d_state = s.at('N');
    p.delta_softplus = attributes_.flag("delta_softplus");
    p.reverse = attributes_.flag("reverse");
    p.u_token_stride = p.delta_token_stride = p.z_token_stride = p.y_token_stride = s['D'];
    p.u_batch_stride = p.delta_batch_stride = p.z_batch_stride = p.y_batch_stride = s['L'] * s['D'];
    p.B_token_stride = p.C_token_stride = s['G'] * s['N'];
    p.B_batch_stride = p.C_batch_stride = s['L'] * p.B_token_stride;
    return MAMBA_OK;
  }

  void bind(const void* const* in, void* const* out) {
    bind_scan(p, attributes_, in, out);
    p.u = in[0], p.delta = in[1];
    p.delta_bias = static_cast<const float*>(in[6]);
  }
};

}  // namespace

const OpSpec& selective_scan_op() {
  static const OpSpec spec = {
      "MambaSelectiveScan",
      {{"u", "BLD", Kind::kActivation},
       {"delta", "BLD", Kind::kActivation},
       {"A", "DN", Kind::kFloat32},
       {"B", "BLGN", Kind::kActivation},
       {"C", "BLGN", Kind::kActivation},
       {"D", "D", Kind::kFloat32},
       {"delta_bias", "D", Kind::kFloat32},
       {"state", "BDN", Kind::kState}},
      "BLD",
      {flag("delta_softplus", 1), flag("has_z", 0), flag("reverse", 0), flag("ragged", 0)},
      7,
      false,
      make_scan_or_step<SelectiveScan, selective_state_update_op>,
      nullptr,
      nullptr,
  };
  return spec;
}

}  // namespace mamba_plugin
