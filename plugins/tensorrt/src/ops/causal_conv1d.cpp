#include "mamba/causal_conv1d.h"

#include "ops/specs.h"

namespace mamba_plugin {
namespace {

class CausalConv1d final
    : public KernelOf<CausalConv1d, mamba_causal_conv1d_params, mamba_causal_conv1d, mamba_causal_conv1d_workspace,
                      mamba_causal_conv1d_tactics> {
 public:
  using KernelOf::KernelOf;

  int fill(const Sizes& s, const std::vector<Tensor>& inputs) {
    p.dtype = p.weight_dtype = dtype_code(inputs[0].type);
    p.batch = s.at('B'), p.seqlen = s.at('L'), p.channels = s.at('C'), p.width = s.at('K');
    p.activation = attributes_.flag("activation");
    p.x_token_stride = p.y_token_stride = s['C'];
    p.x_batch_stride = p.y_batch_stride = s['L'] * s['C'];
    return MAMBA_OK;
  }

  void bind(const void* const* in, void* const* out) {
    p.x = in[0], p.weight = in[1], p.bias = in[2], p.state_in = in[3];
    p.seq_lens = attributes_.flag("ragged") ? static_cast<const int32_t*>(in[4]) : nullptr;
    p.y = out[0], p.state_out = out[1];
  }
};

}  // namespace

const OpSpec& causal_conv1d_op() {
  static const OpSpec spec = {
      "MambaCausalConv1d",
      {{"x", "BLC", Kind::kActivation},
       {"weight", "CK", Kind::kActivation},
       {"bias", "C", Kind::kActivation},
       {"state", "BCk", Kind::kActivation}},
      nullptr,
      {flag("activation", 1), flag("ragged", 0)},
      3,
      false,
      make_kernel<CausalConv1d>,
      nullptr,
      nullptr,
  };
  return spec;
}

}  // namespace mamba_plugin
