// The table of ops, and what their files share.
#ifndef MAMBA_PLUGIN_OPS_SPECS_H_
#define MAMBA_PLUGIN_OPS_SPECS_H_

#include <cfloat>
#include <cmath>

#include "kernel_of.h"
#include "op.h"

namespace mamba_plugin {

// Functions, so that a static initializer anywhere may ask for them.
const OpSpec& causal_conv1d_op();
const OpSpec& selective_scan_op();
const OpSpec& selective_state_update_op();
const OpSpec& ssd_scan_op();
const OpSpec& ssd_state_update_op();
const OpSpec& decode_stack_op();

constexpr double kNoLimit = FLT_MAX;  // an upper limit that limits nothing, as the exporter writes it

inline AttributeSpec flag(const char* name, int fallback) {
  return {name, false, static_cast<double>(fallback), 0.0, 1.0};
}
// A flag that the op defines and this library does not implement.
inline AttributeSpec unset_flag(const char* name) { return {name, false, 0.0, 0.0, 0.0}; }
inline AttributeSpec real(const char* name, double fallback) { return {name, true, fallback, 0.0, HUGE_VAL}; }

template <typename K>
std::unique_ptr<Kernel> make_kernel(const Attributes& attributes) {
  return std::make_unique<K>(attributes);
}

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_OPS_SPECS_H_
