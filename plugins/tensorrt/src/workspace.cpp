#include "workspace.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace mamba_plugin {
namespace {

int64_t power_of_two_from(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

Sizes at(const Sizes& sizes, int64_t batch, int64_t seqlen) {
  Sizes changed = sizes;
  changed.set('B', batch);
  if (sizes['L'] >= 0) changed.set('L', seqlen);
  return changed;
}

}  // namespace

bool gpu_present() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

size_t workspace_bound(const Kernel& kernel, const Sizes& sizes, const std::vector<Tensor>& inputs, bool for_gpu,
                       size_t need) {
  const int64_t last_batch = power_of_two_from(sizes['B']), last_seqlen = power_of_two_from(sizes['L']);
  if (!for_gpu) return kernel.workspace_without_gpu(at(sizes, last_batch, last_seqlen), inputs);
  size_t largest = 0;
  const std::unique_ptr<Kernel> probe = kernel.clone();
  for (int64_t batch = last_batch; batch >= 1; batch /= 2) {
    for (int64_t seqlen = last_seqlen; seqlen >= 1; seqlen /= 2) {
      probe->set_shapes(at(sizes, batch, seqlen), inputs);
      largest = std::max(largest, probe->workspace(-1));
      if (need > 0 && largest >= need) return largest;
    }
  }
  return largest;
}

}  // namespace mamba_plugin
