// What the scans and the steps of both families bind alike: operands of equal name, in the order of the ops' inputs.
#ifndef MAMBA_PLUGIN_OPS_OPERANDS_H_
#define MAMBA_PLUGIN_OPS_OPERANDS_H_

#include "kernel_of.h"

namespace mamba_plugin {

template <typename Params>
void bind_operands(Params& p, const Attributes& attributes, const void* const* in, void* const* out) {
  p.A = static_cast<const float*>(in[2]);
  p.B = in[3], p.C = in[4];
  p.D = static_cast<const float*>(in[5]);
  p.z = attributes.flag("has_z") ? in[8] : nullptr;
  p.y = out[0];
}

template <typename Params>
void bind_scan(Params& p, const Attributes& attributes, const void* const* in, void* const* out) {
  bind_operands(p, attributes, in, out);
  p.initial_state = static_cast<const float*>(in[7]);
  p.seq_lens = attributes.flag("ragged") ? static_cast<const int32_t*>(in[attributes.flag("has_z") ? 9 : 8]) : nullptr;
  p.final_state = static_cast<float*>(out[1]);
}

template <typename Params>
void bind_step(Params& p, const Attributes& attributes, const void* const* in, void* const* out) {
  bind_operands(p, attributes, in, out);
  p.state_in = in[7];
  p.state_out = out[1];
}

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_OPS_OPERANDS_H_
