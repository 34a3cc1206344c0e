// How much scratch memory a node may use at a shape.
//
// TensorRT asks once for a whole profile, and at run time does not say how much it set aside. The kernels' need is
// not monotonic in the shape, so the answer is a bound that is: bound(shape) <= bound(profile) for every shape in
// the profile. At run time a tactic may use bound(shape of the call), and no more.
#ifndef MAMBA_PLUGIN_WORKSPACE_H_
#define MAMBA_PLUGIN_WORKSPACE_H_

#include "op.h"

namespace mamba_plugin {

bool gpu_present();

// `need` is what the caller is going to use: the search stops at the first bound that covers it (0: find the largest).
size_t workspace_bound(const Kernel& kernel, const Sizes& sizes, const std::vector<Tensor>& inputs, bool for_gpu,
                       size_t need);

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_WORKSPACE_H_
