#include "ops/specs.h"

namespace mamba_plugin {

const std::vector<const OpSpec*>& all_ops() {
  static const std::vector<const OpSpec*> ops = {&causal_conv1d_op(), &selective_scan_op(),
                                                 &selective_state_update_op(), &ssd_scan_op(), &ssd_state_update_op(),
                                                 &decode_stack_op()};
  return ops;
}

}  // namespace mamba_plugin
